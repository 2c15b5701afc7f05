package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	processpb "github.com/hutch-run/hutch/gen/process"
	"github.com/hutch-run/hutch/gen/process/processpbconnect"
)

// templateName is what every sandbox is made from.
const templateName = "minimal"

// create makes a sandbox and tells how long the reply took. Unless it is to be
// cold, it is made from a warm template, if there is one.
func (b *bench) create(ctx context.Context, cold bool) (id string, s createSample, err error) {
	return b.createOn(ctx, b.host, cold)
}

func (b *bench) createOn(ctx context.Context, d *daemon, cold bool) (id string, s createSample, err error) {
	began := time.Now()
	res, err := d.host.CreateSandbox(ctx, connect.NewRequest(&hostagentv1.CreateSandboxRequest{
		Template: templateName, MemoryMb: int32(b.plan.MemoryMB), DiskSizeMb: int32(b.plan.DiskSizeMB), ColdStart: cold, //nolint:gosec // constants of this program
	}))
	s.Hutch = micros(time.Since(began))
	if err != nil {
		return "", s, fmt.Errorf("create: %w", err)
	}
	s.Stages = map[string]int64{}
	for _, stage := range res.Msg.GetStages() {
		s.Stages[stage.GetName()] = stage.GetMicros()
	}
	return res.Msg.GetSandboxId(), s, nil
}

// measureCreate makes machines in pairs, each side first in half of them.
func (b *bench) measureCreate(ctx context.Context) error {
	for i := range b.plan.Creates {
		var s createSample
		var bareBoot []int64
		var floor int64
		sides := []func() error{
			func() error {
				m, err := startBare(ctx, b.bare)
				if err != nil {
					return err
				}
				floor = micros(m.took)
				answer, err := m.ask("times")
				bareBoot = numbers(answer)
				return errors.Join(err, m.end())
			},
			func() error {
				id, made, err := b.create(ctx, true)
				if err != nil {
					return err
				}
				s = made
				s.ServeAt, err = b.serverStart(ctx, id)
				return errors.Join(err, b.host.destroy(ctx, id))
			},
		}
		if i%2 == 1 {
			sides[0], sides[1] = sides[1], sides[0]
		}
		for _, side := range sides {
			if err := side(); err != nil {
				return err
			}
		}
		s.Floor, s.BareBoot = floor, bareBoot
		b.report.Create = append(b.report.Create, s)
		say("  %2d: floor %.2f s, hutch %.2f s, ratio %.3f", i+1, float64(s.Floor)/1e6, float64(s.Hutch)/1e6, s.ratio())
	}
	return nil
}

// serverStart returns when the guest agent's server was started, in
// microseconds since the guest kernel's start, to 10 ms: what was before is
// kernel and PID 1, what came after the server's own start and the hello.
func (b *bench) serverStart(ctx context.Context, id string) (int64, error) {
	out, err := b.host.exec(ctx, id, "sh", "-c", "cut -d' ' -f22 /proc/$(pidof hutch-agent)/stat")
	if err != nil {
		return 0, err
	}
	ticks, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("start time of the guest's server: %w", err)
	}
	return ticks * 10_000, nil
}

// measureRunning measures what a running sandbox does against a bare machine
// that runs beside it.
func (b *bench) measureRunning(ctx context.Context) (err error) {
	id, _, err := b.create(ctx, true)
	if err != nil {
		return err
	}
	m, err := startBare(ctx, b.bare)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.end()) }()
	say("  exec")
	b.report.Exec, err = pairs(b.plan.Execs, 3, func() error {
		answer, err := m.ask("exec /bin/true")
		if err == nil && answer != "exit 0" {
			err = fmt.Errorf("bare exec answered %q", answer)
		}
		return err
	}, func() error {
		_, err := b.host.exec(ctx, id, "/bin/true")
		return err
	})
	if err != nil {
		return err
	}
	say("  exec by the CLI")
	b.report.CLIExec, err = pairs(b.plan.CLIExecs, 1, func() error {
		_, err := m.ask("exec /bin/true")
		return err
	}, func() error { return b.host.cli(ctx, "exec", id, "--", "/bin/true") })
	if err != nil {
		return err
	}
	say("  output")
	// Busybox's head writes byte by byte and would measure itself.
	program := []string{"/bin/dd", "if=/dev/zero", "bs=64k", fmt.Sprintf("count=%d", b.plan.CopyBytes>>16)}
	b.report.Copy, err = pairs(b.plan.Copies, 1, func() error {
		return m.receive("copy "+strings.Join(program, " "), b.plan.CopyBytes)
	}, func() error {
		return b.stream(ctx, b.host.process(id, connect.WithAcceptCompression("gzip", nil, nil)), program)
	})
	if err != nil {
		return err
	}
	say("  output to a client that takes gzip")
	b.report.CopyGzip, err = pairs(b.plan.Copies, 1, func() error {
		return m.receive("copy "+strings.Join(program, " "), b.plan.CopyBytes)
	}, func() error { return b.stream(ctx, b.host.process(id), program) })
	if err != nil {
		return err
	}
	say("  pause and resume")
	b.report.Pause, err = pairs(b.plan.Pauses, 3, func() error { return m.stopContinue(ctx) }, func() error {
		if _, err := b.host.host.PauseSandbox(ctx, connect.NewRequest(&hostagentv1.PauseSandboxRequest{SandboxId: id})); err != nil {
			return err
		}
		_, err := b.host.host.ResumeSandbox(ctx, connect.NewRequest(&hostagentv1.ResumeSandboxRequest{SandboxId: id}))
		return err
	})
	return errors.Join(err, b.host.destroy(ctx, id))
}

