// A client of wstunnel.1, written from docs/reference/protocol.md and nothing else: one forward link, one exchange after
// the other on it, without resumption.
//
//	tunnel URL TOKEN SIZE TARGET...
//
// To each target it sends SIZE bytes and their end, reads to the end, and prints what happened: "echoed", "answered N",
// or "reset CODE". A target behind "abandon:" is reset from here as soon as it was reached: "abandoned".
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
)

const (
	firstLimit   = 262144 // "Offsets, credit and acks": in both directions, without a message
	messageBytes = 16384
	pieceBytes   = 65536
)

// message is any control message: the members that this client knows.
type message struct {
	Type     string   `json:"type"`
	Version  uint64   `json:"version,omitempty"`
	Session  string   `json:"session,omitempty"`
	Role     string   `json:"role,omitempty"`
	Agent    string   `json:"agent,omitempty"`
	N        uint64   `json:"n,omitempty"`
	Stream   string   `json:"stream,omitempty"`
	Target   string   `json:"target,omitempty"`
	Consumed *uint64  `json:"consumed,omitempty"`
	Limit    *uint64  `json:"limit,omitempty"`
	Total    *uint64  `json:"total,omitempty"`
	Number   *uint64  `json:"number,omitempty"`
	Code     string   `json:"code,omitempty"`
	Message  string   `json:"message,omitempty"`
	Features []string `json:"features,omitempty"`
}

type link struct {
	socket *websocket.Conn
	ctx    context.Context

	lock     sync.Mutex
	changed  *sync.Cond
	failure  error
	welcomed bool
	n        uint64
	exchange *exchange // nil while the link is idle
}

// exchange is one stream. "up" is the direction from here, "down" the one towards here.
type exchange struct {
	opened     bool
	up         uint64 // sent
	upLimit    uint64
	upConsumed uint64
	upEnded    bool
	down       bytes.Buffer
	received   uint64
	downLimit  uint64
	downAcked  uint64
	downEnded  bool
	resetSent  bool
	reset      string // the code of the reset that came
}

func (x *exchange) finished() bool {
	return x.upEnded && x.upConsumed == x.up+1 && x.downEnded
}

func dial(ctx context.Context, url, token string) (*link, error) {
	socket, _, err := websocket.Dial(ctx, url, &websocket.DialOptions{
		HTTPHeader:   http.Header{"Authorization": {"Bearer " + token}},
		Subprotocols: []string{"wstunnel.1"},
	})
	if err != nil {
		return nil, err
	}
	if socket.Subprotocol() != "wstunnel.1" {
		return nil, fmt.Errorf("the server speaks %q", socket.Subprotocol())
	}
	socket.SetReadLimit(-1) // a binary message may have any size; text is bounded where it is read
	l := &link{socket: socket, ctx: ctx}
	l.changed = sync.NewCond(&l.lock)
	go l.read()
	hello := message{Type: "hello", Version: 1, Session: id(), Role: "forward", Agent: "example-go/1"}
	if err := l.send(hello); err != nil {
		return nil, err
	}
	return l, l.wait(func() bool { return l.welcomed })
}

func id() string {
	var random [16]byte
	_, err := rand.Read(random[:])
	check(err)
	return base64.RawURLEncoding.EncodeToString(random[:])
}

func (l *link) send(m message) error {
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return l.socket.Write(l.ctx, websocket.MessageText, text)
}

// wait until a condition holds, which is looked at under the lock, or the link fails.
func (l *link) wait(condition func() bool) error {
	l.lock.Lock()
	defer l.lock.Unlock()
	for !condition() {
		if l.failure != nil {
			return l.failure
		}
		l.changed.Wait()
	}
	return nil
}

func (l *link) read() {
	for {
		err := l.readMessage()
		if err != nil {
			l.lock.Lock()
			l.failure = err
			l.changed.Broadcast()
			l.lock.Unlock()
			return
		}
	}
}

func (l *link) readMessage() error {
	kind, reader, err := l.socket.Reader(l.ctx)
	if err != nil {
		return err
	}
	if kind == websocket.MessageBinary {
		return l.readData(reader)
	}
	text, err := io.ReadAll(io.LimitReader(reader, messageBytes+1))
	if err != nil {
		return err
	}
	if len(text) > messageBytes {
		return fmt.Errorf("a control message of more than %d bytes", messageBytes)
	}
	var m message
	if err := json.Unmarshal(text, &m); err != nil {
		return err
	}
	l.lock.Lock()
	defer l.lock.Unlock()
	defer l.changed.Broadcast()
	return l.control(m)
}

// readData passes bytes on as they arrive. The exchange takes them at once, so that they count as consumed.
func (l *link) readData(reader io.Reader) error {
	piece := make([]byte, pieceBytes)
	for {
		size, end := reader.Read(piece)
		if err := l.take(piece[:size]); err != nil {
			return err
		}
		if end == io.EOF {
			return nil
		}
		if end != nil {
			return end
		}
	}
}

func (l *link) take(data []byte) error {
	l.lock.Lock()
	defer l.lock.Unlock()
	x := l.exchange
	if x == nil {
		return fmt.Errorf("data on an idle link")
	}
	if x.resetSent {
		return nil
	}
	if !x.opened || x.downEnded || x.received+uint64(len(data)) > x.downLimit {
		return fmt.Errorf("data that must not come now")
	}
	x.down.Write(data)
	x.received += uint64(len(data))
	if 4*(x.received-x.downAcked) >= x.downLimit-x.downAcked {
		return l.ack(x, x.received)
	}
	return nil
}

