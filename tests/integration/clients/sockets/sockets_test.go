package sockets

import (
	"bufio"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"clients/wstunnel"
)

const token = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"

// both runs a test with each library, against a server that answers the handshake with this.
func both(t *testing.T, answer string, test func(t *testing.T, socket wstunnel.Socket, err error, server *server)) {
	for name, upgrade := range Libraries {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			check(t, err)
			defer listener.Close()
			login, err := wstunnel.ParseLogin(fmt.Sprintf("ws://%s@%s/path", token, listener.Addr()))
			check(t, err)
			accepted := make(chan *server, 1)
			go func() { accepted <- accept(t, listener, answer) }()
			conn, err := net.Dial("tcp", listener.Addr().String())
			check(t, err)
			check(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
			socket, err := upgrade(context.Background(), conn, login)
			server := <-accepted
			defer server.conn.Close()
			test(t, socket, err, server)
		})
	}
}

const switching = "101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
	"Sec-WebSocket-Protocol: wstunnel.1\r\nSec-WebSocket-Accept: %s\r\n\r\n"

type server struct {
	t       *testing.T
	conn    net.Conn
	reader  *bufio.Reader
	request *http.Request
}

func accept(t *testing.T, listener net.Listener, answer string) *server {
	conn, err := listener.Accept()
	check(t, err)
	check(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	reader := bufio.NewReader(conn)
	request, err := http.ReadRequest(reader)
	check(t, err)
	digest := sha1.Sum([]byte(request.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	answer = strings.Replace(answer, "%s", base64.StdEncoding.EncodeToString(digest[:]), 1)
	fmt.Fprintf(conn, "HTTP/1.1 %s", answer)
	return &server{t, conn, reader, request}
}

func (s *server) send(frames string) {
	_, err := io.WriteString(s.conn, frames)
	check(s.t, err)
}

// expect takes a frame of less than 126 bytes, and unmasks it.
func (s *server) expect(first byte, payload string) {
	s.t.Helper()
	frame := make([]byte, 6+len(payload))
	_, err := io.ReadFull(s.reader, frame)
	check(s.t, err)
	got := frame[6:]
	for i := range got {
		got[i] ^= frame[2+i%4]
	}
	if frame[0] != first || frame[1] != 0x80|byte(len(payload)) || string(got) != payload {
		s.t.Fatalf("%x %x %q", frame[0], frame[1], got)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestTheRequest(t *testing.T) {
	both(t, switching, func(t *testing.T, _ wstunnel.Socket, err error, server *server) {
		check(t, err)
		request := server.request
		if request.RequestURI != "/path" || request.Header.Get("Authorization") != "Bearer "+token ||
			request.Header.Get("Sec-WebSocket-Protocol") != "wstunnel.1" || request.Header["Origin"] != nil {
			t.Fatalf("%+v", request)
		}
	})
}

func TestRefused(t *testing.T) {
	const answer = "401 Unauthorized\r\nContent-Length: 15\r\n\r\nno valid token\n"
	both(t, answer, func(t *testing.T, _ wstunnel.Socket, err error, _ *server) {
		if refusal, ok := errors.AsType[*wstunnel.Refusal](err); !ok || *refusal != (wstunnel.Refusal{Status: 401, Reason: "no valid token"}) {
			t.Fatal(err)
		}
	})
}

func TestWithoutTheSubprotocol(t *testing.T) {
	answer := strings.Replace(switching, "Sec-WebSocket-Protocol: wstunnel.1\r\n", "", 1)
	both(t, answer, func(t *testing.T, _ wstunnel.Socket, err error, _ *server) {
		if err == nil || !strings.Contains(err.Error(), "does not speak wstunnel.1") {
			t.Fatal(err)
		}
	})
}

func TestFragmentsAndPings(t *testing.T) {
	both(t, switching, func(t *testing.T, socket wstunnel.Socket, err error, server *server) {
		check(t, err)
		server.send("\x01\x02on" + "\x89\x01p" + "\x80\x01e" + "\x82\x00" + "\x02\x01t\x00\x00\x80\x02wo")
		for _, want := range []string{"one", "", "two"} {
			text, payload, err := socket.Next()
			check(t, err)
			if data, err := io.ReadAll(iotest.OneByteReader(payload)); string(data) != want || text != (want == "one") || err != nil {
				t.Fatalf("%q %v", data, err)
			}
		}
		server.expect(0x8a, "p")
		check(t, socket.Write(true, []byte("{}")))
		server.expect(0x81, "{}")
		check(t, socket.Write(false, []byte("\x00")))
		server.expect(0x82, "\x00")
	})
}

func TestACutInAFrame(t *testing.T) {
	both(t, switching, func(t *testing.T, socket wstunnel.Socket, err error, server *server) {
		check(t, err)
		server.send("\x82\x05abc")
		server.conn.(*net.TCPConn).CloseWrite()
		_, payload, err := socket.Next()
		check(t, err)
		data, err := io.ReadAll(payload)
		if string(data) != "abc" || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("%q %v", data, err)
		}
	})
}

func TestFramesThatMustNotCome(t *testing.T) {
	for name, frame := range map[string]string{
		"reserved bit": "\xc2\x00", "reserved opcode": "\x83\x00", "continuation of nothing": "\x80\x00",
		"long ping": "\x89\x7e\x00\x7e" + strings.Repeat("x", 126), "fragmented ping": "\x09\x00",
	} {
		t.Run(name, func(t *testing.T) {
			both(t, switching, func(t *testing.T, socket wstunnel.Socket, err error, server *server) {
				check(t, err)
				server.send(frame)
				if _, _, err := socket.Next(); err == nil {
					t.Fatal("it passed")
				}
			})
		})
	}
}

func TestACloseFrameIsAnsweredWithItsCodeAndNothingFollows(t *testing.T) {
	both(t, switching, func(t *testing.T, socket wstunnel.Socket, err error, server *server) {
		check(t, err)
		server.send("\x88\x02\x03\xe9")
		server.conn.(*net.TCPConn).CloseWrite()
		if _, _, err := socket.Next(); err == nil || !strings.Contains(err.Error(), "1001") && !strings.Contains(err.Error(), "GoingAway") {
			t.Fatal(err)
		}
		if socket.Write(false, []byte("x")) == nil {
			t.Fatal("it was sent")
		}
		server.expect(0x88, "\x03\xe9")
		if rest, _ := io.ReadAll(server.reader); len(rest) > 0 {
			t.Fatalf("%q", rest)
		}
	})
}
