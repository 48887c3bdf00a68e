// Package sockets has wstunnel.Socket on two libraries.
package sockets

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"

	"clients/wstunnel"

	"github.com/coder/websocket"
)

// Libraries are those that there are, by name.
var Libraries = map[string]wstunnel.Upgrade{"coder": Coder, "xnet": XNet}

// Coder makes the handshake with github.com/coder/websocket.
func Coder(ctx context.Context, conn net.Conn, login *wstunnel.Login) (wstunnel.Socket, error) {
	dial := func(context.Context, string, string) (net.Conn, error) { return conn, nil }
	socket, answer, err := websocket.Dial(ctx, login.URL, &websocket.DialOptions{
		HTTPClient:   &http.Client{Transport: &http.Transport{DialContext: dial, DialTLSContext: dial}},
		HTTPHeader:   http.Header{"Authorization": {"Bearer " + login.Token}},
		Subprotocols: []string{wstunnel.Subprotocol},
	})
	switch {
	case err != nil && answer != nil && answer.StatusCode != http.StatusSwitchingProtocols:
		return nil, wstunnel.Refused(answer)
	case err != nil:
		return nil, err
	case socket.Subprotocol() != wstunnel.Subprotocol:
		return nil, fmt.Errorf("the server does not speak %s", wstunnel.Subprotocol)
	}
	socket.SetReadLimit(-1) // a binary message may have any size; text is bounded where it is read
	return &coderSocket{socket}, nil
}

type coderSocket struct {
	socket *websocket.Conn
}

func (s *coderSocket) Next() (bool, io.Reader, error) {
	kind, payload, err := s.socket.Reader(context.Background())
	return kind == websocket.MessageText, payload, err
}

func (s *coderSocket) Write(text bool, data []byte) error {
	kind := websocket.MessageBinary
	if text {
		kind = websocket.MessageText
	}
	return s.socket.Write(context.Background(), kind, data)
}

func (s *coderSocket) Close(code int, reason string) error {
	return s.socket.Close(websocket.StatusCode(code), reason)
}