// stream receives the output of a program by the streaming process API.
func (b *bench) stream(ctx context.Context, process processpbconnect.ProcessClient, program []string) error {
	stdin := false
	events, err := process.Start(ctx, connect.NewRequest(&processpb.StartRequest{
		Process: &processpb.ProcessConfig{Cmd: program[0], Args: program[1:]}, Stdin: &stdin,
	}))
	if err != nil {
		return err
	}
	defer events.Close()
	var got int64
	for events.Receive() {
		got += int64(len(events.Msg().GetEvent().GetData().GetStdout()))
	}
	if err := events.Err(); err != nil {
		return err
	}
	if got != b.plan.CopyBytes {
		return fmt.Errorf("received %d bytes of output, want %d", got, b.plan.CopyBytes)
	}
	return nil
}

// measureDeaths kills VMMs and sees how soon a caller who waits is told.
func (b *bench) measureDeaths(ctx context.Context) error {
	id, _, err := b.create(ctx, true)
	if err != nil {
		return err
	}
	for range b.plan.Deaths {
		took, err := b.die(ctx, id)
		if err != nil {
			return err
		}
		b.report.Deaths = append(b.report.Deaths, micros(took))
		if _, err := b.host.host.ResumeSandbox(ctx, connect.NewRequest(&hostagentv1.ResumeSandboxRequest{SandboxId: id})); err != nil {
			return err
		}
	}
	return b.host.destroy(ctx, id)
}

// die kills the VMM of a sandbox and waits for its state to be error.
func (b *bench) die(ctx context.Context, id string) (time.Duration, error) {
	record, err := b.host.inspect(ctx, id)
	if err != nil {
		return 0, err
	}
	told := make(chan error, 1)
	go func() {
		_, err := b.host.sandboxes.WaitSandbox(ctx, connect.NewRequest(&hostagentv1.WaitSandboxRequest{SandboxId: id, Status: []string{"error"}}))
		told <- err
	}()
	began := time.Now()
	if err := syscall.Kill(int(record.GetVmmPid()), syscall.SIGKILL); err != nil {
		return 0, errors.Join(fmt.Errorf("kill VMM: %w", err), <-told)
	}
	err = <-told
	return time.Since(began), err
}

// pairs measures two sides in turn, each first in half of the pairs, after
// some rounds that are not counted.
func pairs(n, warm int, floor, hutch func() error) ([]sample, error) {
	timed := func(f func() error) (int64, error) {
		began := time.Now()
		err := f()
		return micros(time.Since(began)), err
	}
	var out []sample
	for i := range n + warm {
		var s sample
		var err, err2 error
		if i%2 == 0 {
			s.Floor, err = timed(floor)
			s.Hutch, err2 = timed(hutch)
		} else {
			s.Hutch, err = timed(hutch)
			s.Floor, err2 = timed(floor)
		}
		if err := errors.Join(err, err2); err != nil {
			return nil, err
		}
		if i >= warm {
			out = append(out, s)
		}
	}
	return out, nil
}

func micros(d time.Duration) int64 { return d.Microseconds() }

// numbers reads numbers apart by spaces; what is none is left out.
func numbers(s string) []int64 {
	var out []int64
	for _, f := range strings.Fields(s) {
		if n, err := strconv.ParseInt(f, 10, 64); err == nil {
			out = append(out, n)
		}
	}
	return out
}
