package wstunnel

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
)

// A server that plays one part of the page each time, line by line.

func TestOneStreamAfterTheOtherOnOneLink(t *testing.T) {
	t.Parallel()
	session, server := start(t)
	for n, id := 1, ""; n <= 2; n++ {
		call := session.carry("hi")
		if n == 1 {
			server.accept()
		}
		open := server.expect("open")
		if open.N != number(n) || open.Target != "t:1" || len(open.Stream) != 22 || open.Stream == id {
			t.Fatalf("%+v", open)
		}
		id = open.Stream
		server.expectData("hi")
		server.expectEOF(n, 2)
		server.say(`{"type":"opened","n":%d}`, n)
		server.sendData("HI")
		server.say(`{"type":"eof","n":%d,"total":2}`, n)
		server.expectAck(n, 3)
		server.say(`{"type":"ack","n":%d,"consumed":3,"limit":262147}`, n)
		call.ends("HI", nil)
	}
	server.expectIdle(session)
}

func TestAPingIsAnsweredAndMessagesOfAnEarlierExchangeAreIgnored(t *testing.T) {
	t.Parallel()
	session, server := start(t)
	server.refuseOne(session)
	call := session.carry("")
	server.expect("open")
	server.expectEOF(2, 0)
	server.settle()
	server.say(`{"type":"ack","n":1,"consumed":9,"limit":9}`)
	server.say(`{"type":"reset","n":2,"code":"refused","message":"no"}`)
	server.expectReset(2, "refused")
	call.ends("", &Reset{"refused", "no"})
}

func TestNotAByteBeyondTheLimit(t *testing.T) {
	t.Parallel()
	session, server := start(t)
	call := session.carry(strings.Repeat("x", firstLimit+10))
	server.accept()
	server.expect("open")
	server.expectData(strings.Repeat("x", firstLimit))
	server.settle() // no data comes before its answer
	server.say(`{"type":"opened","n":1}`)
	server.say(`{"type":"ack","n":1,"consumed":0,"limit":%d}`, firstLimit+4)
	server.expectData("xxxx")
	server.settle()
	server.say(`{"type":"ack","n":1,"consumed":%d,"limit":%d}`, firstLimit+4, 2*firstLimit)
	server.expectData("xxxxxx")
	server.expectEOF(1, firstLimit+10)
	server.say(`{"type":"eof","n":1,"total":0}`)
	server.expectAck(1, 1)
	server.say(`{"type":"ack","n":1,"consumed":%d,"limit":%d}`, firstLimit+11, 2*firstLimit)
	call.ends("", nil)
}

func TestAnAckForAQuarterOfTheWindow(t *testing.T) {
	t.Parallel()
	session, server := start(t)
	call := session.carry("")
	server.accept()
	server.expect("open")
	server.expectEOF(1, 0)
	server.say(`{"type":"opened","n":1}`)
	server.sendData(strings.Repeat("x", firstLimit/4))
	ack := server.expectAck(1, firstLimit/4)
	if *ack.Limit < firstLimit {
		t.Fatalf("the limit fell: %d", *ack.Limit)
	}
	server.say(`{"type":"reset","n":1,"code":"idle"}`)
	server.expectReset(1, "idle")
	call.ends(strings.Repeat("x", firstLimit/4), &Reset{Code: "idle"})
}

