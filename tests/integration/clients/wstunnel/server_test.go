package wstunnel

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"
)

// wire is a Socket of its own: a kind, a length and a payload.
type wire struct {
	net.Conn
	buffered *bufio.Reader
}

func newWire(conn net.Conn) *wire { return &wire{conn, bufio.NewReader(conn)} }

func (w *wire) Next() (bool, io.Reader, error) {
	kind, data, err := w.next()
	if kind == 'c' {
		w.Write(false, nil) // fails where it should
		err = errors.New("closed by the peer")
	}
	return kind == 't', bytes.NewReader(data), err
}

func (w *wire) next() (byte, []byte, error) {
	header := make([]byte, 5)
	if _, err := io.ReadFull(w.buffered, header); err != nil {
		return 0, nil, err
	}
	data := make([]byte, binary.BigEndian.Uint32(header[1:]))
	_, err := io.ReadFull(w.buffered, data)
	return header[0], data, err
}

func (w *wire) send(kind byte, data []byte) error {
	header := binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(data)))
	_, err := w.Conn.Write(append(header, data...))
	return err
}

func (w *wire) Write(text bool, data []byte) error {
	kind := byte('b')
	if text {
		kind = 't'
	}
	return w.send(kind, data)
}

func (w *wire) Close(code int, _ string) error {
	return w.send('c', binary.BigEndian.AppendUint16(nil, uint16(code)))
}

// server is the other end, of one link at a time.
type server struct {
	t        *testing.T
	listener net.Listener
	link     *wire
	boot     string
	window   int
	feature  string
}

type testSession struct {
	*Session
	t *testing.T
}

func start(t *testing.T) (*testSession, *server) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	upgrade := func(_ context.Context, conn net.Conn, _ *Login) (Socket, error) { return newWire(conn), nil }
	session := NewSession(&Login{address: listener.Addr().String()}, upgrade, func(string, ...any) {})
	return &testSession{session, t}, &server{t: t, listener: listener, boot: "boot", window: 60, feature: "resume"}
}

func (s *server) check(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// accept takes the next link and greets.
func (s *server) accept() {
	s.t.Helper()
	conn, err := s.listener.Accept()
	s.check(err)
	s.t.Cleanup(func() { conn.Close() })
	s.check(conn.SetDeadline(time.Now().Add(10 * time.Second)))
	s.link = newWire(conn)
	hello := s.expect("hello")
	if hello.Version != 1 || hello.Role != "forward" || len(hello.Session) != 22 || hello.Features[0] != "resume" {
		s.t.Fatalf("%+v", hello)
	}
	s.welcome(s.boot)
}

func (s *server) welcome(boot string) {
	s.say(`{"type":"welcome","version":1,"server":"s","boot":%q,"resume_window":%d,"features":[%q]}`, boot, s.window, s.feature)
}

// settle waits until the client has read everything.
func (s *server) settle() {
	s.t.Helper()
	s.say(`{"type":"ping","number":7,"more":[null]}`)
	if pong := s.expect("pong"); *pong.Number != 7 {
		s.t.Fatalf("%+v", pong)
	}
}

func (s *server) cut() { s.link.Conn.Close() }

func (s *server) say(format string, arguments ...any) {
	s.t.Helper()
	text := format
	if len(arguments) > 0 {
		text = fmt.Sprintf(format, arguments...)
	}
	s.check(s.link.Write(true, []byte(text)))
}

func (s *server) sendData(data string) {
	s.link.Write(false, []byte(data)) // the client may have closed already
}

// read takes what decode does not: what clients send.
func (s *server) read(data []byte) message {
	s.t.Helper()
	var m message
	s.check(json.Unmarshal(data, &m))
	return m
}

// expect waits for a message of this type. Acks and pings come when they like.
func (s *server) expect(kind string) message {
	s.t.Helper()
	for {
		code, data, err := s.link.next()
		s.check(err)
		if code != 't' {
			s.t.Fatalf("%q instead of %s", data, kind)
		}
		m := s.read(data)
		if m.Type == kind {
			return m
		}
		if m.Type != "ack" && m.Type != "ping" {
			s.t.Fatalf("%s instead of %s", data, kind)
		}
	}
}

func (s *server) expectEOF(n int, total number) {
	s.t.Helper()
	if m := s.expect("eof"); m.N != number(n) || *m.Total != total {
		s.t.Fatalf("eof %d of %d", m.N, *m.Total)
	}
}

func (s *server) expectReset(n int, code string) {
	s.t.Helper()
	if m := s.expect("reset"); m.N != number(n) || m.Code != code {
		s.t.Fatalf("%+v", m)
	}
}

// expectAck waits until so much is said to be consumed.
func (s *server) expectAck(n int, consumed number) message {
	s.t.Helper()
	for {
		if m := s.expect("ack"); m.N == number(n) && *m.Consumed == consumed {
			return m
		}
	}
}

// expectData waits for exactly this, in whatever pieces, with nothing but acks between.
func (s *server) expectData(want string) {
	s.t.Helper()
	var got []byte
	for len(got) < len(want) {
		code, data, err := s.link.next()
		s.check(err)
		switch {
		case code == 'b':
			got = append(got, data...)
		case s.read(data).Type != "ack":
			s.t.Fatalf("%s after %d bytes of data", data, len(got))
		}
	}
	if string(got) != want {
		s.t.Fatalf("%d bytes of data, or others", len(got))
	}
}

// expectClose waits for the Close frame, past everything.
func (s *server) expectClose(code uint16) {
	s.t.Helper()
	for {
		kind, data, err := s.link.next()
		s.check(err)
		if kind != 'c' {
			continue
		}
		if got := binary.BigEndian.Uint16(data); got != code {
			s.t.Fatalf("closed with %d", got)
		}
		s.link.Close(int(code), "")
		s.cut()
		return
	}
}

// expectIdle has the client close its link, with nothing sent before.
func (s *server) expectIdle(session *testSession) {
	s.t.Helper()
	go session.Close()
	kind, data, err := s.link.next()
	s.check(err)
	if kind != 'c' {
		s.t.Fatalf("%q on an idle link", data)
	}
	s.link.Close(1000, "")
	s.cut()
}

// refuseOne takes the first link, and refuses a stream on it.
func (s *server) refuseOne(session *testSession) {
	s.t.Helper()
	call := session.carry("")
	s.accept()
	s.expect("open")
	s.expectEOF(1, 0)
	s.say(`{"type":"reset","n":1,"code":"refused"}`)
	s.expectReset(1, "refused")
	call.ends("", &Reset{Code: "refused"})
}
