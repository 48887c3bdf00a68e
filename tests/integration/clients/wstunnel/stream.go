package wstunnel

import (
	"io"
	"sync"
	"time"
)

const (
	firstLimit = 262144  // "It starts at 262,144 in both directions, without a message"
	window     = 1 << 20 // what every ack grants
	replayMost = 4 << 20 // "A sender MAY hold less than it was granted"
)

// Reset is how a stream ends that does not end cleanly. Before it was opened that is a refusal.
type Reset struct {
	Code    string
	Message string
}

func (r *Reset) Error() string {
	if r.Message == "" {
		return r.Code
	}
	return r.Code + ": " + r.Message
}

// stream is one tunnelled connection, whose egress is the server. All its fields are under the lock.
type stream struct {
	lock    sync.Locker
	changed *sync.Cond
	log     func(string, ...any)

	id       string
	target   string
	boot     string    // of the server that was sent the first open
	fresh    bool      // an open begins it, not a resume
	opened   bool      // the target was reached
	heard    bool      // anything of the egress
	epoch    number    // of the last resume
	link     *link     // nil: detached
	detached time.Time // since when no link has carried it

	over   bool
	result *Reset // once over; nil: a clean end
	reset  string // the code of the reset that is due from here
	barely bool   // it goes without the data before it

	up   outward
	down inward
}

// outward is the direction from here.
type outward struct {
	replay   []byte // from base to end
	base     number // the highest consumed that came, but for the EOF's offset
	consumed number // that with it
	sent     number // on this link, or said by the peer to be there
	limit    number
	ended    bool // the application has
	eofSent  bool // on this link, or said by the peer to be there
	eofEver  bool // on any link
}

func (o *outward) end() number { return o.base + number(len(o.replay)) }

// done means that the peer has acked it with its end.
func (o *outward) done() bool { return o.eofSent && o.consumed == o.end()+1 }

// ack takes an offset up to which the peer's application took the bytes.
func (o *outward) ack(consumed, limit number) {
	taken := min(consumed, o.end())
	o.replay = o.replay[taken-o.base:]
	o.base, o.consumed, o.limit = taken, consumed, limit
}

// inward is the direction towards here.
type inward struct {
	waiting  []byte // received, and not consumed
	received number
	consumed number
	ended    bool // the EOF came, and counts as received
	broken   bool // the application takes no more: what comes is dropped

	limit        number // the highest that was sent
	ackConsumed  number // with the last ack
	ackReceived  number
	swept        bool // an ack is due because a second is over
	endConfirmed bool // consumed = total + 1 was sent
}

func (i *inward) grant() number {
	i.limit = max(i.limit, i.consumed+window)
	i.ackConsumed, i.ackReceived, i.swept = i.consumed, i.received, false
	return i.limit
}

func (i *inward) endConsumed() bool { return i.ended && i.consumed == i.received }

func newStream(lock sync.Locker, changed *sync.Cond, log func(string, ...any), target string) *stream {
	s := &stream{lock: lock, changed: changed, log: log, id: newID(), target: target, fresh: true}
	s.up.limit, s.down.limit = firstLimit, firstLimit
	return s
}

// finish ends the stream: cleanly with nil, unless it was reset from here.
func (s *stream) finish(reset *Reset) {
	if s.over {
		return
	}
	if reset == nil && s.reset != "" && !s.done() {
		reset = &Reset{Code: s.reset}
	}
	s.over, s.result = true, reset
	s.changed.Broadcast()
}

// abort asks for a reset from here.
func (s *stream) abort(code string, barely bool) {
	if s.reset == "" {
		s.reset, s.barely = code, barely
	}
	s.changed.Broadcast()
}

// done means that both directions are.
func (s *stream) done() bool { return s.up.done() && s.down.endConfirmed }

// leave drops the link, whatever goes on there.
func (s *stream) leave() {
	if s.link != nil {
		s.link.lose(closing{1000, ""})
	}
}

func (s *stream) detach() {
	s.link = nil
	if s.detached.IsZero() { // a resume that was not answered does not restart the window
		s.detached = time.Now()
	}
}

// beginning is the message that begins an exchange of this stream, at the server with this boot id.
func (s *stream) beginning(boot string) message {
	if s.fresh {
		s.fresh, s.boot = false, boot
		return message{Type: "open", Stream: s.id, Target: s.target}
	}
	s.epoch++
	limit := s.down.grant()
	return message{
		Type: "resume", Stream: s.id, Epoch: s.epoch,
		Received: new(s.down.received), Consumed: new(s.down.consumed), Limit: &limit,
	}
}

// control takes a message of the exchange that is no reset.
func (s *stream) control(m message) error {
	s.heard = true
	switch m.Type {
	case "opened":
		if s.opened {
			return Violation("opened twice")
		}
		s.opened = true
	case "ack":
		return s.acked(*m.Consumed, *m.Limit)
	case "eof":
		if !s.opened || s.down.ended || *m.Total != s.down.received {
			return Violation("an eof that cannot be")
		}
		s.down.ended = true
		s.down.received++
	default:
		return Violation(m.Type + " in an exchange")
	}
	return nil
}

func (s *stream) acked(consumed, limit number) error {
	sent := s.up.sent
	if s.up.eofSent {
		sent++
	}
	if consumed < s.up.consumed || consumed > sent || limit < s.up.limit {
		return Violation("an ack that cannot be")
	}
	s.up.ack(consumed, limit)
	return nil
}

// take has the data wait for the application.
func (s *stream) take(data []byte) error {
	end := s.down.received + number(len(data))
	if !s.opened || s.down.ended || end > s.down.limit {
		return Violation("data that must not come now")
	}
	s.heard = true
	s.down.received = end
	s.down.waiting = append(s.down.waiting, data...)
	return nil
}

