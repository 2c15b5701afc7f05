package vmmtest

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/proc"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// life is one machine from launch to power-off.
func (s suite) life(t *testing.T) {
	ctx, spec := s.begin(t)
	spec.VCPUs = 2
	read, write := disks(t, &spec)
	v := s.launch(t, ctx, spec)
	running(t, ctx, v, true)
	g := s.dial(t, ctx, v)
	if got := ask(t, ctx, g, "echo hello there"); got != "hello there" {
		t.Errorf("echo: %q", got)
	}
	if got := ask(t, ctx, g, "query cpus"); got != "2" {
		t.Errorf("cpus: %s", got)
	}
	if got, want := ask(t, ctx, g, "query disks"), "root=READONLY,ro data=WRITABLE,rw"; got != want {
		t.Errorf("disks: %q, want %q", got, want)
	}
	t.Run("Pause", func(t *testing.T) { pauseResume(t, ctx, v, g) })
	t.Run("Bulk", func(t *testing.T) { bulk(t, ctx, g) })
	t.Run("Redial", func(t *testing.T) { g = s.redial(t, ctx, v, g) })
	t.Run("Console", func(t *testing.T) { s.console(t, ctx, spec, g) })
	t.Run("AdoptWrong", func(t *testing.T) { s.adoptWrong(t, ctx, v, spec) })
	t.Run("Adopt", func(t *testing.T) { v, g = s.adopt(t, ctx, v, spec) })
	t.Cleanup(func() { end(t, v); g.Close() })

	v2 := v
	go g.Ask(ctx, "poweroff") // may or may not be answered
	var wait sync.WaitGroup
	for range 10 {
		wait.Go(func() {
			<-v2.Done()
			if e := v2.Exit(); e.Reason != vmm.GuestPowerOff || e.Detail == "" {
				t.Errorf("exit: %+v", e)
			}
		})
	}
	waitDone(t, ctx, v)
	wait.Wait()
	s.afterTheEnd(t, ctx, v, spec)
	if got := readAt(t, write, 512); got != "written!" {
		t.Errorf("the writable disk has %q", got)
	}
	if got := readAt(t, read, 512); got != strings.Repeat("\x00", 8) {
		t.Errorf("the read-only disk has %q", got)
	}
}

func disks(t *testing.T, spec *vmm.Spec) (read, write string) {
	t.Helper()
	dir := t.TempDir()
	read, write = filepath.Join(dir, "root"), filepath.Join(dir, "data,with=odd name")
	for path, head := range map[string]string{read: "READONLY", write: "WRITABLE"} {
		if err := os.WriteFile(path, append([]byte(head), make([]byte, 1<<20-len(head))...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	spec.Disks = []vmm.Disk{
		{Serial: "root", Path: read, ReadOnly: true},
		{Serial: "data", Path: write, Discard: true},
	}
	return read, write
}

func readAt(t *testing.T, path string, off int64) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 8)
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func pauseResume(t *testing.T, ctx context.Context, v vmm.VM, g *Guest) {
	for range 2 {
		if err := v.Pause(ctx); err != nil {
			t.Fatal(err)
		}
		running(t, ctx, v, false)
	}
	for range 2 {
		if err := v.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		running(t, ctx, v, true)
	}
	if got := ask(t, ctx, g, "echo again"); got != "again" {
		t.Errorf("echo after resume: %q", got)
	}
}

func bulk(t *testing.T, ctx context.Context, g *Guest) {
	text := strings.Repeat("0123456789abcdef", 4<<10-1) // just below a Scanner's line
	for range 8 {
		got, err := g.Ask(ctx, "echo "+text)
		if err != nil || got != text {
			t.Fatalf("echo of %d bytes: %d bytes, %v", len(text), len(got), err)
		}
	}
}

func (s suite) redial(t *testing.T, ctx context.Context, v vmm.VM, g *Guest) *Guest {
	for i := range 3 {
		next, err := DialGuest(ctx, v)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := g.Ask(ctx, "echo x"); err == nil || ctx.Err() != nil {
			t.Errorf("the connection before: %v", err)
		}
		g.Close()
		g = next
		if got := ask(t, ctx, g, fmt.Sprint("echo connection ", i)); got != fmt.Sprint("connection ", i) {
			t.Errorf("echo: %q", got)
		}
	}
	return g
}

func (s suite) console(t *testing.T, ctx context.Context, spec vmm.Spec, g *Guest) {
	log := func() string {
		r, err := proc.OpenCapped(spec.ConsoleLog)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if !strings.Contains(log(), "ready") {
		t.Errorf("the guest's words are not in the console log:\n%s", log())
	}
	ask(t, ctx, g, fmt.Sprint("spam ", 2*s.LogMax))
	for !strings.Contains(log(), "spam spam") {
		select {
		case <-ctx.Done():
			t.Fatal("the guest's spam is not in the console log")
		case <-time.After(10 * time.Millisecond):
		}
	}
	if n := int64(len(log())); n > s.LogMax {
		t.Errorf("the console log has %d bytes, more than %d", n, s.LogMax)
	}
}

func (s suite) adoptWrong(t *testing.T, ctx context.Context, v vmm.VM, spec vmm.Spec) {
	for name, change := range map[string]func(*sandbox.Machine){
		"other start": func(m *sandbox.Machine) { m.Process.StartTicks++ },
		"other boot":  func(m *sandbox.Machine) { m.Process.BootID = "5c2d" },
		"other pid":   func(m *sandbox.Machine) { m.Process.PID = 1 << 22 },
	} {
		m := v.Machine()
		change(&m)
		// Of another machine's spec, since what a lost one left is removed.
		if a, err := s.Driver(t).Adopt(ctx, m, s.Spec(t)); !fault.Is(err, fault.NotFound) {
			t.Errorf("%s: %v, want not found", name, err)
			if err == nil {
				a.Close()
			}
		}
	}
	running(t, ctx, v, true)
}

func (s suite) adopt(t *testing.T, ctx context.Context, v vmm.VM, spec vmm.Spec) (vmm.VM, *Guest) {
	m := v.Machine()
	var g *Guest
	for i := range 2 {
		for range 2 {
			if err := v.Close(); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case <-v.Done():
			t.Error("a machine that was let go of is done")
		default:
		}
		if _, err := v.DialLink(ctx); err == nil {
			t.Error("a machine that was let go of gives its link")
		}
		adopted, err := s.Driver(t).Adopt(ctx, m, spec)
		if err != nil {
			t.Fatal(err)
		}
		v = adopted
		if diff := cmp.Diff(m, v.Machine()); diff != "" {
			t.Error(diff)
		}
		running(t, ctx, v, true)
		if g, err = DialGuest(ctx, v); err != nil {
			t.Fatal(err)
		}
		if got := ask(t, ctx, g, fmt.Sprint("echo adoption ", i)); got != fmt.Sprint("adoption ", i) {
			t.Errorf("echo: %q", got)
		}
		if i == 0 {
			g.Close()
		}
	}
	return v, g
}
