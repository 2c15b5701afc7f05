package vmmtest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
)

// RunSnapshots runs the suite of a driver that is a vmm.Snapshotter.
func RunSnapshots(t *testing.T, h Harness) {
	s := suite{h}
	t.Run("Caps", s.snapshotCaps)
	t.Run("Copies", s.copies)
	t.Run("OwnMemory", s.ownMemory)
	from := s.saveOne(t)
	for name, f := range map[string]func(*testing.T, saved){
		"Refused": s.restoreRefused, "Cancelled": s.restoreCancelled, "Adopt": s.adoptRestored,
		"LinkUnderSave": s.linkUnderSave, "SaveRefused": s.saveRefused, "SaveCancelled": s.saveCancelled, "KillDuringSave": s.killDuringSave,
	} {
		t.Run(name, func(t *testing.T) { f(t, from) })
	}
}

func (s suite) snapshotCaps(t *testing.T) {
	c := s.Driver(t).Caps()
	if !c.Snapshots || c.Machine == "" || c.CPU == "" {
		t.Errorf("caps: %+v", c)
	}
	if again := s.Driver(t).Caps(); again != c {
		t.Errorf("caps are %+v, and %+v the next time", c, again)
	}
}

// restore restores a machine that ends with the test. It stands.
func (s suite) restore(t *testing.T, ctx context.Context, spec vmm.Spec, from vmm.Saved) vmm.VM {
	t.Helper()
	short, cancel := context.WithCancel(ctx)
	v, err := s.Driver(t).(vmm.Snapshotter).Restore(short, spec, from)
	cancel()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(t, v) })
	running(t, ctx, v, false)
	return v
}

func resume(t *testing.T, ctx context.Context, v vmm.VM) {
	t.Helper()
	if err := v.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	running(t, ctx, v, true)
}

func pause(t *testing.T, ctx context.Context, v vmm.VM) {
	t.Helper()
	if err := v.Pause(ctx); err != nil {
		t.Fatal(err)
	}
}

// answers asks over a new connection.
func (s suite) answers(t *testing.T, ctx context.Context, v vmm.VM, request, want string) {
	t.Helper()
	g, err := DialGuest(ctx, v)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if got := ask(t, ctx, g, request); got != want {
		t.Errorf("%s: %q, want %q", request, got, want)
	}
}

// copies makes copies of a machine that lives on, and a copy of a copy: each
// goes its own way, and none changes what they were made of.
func (s suite) copies(t *testing.T) {
	ctx, spec := s.begin(t)
	spec.MemoryMB += 64
	spec.VCPUs = 2
	disks(t, &spec)
	source := s.launch(t, ctx, spec)
	some, much := s.FillMB, s.FillMB*11/4
	s.answers(t, ctx, source, fmt.Sprint("fill ", some, " 7"), "filled")
	s.answers(t, ctx, source, "note source", "noted")
	g := s.dial(t, ctx, source) // open during the save
	ask(t, ctx, g, "echo up")
	pause(t, ctx, source)
	first := s.save(t, ctx, source, spec)
	if _, err := g.Ask(ctx, "echo up"); err == nil {
		t.Error("the link is open after a save")
	}
	template := first.load(t, true)
	before := digest(t, template)
	from := vmm.Saved{State: first.state, Memory: template}

	aSpec, bSpec := s.copyOf(t, spec), s.copyOf(t, spec)
	a, b := s.restore(t, ctx, aSpec, from), s.restore(t, ctx, bSpec, from)
	for name, v := range map[string]vmm.VM{"a": a, "b": b} {
		resume(t, ctx, v)
		s.answers(t, ctx, v, "noted", "source")
		s.answers(t, ctx, v, "check", fmt.Sprint("ok ", some, " 7"))
		s.answers(t, ctx, v, "query cpus", "2")
		s.answers(t, ctx, v, "query disks", "root=READONLY,ro data=WRITABLE,rw")
		s.answers(t, ctx, v, "note "+name, "noted")
	}
	// Nearly all that a guest can write, some of it over pages of its own.
	s.answers(t, ctx, a, fmt.Sprint("fill ", some, " 8"), "filled")
	s.answers(t, ctx, a, fmt.Sprint("fill ", much, " 9"), "filled")
	s.answers(t, ctx, a, "check", fmt.Sprint("ok ", much, " 9"))
	resume(t, ctx, source)
	for v, want := range map[vmm.VM]string{source: "source", a: "a", b: "b"} {
		s.answers(t, ctx, v, "noted", want)
	}
	for _, v := range []vmm.VM{source, b} {
		s.answers(t, ctx, v, "check", fmt.Sprint("ok ", some, " 7"))
	}

	pause(t, ctx, a)
	pause(t, ctx, b)
	for v, want := range map[vmm.VM]struct {
		spec        vmm.Spec
		note, check string
	}{a: {aSpec, "a", fmt.Sprint("ok ", much, " 9")}, b: {bSpec, "b", fmt.Sprint("ok ", some, " 7")}} {
		second := s.save(t, ctx, v, want.spec)
		end(t, v)
		next := s.restore(t, ctx, s.copyOf(t, want.spec), vmm.Saved{State: second.state, Memory: second.load(t, true)})
		resume(t, ctx, next)
		s.answers(t, ctx, next, "noted", want.note)
		s.answers(t, ctx, next, "check", want.check)
		end(t, next)
	}
	if digest(t, template) != before {
		t.Error("a copy changed the memory that it was made of")
	}
}