func TestProtocolErrorsCloseTheLinkAndNotTheStream(t *testing.T) {
	t.Parallel()
	for name, say := range map[string]func(*server){
		"data before opened": func(s *server) { s.sendData("x") },
		"eof before opened":  func(s *server) { s.say(`{"type":"eof","n":1,"total":0}`) },
		"opened twice":       func(s *server) { s.say(`{"type":"opened","n":1}`); s.say(`{"type":"opened","n":1}`) },
		"another total":      func(s *server) { s.say(`{"type":"opened","n":1}`); s.say(`{"type":"eof","n":1,"total":1}`) },
		"an exchange to come": func(s *server) {
			s.say(`{"type":"opened","n":2}`)
		},
		"an ack of what was not sent": func(s *server) { s.say(`{"type":"ack","n":1,"consumed":5,"limit":262144}`) },
		"a limit that falls":          func(s *server) { s.say(`{"type":"ack","n":1,"consumed":0,"limit":262143}`) },
		"a second welcome":            func(s *server) { s.welcome("boot") },
		"a type of its own":           func(s *server) { s.say(`{"type":"surprise"}`) },
		"a missing member":            func(s *server) { s.say(`{"type":"ack","n":1,"consumed":0}`) },
		"a number with a fraction":    func(s *server) { s.say(`{"type":"ping","number":1.0}`) },
		"a number too big":            func(s *server) { s.say(`{"type":"ping","number":9007199254740992}`) },
		"nested too deep": func(s *server) {
			s.say(`{"type":"ping","number":1,"x":%s}`, strings.Repeat("[", 256)+strings.Repeat("]", 256))
		},
		"a message too long": func(s *server) { s.say(`{"type":"ping","number":1}%s`, strings.Repeat(" ", messageBytes)) },
		"beyond the limit": func(s *server) {
			s.say(`{"type":"opened","n":1}`)
			s.sendData(strings.Repeat("x", window+firstLimit*3))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			session, server := start(t)
			call := session.carryTo("hi", stuck{})
			server.accept()
			server.expect("open")
			server.expectData("hi")
			server.expectEOF(1, 2)
			say(server)
			server.expectClose(1002)
			server.accept()
			server.expect("resume")
			server.say(`{"type":"gone","n":1,"outcome":"reset","code":"limit"}`)
			call.ends("", &Reset{Code: "limit"})
		})
	}
}

func TestSentAgainFromTheOtherEndsOffset(t *testing.T) {
	t.Parallel()
	session, server := start(t)
	call := session.carry("one two")
	server.accept()
	id := server.expect("open").Stream
	server.expectData("one two")
	server.say(`{"type":"opened","n":1}`)
	server.sendData("ONE ")
	server.expectEOF(1, 7)
	server.expectAck(1, 4) // the sweep's: what it says was consumed before the cut
	server.cut()
	server.accept()
	resume := server.expect("resume")
	if resume.N != 1 || resume.Stream != id || resume.Epoch != 1 || *resume.Received != 4 || *resume.Consumed != 4 {
		t.Fatalf("%+v", resume)
	}
	server.say(`{"type":"resumed","n":1,"received":4,"consumed":1,"limit":262145,"opened":""}`)
	server.sendData("TWO")
	server.expectData("two")
	server.expectEOF(1, 7)
	server.settle()
	server.cut()
	server.accept()
	if resume = server.expect("resume"); resume.Epoch != 2 || *resume.Received != 7 {
		t.Fatalf("%+v", resume)
	}
	// It has the EOF now, so nothing is sent again.
	server.say(`{"type":"resumed","n":1,"received":8,"consumed":4,"limit":262145,"opened":""}`)
	server.say(`{"type":"eof","n":1,"total":7}`)
	server.expectAck(1, 8)
	server.cut()
	server.accept()
	// Only the last acks lacked: over as soon as it began.
	if resume = server.expect("resume"); *resume.Received != 8 || *resume.Consumed != 8 {
		t.Fatalf("%+v", resume)
	}
	server.say(`{"type":"resumed","n":1,"received":8,"consumed":8,"limit":262145,"opened":""}`)
	call.ends("ONE TWO", nil)
	server.expectIdle(session)
}

func TestAnEndThatResumeConfirmedIsNotAckedAgain(t *testing.T) {
	t.Parallel()
	session, server := start(t)
	out := &gated{gate: make(chan struct{})}
	call := session.carryTo("", out)
	server.accept()
	server.expect("open")
	server.expectEOF(1, 0)
	server.say(`{"type":"opened","n":1}`)
	server.say(`{"type":"eof","n":1,"total":0}`)
	server.settle()
	server.cut()
	close(out.gate) // it takes the end while there is no link
	for {
		server.accept()
		resume := server.expect("resume")
		if *resume.Received != 1 {
			t.Fatalf("%+v", resume)
		}
		if *resume.Consumed == 1 {
			break
		}
		server.cut()
	}
	server.say(`{"type":"resumed","n":1,"received":1,"consumed":1,"limit":262144,"opened":""}`)
	call.ends("", nil)
	server.expectIdle(session)
}

