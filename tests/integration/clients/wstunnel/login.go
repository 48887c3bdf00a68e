package wstunnel

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"net"
	"net/url"
	"slices"
	"strings"
)

// Login is what a login URL says ("Handshake").
type Login struct {
	URL   string // for the WebSocket: without the token and the pins
	Token string

	address string
	tls     *tls.Config // nil: ws
}

var (
	errLogin = errors.New("not a login URL: wss://TOKEN@HOST[:PORT][/PATH][#sha256=PIN[&sha256=PIN...]]")
	errPin   = errors.New("the server's key is none of the pinned ones")
)

// ParseLogin takes a login URL apart. Its errors do not show the token.
func ParseLogin(text string) (*Login, error) {
	parsed, err := url.Parse(text)
	if err != nil || parsed.User == nil || parsed.Hostname() == "" {
		return nil, errLogin
	}
	login := &Login{Token: parsed.User.Username()}
	port := "80"
	switch parsed.Scheme {
	case "ws":
	case "wss":
		port = "443"
		login.tls = &tls.Config{ServerName: parsed.Hostname(), MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
		if err := login.pin(parsed.Fragment); err != nil {
			return nil, err
		}
	default:
		return nil, errLogin
	}
	if parsed.Port() != "" {
		port = parsed.Port()
	}
	login.address = net.JoinHostPort(parsed.Hostname(), port)
	if parsed.Path == "" {
		parsed.Path = "/"
	}
	parsed.User, parsed.Fragment = nil, ""
	login.URL = parsed.String()
	return login, nil
}

// pin has the pins alone decide, if there are any.
func (l *Login) pin(fragment string) error {
	if fragment == "" {
		return nil
	}
	var pins [][]byte
	for _, part := range strings.Split(fragment, "&") {
		text, found := strings.CutPrefix(part, "sha256=")
		decode := base64.RawURLEncoding.DecodeString
		if len(text) == hex.EncodedLen(sha256.Size) {
			decode = hex.DecodeString
		}
		pin, err := decode(text)
		if !found || err != nil || len(pin) != sha256.Size {
			return errLogin
		}
		pins = append(pins, pin)
	}
	l.tls.InsecureSkipVerify = true
	l.tls.VerifyConnection = func(state tls.ConnectionState) error {
		key := sha256.Sum256(state.PeerCertificates[0].RawSubjectPublicKeyInfo)
		if !slices.ContainsFunc(pins, func(pin []byte) bool { return string(pin) == string(key[:]) }) {
			return errPin
		}
		return nil
	}
	return nil
}

// connect dials the server and verifies it.
func (l *Login) connect(ctx context.Context) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", l.address)
	if err != nil || l.tls == nil {
		return conn, err
	}
	secured := tls.Client(conn, l.tls)
	if err := secured.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return secured, nil
}