// ownMemory saves, ends and restores one machine several times.
func (s suite) ownMemory(t *testing.T) {
	ctx, spec := s.begin(t)
	disks(t, &spec)
	v := s.launch(t, ctx, spec)
	for i := range 4 {
		s.answers(t, ctx, v, fmt.Sprint("fill ", s.FillMB, " ", i), "filled")
		pause(t, ctx, v)
		from := s.save(t, ctx, v, spec)
		end(t, v)
		s.nothingLeft(t, spec)
		memory := from.load(t, false)
		v = s.restore(t, ctx, spec, vmm.Saved{State: from.state, Memory: memory, Shared: true})
		memory.Close()
		resume(t, ctx, v)
		s.answers(t, ctx, v, "check", fmt.Sprint("ok ", s.FillMB, " ", i))
		s.answers(t, ctx, v, "query disks", "root=READONLY,ro data=WRITABLE,rw")
	}
	g := s.dial(t, ctx, v)
	g.Ask(ctx, "poweroff") // may or may not be answered
	waitDone(t, ctx, v)
	if e := v.Exit(); e.Reason != vmm.GuestPowerOff {
		t.Errorf("exit: %+v", e)
	}
}

// saveOne returns a saved machine for tests that need just any.
func (s suite) saveOne(t *testing.T) saved {
	t.Helper()
	spec := s.Spec(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	v, err := s.Driver(t).Launch(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, v)
	s.answers(t, ctx, v, "fill 8 1", "filled")
	pause(t, ctx, v)
	return s.save(t, ctx, v, spec)
}

func (s suite) restoreRefused(t *testing.T, from saved) {
	ctx, good := s.begin(t)
	d := s.Driver(t).(vmm.Snapshotter)
	memory := from.load(t, true)
	state, err := io.ReadAll(io.NewSectionReader(from.state, 0, 1<<30))
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(state)
	flipped[len(flipped)/2] ^= 4
	file := func(b []byte) *os.File {
		f := newFile(t, "state")
		if _, err := f.Write(b); err != nil {
			t.Fatal(err)
		}
		return f
	}
	small := newFile(t, "small") // no memory file at all
	for name, change := range map[string]func(*vmm.Spec, *vmm.Saved){
		"empty state":        func(_ *vmm.Spec, f *vmm.Saved) { f.State = file(nil) },
		"cut state":          func(_ *vmm.Spec, f *vmm.Saved) { f.State = file(state[:len(state)-1]) },
		"half a state":       func(_ *vmm.Spec, f *vmm.Saved) { f.State = file(state[:len(state)/2]) },
		"a few bytes":        func(_ *vmm.Spec, f *vmm.Saved) { f.State = file(state[:20]) },
		"flipped bit":        func(_ *vmm.Spec, f *vmm.Saved) { f.State = file(flipped) },
		"garbage":            func(_ *vmm.Spec, f *vmm.Saved) { f.State = file(bytes.Repeat([]byte("no state "), 10000)) },
		"more than a state":  func(_ *vmm.Spec, f *vmm.Saved) { f.State = file(append(bytes.Clone(state), 0)) },
		"other memory":       func(s *vmm.Spec, _ *vmm.Saved) { s.MemoryMB += 64 },
		"other vcpus":        func(s *vmm.Spec, _ *vmm.Saved) { s.VCPUs++ },
		"no memory file":     func(_ *vmm.Spec, f *vmm.Saved) { f.Memory = small },
		"short memory":       func(_ *vmm.Spec, f *vmm.Saved) { f.Memory = shortMemory(t) },
		"memory not sealed":  func(_ *vmm.Spec, f *vmm.Saved) { f.Memory = from.load(t, false) },
		"sealed, and shared": func(_ *vmm.Spec, f *vmm.Saved) { f.Shared = true },
	} {
		spec, f := good, vmm.Saved{State: from.state, Memory: memory}
		change(&spec, &f)
		v, err := d.Restore(ctx, spec, f)
		if err == nil {
			end(t, v)
		}
		if !fault.Is(err, fault.Precondition) {
			t.Errorf("%s: error %v, want a precondition", name, err)
		}
		s.nothingLeft(t, good)
	}
	// After all of that it still serves.
	resume(t, ctx, s.restore(t, ctx, good, vmm.Saved{State: from.state, Memory: memory}))
}

// restoreCancelled gives a restore up at many points.
func (s suite) restoreCancelled(t *testing.T, from saved) {
	ctx, spec := s.begin(t)
	d := s.Driver(t).(vmm.Snapshotter)
	f := vmm.Saved{State: from.state, Memory: from.load(t, true)}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if v, err := d.Restore(cancelled, spec, f); !fault.Is(err, fault.Canceled) {
		t.Errorf("cancelled before: %v", err)
		if err == nil {
			end(t, v)
		}
	}
	for _, after := range []time.Duration{0, 1, 10, 50, 100, 130, 160, 200} {
		short, cancel := context.WithTimeout(ctx, after*time.Millisecond)
		v, err := d.Restore(short, spec, f)
		cancel()
		if err == nil {
			end(t, v)
		} else if !fault.Is(err, fault.Deadline) {
			t.Errorf("given up after %d ms: %v", int(after), err)
		}
		s.nothingLeft(t, spec)
	}
}

// adoptRestored takes up a restored machine in a process that knows nothing of
// it, before and after it runs, and saves it there.
func (s suite) adoptRestored(t *testing.T, from saved) {
	ctx, spec := s.begin(t)
	v := s.restore(t, ctx, spec, vmm.Saved{State: from.state, Memory: from.load(t, true)})
	adopt := func() {
		t.Helper()
		m := v.Machine()
		v.Close()
		var err error
		if v, err = s.Driver(t).Adopt(ctx, m, vmm.Spec{ID: spec.ID, Dir: spec.Dir, ConsoleLog: spec.ConsoleLog, VMMLog: spec.VMMLog}); err != nil {
			t.Fatal(err)
		}
	}
	adopt()
	t.Cleanup(func() { end(t, v) })
	running(t, ctx, v, false)
	resume(t, ctx, v)
	s.answers(t, ctx, v, "check", "ok 8 1")
	s.answers(t, ctx, v, "note adopted", "noted")
	adopt()
	running(t, ctx, v, true)
	pause(t, ctx, v)
	again := s.save(t, ctx, v, spec)
	end(t, v)
	v = s.restore(t, ctx, spec, vmm.Saved{State: again.state, Memory: again.load(t, false), Shared: true})
	resume(t, ctx, v)
	s.answers(t, ctx, v, "noted", "adopted")
	s.answers(t, ctx, v, "check", "ok 8 1")
}

// linkUnderSave opens and closes the link and writes to it all the time, also
// while the machine is paused and saved: what was saved is whole.
func (s suite) linkUnderSave(t *testing.T, from saved) {
	ctx, spec := s.begin(t)
	v := s.restore(t, ctx, spec, vmm.Saved{State: from.state, Memory: from.load(t, true)})
	for range 5 {
		resume(t, ctx, v)
		stop := make(chan struct{})
		var wait sync.WaitGroup
		wait.Go(func() { hammer(t, ctx, v, stop) })
		running(t, ctx, v, true)
		pause(t, ctx, v)
		next := s.save(t, ctx, v, spec)
		close(stop)
		wait.Wait()
		end(t, v)
		v = s.restore(t, ctx, spec, vmm.Saved{State: next.state, Memory: next.load(t, true)})
	}
	resume(t, ctx, v)
	s.answersAtLast(t, ctx, v, "check", "ok 8 1")
}

// answersAtLast asks over new connections until there is an answer: the guest
// may have missed that the first was made, see vmm.VM.
func (s suite) answersAtLast(t *testing.T, ctx context.Context, v vmm.VM, request, want string) {
	t.Helper()
	const patience, tries = 10 * time.Second, 5
	for range tries {
		short, cancel := context.WithTimeout(ctx, patience)
		g, err := DialGuest(short, v)
		if err != nil {
			cancel()
			t.Fatal(err)
		}
		got, err := g.Ask(short, request)
		g.Close()
		cancel()
		switch {
		case err == nil && got == want:
			return
		case err == nil:
			t.Errorf("%s: %q, want %q", request, got, want)
			return
		case short.Err() == nil:
			t.Fatal(err)
		}
		t.Logf("no answer: %v", err)
	}
	t.Errorf("%s: no answer on %d connections", request, tries)
}

// hammer opens the link until stop is closed.
func hammer(t *testing.T, ctx context.Context, v vmm.VM, stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		conn, err := v.DialLink(ctx)
		if fault.Is(err, fault.Unavailable) {
			continue // too many wait already
		}
		if err != nil {
			t.Errorf("link: %v", err)
			return
		}
		conn.Write([]byte("t0 echo hammer\n")) // may be closed by a save
		conn.Close()
	}
}

