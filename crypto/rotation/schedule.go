package rotation

import (
	"errors"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
)

// A key is replaced at two thirds of its life, give or take a twentieth of that, so that logs that began together do not go on together.
const jitterShare = 0.05

// due is when a key with this life is replaced. r is in [0, 1).
func due(begin, end time.Time, r float64) time.Time {
	third := float64(end.Sub(begin)) * 2 / 3
	return begin.Add(time.Duration(third * (1 + jitterShare*(2*r-1))))
}

// phaseAt is the phase by age alone.
func phaseAt(now, begin, due, end time.Time) Phase {
	life, age := end.Sub(begin), now.Sub(begin)
	switch {
	case age >= life:
		return PhaseExpired
	case age >= life*20/24:
		return PhaseAlarm
	case age >= life*18/24:
		return PhaseWarn
	case !now.Before(due):
		return PhaseDue
	}
	return PhaseFresh
}

// Times between attempts.
const (
	retryFirst = time.Second
	retryMost  = time.Minute
)

// pace spaces the attempts of something that fails. The zero pace does not wait.
type pace struct {
	wait time.Duration
	next time.Time
}

func (p *pace) ready(now time.Time) bool { return !now.Before(p.next) }

// failed sets the next attempt: 1 s after the first failure, then twice as long each time, up to 1 min, by up to a quarter less.
// A refused credential waits 1 min at once: no storm of attempts on a token that counts them.
func (p *pace) failed(now time.Time, err error, r float64) {
	p.wait = min(max(2*p.wait, retryFirst), retryMost)
	if errors.Is(err, keys.ErrCredential) {
		p.wait = retryMost
	}
	p.next = now.Add(time.Duration(float64(p.wait) * (1 - r/4)))
}

func (p *pace) succeeded() { *p = pace{} }
