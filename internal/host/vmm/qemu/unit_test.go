package qemu

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/jail"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/host/vmm/qemu/qmp"
	"github.com/hutch-run/hutch/internal/proc"
	"github.com/hutch-run/hutch/internal/testenv"
)

var update = flag.Bool("update", false, "write the golden files")

// TestArgs compares whole command lines: any change of what QEMU is told shows
// in a diff.
func TestArgs(t *testing.T) {
	full := argParams{
		Name: "sb-0123456789abcdef", Accel: KVM, VCPUs: 4, MemoryMB: 2048, Cmdline: "quiet",
		ControlFD: 4, ConsoleFD: 5, LinkFD: 6, JournalFD: 7, KernelFD: 8, InitrdFD: 9, MemoryFD: 13,
		Disks: []argDisk{{FD: 10, Serial: "root", ReadOnly: true}, {FD: 11, Serial: "data", Discard: true}},
		NIC:   &argNIC{FD: 12, MAC: "02:00:00:00:00:01"}, Shares: []argShare{{FD: 14, Tag: "share0"}},
	}
	small := argParams{
		Name: "a", Accel: TCG, VCPUs: 1, MemoryMB: 128, ControlFD: 4, ConsoleFD: 5, LinkFD: 6, JournalFD: 7, KernelFD: 8, MemoryFD: 9,
	}
	restored := argParams{
		Name: "r", Accel: TCG, VCPUs: 1, MemoryMB: 128, ControlFD: 4, ConsoleFD: 5, LinkFD: 6, JournalFD: 7, MemoryFD: 8, Private: true,
		Disks: []argDisk{{FD: 9, Serial: "data", Discard: true}},
	}
	for name, p := range map[string]argParams{"full": full, "small": small, "restored": restored} {
		got := strings.Join(buildArgs(p), "\n") + "\n"
		golden := filepath.Join("testdata", name+".args")
		if *update {
			if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), got); diff != "" {
			t.Errorf("%s (run with -update to accept): %s", name, diff)
		}
	}
}

// TestArgsQuote gives values that were never checked: none may become an
// option of its own.
func TestArgsQuote(t *testing.T) {
	p := argParams{
		Name: "x,debug-threads=on", Accel: TCG, Cmdline: "-no-such,option", KernelFD: 4,
		Disks: []argDisk{{Serial: "s,readonly=off"}}, NIC: &argNIC{MAC: "m,script=/x"},
		Shares: []argShare{{Tag: "t,server=on"}},
	}
	args := strings.Join(buildArgs(p), "\n")
	for _, want := range []string{"guest=x,,debug-threads=on\n", "serial=s,,readonly=off,", "mac=m,,script=/x,", "id=t,,server=on,fd=", "chardev=t,,server=on,tag=t,,server=on,", "\n-append\n" + kernelCmdline(TCG, "-no-such,option") + "\n"} {
		if !strings.Contains(args, want) {
			t.Errorf("no %q in:\n%s", want, args)
		}
	}
}

