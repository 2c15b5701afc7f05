package supervise

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/delay"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/undo"
)

// unit is a Unit with what became of it.
type unit struct {
	s       *Supervisor
	def     Unit // replaced only while nobody wants it
	journal *journal

	mu      sync.Mutex
	status  Status
	changed chan struct{} // closed when status changes
	job     *job          // nil: nobody wants it
	noted   note
}

// job is one time that a unit is wanted, until it was stopped.
type job struct {
	run  context.Context // ends when the unit is to be stopped, or with the supervisor
	end  context.CancelCauseFunc
	done chan struct{} // closed when nothing of it is left
	err  error         // then: why its program could not be stopped

	mu       sync.Mutex
	deadline time.Time     // of the stop
	sooner   chan struct{} // told when the deadline was set or moved; never blocks
}

// errStop ends a job's run when the unit is to be stopped. When the run ends
// with anything else, the program is left running.
var errStop = errors.New("stop")

func newUnit(s *Supervisor, def Unit) *unit {
	return &unit{
		s: s, def: def, journal: newJournal(s.p.Dir, def.Name, s.p.Log),
		status: Status{Name: def.Name, State: Stopped, Since: time.Now()}, changed: make(chan struct{}),
	}
}

func (u *unit) redefine(def Unit) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.job != nil {
		return fault.New(fault.Precondition, "define unit %s anew: it is %s", def.Name, u.status.State)
	}
	u.def = def
	return nil
}

func (u *unit) look() (Status, <-chan struct{}) {
	u.mu.Lock()
	defer u.mu.Unlock()
	st := u.status
	st.Lines = slices.Clone(st.Lines)
	return st, u.changed
}

// set changes the status and tells those who watch.
func (u *unit) set(change func(*Status)) {
	u.mu.Lock()
	defer u.mu.Unlock()
	was := u.status.State
	change(&u.status)
	if u.status.State != was {
		u.status.Since = time.Now()
	}
	close(u.changed)
	u.changed = make(chan struct{})
}

func (u *unit) enter(state State, said string) {
	u.set(func(s *Status) { s.State, s.Said, s.Next = state, said, time.Time{} })
}

func (u *unit) wanted() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.job != nil
}

// want begins a job unless there is one. The supervisor's lock is held.
func (u *unit) want() error {
	return u.begin(note{}, nil)
}

// resume begins the job that an earlier server left.
func (u *unit) resume(found note) {
	p, err := adopt(found)
	if err != nil {
		u.s.p.Log.Warn("take a service over", "unit", u.def.Name, "error", err)
	}
	if err := u.begin(found, p); err != nil {
		u.s.p.Log.Warn("go on with a service", "unit", u.def.Name, "error", err)
		if p != nil {
			p.abandon()
		}
	}
}

func (u *unit) begin(found note, p *process) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.job != nil {
		if u.status.State == Stopping {
			return fault.New(fault.Unavailable, "start %s: it is being stopped", u.def.Name)
		}
		return nil
	}
	if err := u.journal.open(); err != nil {
		return fmt.Errorf("start %s: %w", u.def.Name, err)
	}
	j := &job{done: make(chan struct{}), sooner: make(chan struct{}, 1)}
	j.run, j.end = context.WithCancelCause(u.s.ctx)
	u.status.Crashes = max(u.status.Crashes, found.crashes)
	u.job, u.noted = j, found
	u.noted.crashes = u.status.Crashes
	u.status.State, u.status.Since, u.status.Said = Starting, time.Now(), ""
	u.s.working.Go(func() { u.drive(j, p) })
	return nil
}

// drive is the life of a job. It is the only one that touches the program.
func (u *unit) drive(j *job, p *process) {
	defer close(j.done)
	b := backoff{pace: u.s.p.pace}
	lost := u.noted.pid != 0 && p == nil // it ended while nobody watched
	if p == nil {
		u.keep(func(*note) {})
	}
	for ; j.run.Err() == nil; lost = false {
		var pause time.Duration
		if lost {
			pause = b.after(u.noted.ready, 0)
			u.crashed(nil, pause)
		} else if p, pause = u.once(j, p, &b); p != nil {
			break // it still runs
		}
		_ = delay.For(j.run, pause)
	}
	u.finish(j, p)
}