// resumed goes on from what the peer has.
func (s *stream) resumed(m message) {
	s.heard, s.detached = true, time.Time{}
	if m.Opened != nil {
		s.opened = true
	}
	s.down.endConfirmed = s.down.ended && s.down.ackConsumed == s.down.received
	end := s.up.end()
	if s.up.ended {
		end++
	}
	received, consumed := *m.Received, *m.Consumed
	if consumed < s.up.consumed || received < consumed || end < received || *m.Limit < s.up.limit {
		s.abort("lost", true)
		return
	}
	s.up.ack(consumed, *m.Limit)
	s.up.eofSent = received > s.up.end()
	s.up.sent = min(received, s.up.end())
	s.barely = s.reset != "" // it was pending
}

// gone reports whether the stream goes on all the same.
func (s *stream) gone(m message, boot string) bool {
	switch {
	case s.reset != "":
		s.finish(nil) // whatever the outcome, that is the answer
	case m.Outcome == "finished" && s.up.eofEver && s.down.endConsumed():
		s.finish(nil)
	case m.Outcome == "reset":
		s.finish(&Reset{m.Code, m.Message})
	case m.Outcome == "stale":
		return true
	case m.Outcome == "unknown" && !s.heard && boot == s.boot:
		s.log("opening afresh")
		s.id, s.fresh, s.epoch, s.detached = newID(), true, 0, time.Time{}
		s.up.sent, s.up.eofSent, s.up.eofEver = 0, false, false
		s.down.limit = firstLimit
		return true
	default:
		s.finish(&Reset{"lost", "the server does not have the stream any more"})
	}
	return false
}

// nextAck is the ack that is due, if one is.
func (s *stream) nextAck() *message {
	d := &s.down
	quarter := d.consumed > d.ackConsumed && 4*(d.consumed-d.ackConsumed) >= d.limit-d.ackConsumed
	if d.endConfirmed || !quarter && !d.swept && !d.endConsumed() {
		return nil
	}
	limit := d.grant()
	d.endConfirmed = d.endConsumed()
	return &message{Type: "ack", Consumed: new(d.consumed), Limit: &limit}
}

// sweep makes an ack due if anything moved.
func (s *stream) sweep() {
	s.down.swept = s.down.received != s.down.ackReceived || s.down.consumed != s.down.ackConsumed
}

// nextData is a piece of what the peer lacks. It has room for all that was read from the application. The piece stays as
// it is: the replay buffer only grows behind it.
func (s *stream) nextData() []byte {
	o := &s.up
	size := min(o.end()-o.sent, pieceBytes)
	if size == 0 || s.reset != "" && s.barely {
		return nil
	}
	data := o.replay[o.sent-o.base:][:size]
	o.sent += number(len(data))
	return data
}

// nextEnd is the reset or the EOF that is due, once no data is.
func (s *stream) nextEnd() *message {
	o := &s.up
	switch {
	case o.eofSent && s.down.endConfirmed:
		return nil // "Silence after the end"
	case s.reset != "":
		return &message{Type: "reset", Code: s.reset}
	case o.ended && !o.eofSent && o.sent == o.end():
		o.eofSent, o.eofEver = true, true
		return &message{Type: "eof", Total: new(o.end())}
	case s.down.broken && o.ended && o.base == o.end():
		s.abort("reset", true)
		return &message{Type: "reset", Code: s.reset, Message: "cannot write"}
	}
	return nil
}

// readFrom keeps what the application has to say, up to the limit.
func (s *stream) readFrom(in io.Reader) {
	piece := make([]byte, pieceBytes)
	for {
		size := s.room()
		if size == 0 {
			return
		}
		size, err := in.Read(piece[:size])
		s.lock.Lock()
		s.up.replay = append(s.up.replay, piece[:size]...)
		s.up.ended = err == io.EOF
		if err != nil && err != io.EOF {
			s.abort("reset", false)
		}
		s.changed.Broadcast()
		s.lock.Unlock()
		if err != nil {
			return
		}
	}
}

// room waits until the application may be read. 0: it is over.
func (s *stream) room() int {
	s.lock.Lock()
	defer s.lock.Unlock()
	for {
		if s.over {
			return 0
		}
		if size := min(s.up.base+replayMost, s.up.limit) - s.up.end(); size > 0 {
			return int(min(size, pieceBytes))
		}
		s.changed.Wait()
	}
}

// writeTo gives the application what came, and closes it behind the EOF. It returns the error of a write or a close.
func (s *stream) writeTo(out io.WriteCloser) error {
	var failure error
	for {
		data, eof := s.arrived()
		if data == nil && !eof {
			return failure
		}
		if len(data) > 0 && failure == nil {
			_, failure = out.Write(data)
		}
		if eof {
			if err := out.Close(); failure == nil {
				failure = err
			}
		}
		s.lock.Lock()
		s.down.broken = failure != nil
		s.down.consumed += number(len(data))
		if eof {
			s.down.consumed++
		}
		s.changed.Broadcast()
		s.lock.Unlock()
		if eof {
			return failure
		}
	}
}

// arrived waits for data or the EOF. Neither: it is over, and all that came was taken.
func (s *stream) arrived() (data []byte, eof bool) {
	s.lock.Lock()
	defer s.lock.Unlock()
	for len(s.down.waiting) == 0 && !s.down.ended && !s.over {
		s.changed.Wait()
	}
	data, s.down.waiting = s.down.waiting, nil
	return data, s.down.ended
}