func TestClassify(t *testing.T) {
	ended := proc.Exit{Known: true}
	killed := proc.Exit{Known: true, Signal: syscall.SIGKILL}
	for name, tt := range map[string]struct {
		e      ending
		reason vmm.Reason
		detail string
	}{
		"power off":                  {ending{shutdown: "guest-shutdown", exit: ended}, vmm.GuestPowerOff, "QEMU exited 0"},
		"power off beats kill":       {ending{shutdown: "guest-shutdown", killed: true, exit: ended}, vmm.GuestPowerOff, "exited 0"},
		"panic in an old log":        {ending{shutdown: "guest-shutdown", panic: "Kernel panic", exit: ended}, vmm.GuestPowerOff, ""},
		"reset":                      {ending{shutdown: "guest-reset", exit: ended}, vmm.GuestReset, ""},
		"panic":                      {ending{shutdown: "guest-reset", panic: "Kernel panic - x", exit: ended}, vmm.GuestPanic, "Kernel panic - x"},
		"panic told by a device":     {ending{shutdown: "guest-panic", exit: ended}, vmm.GuestPanic, "exited 0"},
		"kill":                       {ending{killed: true, exit: killed}, vmm.Killed, "SIGKILL"},
		"killed by another":          {ending{exit: killed, words: "bye"}, vmm.Crashed, "SIGKILL: bye"},
		"killed for want of memory":  {ending{exit: killed, oomKills: 1, memoryMB: 300}, vmm.Crashed, "more than its 300 MB"},
		"kill after want of memory":  {ending{exit: killed, killed: true, oomKills: 1}, vmm.Killed, ""},
		"failed by itself":           {ending{exit: proc.Exit{Known: true, Code: 1}, words: "no disk"}, vmm.Crashed, "QEMU exited 1: no disk"},
		"terminated":                 {ending{shutdown: "host-signal", exit: ended}, vmm.Crashed, "(host-signal)"},
		"adopted, and nothing known": {ending{}, vmm.Crashed, "status unknown"},
		"power off unseen":           {ending{unseen: true, shutdown: "guest-shutdown"}, vmm.GuestPowerOff, "status unknown"},
		"reset unseen":               {ending{unseen: true, shutdown: "guest-reset"}, vmm.GuestReset, "or its kernel panicked"},
		"crash unseen":               {ending{unseen: true, words: "bye"}, vmm.Crashed, "status unknown, its log ends in: bye"},
		"terminated unseen":          {ending{unseen: true, shutdown: "host-signal"}, vmm.Crashed, "(host-signal)"},
		"want of memory unseen":      {ending{unseen: true, oomKills: 1, memoryMB: 300}, vmm.Crashed, "more than its 300 MB"},
	} {
		got := classify(tt.e)
		if got.Reason != tt.reason || !strings.Contains(got.Detail, tt.detail) || got.Detail == "" {
			t.Errorf("%s: %+v, want %q with %q", name, got, tt.reason, tt.detail)
		}
	}
}

func TestShutdownReason(t *testing.T) {
	for data, want := range map[string]string{
		`{"guest": true, "reason": "guest-shutdown"}`: "guest-shutdown",
		`{}`: "", ``: "", `[]`: "", `{"reason": 1}`: "",
		`{"reason": "` + strings.Repeat("x", 1000) + `"}`: "",
	} {
		if got := shutdownReason(qmp.Event{Name: "SHUTDOWN", Data: []byte(data)}); got != want {
			t.Errorf("%.60s: %q, want %q", data, got, want)
		}
	}
	if got := shutdownReason(qmp.Event{Name: "RESET", Data: []byte(`{"reason": "guest-reset"}`)}); got != "" {
		t.Errorf("another event: %q", got)
	}
}

func newConsole(t *testing.T) *console {
	t.Helper()
	log, err := proc.CreateCapped(filepath.Join(t.TempDir(), "console.log"), 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	return &console{log: log}
}

func TestConsolePanic(t *testing.T) {
	const words = "[    1.5] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100"
	const want = "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100"
	all := "boot\r\n" + strings.Repeat("x", 5000) + "\n" + words + "\r\n" + strings.Repeat("trace\n", 2000) + "Kernel panic - not syncing: second\n"
	for _, size := range []int{1, 7, 4096, len(all)} {
		c := newConsole(t)
		for rest := all; rest != ""; {
			n := min(size, len(rest))
			c.take([]byte(rest[:n]))
			rest = rest[n:]
		}
		if got := c.panicText(); got != want {
			t.Errorf("in pieces of %d: %q", size, got)
		}
	}
	c := newConsole(t)
	c.take([]byte("\n" + words)) // it ends before the line does
	if got := c.panicText(); got != want {
		t.Errorf("without an end of line: %q", got)
	}
	c = newConsole(t)
	c.take([]byte("Kernel panic - not synced\nno panic\n"))
	if got := c.panicText(); got != "" {
		t.Errorf("other words: %q", got)
	}
}

func TestConsoleCopyStops(t *testing.T) {
	testenv.CheckGoroutines(t)
	a, b := net.Pipe()
	defer b.Close()
	stop, done := make(chan struct{}), make(chan struct{})
	c := newConsole(t)
	go func() { defer close(done); c.copy(a, stop) }()
	b.Write([]byte(strings.Repeat("x", 10000)))
	close(stop)
	a.Close()
	<-done
}

func TestParseVersion(t *testing.T) {
	for out, want := range map[string]string{
		"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)\nCopyright": "7.2.22",
		"QEMU emulator version 10.0.0\n":                              "10.0.0",
		"QEMU emulator version 11.0.50 (v11.0.0-1-gabc)":              "11.0.50",
	} {
		if got, err := parseVersion(out); got != want || err != nil {
			t.Errorf("%q: %q, %v", out, got, err)
		}
	}
	for out, want := range map[string]string{
		"QEMU emulator version 6.2.0\n": "too old", "QEMU emulator version 7.1.9\n": "too old",
		"": "it said", "Xen 4.17\n": "it said", "QEMU emulator version x.y": "it said",
	} {
		if got, err := parseVersion(out); !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %q, %v", out, got, err)
		}
	}
}

