// Package wstunnel is a client of the protocol wstunnel.1, with resumption, on any WebSocket library. It was written from
// docs/reference/protocol.md and nothing else; what is quoted in comments stands there.
//
// It has no control link: it opens forward links only, one a stream, and notices by itself when one is lost.
package wstunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

const (
	resumeWindow = 300 // seconds
	dialWithin   = 10 * time.Second
	firstWithin  = 10 * time.Second // of trying, before there is a stream that could be resumed
	pauseFirst   = 50 * time.Millisecond
	pauseMost    = 5 * time.Second
	stopWithin   = 2 * time.Second
)

// Session is all that one running client has at a server. Its streams go one after the other: they share a link.
type Session struct {
	login   *Login
	upgrade Upgrade
	log     func(format string, arguments ...any)
	id      string
	lock    sync.Mutex
	changed *sync.Cond
	spare   *link // the last stream's, if it was left idle
}

// NewSession begins with the first stream. What log is told is for a person.
func NewSession(login *Login, upgrade Upgrade, log func(format string, arguments ...any)) *Session {
	s := &Session{login: login, upgrade: upgrade, log: log, id: newID()}
	s.changed = sync.NewCond(&s.lock)
	return s
}

// Carry opens a stream to the target, sends it what in has to say, to its end, and writes to out what comes, and closes
// it behind the end. It returns nil once both ends were delivered. Otherwise the error is a *Reset, a *Refusal, or what
// the connection to the server, in or out had. When ctx is done the stream is reset.
func (s *Session) Carry(ctx context.Context, target string, in io.Reader, out io.WriteCloser) error {
	st := newStream(&s.lock, s.changed, s.log, target)
	dialling, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() {
		s.locked(func() { st.abort("shutdown", false) })
		time.AfterFunc(stopWithin, func() {
			cancel()
			s.locked(func() { st.leave() })
		})
	})()
	go st.readFrom(in)
	written := make(chan error, 1)
	go func() { written <- st.writeTo(out) }()
	err := s.keep(dialling, st)
	s.locked(func() { st.finish(&Reset{Code: "lost"}) })
	select {
	case failure := <-written:
		if failure != nil {
			return failure
		}
	case <-time.After(closeWithin): // "as far as it takes them at once"
	}
	if err == nil && st.result != nil {
		return st.result
	}
	return err
}

// Close ends the session, which must not be used afterwards.
func (s *Session) Close() {
	l := s.takeSpare()
	if l == nil {
		return
	}
	s.locked(func() { l.lose(closing{1000, ""}) })
	<-l.ended
}

func (s *Session) takeSpare() *link {
	s.lock.Lock()
	defer s.lock.Unlock()
	l := s.spare
	s.spare = nil
	if l == nil || l.state != idle {
		return nil
	}
	return l
}

func (s *Session) locked(do func()) {
	s.lock.Lock()
	defer s.lock.Unlock()
	do()
}

// keep has the stream on a link, one after the other, until it is over. The error is why there is none.
func (s *Session) keep(ctx context.Context, st *stream) error {
	deadline := time.Now().Add(firstWithin)
	pause := time.Duration(0)
	var moved number
	for l := s.takeSpare(); ; l = nil {
		if l == nil {
			var err error
			if l, err = s.dial(ctx, deadline, pause); err != nil {
				return err
			}
		}
		s.lock.Lock()
		if !st.over {
			l.begin(st)
		}
		for st.link == l {
			s.changed.Wait()
		}
		over, now := st.over, st.up.consumed+st.down.received
		if over {
			s.spare = l
		}
		deadline = st.detached.Add(time.Duration(l.welcome.ResumeWindow) * time.Second)
		s.lock.Unlock()
		if over {
			return nil
		}
		if !slices.Contains(l.welcome.Features, "resume") {
			return &Reset{"lost", "the link was lost, and the server cannot resume"}
		}
		pause = 0
		if now == moved {
			pause = pauseFirst
		}
		moved = now
	}
}

// dial makes a link that has greeted, trying until the deadline, after a pause and after longer ones.
func (s *Session) dial(ctx context.Context, deadline time.Time, pause time.Duration) (*link, error) {
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	var last error
	for {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			if last == nil {
				last = &Reset{Code: "lost"}
			}
			return nil, last
		}
		l, err := s.dialOnce(ctx)
		if err == nil {
			return l, nil
		}
		s.log("no link: %v", err)
		last = err
		var refusal *Refusal
		var untrusted *tls.CertificateVerificationError
		if errors.As(err, &refusal) && refusal.final() || errors.As(err, &untrusted) ||
			errors.Is(err, errPin) || errors.Is(err, errVersion) {
			return nil, err
		}
		pause = min(max(2*pause, pauseFirst), pauseMost)
		pause += rand.N(pause / 4)
	}
}

func (s *Session) dialOnce(ctx context.Context) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, dialWithin)
	defer cancel()
	conn, err := s.login.connect(ctx)
	if err != nil {
		return nil, err
	}
	// The upgrade ends with the context too, and so does the greeting.
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	w := &watched{Conn: conn, since: time.Now()}
	socket, err := s.upgrade(ctx, w, s.login)
	if err != nil {
		conn.Close()
		return nil, err
	}
	l := &link{
		lock: &s.lock, changed: s.changed, socket: socket, conn: w, log: s.log, ended: make(chan struct{}),
	}
	hello := message{
		Type: "hello", Version: 1, Session: s.id, Role: "forward", Agent: "example-go/2",
		ResumeWindow: resumeWindow, Features: []string{"resume"},
	}
	if err := l.greet(hello); err != nil {
		return nil, fmt.Errorf("greeting: %w", err)
	}
	return l, nil
}