// saveRefused saves a machine that runs, and one that is gone.
func (s suite) saveRefused(t *testing.T, from saved) {
	ctx, spec := s.begin(t)
	v := s.restore(t, ctx, spec, vmm.Saved{State: from.state, Memory: from.load(t, true)})
	resume(t, ctx, v)
	to := vmm.Files{State: newFile(t, "state"), Memory: newFile(t, "memory")}
	if _, err := v.(vmm.Saver).Save(ctx, to); !fault.Is(err, fault.Precondition) {
		t.Errorf("save of a machine that runs: %v", err)
	}
	running(t, ctx, v, true)
	s.answers(t, ctx, v, "check", "ok 8 1")
	if err := v.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := v.(vmm.Saver).Save(ctx, to); !fault.Is(err, fault.Unavailable) {
		t.Errorf("save of a machine that is gone: %v", err)
	}
}

// saveCancelled gives a save up, after which the machine goes on and is saved.
func (s suite) saveCancelled(t *testing.T, from saved) {
	ctx, spec := s.begin(t)
	v := s.restore(t, ctx, spec, vmm.Saved{State: from.state, Memory: from.load(t, true)})
	for _, after := range []time.Duration{0, 1, 2, 3, 5, 8, 13, 21, 34, 55} {
		short, cancel := context.WithTimeout(ctx, after*time.Millisecond)
		_, err := v.(vmm.Saver).Save(short, vmm.Files{State: newFile(t, "state"), Memory: newFile(t, "memory")})
		cancel()
		if err != nil && !fault.Is(err, fault.Deadline) {
			t.Errorf("given up after %d ms: %v", int(after), err)
		}
	}
	resume(t, ctx, v)
	s.answers(t, ctx, v, "check", "ok 8 1")
	pause(t, ctx, v)
	again := s.save(t, ctx, v, spec)
	next := s.restore(t, ctx, s.copyOf(t, spec), vmm.Saved{State: again.state, Memory: again.load(t, true)})
	resume(t, ctx, next)
	s.answers(t, ctx, next, "check", "ok 8 1")
}

