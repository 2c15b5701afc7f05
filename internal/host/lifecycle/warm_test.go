package lifecycle

import (
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

func stageNames(v View) []string {
	var names []string
	for _, s := range v.Stages {
		names = append(names, s.Name)
	}
	return names
}

// memory is what the guest of a sandbox knows.
func (h *host) memory(id sandbox.ID) string {
	h.t.Helper()
	vm := h.w.vm(h.t, id)
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	if vm.held || !vm.running {
		h.t.Errorf("%s: held %v, running %v", id, vm.held, vm.running)
	}
	return vm.memory
}

func TestWarmCreateIsACopy(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	warm, err := h.WarmTemplate(h.c, plain, "")
	h.must(err)
	if again, err := h.WarmTemplate(h.c, plain, ""); err != nil || again.ID != warm.ID {
		t.Errorf("again: %v, %v", again, err)
	}
	w.checkEmpty(t) // the machine that was copied is gone
	check := func(h *host, id sandbox.ID) {
		t.Helper()
		v := h.create(id, plain)
		if got := h.memory(id); !strings.HasPrefix(got, "boot 1 of warm-") || v.Snapshot != warm.ID {
			t.Errorf("%s has the memory %q, made from %q", id, got, v.Snapshot)
		}
		if got := strings.Join(stageNames(v), " "); got != "record queue slot memory disk restore hello configure" {
			t.Errorf("stages: %s", got)
		}
		g, done, err := h.Use(h.c, id)
		h.must(err)
		defer done()
		if c := g.(*fakeGuest).config; len(c.BootID) != 36 || c.ID != string(id) {
			t.Errorf("configured as %+v", c)
		}
	}
	check(h, "sb-1")
	check(h, "sb-2")
	for what, spec := range map[string]sandbox.Spec{
		"cold": {VCPUs: 1, MemoryMB: 128, DiskMB: 64, ColdStart: true}, "vcpus": {VCPUs: 2, MemoryMB: 128, DiskMB: 64},
		"memory": {VCPUs: 1, MemoryMB: 256, DiskMB: 64}, "disk": {VCPUs: 1, MemoryMB: 128, DiskMB: 65}, "big": {Template: "big", VCPUs: 1, MemoryMB: 128, DiskMB: 64},
	} {
		if v := h.create(sandbox.ID(what), spec); v.Snapshot != "" || !slices.Contains(stageNames(v), "launch") {
			t.Errorf("%s: made from %q", what, v.Snapshot)
		}
	}
	h.stop(true)
	h = start(t, w) // reads it from disk
	check(h, "sb-3")
	h.stop(true)
	h = start(t, w, func(p *Params) { // the host has another kernel now
		k, _ := p.Kernel()
		k.ID = "k2"
		p.Kernel = kernelOf(k)
	})
	if v := h.create("sb-4", plain); v.Snapshot != "" {
		t.Error("a machine of another kernel was copied")
	}
	holds(t, "the shape is warm again", func() bool {
		list, err := h.p.Snapshots.List()
		return err == nil && len(list) == 1 && list[0].Fits.KernelID == "k2" && list[0].ID != warm.ID
	})
}

func TestWarmStartFallsBack(t *testing.T) {
	for _, s := range (&boot{}).copySteps() {
		t.Run(s.name, func(t *testing.T) {
			testenv.CheckGoroutines(t)
			w := newWorld(t)
			br := &breaker{}
			h := start(t, w, func(p *Params) { p.Break = br.hook })
			_, err := h.WarmTemplate(h.c, plain, "")
			h.must(err)
			br.mu.Lock()
			br.step = "create " + s.name
			br.mu.Unlock()
			v := h.create("sb-1", plain)
			if !br.hit || v.Snapshot != "" || !slices.Contains(stageNames(v), "warm start failed") || !slices.Contains(stageNames(v), "launch") {
				t.Errorf("hit %v, made from %q by %v", br.hit, v.Snapshot, stageNames(v))
			}
			h.memory("sb-1")
			w.checkWhole(t, h.List())
			h.must(h.Destroy(h.c, "sb-1"))
			w.checkEmpty(t)
		})
	}
}

func TestWarmTemplatesStayWithinTheirBudgets(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w, func(p *Params) { p.Warm = Warm{MemoryMB: 1, DiskMB: 2} })
	var ids []string
	for _, mb := range []int{128, 129, 130} { // each has a chunk of memory and one of state
		s, err := h.WarmTemplate(h.c, sandbox.Spec{VCPUs: 1, MemoryMB: mb, DiskMB: 64}, "")
		h.must(err)
		ids = append(ids, s.ID)
	}
	inRAM := 0
	for _, x := range h.stock.list() {
		if _, in := x.lastUse(); in {
			inRAM++
		}
	}
	list, err := h.p.Snapshots.List()
	h.must(err)
	if inRAM != 1 || len(list) != 1 || list[0].ID != ids[2] {
		t.Errorf("%d in RAM, on disk %v, made %v", inRAM, list, ids)
	}
}

