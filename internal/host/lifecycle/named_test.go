package lifecycle

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/kernel"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// snap writes a sandbox down.
func (h *host) snap(id sandbox.ID, name string) SnapshotView {
	h.t.Helper()
	s, stopped, err := h.CreateSnapshot(h.c, id, name)
	if err != nil || stopped <= 0 {
		h.t.Fatalf("snapshot of %s: stopped %v, %v", id, stopped, err)
	}
	return s
}

func TestSnapshotsAreTemplates(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	spec := plain
	spec.DefaultEnv, spec.DefaultUser = map[string]string{"A": "own"}, "me"
	h.create("sb-1", spec)
	memory := h.memory("sb-1")
	s := h.snap("sb-1", "ready")
	if s.Kind != snapshot.Named || s.Name != "ready" || s.Source != "sb-1" || s.Template != "minimal" || s.Env["A"] != "own" || s.Env["PATH"] != "/bin" || s.User != "me" || s.Problem != "" {
		t.Errorf("%+v", s)
	}
	h.memory("sb-1")
	h.must(h.Destroy(h.c, "sb-1"))
	check := func(h *host, id sandbox.ID) {
		t.Helper()
		v := h.create(id, sandbox.Spec{Template: "ready"})
		if got := h.memory(id); got != memory || v.Snapshot != s.ID || v.Spec.MemoryMB != 128 || v.Spec.DiskMB != 64 || v.User != "me" || v.Env["A"] != "own" {
			t.Errorf("%s knows %q: %+v", id, got, v)
		}
		if bootID, _ := h.config(id); bootID == "" {
			t.Errorf("%s has no boot id of its own", id)
		}
	}
	check(h, "sb-2")
	cold := h.create("sb-cold", sandbox.Spec{Template: "ready", ColdStart: true, MemoryMB: 256})
	if h.memory("sb-cold") == memory || cold.Snapshot != s.ID {
		t.Errorf("asked to boot: %+v", cold)
	}
	if disk, err := os.ReadFile(h.p.Records.DataDisk("sb-cold")); err != nil || string(disk) != "64" {
		t.Errorf("its disk: %q, %v", disk, err)
	}
	two := h.snap("sb-2", "second")
	if two.Parent != s.ID || two.Template != "ready" {
		t.Errorf("lineage: %+v", two)
	}
	h.stop(true)
	h = start(t, w) // reads them from disk
	check(h, "sb-3")
	if images, _ := h.ImagesInUse(); !images["sha256:1"] {
		t.Error("the image of a snapshot is not in use")
	}
	for _, v := range h.Snapshots() {
		if v.ID == s.ID && len(v.Users) != 3 {
			t.Errorf("users: %v", v.Users)
		}
	}
	w.checkWhole(t, h.List())
	w.checkSnapshots(t, h)
}

