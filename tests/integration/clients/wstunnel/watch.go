package wstunnel

import (
	"errors"
	"time"
)

// "Life of a link" and the deadlines elsewhere.
const (
	answerWithin   = 10 * time.Second // welcome, resumed, gone, the answer to a reset
	closeWithin    = time.Second
	tickEvery      = 250 * time.Millisecond
	sweepEvery     = time.Second
	silence        = 13 * time.Second
	silenceAnswer  = 10 * time.Second
	progress       = 3 * time.Second
	progressAnswer = 5 * time.Second
)

var errDead = errors.New("no answer to ping")

// watch keeps time.
func (l *link) watch() {
	ticker := time.NewTicker(tickEvery)
	defer ticker.Stop()
	for range ticker.C {
		l.lock.Lock()
		over := l.state == closed
		if !over {
			l.tick(time.Now())
		}
		l.lock.Unlock()
		if over {
			return
		}
	}
}

func (l *link) tick(now time.Time) {
	if now.Sub(l.ticked) > time.Second { // we were late, and blame no peer for it
		l.owed, l.asked = time.Time{}, time.Time{}
		l.conn.last.Store(int64(now.Sub(l.conn.since)))
	}
	l.ticked = now
	if l.stream != nil && now.Sub(l.swept) >= sweepEvery {
		l.swept = now
		l.stream.sweep()
		l.changed.Broadcast()
	}
	if !l.answerBy.IsZero() && now.After(l.answerBy) {
		l.lose(Violation("no answer in time"))
		return
	}
	if l.state != greeting {
		l.probe(now)
	}
}

// probe asks whether the link lives when there is a reason to.
func (l *link) probe(now time.Time) {
	heard := l.conn.heard()
	if heard.After(l.owed) {
		l.owed = time.Time{}
	}
	switch {
	case !l.asked.IsZero() && heard.After(l.asked):
		l.asked = time.Time{}
	case !l.asked.IsZero():
		if now.After(l.deadAt) {
			l.lose(errDead)
		}
	case !l.owed.IsZero() && now.Sub(l.owed) >= max(progress, 4*l.trip):
		l.ping(now, progressAnswer)
	case now.Sub(heard) >= silence:
		l.ping(now, silenceAnswer)
	}
}

func (l *link) ping(now time.Time, within time.Duration) {
	l.asked, l.deadAt = now, now.Add(within)
	l.answer(message{Type: "ping", Number: new(number(1))})
	l.changed.Broadcast()
}