func TestNoResetAfterBothEnds(t *testing.T) {
	t.Parallel()
	session, server := start(t)
	call := session.carry("")
	server.accept()
	server.expect("open")
	server.expectEOF(1, 0)
	server.say(`{"type":"opened","n":1}`)
	server.say(`{"type":"eof","n":1,"total":0}`)
	server.expectAck(1, 1)
	call.cancel()
	server.settle() // no reset comes before its answer
	server.settle()
	server.say(`{"type":"ack","n":1,"consumed":1,"limit":262144}`)
	call.ends("", nil)
}

func TestOpenedAfresh(t *testing.T) {
	t.Parallel()
	session, server := start(t)
	call := session.carry("hi")
	server.accept()
	id := server.expect("open").Stream
	server.expectData("hi")
	server.expectEOF(1, 2)
	server.cut()
	server.accept()
	server.expect("resume")
	server.say(`{"type":"gone","n":1,"outcome":"unknown"}`)
	open := server.expect("open")
	if open.N != 2 || open.Stream == id || open.Target != "t:1" {
		t.Fatalf("%+v", open)
	}
	server.expectData("hi")
	server.expectEOF(2, 2)
	server.cut()
	server.accept()
	if resume := server.expect("resume"); resume.Stream != open.Stream || resume.Epoch != 1 {
		t.Fatalf("%+v", resume)
	}
	server.say(`{"type":"gone","n":1,"outcome":"reset","code":"refused","message":"no"}`)
	call.ends("", &Reset{"refused", "no"})
}

func TestUnknownIsLost(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*server){
		"to a server that was started anew": func(s *server) { s.boot = "another" },
		"once anything was heard":           func(s *server) { s.say(`{"type":"ack","n":1,"consumed":0,"limit":262144}`) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			session, server := start(t)
			call := session.carry("hi")
			server.accept()
			server.expect("open")
			server.expectData("hi")
			change(server)
			server.cut()
			server.accept()
			server.expect("resume")
			server.say(`{"type":"gone","n":1,"outcome":"unknown"}`)
			call.endsWith("lost")
		})
	}
}

func TestStaleIsAskedAgain(t *testing.T) {
	t.Parallel()
	session, server := start(t)
	call := session.carry("hi")
	server.accept()
	server.expect("open")
	server.expectData("hi")
	server.cut()
	server.accept()
	server.expect("resume")
	server.say(`{"type":"gone","n":1,"outcome":"stale"}`)
	if resume := server.expect("resume"); resume.N != 2 || resume.Epoch != 2 {
		t.Fatalf("%+v", resume)
	}
	server.say(`{"type":"gone","n":2,"outcome":"reset","code":"limit"}`)
	call.ends("", &Reset{Code: "limit"})
}

func TestFinishedIsCleanOnlyIfBothEndsWereDelivered(t *testing.T) {
	t.Parallel()
	session, server := start(t)
	call := session.carry("hi")
	server.accept()
	server.expect("open")
	server.expectData("hi")
	server.expectEOF(1, 2)
	server.say(`{"type":"opened","n":1}`)
	server.cut()
	server.accept()
	server.expect("resume")
	server.say(`{"type":"gone","n":1,"outcome":"finished"}`)
	call.endsWith("lost")

	call = session.carry("hi")
	server.expect("open")
	server.expectData("hi")
	server.expectEOF(2, 2)
	server.say(`{"type":"opened","n":2}`)
	server.say(`{"type":"eof","n":2,"total":0}`)
	server.expectAck(2, 1)
	server.cut()
	server.accept()
	server.expect("resume")
	server.say(`{"type":"gone","n":1,"outcome":"finished"}`)
	call.ends("", nil)
}

func TestOffsetsThatCannotBe(t *testing.T) {
	t.Parallel()
	for name, resumed := range map[string]string{
		"received more than was sent":  `"received":4,"consumed":0,"limit":262144`,
		"consumed more than received":  `"received":1,"consumed":2,"limit":262144`,
		"less than was consumed":       `"received":0,"consumed":0,"limit":262144`,
		"less room than was granted":   `"received":2,"consumed":2,"limit":262143`,
		"the end, which was not there": `"received":3,"consumed":3,"limit":262144`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			session, server := start(t)
			input, write := io.Pipe()
			call := session.carryFrom(input, new(output))
			server.accept()
			server.expect("open")
			write.Write([]byte("hi"))
			server.expectData("hi")
			server.say(`{"type":"ack","n":1,"consumed":1,"limit":262144}`)
			server.cut()
			server.accept()
			server.expect("resume")
			server.say(`{"type":"resumed","n":1,%s}`, resumed)
			server.expectReset(1, "lost")
			server.say(`{"type":"reset","n":1,"code":"lost"}`)
			call.ends("", &Reset{Code: "lost"})
		})
	}
}

