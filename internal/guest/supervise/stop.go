package supervise

import (
	"context"
	"time"

	"golang.org/x/sys/unix"
)

// end asks the program to end, and kills it when the time of the job is over.
func (u *unit) end(j *job, p *process) {
	if u.def.BeforeStop != nil && j.left() > 0 {
		u.beforeStop(j, p)
	}
	if j.left() > 0 {
		u.tell(p, u.def.StopSignal)
		if u.awaitEnd(j, p) {
			return
		}
		u.s.p.Log.Warn("service does not end, killing it", "service", u.def.Name)
	}
	u.tell(p, unix.SIGKILL)
	timer := time.NewTimer(u.s.p.pace.kill)
	defer timer.Stop()
	select {
	case <-p.ended:
	case <-timer.C:
		u.s.p.Log.Error("service can't be killed", "service", u.def.Name, "pid", p.pid)
		p.abandon()
	}
}

func (u *unit) tell(p *process, sig unix.Signal) {
	if err := p.signal(sig); err != nil && err != unix.ESRCH {
		u.s.p.Log.Warn("signal a service", "service", u.def.Name, "signal", unix.SignalName(sig), "error", err)
	}
}

// beforeStop runs what comes before the signal. It ends with the time of the
// job, or with the program.
func (u *unit) beforeStop(j *job, p *process) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(j.run), j.left())
	defer cancel()
	done := make(chan error, 1)
	u.s.working.Go(func() { done <- u.def.BeforeStop(ctx) })
	gone := u.awaitEither(j, p, done)
	cancel()
	if !gone {
		return
	}
	<-done
}

// awaitEither waits for the error of what runs before the signal, and reports
// whether that is still to come.
func (u *unit) awaitEither(j *job, p *process, done <-chan error) bool {
	for {
		timer := time.NewTimer(j.left())
		select {
		case err := <-done:
			timer.Stop()
			if err != nil {
				u.s.p.Log.Warn("before the stop of a service", "service", u.def.Name, "error", err)
			}
			return false
		case <-j.sooner:
			timer.Stop()
		case <-p.ended:
			timer.Stop()
			return true
		case <-timer.C:
			return true
		}
	}
}

// awaitEnd waits for the end of the program, and reports whether it came in
// time.
func (u *unit) awaitEnd(j *job, p *process) bool {
	for {
		timer := time.NewTimer(j.left())
		select {
		case <-p.ended:
			timer.Stop()
			return true
		case <-j.sooner:
			timer.Stop()
		case <-timer.C:
			return false
		}
	}
}
