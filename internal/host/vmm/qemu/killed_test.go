package qemu_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/hutch-run/hutch/internal/host/jail"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/host/vmm/qemu"
	"github.com/hutch-run/hutch/internal/host/vmm/vmmtest"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// order is what a test tells the test binary to launch, through this variable.
const orderEnv = "HUTCH_QEMU_TEST_ORDER"

type order struct {
	Parent string
	Spec   vmm.Spec
}

func TestMain(m *testing.M) {
	if text := os.Getenv(orderEnv); text != "" {
		fmt.Fprintln(os.Stderr, launchAndStay(text))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// launchAndStay launches a machine, says which, and waits to be killed.
func launchAndStay(text string) error {
	var o order
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return err
	}
	j, err := jail.New(jail.Params{Parent: o.Parent})
	if err != nil {
		return err
	}
	ctx := context.Background()
	d, err := qemu.New(ctx, qemu.Params{Jail: j, LogMax: logMax})
	if err != nil {
		return err
	}
	v, err := d.Launch(ctx, o.Spec)
	if err != nil {
		return err
	}
	g, err := vmmtest.DialGuest(ctx, v)
	if err != nil {
		return err
	}
	defer g.Close()
	if err := json.NewEncoder(os.Stdout).Encode(v.Machine()); err != nil {
		return err
	}
	<-v.Done()
	return fmt.Errorf("the machine ended: %+v", v.Exit())
}

// TestParentKilled kills the process that launched a machine. The machine goes
// on, and this process takes it up with everything that belongs to it.
func TestParentKilled(t *testing.T) {
	b := newBench(t)
	testenv.CheckGoroutines(t)
	ctx := testenv.Context(t)
	spec := b.spec(t)
	text, err := json.Marshal(order{Parent: b.parent, Spec: spec})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), orderEnv+"="+string(text))
	var words strings.Builder
	cmd.Stderr = &words
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var m sandbox.Machine
	decodeErr := json.NewDecoder(bufio.NewReader(out)).Decode(&m)
	cmd.Process.Kill()
	cmd.Wait()
	if decodeErr != nil {
		t.Fatalf("launch in another process: %v: %s", decodeErr, words.String())
	}

	v, err := b.driver.Adopt(ctx, m, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, v)
	if running, err := v.Running(ctx); !running || err != nil {
		t.Errorf("running: %v, %v", running, err)
	}
	g, err := vmmtest.DialGuest(ctx, v)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if got, err := g.Ask(ctx, "echo still here"); err != nil || got != "still here" {
		t.Errorf("echo: %q, %v", got, err)
	}
	// Most of the boot was after the kill, and its end is in the log.
	if log, err := os.ReadFile(spec.ConsoleLog); err != nil || !strings.Contains(string(log), "guestinit: ready") {
		t.Errorf("console log: %v", err)
	}
	go g.Ask(ctx, "poweroff")
	select {
	case <-v.Done():
	case <-ctx.Done():
		t.Fatal("the guest does not power off")
	}
	if e := v.Exit(); e.Reason != vmm.GuestPowerOff {
		t.Errorf("exit: %+v", e)
	}
	if l := b.left(t, spec); l != nil {
		t.Errorf("left: %v", l)
	}
}
