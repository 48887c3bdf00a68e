package wstunnel

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

// Socket is a WebSocket connection, of whatever library. One goroutine reads it and one writes it.
type Socket interface {
	// Next waits for a message and returns its payload, which is to be read to its end before the next call.
	// RFC 6455 pings are answered on the way. A Close frame is answered, unless it is an answer, the connection is
	// closed, and it is an error.
	Next() (text bool, payload io.Reader, err error)
	// Write sends a message in one frame. The data stays the caller's.
	Write(text bool, data []byte) error
	// Close sends a Close frame; the reader gets the answer.
	Close(code int, reason string) error
}

// Upgrade makes the WebSocket handshake on a connection to the server, which has been verified.
type Upgrade func(ctx context.Context, conn net.Conn, login *Login) (Socket, error)

// Subprotocol has to be offered, and the server has to choose it.
const Subprotocol = "wstunnel.1"

// Refusal is the server's answer to a handshake that it does not like.
type Refusal struct {
	Status int
	Reason string // the first line of the body
}

func (r *Refusal) Error() string {
	return fmt.Sprintf("the server refused: %d %s", r.Status, r.Reason)
}

// Refused takes the reason out of a handshake's answer, and closes it.
func Refused(answer *http.Response) *Refusal {
	defer answer.Body.Close()
	body := bufio.NewScanner(answer.Body)
	body.Scan()
	return &Refusal{answer.StatusCode, body.Text()}
}

// final reports whether another try is in vain.
func (r *Refusal) final() bool {
	subprotocol := r.Status == 400 && strings.HasPrefix(r.Reason, "no subprotocol in common")
	return subprotocol || r.Status == 401 || r.Status == 403 || r.Status == 404
}

// watched notes when the last bytes came: any byte proves that the link lives. Close is for after a
// Close frame: "The server ends TCP first".
type watched struct {
	net.Conn
	since time.Time
	last  atomic.Int64 // nanoseconds after since
}

func (w *watched) Read(data []byte) (int, error) {
	size, err := w.Conn.Read(data)
	if size > 0 {
		w.last.Store(int64(time.Since(w.since)))
	}
	return size, err
}

func (w *watched) Close() error {
	w.SetReadDeadline(time.Now().Add(closeWithin))
	io.Copy(io.Discard, w.Conn)
	if secured, ok := w.Conn.(*tls.Conn); ok { // TLS has ended, TCP has not yet
		secured.CloseWrite()
		io.Copy(io.Discard, secured.NetConn())
	}
	return w.drop()
}

func (w *watched) drop() error { return w.Conn.Close() }

func (w *watched) heard() time.Time {
	return w.since.Add(time.Duration(w.last.Load()))
}
