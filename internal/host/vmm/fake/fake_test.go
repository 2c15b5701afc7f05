package fake_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/host/vmm/fake"
	"github.com/hutch-run/hutch/internal/host/vmm/vmmtest"
	"github.com/hutch-run/hutch/internal/host/vmm/vmmtest/testguest"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

const logMax = 32 << 10

func newSpec(t testing.TB) vmm.Spec {
	t.Helper()
	dir := t.TempDir()
	run := filepath.Join(dir, "run")
	for path, err := range map[string]error{
		"run": os.Mkdir(run, 0o700), "kernel": os.WriteFile(dir+"/kernel", []byte("k"), 0o644),
	} {
		if err != nil {
			t.Fatal(path, err)
		}
	}
	return vmm.Spec{
		ID: sandbox.NewID(), VCPUs: 1, MemoryMB: vmm.MinMemoryMB, UID: 1000, Kernel: dir + "/kernel",
		Dir: run, ConsoleLog: dir + "/console.log", VMMLog: dir + "/vmm.log",
	}
}

// guest is the suite's guest in a fake machine.
type guest struct{ m *fake.Machine }

func (g guest) Memory() testguest.Memory { return g.m.RAM() }

func (g guest) Spam(n int) error {
	_, err := g.m.Write([]byte(strings.Repeat("spam ", n/5)))
	return err
}

func (g guest) Query(what string) (string, error) {
	switch what {
	case "cpus":
		return fmt.Sprint(g.m.Spec.VCPUs), nil
	case "disks":
		var all []string
		for _, d := range g.m.Spec.Disks {
			mode, flags := "rw", os.O_RDWR
			if d.ReadOnly {
				mode, flags = "ro", os.O_RDONLY
			}
			f, err := os.OpenFile(d.Path, flags, 0)
			if err != nil {
				return "", err
			}
			head := make([]byte, 8)
			_, err = f.ReadAt(head, 0)
			if err == nil && !d.ReadOnly {
				_, err = f.WriteAt([]byte("written!"), 512)
			}
			f.Close()
			if err != nil {
				return "", err
			}
			all = append(all, fmt.Sprintf("%s=%s,%s", d.Serial, head, mode))
		}
		return strings.Join(all, " "), nil
	}
	return "", errors.New("unknown")
}

func (g guest) End(how string) error {
	switch how {
	case "poweroff":
		g.m.End(vmm.Exit{Reason: vmm.GuestPowerOff, Detail: "fake exited 0"})
	case "reboot":
		g.m.End(vmm.Exit{Reason: vmm.GuestReset, Detail: "fake exited 0"})
	default:
		g.m.End(vmm.Exit{Reason: vmm.GuestPanic, Detail: "Kernel panic - not syncing: fake"})
	}
	return nil
}

func onLink(m *fake.Machine, conn net.Conn) { testguest.Serve(conn, guest{m}) }

func TestSuite(t *testing.T) {
	h := fake.NewHost(fake.Params{OnLink: onLink, LogMax: logMax})
	defer h.Wait()
	vmmtest.Run(t, harness(h))
}

func TestSnapshots(t *testing.T) {
	h := fake.NewHost(fake.Params{OnLink: onLink, LogMax: logMax})
	defer h.Wait()
	vmmtest.RunSnapshots(t, harness(h))
}

func harness(h *fake.Host) vmmtest.Harness {
	return vmmtest.Harness{
		Driver: func(testing.TB) vmm.Driver { return h.Driver() },
		Spec:   newSpec,
		LogMax: logMax,
		FillMB: 4,
		Crash: func(t testing.TB, m sandbox.Machine) {
			for _, x := range h.Machines() {
				if x.Process() == m.Process {
					x.Crash()
					return
				}
			}
			t.Fatal("no such machine")
		},
		Ended: func(t testing.TB, m sandbox.Machine) {
			tick := time.NewTicker(time.Millisecond)
			defer tick.Stop()
			for slices.ContainsFunc(h.Machines(), func(x *fake.Machine) bool { return x.Process() == m.Process }) {
				select {
				case <-tick.C:
				case <-testenv.Context(t).Done():
					t.Fatal("the machine does not end")
				}
			}
		},
		Left: func(t testing.TB, spec vmm.Spec) (left []string) {
			if m := h.Machine(spec.ID); m != nil {
				left = append(left, fmt.Sprint("machine of process ", m.Process().PID))
			}
			return left
		},
	}
}

func TestLaunchHook(t *testing.T) {
	h := fake.NewHost(fake.Params{})
	broken := errors.New("no room")
	h.OnLaunch(func(context.Context, vmm.Spec) error { return broken })
	spec := newSpec(t)
	if _, err := h.Driver().Launch(t.Context(), spec); !errors.Is(err, broken) {
		t.Errorf("launch: %v", err)
	}
	h.OnLaunch(func(ctx context.Context, _ vmm.Spec) error { <-ctx.Done(); return ctx.Err() })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.Driver().Launch(ctx, spec); !errors.Is(err, context.Canceled) {
		t.Errorf("launch: %v", err)
	}
	h.OnLaunch(nil)
	v, err := h.Driver().Launch(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if _, err := h.Driver().Launch(t.Context(), spec); !fault.Is(err, fault.Exists) {
		t.Errorf("second launch of an id: %v", err)
	}
	if len(h.Machines()) != 1 {
		t.Errorf("machines: %v", h.Machines())
	}
	if err := v.Kill(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestHang(t *testing.T) {
	testenv.CheckGoroutines(t)
	h := fake.NewHost(fake.Params{})
	spec := newSpec(t)
	v, err := h.Driver().Launch(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	m := h.Machine(spec.ID)
	m.Hang()
	m.Hang()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := v.Pause(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("pause of a hanging machine: %v", err)
	}
	paused := make(chan error)
	go func() { paused <- v.Pause(t.Context()) }()
	m.Unhang()
	m.Unhang()
	if err := <-paused; err != nil {
		t.Errorf("pause after the hang: %v", err)
	}
	m.Hang()
	go func() { paused <- v.Resume(t.Context()) }()
	if err := v.Kill(t.Context()); err != nil {
		t.Errorf("kill of a hanging machine: %v", err)
	}
	if err := <-paused; !fault.Is(err, fault.Unavailable) {
		t.Errorf("resume of a killed machine: %v", err)
	}
}
