package wstunnel

import (
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	pieceBytes = 65536 // of stream data in one frame: control messages wait for a frame that was begun
	readBytes  = 8192  // coder's reader waits until so much is there, or the frame ends
)

// closing is a fault of the link, or its end, with the close code that says so.
type closing struct {
	code   int
	reason string
}

func (c closing) Error() string { return fmt.Sprintf("closed with %d: %s", c.code, c.reason) }

// Violation is a protocol error: the link is closed with 1002.
func Violation(reason string) error { return closing{1002, reason} }

var errVersion = closing{1008, "the server speaks another version"}

type state int

const (
	greeting state = iota // no welcome yet
	idle
	beginning // open or resume is due
	resuming
	busy
	resetting
	closed // or lost: nothing comes from it any more
)

// link is a "forward" link. All its fields are under the lock.
type link struct {
	lock    sync.Locker
	changed *sync.Cond
	socket  Socket
	conn    *watched
	log     func(string, ...any)

	state    state
	n        number  // of the last exchange
	stream   *stream // from beginning to resetting
	welcome  message
	trip     time.Duration // from hello to welcome
	failure  error         // once closed
	farewell *closing      // the Close frame that is due
	urgent   []message     // due before anything of the stream
	answerBy time.Time     // zero: no answer is due
	ended    chan struct{} // closed when nothing can come any more

	ticked time.Time
	swept  time.Time
	owed   time.Time // since when something was sent that must be reacted to; zero: nothing
	asked  time.Time // when a ping went; zero: none is out
	deadAt time.Time // if that is not answered
}

// greet begins a link's life: hello goes out, and welcome is waited for.
func (l *link) greet(hello message) error {
	now := time.Now()
	l.ticked, l.swept, l.answerBy = now, now, now.Add(answerWithin)
	l.urgent = []message{hello}
	go l.read()
	go l.write()
	go l.watch()
	l.lock.Lock()
	defer l.lock.Unlock()
	for l.state == greeting {
		l.changed.Wait()
	}
	l.trip = time.Since(now)
	return l.failure
}

// begin puts a stream on an idle link: it is opened there, or resumed.
func (l *link) begin(s *stream) {
	l.n++
	l.stream, s.link = s, l
	l.state = beginning
	l.changed.Broadcast()
}

// end makes the link idle.
func (l *link) end() {
	l.stream.link = nil
	l.stream, l.state, l.answerBy = nil, idle, time.Time{}
}

// lose takes the link for lost. Its stream is detached in the same step: what comes on it from now on is dropped.
func (l *link) lose(err error) {
	if l.state == closed {
		return
	}
	if l.stream != nil {
		l.stream.detach()
		l.stream = nil
	}
	l.state, l.failure = closed, err
	l.changed.Broadcast()
	farewell, ok := err.(closing)
	if farewell.code != 1000 {
		l.log("link lost: %v", err)
	}
	if ok {
		l.farewell = &farewell // the writer sends it, behind what it is sending
		time.AfterFunc(closeWithin, func() { l.conn.drop() })
		return
	}
	l.conn.drop()
}

func (l *link) loseLocked(err error) {
	l.lock.Lock()
	defer l.lock.Unlock()
	l.lose(err)
}

// read takes messages until the connection ends. It never waits for the application, nor for the writer.
func (l *link) read() {
	defer close(l.ended)
	for {
		text, payload, err := l.socket.Next()
		if err != nil {
			l.loseLocked(err)
			if _, ok := err.(closing); !ok {
				l.conn.drop()
			}
			return
		}
		if text {
			err = l.readText(payload)
		} else {
			err = l.readData(payload)
		}
		if err != nil {
			l.loseLocked(err)
			io.Copy(io.Discard, payload)
		}
	}
}

func (l *link) readText(payload io.Reader) error {
	text, err := io.ReadAll(io.LimitReader(payload, messageBytes+1))
	if err != nil {
		return err
	}
	m, err := decode(text)
	if err != nil {
		return err
	}
	l.lock.Lock()
	defer l.lock.Unlock()
	defer l.changed.Broadcast()
	return l.control(m)
}