func TestChoose(t *testing.T) {
	works := func() error { return nil }
	broken := func() error { return errors.New("no svm") }
	for _, tt := range []struct {
		wish    Accel
		problem func() error
		want    Accel
		reason  string
	}{
		{Auto, works, KVM, "a guest ran"}, {"", works, KVM, "a guest ran"}, {Auto, broken, TCG, "no svm"},
		{KVM, works, KVM, "asked for"}, {TCG, works, TCG, "asked for"},
	} {
		got, reason, err := choose(tt.wish, tt.problem)
		if got != tt.want || err != nil || !strings.Contains(reason, tt.reason) {
			t.Errorf("wish %q: %s, %q, %v", tt.wish, got, reason, err)
		}
	}
	if _, _, err := choose(KVM, broken); !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), "no svm") {
		t.Errorf("unusable KVM asked for: %v", err)
	}
	if _, _, err := choose("warp", works); !fault.Is(err, fault.Invalid) {
		t.Errorf("unknown wish: %v", err)
	}
}

func TestHasVirtualization(t *testing.T) {
	for info, want := range map[string]bool{
		"processor\t: 0\nflags\t\t: fpu vmx sse\n": true,
		"flags : fpu svm\n":                        true,
		"flags : fpu svm_lock vmxx\nbugs : vmx\n":  false,
		"vmx flags : ept\nflags : fpu\n":           false,
		"":                                         false,
	} {
		if got := hasVirtualization(info); got != want {
			t.Errorf("%q: %v", info, got)
		}
	}
}

// TestProof runs the proof's guest by emulation, which works everywhere: so a
// failure on KVM means KVM.
func TestProof(t *testing.T) {
	testenv.RequireVM(t)
	testenv.CheckGoroutines(t)
	j, err := jail.New(jail.Params{Parent: fmt.Sprintf("hutch-proof-%d", os.Getpid())})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	}()
	binary := "/usr/bin/" + defaultBinary
	if err := prove(testenv.Context(t), j, binary, TCG); err != nil {
		t.Error(err)
	}
	// A program that ends in another way proves nothing.
	if err := prove(testenv.Context(t), j, "/bin/true", TCG); err == nil || !strings.Contains(err.Error(), "exited 0") {
		t.Errorf("a program that is not QEMU: %v", err)
	}
	if problem := kvmProblem(testenv.Context(t), j, binary); problem != nil {
		t.Log("KVM: ", problem)
		// Here the proof must fail too, should the look at the flags be wrong.
		if _, err := os.Stat(kvmDevice); err == nil && prove(testenv.Context(t), j, binary, KVM) == nil {
			t.Log("but a tiny guest runs on it")
		}
	}
}

func TestSockets(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	f, err := listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listen(t.Context(), path); err == nil || !strings.Contains(err.Error(), "running machine") {
		t.Errorf("a socket in use: %v", err)
	}
	f.Close()
	if f, err = listen(t.Context(), path); err != nil {
		t.Fatalf("a socket left behind: %v", err)
	}
	f.Close()
	for range 2 {
		if err := removeSocket(path); err != nil {
			t.Error(err)
		}
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := removeSocket(path); err == nil {
		t.Error("a file was removed as a socket")
	}
	for _, s := range sockets() {
		if len(s) > vmm.MaxSocketName {
			t.Errorf("%s is longer than %d", s, vmm.MaxSocketName)
		}
	}
}
