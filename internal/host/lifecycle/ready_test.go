package lifecycle

import (
	"strings"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// only returns the one snapshot there is.
func (h *host) only() SnapshotView {
	h.t.Helper()
	all := h.Snapshots()
	onDisk, err := h.p.Snapshots.List()
	if err != nil || len(all) != 1 || len(onDisk) != 1 || onDisk[0].ID != all[0].ID {
		h.t.Fatalf("snapshots %v, on disk %v (%v), want one", all, onDisk, err)
	}
	return all[0]
}

// TestWarmAfterReady makes a shape warm with ever more in it.
func TestWarmAfterReady(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	warm := func(ready snapshot.Ready) string {
		t.Helper()
		s, err := h.WarmTemplate(h.c, plain, ready)
		h.must(err)
		if got := h.only(); got.ID != s.ID {
			t.Errorf("made %s, there is %s", s.ID, got.ID)
		}
		return s.ID
	}
	bare := warm("")
	docker := warm(snapshot.ReadyDocker)
	if docker == bare || warm(snapshot.ReadyDocker) != docker || warm("") != docker {
		t.Errorf("%s, %s: made again, or not", bare, docker)
	}
	check := func(id sandbox.ID, ready snapshot.Ready) {
		t.Helper()
		v := h.create(id, plain)
		if got := h.memory(id); !strings.HasSuffix(got, "+"+string(ready)) || v.Snapshot != h.only().ID || h.only().Ready != ready {
			t.Errorf("%s knows %q, made from %q", id, got, v.Snapshot)
		}
	}
	check("sb-1", snapshot.ReadyDocker)
	if n := h.callsOf("DialDocker"); n != 1 {
		t.Errorf("Docker was used %d times before it was copied", n)
	}
	if cluster := warm(snapshot.ReadyKubernetes); cluster == docker {
		t.Error("Kubernetes is in what was made for Docker")
	}
	check("sb-2", snapshot.ReadyKubernetes)
	h.stop(true)
	h = start(t, w)
	check("sb-3", snapshot.ReadyKubernetes)
	old := h.only().ID
	h.stop(true)
	h = start(t, w, func(p *Params) { // the host has another kernel now
		k, _ := p.Kernel()
		k.ID = "k2"
		p.Kernel = kernelOf(k)
	})
	holds(t, "made again", func() bool { return len(h.Snapshots()) == 1 && h.Snapshots()[0].ID != old })
	check("sb-4", snapshot.ReadyKubernetes)
	if _, err := h.WarmTemplate(h.c, plain, "postgres"); !fault.Is(err, fault.Invalid) {
		t.Errorf("nobody knows of that: %v", err)
	}
}

// TestWarmThatDoesNotGetReady leaves what was warm before.
func TestWarmThatDoesNotGetReady(t *testing.T) {
	unable := fault.New(fault.Unimplemented, "this agent is too old")
	for name, c := range map[string]struct {
		prepare func(*host)
		ready   snapshot.Ready
		class   fault.Class
		says    string
	}{
		"missing programs": {func(h *host) { h.w.lacks = "no dockerd" }, snapshot.ReadyDocker, fault.Precondition, "no dockerd"},
		"no cluster":       {func(h *host) { h.w.lacks = "no binary" }, snapshot.ReadyKubernetes, fault.Precondition, "no binary"},
		"crashes":          {func(h *host) { h.w.crashes = maxCrashes }, snapshot.ReadyKubernetes, fault.Precondition, "no room"},
		"old agent": {func(h *host) {
			h.s.mu.Lock()
			defer h.s.mu.Unlock()
			h.s.faults = func(_ int, name string) (before, after error) {
				if name == "StartKubernetes" {
					before = unable
				}
				return before, nil
			}
		}, snapshot.ReadyKubernetes, fault.Unimplemented, "too old"},
	} {
		t.Run(name, func(t *testing.T) {
			testenv.CheckGoroutines(t)
			w := newWorld(t)
			h := start(t, w)
			bare, err := h.WarmTemplate(h.c, plain, "")
			h.must(err)
			c.prepare(h)
			_, err = h.WarmTemplate(h.c, plain, c.ready)
			wants(t, err, c.class)
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error = %v", err)
			}
			if got := h.only(); got.ID != bare.ID {
				t.Errorf("there is %+v", got)
			}
			w.checkEmpty(t)
		})
	}
}

// TestWarmWhoseMachineDies kills the VM while Docker comes up.
func TestWarmWhoseMachineDies(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	h.s.gate("RuntimeStatus")
	made := async(func() error {
		_, err := h.WarmTemplate(h.c, plain, snapshot.ReadyDocker)
		return err
	})
	holds(t, "Docker starts", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, vm := range w.vms {
			return vm.starting != ""
		}
		return false
	})
	w.crash(t, h.views()[0].ID)
	wants(t, <-made, fault.Unavailable)
	w.checkEmpty(t)
}

// TestSparesOfWhatWasReplaced looks at spares of a warm template that has
// another in its place.
func TestSparesOfWhatWasReplaced(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := withSpare(t, w)
	_, err := h.WarmTemplate(h.c, plain, snapshot.ReadyDocker)
	h.must(err)
	holds(t, "the old spare goes", func() bool { return len(h.views()) == 0 })
	h.create("sb-1", plain)
	if !h.spareIsReady() {
		t.Fatal("there is no spare")
	}
	v := h.create("", plain)
	if got := h.memory(v.ID); !strings.HasSuffix(got, "+docker") || stageNames(v)[0] != "spare" {
		t.Errorf("made in %v, it knows %q", stageNames(v), got)
	}
}

// TestWarmByItselfAndAsked has a shape made warm by itself at the same time as a
// caller asks for more in it.
func TestWarmByItselfAndAsked(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w, func(p *Params) { p.Warm.Auto = true })
	save := h.s.gate("VM.Save")
	h.create("sb-1", plain)
	building := func(is func(*warmBuild) bool) func() bool {
		return func() bool {
			h.warm.mu.Lock()
			defer h.warm.mu.Unlock()
			for _, b := range h.warm.building {
				return is(b)
			}
			return false
		}
	}
	holds(t, "one is being made", building(func(*warmBuild) bool { return true }))
	made := async(func() error {
		_, err := h.WarmTemplate(h.c, plain, snapshot.ReadyDocker)
		return err
	})
	holds(t, "it is asked for", building(func(b *warmBuild) bool { return b.asked }))
	save <- nil // the first
	save <- nil // what was asked for
	h.must(<-made)
	if got := h.only(); got.Ready != snapshot.ReadyDocker {
		t.Errorf("there is %+v", got)
	}
	for _, id := range []sandbox.ID{"sb-2", "sb-3"} { // which could wish for one
		h.must(h.Destroy(h.c, h.create(id, plain).ID))
	}
	h.create("cold", sandbox.Spec{VCPUs: 1, MemoryMB: 128, DiskMB: 64, ColdStart: true})
	h.settled("cold")
	if got := h.only(); got.Ready != snapshot.ReadyDocker {
		t.Errorf("there is %+v", got)
	}
}