// ack says what was consumed, and that another first window may come behind it.
func (l *link) ack(x *exchange, consumed uint64) error {
	x.downAcked = consumed
	x.downLimit = max(x.downLimit, consumed+firstLimit)
	return l.send(message{Type: "ack", N: l.n, Consumed: &consumed, Limit: &x.downLimit})
}

func (l *link) control(m message) error {
	switch m.Type {
	case "welcome":
		if m.Version != 1 || l.welcomed {
			return fmt.Errorf("a welcome that is none")
		}
		l.welcomed = true
		return nil
	case "ping":
		return l.send(message{Type: "pong", Number: m.Number})
	case "pong":
		return nil
	case "opened", "ack", "eof", "reset":
		if m.N < l.n {
			return nil
		}
		if m.N > l.n || l.exchange == nil {
			return fmt.Errorf("a message of exchange %d in exchange %d", m.N, l.n)
		}
		return l.about(l.exchange, m)
	}
	return fmt.Errorf("a message of type %q", m.Type)
}

func (l *link) about(x *exchange, m message) error {
	if m.Type == "reset" {
		x.reset = m.Code
		if x.resetSent {
			return nil
		}
		return l.send(message{Type: "reset", N: l.n, Code: m.Code})
	}
	if x.resetSent {
		return nil // discarded until the answer comes
	}
	switch m.Type {
	case "opened":
		x.opened = true
	case "ack":
		if m.Consumed == nil || m.Limit == nil || *m.Consumed < x.upConsumed || *m.Limit < x.upLimit {
			return fmt.Errorf("an ack that falls")
		}
		x.upConsumed, x.upLimit = *m.Consumed, *m.Limit
	case "eof":
		if m.Total == nil || *m.Total != x.received || x.downEnded {
			return fmt.Errorf("an eof of another total")
		}
		x.downEnded = true
		return l.ack(x, x.received+1)
	}
	return nil
}

// open begins an exchange; the link is idle.
func (l *link) open(target string) (*exchange, error) {
	l.lock.Lock()
	defer l.lock.Unlock()
	l.n++
	l.exchange = &exchange{upLimit: firstLimit, downLimit: firstLimit}
	return l.exchange, l.send(message{Type: "open", N: l.n, Stream: id(), Target: target})
}

// idle ends an exchange that is over at both ends.
func (l *link) idle() {
	l.lock.Lock()
	defer l.lock.Unlock()
	l.exchange = nil
}

// carry sends the data and its end, and waits for the end of what comes back.
func (l *link) carry(target string, data []byte) (string, error) {
	x, err := l.open(target)
	if err != nil {
		return "", err
	}
	defer l.idle()
	for at := 0; at < len(data); {
		var size int
		over := func() bool {
			size = min(int(x.upLimit-x.up), len(data)-at, pieceBytes)
			return size > 0 || x.reset != ""
		}
		if err := l.wait(over); err != nil {
			return "", err
		}
		if x.reset != "" {
			return "reset " + x.reset, nil
		}
		if err := l.socket.Write(l.ctx, websocket.MessageBinary, data[at:at+size]); err != nil {
			return "", err
		}
		at += size
		l.lock.Lock()
		x.up += uint64(size)
		l.lock.Unlock()
	}
	l.lock.Lock()
	if x.reset == "" {
		x.upEnded = true
		total := x.up
		err = l.send(message{Type: "eof", N: l.n, Total: &total})
	}
	l.lock.Unlock()
	if err != nil {
		return "", err
	}
	if err := l.wait(func() bool { return x.finished() || x.reset != "" }); err != nil {
		return "", err
	}
	switch {
	case x.reset != "":
		return "reset " + x.reset, nil
	case bytes.Equal(x.down.Bytes(), data):
		return "echoed", nil
	}
	return fmt.Sprintf("answered %d", x.received), nil
}

// abandon resets a stream once it is open.
func (l *link) abandon(target string) (string, error) {
	x, err := l.open(target)
	if err != nil {
		return "", err
	}
	defer l.idle()
	if err := l.wait(func() bool { return x.opened || x.reset != "" }); err != nil || x.reset != "" {
		return "reset " + x.reset, err
	}
	l.lock.Lock()
	x.resetSent = true
	err = l.send(message{Type: "reset", N: l.n, Code: "reset"})
	l.lock.Unlock()
	if err != nil {
		return "", err
	}
	return "abandoned", l.wait(func() bool { return x.reset != "" })
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	size, err := strconv.Atoi(os.Args[3])
	check(err)
	data := make([]byte, size)
	_, err = rand.Read(data)
	check(err)
	l, err := dial(ctx, os.Args[1], os.Args[2])
	check(err)
	for _, target := range os.Args[4:] {
		var said string
		if address, found := strings.CutPrefix(target, "abandon:"); found {
			said, err = l.abandon(address)
		} else {
			said, err = l.carry(target, data)
		}
		check(err)
		fmt.Println(said)
	}
	check(l.socket.Close(websocket.StatusNormalClosure, ""))
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
