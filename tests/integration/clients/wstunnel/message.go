package wstunnel

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"strconv"
	"unicode/utf8"
)

const (
	messageBytes  = 16384
	messageNested = 256
)

// number is from 0 to 2^53-1.
type number uint64

func (n *number) UnmarshalJSON(text []byte) error {
	value, err := strconv.ParseUint(string(text), 10, 53)
	*n = number(value)
	return err
}

// message is any control message that travels on a forward link. A member that may be 0, or "", or absent with another
// meaning is a pointer.
type message struct {
	Type         string   `json:"type"`
	Version      number   `json:"version,omitempty"`
	Session      string   `json:"session,omitempty"`
	Role         string   `json:"role,omitempty"`
	Agent        string   `json:"agent,omitempty"`
	Boot         string   `json:"boot,omitempty"`
	ResumeWindow number   `json:"resume_window,omitempty"`
	Features     []string `json:"features,omitempty"`
	N            number   `json:"n,omitempty"`
	Stream       string   `json:"stream,omitempty"`
	Target       string   `json:"target,omitempty"`
	Epoch        number   `json:"epoch,omitempty"`
	Received     *number  `json:"received,omitempty"`
	Consumed     *number  `json:"consumed,omitempty"`
	Limit        *number  `json:"limit,omitempty"`
	Total        *number  `json:"total,omitempty"`
	Number       *number  `json:"number,omitempty"`
	Opened       *string  `json:"opened,omitempty"`
	Outcome      string   `json:"outcome,omitempty"`
	Code         string   `json:"code,omitempty"`
	Message      string   `json:"message,omitempty"`
}

func decode(text []byte) (message, error) {
	var m message
	switch {
	case !utf8.Valid(text):
		return m, closing{1007, "text that is not UTF-8"}
	case len(text) > messageBytes || bytes.Count(text, []byte("["))+bytes.Count(text, []byte("{")) > messageNested:
		return m, Violation("a control message too long or too deep")
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return m, Violation("a control message that cannot be read: " + err.Error())
	}
	return m, m.check()
}

// check that the required members are there.
func (m *message) check() error {
	var missing bool
	switch m.Type {
	case "welcome":
		missing = m.Version == 0 || m.Boot == ""
	case "opened":
		missing = m.N == 0
	case "ack":
		missing = m.N == 0 || m.Consumed == nil || m.Limit == nil
	case "eof":
		missing = m.N == 0 || m.Total == nil
	case "reset":
		missing = m.N == 0 || m.Code == ""
	case "resumed":
		missing = m.N == 0 || m.Received == nil || m.Consumed == nil || m.Limit == nil
	case "gone":
		missing = m.N == 0 || m.Outcome == ""
	case "ping", "pong":
		missing = m.Number == nil
	default:
		return Violation("a message of type " + strconv.Quote(m.Type) + " on a forward link")
	}
	if missing {
		return Violation("a required member of " + m.Type + " is missing")
	}
	return nil
}

func (m message) encode() []byte {
	text, err := json.Marshal(m)
	if err != nil {
		panic(err) // strings and numbers
	}
	return text
}

func newID() string {
	var random [16]byte
	rand.Read(random[:]) // never fails
	return base64.RawURLEncoding.EncodeToString(random[:])
}