// once runs the program until it ends, starting it first unless p runs, and
// returns how long to wait before the next start. It returns the program when
// the run ended before it did.
func (u *unit) once(j *job, p *process, b *backoff) (*process, time.Duration) {
	if p == nil {
		var err error
		if p, err = u.launch(j.run); err != nil {
			pause := b.after(false, 0)
			u.set(func(s *Status) { s.State, s.Said, s.Next = Failed, oneLine(err.Error()), time.Now().Add(pause) })
			return nil, pause
		}
	}
	ready := u.attend(j, p)
	if j.run.Err() != nil {
		return p, 0
	}
	var healthy time.Duration
	if !ready.IsZero() {
		healthy = time.Since(ready)
	}
	pause := b.after(!ready.IsZero(), healthy)
	u.crashed(p, pause)
	return nil, pause
}

// launch starts the program once all that it needs is ready.
func (u *unit) launch(ctx context.Context) (*process, error) {
	if err := u.awaitNeeds(ctx); err != nil {
		return nil, err
	}
	u.enter(Starting, "")
	if u.def.Prepare != nil {
		short, cancel := context.WithTimeout(ctx, u.s.p.pace.prepare)
		defer cancel()
		if err := u.def.Prepare(short); err != nil {
			return nil, fmt.Errorf("prepare: %w", err)
		}
	}
	if err := u.s.p.Gate.Enter(ctx); err != nil {
		return nil, err
	}
	p, err := u.spawn()
	u.s.p.Gate.Leave()
	if err != nil {
		return nil, err
	}
	u.keep(func(n *note) { n.pid, n.started, n.ready = p.pid, p.started, false })
	return p, nil
}

// keep changes the note. What can't be kept is a loss only if the server crashes.
func (u *unit) keep(change func(*note)) {
	change(&u.noted)
	if err := u.noted.write(u.s.notePath(u.def.Name)); err != nil {
		u.s.p.Log.Warn("keep a note", "unit", u.def.Name, "error", err)
	}
}

