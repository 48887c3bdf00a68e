package sockets

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"

	"clients/wstunnel"

	"golang.org/x/net/websocket"
)

// XNet makes the handshake with golang.org/x/net/websocket.
func XNet(_ context.Context, conn net.Conn, login *wstunnel.Login) (wstunnel.Socket, error) {
	config, err := websocket.NewConfig(login.URL, "http://origin.invalid")
	if err != nil {
		return nil, err
	}
	config.Header.Set("Authorization", "Bearer "+login.Token)
	config.Protocol = []string{wstunnel.Subprotocol}
	shaking := &handshake{Conn: conn}
	socket, failure := websocket.NewClient(config, shaking)
	answer, err := shaking.answer()
	switch {
	case err != nil:
		return nil, errors.Join(failure, err)
	case answer.StatusCode != http.StatusSwitchingProtocols:
		return nil, wstunnel.Refused(answer)
	case failure != nil:
		return nil, failure
	case answer.Header.Get("Sec-WebSocket-Protocol") != wstunnel.Subprotocol: // to the library that is optional
		return nil, fmt.Errorf("the server does not speak %s", wstunnel.Subprotocol)
	}
	return &xnetSocket{socket: socket, conn: conn}, nil
}

// handshake is a connection that takes the Origin out of the request, which the library always sends and the server
// refuses, and keeps the answer, which the library drops.
type handshake struct {
	net.Conn
	request  []byte
	response []byte
	sent     bool
	over     bool
}

func (h *handshake) Write(data []byte) (int, error) {
	if h.sent {
		return h.Conn.Write(data)
	}
	h.request = append(h.request, data...)
	if !bytes.HasSuffix(h.request, []byte("\r\n\r\n")) {
		return len(data), nil
	}
	h.sent = true
	before, rest, _ := bytes.Cut(h.request, []byte("\r\nOrigin: "))
	_, after, _ := bytes.Cut(rest, []byte("\r\n"))
	_, err := h.Conn.Write(bytes.Join([][]byte{before, after}, []byte("\r\n")))
	return len(data), err
}

func (h *handshake) Read(data []byte) (int, error) {
	size, err := h.Conn.Read(data)
	if !h.over {
		h.response = append(h.response, data[:size]...)
	}
	return size, err
}

func (h *handshake) answer() (*http.Response, error) {
	h.over = true
	answer := io.MultiReader(bytes.NewReader(h.response), h.Conn) // of a refusal the rest may be on its way
	return http.ReadResponse(bufio.NewReader(answer), &http.Request{Method: http.MethodGet})
}

// xnetSocket reads frames instead of messages, since the library does not put fragments together; and checks what it
// does not.
type xnetSocket struct {
	socket *websocket.Conn
	conn   net.Conn
	lock   sync.Mutex
	closed bool // a Close frame was sent: nothing follows
}

func (s *xnetSocket) Next() (bool, io.Reader, error) {
	first, err := s.frame(false)
	if err != nil {
		return false, nil, err
	}
	return first.code == websocket.TextFrame, &xnetMessage{s, first}, nil
}

func (s *xnetSocket) Write(text bool, data []byte) error {
	s.lock.Lock()
	defer s.lock.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	if text {
		return websocket.Message.Send(s.socket, string(data))
	}
	return websocket.Message.Send(s.socket, data)
}

func (s *xnetSocket) Close(code int, _ string) error {
	s.lock.Lock()
	defer s.lock.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	return s.socket.WriteClose(code)
}

// xnetFrame is a data frame.
type xnetFrame struct {
	payload io.Reader
	code    byte
	final   bool
	left    int // bytes of the payload: to the library the end of the connection is one of the frame, too
}

// frame waits for the next data frame, which continues a message or begins one.
func (s *xnetSocket) frame(continues bool) (*xnetFrame, error) {
	for {
		incoming, err := s.socket.NewFrameReader()
		if err != nil {
			return nil, err
		}
		header, err := io.ReadAll(incoming.HeaderReader())
		if err != nil {
			return nil, err
		}
		code, final, left := header[0]&0x0f, header[0]&0x80 != 0, incoming.Len()-len(header)
		control := code >= websocket.CloseFrame
		switch {
		case header[0]&0x70 != 0, code > websocket.PongFrame, !control && code > websocket.BinaryFrame,
			control && (!final || left > 125), !control && continues != (code == websocket.ContinuationFrame):
			return nil, wstunnel.Violation("a frame that must not come now")
		case code == websocket.CloseFrame:
			return nil, s.peerClosed(incoming)
		}
		payload, err := s.socket.HandleFrame(incoming) // answers a ping
		if err != nil {
			return nil, err
		}
		if payload != nil {
			return &xnetFrame{payload, code, final, left}, nil
		}
	}
}

func (s *xnetSocket) peerClosed(payload io.Reader) error {
	body, err := io.ReadAll(payload)
	if err != nil {
		return err
	}
	code := uint16(1000)
	if len(body) >= 2 {
		code = binary.BigEndian.Uint16(body)
		body = body[2:]
	}
	s.Close(int(code), "")
	s.conn.Close()
	return fmt.Errorf("closed by the server: %d %s", code, body)
}

// xnetMessage reads a message's payload, through all its frames.
type xnetMessage struct {
	socket *xnetSocket
	frame  *xnetFrame
}

func (m *xnetMessage) Read(data []byte) (int, error) {
	for m.frame.left == 0 {
		if m.frame.final {
			return 0, io.EOF
		}
		next, err := m.socket.frame(true)
		if err != nil {
			return 0, err
		}
		m.frame = next
	}
	size, err := m.frame.payload.Read(data)
	m.frame.left -= size
	if err == io.EOF && m.frame.left > 0 {
		err = io.ErrUnexpectedEOF
	} else if err == io.EOF {
		err = nil
	}
	return size, err
}