// readData passes on what has come of a message before it is whole.
func (l *link) readData(payload io.Reader) error {
	if err := l.data(nil); err != nil {
		return err
	}
	piece := make([]byte, readBytes)
	for {
		size, end := payload.Read(piece)
		if err := l.data(piece[:size]); err != nil {
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

func (l *link) data(data []byte) error {
	l.lock.Lock()
	defer l.lock.Unlock()
	switch l.state {
	case busy:
		l.changed.Broadcast()
		return l.stream.take(data)
	case resetting, closed:
		return nil
	}
	return Violation("data outside of an exchange")
}

func (l *link) control(m message) error {
	if l.state == closed {
		return nil
	}
	if (m.Type == "welcome") != (l.state == greeting) {
		return Violation(m.Type + " must not come now")
	}
	switch m.Type {
	case "welcome":
		if m.Version != 1 {
			return errVersion
		}
		l.welcome, l.state, l.answerBy = m, idle, time.Time{}
		return nil
	case "ping":
		l.answer(message{Type: "pong", Number: m.Number})
		return nil
	case "pong":
		return nil // that bytes came is what counts
	}
	if m.N != l.n {
		if m.N < l.n {
			return nil
		}
		return Violation("a message of an exchange to come")
	}
	switch l.state {
	case resuming:
		return l.resumed(m)
	case busy:
		return l.about(m)
	case resetting:
		switch m.Type {
		case "reset":
			l.stream.finish(nil)
			l.end()
			return nil
		case "opened", "ack", "eof":
			return nil
		}
	}
	return Violation(m.Type + " must not come now")
}

// resumed takes the answer to resume.
func (l *link) resumed(m message) error {
	s := l.stream
	switch m.Type {
	case "resumed":
		l.state, l.answerBy = busy, time.Time{}
		s.resumed(m)
		l.finish()
		return nil
	case "gone":
		l.end()
		if s.gone(m, l.welcome.Boot) {
			l.begin(s)
		}
		return nil
	}
	return Violation(m.Type + " instead of resumed")
}

// about takes a message of the exchange.
func (l *link) about(m message) error {
	if m.Type == "reset" {
		l.answer(message{Type: "reset", N: l.n, Code: m.Code})
		l.stream.finish(&Reset{m.Code, m.Message})
		l.end()
		return nil
	}
	err := l.stream.control(m)
	l.finish()
	return err
}

// finish ends the exchange if both directions are done.
func (l *link) finish() {
	if l.stream.done() {
		l.stream.finish(nil)
		l.end()
	}
}

// answer has a message sent before anything of the stream; of several pongs only the last.
func (l *link) answer(m message) {
	if last := len(l.urgent) - 1; last >= 0 && l.urgent[last].Type == "pong" && m.Type == "pong" {
		l.urgent[last] = m
		return
	}
	l.urgent = append(l.urgent, m)
}

// write sends what is due until the link is lost, and the Close frame then.
func (l *link) write() {
	l.lock.Lock()
	defer l.lock.Unlock()
	for {
		text, data, due := l.next()
		switch {
		case due:
			l.lock.Unlock()
			err := l.socket.Write(text, data)
			l.lock.Lock()
			if err != nil {
				l.lose(err)
			}
		case l.farewell != nil:
			l.lock.Unlock()
			if err := l.socket.Close(l.farewell.code, l.farewell.reason); err != nil {
				l.conn.drop()
			}
			l.lock.Lock()
			return
		case l.state == closed:
			return
		default:
			l.changed.Wait()
		}
	}
}

// next is the message that goes out now, if any.
func (l *link) next() (text bool, data []byte, due bool) {
	if len(l.urgent) > 0 && (l.state != closed || l.farewell != nil) {
		m := l.urgent[0]
		l.urgent = l.urgent[1:]
		return true, m.encode(), true
	}
	switch l.state {
	case beginning:
		m := l.stream.beginning(l.welcome.Boot)
		l.state = busy
		if m.Type == "resume" {
			l.state, l.answerBy = resuming, time.Now().Add(answerWithin)
		}
		return true, l.reactable(m), true
	case busy:
		s := l.stream
		if ack := s.nextAck(); ack != nil {
			ack.N = l.n
			l.finish()
			return true, ack.encode(), true
		}
		if data := s.nextData(); data != nil {
			l.owe()
			return false, data, true
		}
		if end := s.nextEnd(); end != nil {
			if end.Type == "reset" {
				l.state, l.answerBy = resetting, time.Now().Add(answerWithin)
			}
			return true, l.reactable(*end), true
		}
	}
	return false, nil, false
}

// reactable encodes a message of the exchange that the peer must react to.
func (l *link) reactable(m message) []byte {
	l.owe()
	m.N = l.n
	return m.encode()
}

func (l *link) owe() {
	if l.owed.IsZero() {
		l.owed = time.Now()
	}
}