func (u *unit) awaitNeeds(ctx context.Context) error {
	for _, need := range u.def.Needs {
		for {
			st, changed := u.s.Status(need)
			if st.State == Ready {
				break
			}
			u.enter(Waiting, "for "+need+": "+st.now())
			if st.State == Stopped {
				if err := u.s.Start(need); err != nil {
					return err
				}
				continue
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	return nil
}

// attend asks the program until it is ready, and waits for its end. It returns
// since when it was ready, zero: never; or early, when the job's run ends.
func (u *unit) attend(j *job, p *process) (ready time.Time) {
	u.set(func(s *Status) { s.PID = p.pid })
	if ready = u.awaitReady(j, p); ready.IsZero() {
		return ready
	}
	select {
	case <-p.ended:
	case <-j.run.Done():
	}
	return ready
}

// awaitReady asks the program until it is ready, and returns when that was;
// zero: it ended before, or the job's run did. One that was ready under the
// server before is believed: it has served all the time.
func (u *unit) awaitReady(j *job, p *process) time.Time {
	if !p.child && u.noted.ready {
		u.enter(Ready, "")
		return time.Now()
	}
	pause := u.s.p.pace.firstLook
	for {
		said, err := u.ask(j, p)
		if p.hasEnded() || j.run.Err() != nil {
			return time.Time{}
		}
		if err == nil {
			u.keep(func(n *note) { n.ready = true })
			u.enter(Ready, said)
			return time.Now()
		}
		u.enter(Starting, oneLine(err.Error()))
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-p.ended:
		case <-j.run.Done():
		}
		timer.Stop()
		pause = min(pause*3/2, u.s.p.pace.lastLook)
	}
}

// ask asks the service once, for as long as it runs and is wanted.
func (u *unit) ask(j *job, p *process) (said string, err error) {
	if u.def.Ready == nil {
		return "", nil
	}
	ctx, cancel := context.WithTimeout(j.run, u.s.p.pace.ask)
	defer cancel()
	answered := make(chan struct{})
	defer close(answered)
	u.s.working.Go(func() {
		select {
		case <-p.ended:
			cancel()
		case <-answered:
		}
	})
	said, err = u.def.Ready(ctx)
	return oneLine(said), err
}

// crashed tells of a program that ended by itself; nil: one whose end nobody saw.
func (u *unit) crashed(p *process, pause time.Duration) {
	u.journal.drain()
	exit := Exit{}
	if p != nil {
		exit = p.exit
	}
	lines := u.journal.last(keptLines)
	u.set(func(s *Status) {
		s.State, s.Said, s.PID = Failed, "", 0
		s.Crashes, s.Last, s.Lines, s.Next = s.Crashes+1, &exit, lines, time.Now().Add(pause)
		if pause == 0 {
			s.State, s.Next = Starting, time.Time{}
		}
	})
	st, _ := u.look()
	u.journal.say(fmt.Sprintf("%s, next start in %s", exit, pause))
	u.s.p.Log.Warn("service ended", "service", u.def.Name, "how", exit.String(), "crashes", st.Crashes, "next_start_in", pause)
	u.keep(func(n *note) { n.pid, n.crashes = 0, st.Crashes })
	u.cleanUp()
}

func (u *unit) cleanUp() {
	if u.def.CleanUp == nil {
		return
	}
	ctx, cancel := undo.Detach(context.Background())
	defer cancel()
	if err := u.def.CleanUp(ctx); err != nil {
		u.s.p.Log.Warn("clean up after a service", "service", u.def.Name, "error", err)
	}
}

// finish ends a job: with its program, if that is what ended the run.
func (u *unit) finish(j *job, p *process) {
	if !errors.Is(context.Cause(j.run), errStop) {
		if p != nil {
			p.abandon()
		}
		j.err = errors.New("the supervision has ended before")
		return
	}
	u.enter(Stopping, "")
	if p != nil {
		u.end(j, p)
		u.journal.drain()
	}
	if u.def.KillRest {
		u.killRest()
	}
	u.cleanUp()
	if p != nil && !p.hasEnded() {
		j.err = fmt.Errorf("process %d can't be killed", p.pid)
	}
	u.forget(p)
}

// forget leaves the unit as one that nobody wants.
func (u *unit) forget(p *process) {
	if err := unix.Unlink(u.s.notePath(u.def.Name)); err != nil && err != unix.ENOENT {
		u.s.p.Log.Warn("remove a note", "unit", u.def.Name, "error", err)
	}
	_ = unix.Rmdir(u.cgroup()) // stays where somebody is left in it
	u.set(func(s *Status) {
		s.State, s.Said, s.PID, s.Next = Stopped, "", 0, time.Time{}
		if p != nil && p.hasEnded() {
			exit := p.exit
			s.Last = &exit
		}
		u.job = nil
	})
}

// stop asks the job to end within limit and waits for that.
func (u *unit) stop(ctx context.Context, limit time.Duration) error {
	u.mu.Lock()
	j := u.job
	u.mu.Unlock()
	if j == nil {
		return nil
	}
	j.hurry(time.Now().Add(limit))
	j.end(errStop)
	select {
	case <-j.done:
	case <-ctx.Done():
		return fmt.Errorf("stop %s: %w", u.def.Name, context.Cause(ctx))
	}
	if j.err != nil {
		return fmt.Errorf("stop %s: %w", u.def.Name, j.err)
	}
	return nil
}

// hurry sets the deadline of a stop, or moves it to an earlier time.
func (j *job) hurry(deadline time.Time) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.deadline.IsZero() && !deadline.Before(j.deadline) {
		return
	}
	j.deadline = deadline
	select {
	case j.sooner <- struct{}{}:
	default:
	}
}

func (j *job) left() time.Duration {
	j.mu.Lock()
	defer j.mu.Unlock()
	return max(0, time.Until(j.deadline))
}

// close ends what the unit has open. Its job has been told.
func (u *unit) close() {
	u.mu.Lock()
	j := u.job
	u.mu.Unlock()
	if j != nil {
		<-j.done
	}
	u.journal.close()
}

// oneLine makes a text a line that fits into a status.
func oneLine(text string) string {
	text = strings.Join(strings.Fields(strings.ToValidUTF8(text, "?")), " ")
	if len(text) > maxLine {
		text = strings.ToValidUTF8(text[:maxLine], "") + "…"
	}
	return text
}

const (
	// maxLine bounds a line of a status, in bytes.
	maxLine = 300
	// keptLines is how many lines a status has of what a program wrote last.
	keptLines = 5
)