func TestShapesBecomeWarmByThemselves(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w, func(p *Params) { p.Warm.Auto = true })
	if v := h.create("sb-1", plain); v.Snapshot != "" {
		t.Error("the first was a copy")
	}
	holds(t, "warm", func() bool {
		list, err := h.p.Snapshots.List()
		return err == nil && len(list) == 1
	})
	holds(t, "a copy", func() bool {
		v := h.create("sb-2", plain)
		if v.Snapshot == "" {
			h.must(h.Destroy(h.c, "sb-2"))
		}
		return v.Snapshot != ""
	})
}

func TestHibernation(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	for _, paused := range []bool{false, true} {
		v := h.create("sb-1", plain)
		memory := h.memory("sb-1")
		if paused {
			h.must(h.Pause(h.c, "sb-1"))
		}
		h.must(h.Hibernate(h.c, "sb-1"))
		w.checkWhole(t, h.List())
		h.stop(true)
		h = start(t, w)
		w.checkWhole(t, h.List())
		h.must(h.Resume(h.c, "sb-1"))
		if got, _ := h.Get("sb-1"); got.State != sandbox.Running || got.HostIP != v.HostIP || h.memory("sb-1") != memory {
			t.Errorf("it woke as %+v with %q", got, h.memory("sb-1"))
		}
		w.checkWhole(t, h.List())
		h.must(h.Destroy(h.c, "sb-1"))
		w.checkEmpty(t)
	}
}

// TestHibernatedOverAReboot loses the slot, and nothing else.
func TestHibernatedOverAReboot(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	h.create("sb-1", plain)
	memory := h.memory("sb-1")
	h.must(h.Hibernate(h.c, "sb-1"))
	h.stop(true)
	w.reboot()
	h = start(t, w)
	h.must(h.Resume(h.c, "sb-1"))
	if got := h.memory("sb-1"); got != memory {
		t.Errorf("it woke with %q", got)
	}
	w.checkWhole(t, h.List())
}

func TestAResumeEndsAHibernation(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	h.create("sb-1", plain)
	h.s.gate("VM.Save")
	slept := async(func() error { return h.Hibernate(h.c, "sb-1") })
	holds(t, "held", func() bool {
		vm := w.vm(t, "sb-1")
		w.mu.Lock()
		defer w.mu.Unlock()
		return vm.held && !vm.running
	})
	h.must(h.Resume(h.c, "sb-1"))
	wants(t, <-slept, fault.Canceled)
	h.memory("sb-1")
	w.checkWhole(t, h.List())
}

// TestBrokenSleep breaks each step of a hibernation: the sandbox goes on.
func TestBrokenSleep(t *testing.T) {
	for _, step := range []string{"hibernate capture", "hibernate write", "hibernate record"} {
		for _, paused := range []bool{false, true} {
			testenv.CheckGoroutines(t)
			w := newWorld(t)
			br := &breaker{step: step}
			h := start(t, w, func(p *Params) { p.Break = br.hook })
			h.create("sb-1", plain)
			want := sandbox.Running
			if paused {
				h.must(h.Pause(h.c, "sb-1"))
				want = sandbox.Paused
			}
			if err := h.Hibernate(h.c, "sb-1"); err == nil || !br.hit {
				t.Errorf("%s: %v", step, err)
			}
			if got := h.state("sb-1"); got != want {
				t.Errorf("%s: it is %s, want %s", step, got, want)
			}
			w.checkWhole(t, h.List())
			h.must(h.Hibernate(h.c, "sb-1"))
			h.must(h.Resume(h.c, "sb-1"))
			h.memory("sb-1")
			h.must(h.Destroy(h.c, "sb-1"))
			w.checkEmpty(t)
		}
	}
}