func TestAResetThatIsPendingGoesBareRightAfterResumed(t *testing.T) {
	t.Parallel()
	session, server := start(t)
	input, write := io.Pipe()
	call := session.carryFrom(input, new(output))
	server.accept()
	server.expect("open")
	write.Write([]byte("hi"))
	server.expectData("hi")
	server.cut()
	call.cancel()
	server.accept()
	server.expect("resume")
	server.say(`{"type":"resumed","n":1,"received":0,"consumed":0,"limit":262144,"opened":"x"}`)
	server.expectReset(1, "shutdown")
	server.sendData("discarded")
	server.say(`{"type":"eof","n":1,"total":4}`)
	server.say(`{"type":"reset","n":1,"code":"shutdown"}`)
	call.ends("", &Reset{Code: "shutdown"})
}

func TestAWriteThatFailsIsResetOnceAllElseIsDelivered(t *testing.T) {
	t.Parallel()
	session, server := start(t)
	call := session.carryTo("hi", broken{})
	server.accept()
	server.expect("open")
	server.expectData("hi")
	server.expectEOF(1, 2)
	server.say(`{"type":"opened","n":1}`)
	server.sendData("x")
	server.expectAck(1, 1) // the sweep's: it goes on consuming
	server.say(`{"type":"ack","n":1,"consumed":2,"limit":262144}`)
	server.expectReset(1, "reset")
	server.say(`{"type":"reset","n":1,"code":"reset"}`)
	if err := <-call.done; !errors.Is(err, errBroken) {
		t.Fatal(err)
	}
}

func TestWithoutAResumeWindowTheStreamEndsWithItsLink(t *testing.T) {
	t.Parallel()
	for _, change := range []func(*server){
		func(s *server) { s.window = 0 },
		func(s *server) { s.feature = "drain" },
	} {
		session, server := start(t)
		change(server)
		call := session.carry("hi")
		server.accept()
		server.expect("open")
		server.cut()
		call.endsWith("lost")
	}
}

// broken takes nothing, and stuck everything, for ever.
type (
	broken struct{}
	stuck  struct{}
)

var errBroken = errors.New("broken")

func (broken) Write([]byte) (int, error) { return 0, errBroken }
func (broken) Close() error              { return nil }
func (stuck) Write([]byte) (int, error)  { select {} }
func (stuck) Close() error               { return nil }

// gated is given the end when the gate is open.
type gated struct {
	output
	gate chan struct{}
}

func (g *gated) Close() error {
	<-g.gate
	return nil
}

type output struct{ bytes.Buffer }

func (*output) Close() error { return nil }

// call is a Carry that runs.
type call struct {
	t      *testing.T
	out    io.WriteCloser
	done   chan error
	cancel func()
}

func (s *testSession) carry(in string) *call { return s.carryTo(in, new(output)) }

func (s *testSession) carryTo(in string, out io.WriteCloser) *call {
	return s.carryFrom(strings.NewReader(in), out)
}

func (s *testSession) carryFrom(in io.Reader, out io.WriteCloser) *call {
	ctx, cancel := context.WithCancel(context.Background())
	c := &call{s.t, out, make(chan error, 1), cancel}
	go func() { c.done <- s.Carry(ctx, "t:1", in, out) }()
	return c
}

// ends waits for its end: what was written, and the reset or nil.
func (c *call) ends(written string, reset *Reset) {
	c.t.Helper()
	err := <-c.done
	var got *Reset
	switch {
	case reset == nil && err != nil,
		reset != nil && (!errors.As(err, &got) || *got != *reset):
		c.t.Fatalf("ended with %v", err)
	}
	if out, ok := c.out.(*output); ok && out.String() != written {
		c.t.Fatalf("wrote %q", out.String())
	}
}

func (c *call) endsWith(code string) {
	c.t.Helper()
	if reset, ok := errors.AsType[*Reset](<-c.done); !ok || reset.Code != code {
		c.t.Fatalf("ended with %v", reset)
	}
}