func TestSnapshotsThatAreRefused(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	h.create("sb-1", plain)
	h.snap("sb-1", "ready")
	for name, want := range map[string]fault.Class{"ready": fault.Exists, "minimal": fault.Exists, "../x": fault.Invalid, "": fault.Invalid} {
		if _, _, err := h.CreateSnapshot(h.c, "sb-1", name); !fault.Is(err, want) {
			t.Errorf("%q: %v", name, err)
		}
	}
	for what, spec := range map[string]sandbox.Spec{
		"vcpus": {Template: "ready", VCPUs: 2}, "memory_mb": {Template: "ready", MemoryMB: 256}, "disk_size_mb": {Template: "ready", DiskMB: 65},
	} {
		if _, err := h.Create(h.c, "", spec); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := h.WarmTemplate(h.c, sandbox.Spec{Template: "ready"}, ""); !fault.Is(err, fault.Invalid) {
		t.Errorf("warmed: %v", err)
	}
	h.create("sb-2", sandbox.Spec{Template: "ready"})
	wants(t, h.DeleteSnapshot("ready", false), fault.Precondition)
	wants(t, h.DeleteSnapshot("unknown", true), fault.NotFound)
	h.must(h.Hibernate(h.c, "sb-1"))
	for _, v := range h.Snapshots() {
		if v.Kind == snapshot.Hibernation {
			wants(t, h.DeleteSnapshot(v.ID, true), fault.Precondition)
		}
	}
	h.must(h.DeleteSnapshot("ready", true))
	_, err := h.Create(h.c, "", sandbox.Spec{Template: "ready"})
	wants(t, err, fault.NotFound)
	h.must(h.Resume(h.c, "sb-1"))
	h.snap("sb-1", "ready")
	w.checkSnapshots(t, h)
}

// TestASnapshotNeverBecomesABoot breaks the steps of a copy: what was asked for
// is a machine that goes on, so there is none.
func TestASnapshotNeverBecomesABoot(t *testing.T) {
	for _, s := range (&boot{}).copySteps() {
		t.Run(s.name, func(t *testing.T) {
			testenv.CheckGoroutines(t)
			w := newWorld(t)
			br := &breaker{}
			h := start(t, w, func(p *Params) { p.Break = br.hook })
			h.create("sb-1", plain)
			h.snap("sb-1", "ready")
			br.mu.Lock()
			br.step = "create " + s.name
			br.mu.Unlock()
			if v, err := h.Create(h.c, "sb-2", sandbox.Spec{Template: "ready"}); err == nil || !br.hit {
				t.Errorf("hit %v: %+v", br.hit, v)
			}
			if n := len(h.List()); n != 1 {
				t.Errorf("%d sandboxes", n)
			}
			w.checkWhole(t, h.List())
			h.create("sb-2", sandbox.Spec{Template: "ready"})
		})
	}
}

// TestBrokenSnapshots breaks each step of a snapshot: the sandbox goes on.
func TestBrokenSnapshots(t *testing.T) {
	for _, step := range []string{"snapshot capture", "snapshot disk", "snapshot publish"} {
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
			if _, _, err := h.CreateSnapshot(h.c, "sb-1", "ready"); err == nil || !br.hit {
				t.Errorf("%s: %v", step, err)
			}
			if got := h.state("sb-1"); got != want {
				t.Errorf("%s: it is %s, want %s", step, got, want)
			}
			w.checkWhole(t, h.List())
			w.checkSnapshots(t, h)
			h.snap("sb-1", "ready")
		}
	}
}

// TestASnapshotKeepsItsKernel starts a hutchd with another kernel pack: what
// stood still goes on with its own, while that is there.
func TestASnapshotKeepsItsKernel(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	h.create("sb-1", plain)
	h.snap("sb-1", "ready")
	h.must(h.Destroy(h.c, "sb-1"))
	h.stop(true)
	old := true
	h = start(t, w, func(p *Params) {
		k, _ := p.Kernel()
		p.OldKernel = func(id string) (kernel.Pack, error) {
			if id == k.ID && !old {
				return kernel.Pack{}, fault.New(fault.NotFound, "no pack")
			}
			k.ID = id
			return k, nil
		}
		newer := k
		newer.ID = "k2"
		p.Kernel = kernelOf(newer)
	})
	if v := h.create("sb-2", sandbox.Spec{Template: "ready"}); v.KernelID != "k1" {
		t.Errorf("kernel %s", v.KernelID)
	}
	if kernels, all := h.KernelsInUse(); !kernels["k1"] || !all {
		t.Errorf("kernels in use: %v", kernels)
	}
	if v := h.create("sb-3", sandbox.Spec{Template: "ready", ColdStart: true}); v.KernelID != "k2" {
		t.Errorf("kernel of a boot: %s", v.KernelID)
	}
	old = false
	if _, err := h.Create(h.c, "", sandbox.Spec{Template: "ready"}); !fault.Is(err, fault.NotFound) {
		t.Errorf("without its kernel: %v", err)
	}
	if v := h.Snapshots()[0]; v.Problem == "" {
		t.Error("no problem is told")
	}
}

// TestDamageIsFound flips a bit of a snapshot on disk.
func TestDamageIsFound(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	h.create("sb-1", plain)
	s := h.snap("sb-1", "ready")
	h.stop(true)
	file := filepath.Join(w.root, "snapshots", s.ID, "memory")
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	h.must(err)
	_, err = f.WriteAt([]byte("X"), 70_000)
	h.must(err)
	h.must(f.Close())
	h = start(t, w)
	if _, err := h.Create(h.c, "", sandbox.Spec{Template: "ready"}); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("it was started: %v", err)
	}
	if _, err := h.VerifySnapshot(context.WithoutCancel(h.c), "ready"); err == nil || !strings.Contains(err.Error(), "memory") {
		t.Errorf("verified: %v", err)
	}
	if n := len(h.List()); n != 1 {
		t.Errorf("%d sandboxes", n)
	}
}