// TestBrokenWaking breaks each step of a restore. Until its processors have
// run, the sandbox stays asleep; from then on it has its disk.
func TestBrokenWaking(t *testing.T) {
	for _, s := range (&boot{}).restoreSteps() {
		t.Run(s.name, func(t *testing.T) {
			testenv.CheckGoroutines(t)
			w := newWorld(t)
			br := &breaker{}
			h := start(t, w, func(p *Params) { p.Break = br.hook })
			h.create("sb-1", plain)
			h.must(h.Hibernate(h.c, "sb-1"))
			br.mu.Lock()
			br.step = "resume " + s.name
			br.mu.Unlock()
			err := h.Resume(h.c, "sb-1")
			if err == nil || !br.hit {
				t.Errorf("hit %v: %v", br.hit, err)
			}
			want := sandbox.Hibernated
			if slices.Contains([]string{"hello", "configure", "running"}, s.name) {
				want = sandbox.Failed
			}
			if got := h.state("sb-1"); got != want {
				t.Errorf("it is %s, want %s", got, want)
			}
			w.checkWhole(t, h.List())
			h.must(h.Resume(h.c, "sb-1"))
			w.checkWhole(t, h.List())
			h.must(h.Destroy(h.c, "sb-1"))
			w.checkEmpty(t)
		})
	}
}

// TestAMachineRestsBeforeItIsCopied looks at how the connections to it were
// when it was written down.
func TestAMachineRestsBeforeItIsCopied(t *testing.T) {
	testenv.CheckGoroutines(t)
	const rest = 20 * time.Millisecond
	var mu sync.Mutex
	var guests []*restingGuest
	h := start(t, newWorld(t), func(p *Params) {
		p.Warm.Rest = rest
		connect := p.Connect
		p.Connect = func(vm vmm.VM, log *slog.Logger) guestconn.Guest {
			g := &restingGuest{fakeGuest: connect(vm, log).(*fakeGuest)}
			mu.Lock()
			defer mu.Unlock()
			guests = append(guests, g)
			return g
		}
	})
	began := time.Now()
	_, err := h.WarmTemplate(h.c, plain, "")
	h.must(err)
	if took := time.Since(began); took < rest {
		t.Errorf("it rested for less than %v", took)
	}
	if len(guests) != 1 || !guests[0].ranWhenClosed {
		t.Errorf("%d connections, of which the first was not closed while the guest was held and ran", len(guests))
	}
}

// restingGuest notes whether its machine ran, held, when it was closed first.
type restingGuest struct {
	*fakeGuest
	once          sync.Once
	ranWhenClosed bool
}

func (g *restingGuest) Close() error {
	g.once.Do(func() {
		g.m.w.mu.Lock()
		defer g.m.w.mu.Unlock()
		g.ranWhenClosed = g.m.running && g.m.held
	})
	return g.fakeGuest.Close()
}

// TestARestIsTakenBack fails a machine's copy after its rest.
func TestARestIsTakenBack(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w, func(p *Params) { p.Warm.Rest = time.Millisecond })
	h.s.mu.Lock()
	h.s.faults = func(_ int, name string) (before, after error) {
		if name == "VM.Save" {
			before = fault.New(fault.Internal, "no room")
		}
		return before, nil
	}
	h.s.mu.Unlock()
	if _, err := h.WarmTemplate(h.c, plain, ""); err == nil || !strings.Contains(err.Error(), "no room") {
		t.Errorf("error = %v", err)
	}
	w.checkEmpty(t)
}