// killDuringSave kills machines while they are saved: a save that says it is
// whole is.
func (s suite) killDuringSave(t *testing.T, from saved) {
	ctx, spec := s.begin(t)
	template := from.load(t, true)
	for _, after := range []time.Duration{0, 2, 4, 6, 8, 10, 15, 20, 40} {
		v := s.restore(t, ctx, spec, vmm.Saved{State: from.state, Memory: template})
		to := saved{spec, newFile(t, "state"), newFile(t, "memory")}
		short, cancel := context.WithTimeout(ctx, after*time.Millisecond)
		var err error
		var wait sync.WaitGroup
		wait.Go(func() {
			_, err = v.(vmm.Saver).Save(ctx, vmm.Files{State: to.state, Memory: to.memory})
		})
		<-short.Done()
		cancel()
		end(t, v)
		wait.Wait()
		s.nothingLeft(t, spec)
		if err != nil {
			if !fault.Is(err, fault.Unavailable) {
				t.Errorf("save of a machine that was killed after %d ms: %v", int(after), err)
			}
			continue
		}
		next := s.restore(t, ctx, spec, vmm.Saved{State: to.state, Memory: to.load(t, true)})
		resume(t, ctx, next)
		s.answers(t, ctx, next, "check", "ok 8 1")
		end(t, next)
	}
}
