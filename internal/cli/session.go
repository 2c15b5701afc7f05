package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/term"

	processpb "github.com/hutch-run/hutch/gen/process"
)

// notKnown is told of a program that was interrupted before its start.
const notKnown = "interrupted before the program was known to run"

// session is one program run in a sandbox with the caller's streams.
type session struct {
	cmd         string
	args        []string
	env         map[string]string
	cwd         string
	user        string
	interactive bool // send standard input
	tty         bool
	timeout     time.Duration
}

// run runs the session's program in sandbox id to its end. The result is nil
// for exit code 0, an exitStatus for others.
func (s session) run(ctx context.Context, a *App, c *client, id string) error {
	p := c.process(id)
	says := &complaints{w: a.Err, keep: s.tty}
	defer says.end()
	// The stream does not end with ctx: an interrupt is sent to the program,
	// and its last output is still wanted.
	streamCtx, giveUp := context.WithCancelCause(context.WithoutCancel(ctx))
	defer giveUp(nil)
	// Until the program runs there is nothing to send an interrupt to.
	started := context.AfterFunc(ctx, func() { giveUp(exitStatus{exitHutch, notKnown}) })
	defer started()
	restore, err := s.rawTerminal(a)
	if err != nil {
		return err
	}
	defer restore()
	stream, err := p.Start(streamCtx, connect.NewRequest(s.request(a)))
	if err != nil {
		return cmp.Or(context.Cause(streamCtx), startError(err))
	}
	defer stream.Close()
	var pump *inputPump
	defer func() {
		if pump != nil {
			pump.stop()
		}
	}()
	for stream.Receive() {
		ev := stream.Msg().GetEvent()
		if start := ev.GetStart(); start != nil && pump == nil && started() {
			pump = &inputPump{session: s, a: a, p: p, pid: start.GetPid(), says: says}
			pump.start(ctx, streamCtx, giveUp)
		}
		if data := ev.GetData(); data != nil {
			if err := writeOutput(a.Out, says, data); err != nil {
				return err
			}
		}
		if end := ev.GetEnd(); end != nil {
			return ended(end, pump != nil && pump.cut.Load())
		}
	}
	if cause := context.Cause(streamCtx); cause != nil {
		return cause
	}
	err = stream.Err()
	if pump == nil && err != nil {
		return startError(err)
	}
	return brokenOff(err)
}

func (s session) request(a *App) *processpb.StartRequest {
	config := &processpb.ProcessConfig{Cmd: s.cmd, Args: s.args, Envs: s.env, User: s.user}
	if s.cwd != "" {
		config.Cwd = &s.cwd
	}
	req := &processpb.StartRequest{Process: config, Stdin: &s.interactive, TimeoutMs: uint32(s.timeout.Milliseconds())}
	if s.tty {
		req.Pty = &processpb.PTY{Size: terminalSize(a.Out)}
	}
	return req
}

func writeOutput(stdout, stderr io.Writer, d *processpb.ProcessEvent_DataEvent) error {
	var err error
	switch out := d.GetOutput().(type) {
	case *processpb.ProcessEvent_DataEvent_Stdout:
		_, err = stdout.Write(out.Stdout)
	case *processpb.ProcessEvent_DataEvent_Stderr:
		_, err = stderr.Write(out.Stderr)
	case *processpb.ProcessEvent_DataEvent_Pty:
		_, err = stdout.Write(out.Pty)
	}
	if err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// ended turns the end of a program into the exit status of hutch. A program
// whose input was cut off, which hutch has said by then, was no success.
func ended(e *processpb.ProcessEvent_EndEvent, inputCut bool) error {
	switch {
	case e.GetTimedOut():
		return exitStatus{exitTimeout, "time limit reached, the program was killed"}
	case e.GetOomKilled():
		return exitStatus{int(e.GetExitCode()), "the guest ran out of memory and killed the program, or one that it started"}
	case e.GetExitCode() != 0:
		return exitStatus{code: int(e.GetExitCode()) & 0xff}
	case inputCut:
		return exitStatus{code: exitHutch}
	}
	return nil
}

// brokenOff says that a program's stream ended without the program's end.
// Errors with a text of hutchd's or the guest's own are kept.
func brokenOff(err error) error {
	const lost = "the connection to the program broke off, its end is not known: the guest, its agent or hutchd died or was restarted"
	switch connect.CodeOf(err) {
	case connect.CodeUnknown, connect.CodeInternal, connect.CodeUnavailable:
		if err == nil {
			return errors.New(lost)
		}
		return fmt.Errorf("%s (%w)", lost, err)
	default:
		return err
	}
}

// startError gives the failures to start a program docker's exit codes.
func startError(err error) error {
	var ce *connect.Error
	if !errors.As(err, &ce) || ce.Meta().Get("Hutch-Error") != "" {
		return err
	}
	switch ce.Code() {
	case connect.CodeNotFound:
		return exitStatus{exitNotFound, ce.Message()}
	case connect.CodePermissionDenied, connect.CodeInvalidArgument:
		return exitStatus{exitNoRun, ce.Message()}
	default:
		return err
	}
}

// rawTerminal makes the terminal raw for a tty session and returns what makes
// it as it was.
func (s session) rawTerminal(a *App) (restore func(), err error) {
	f, ok := a.In.(*os.File)
	if !s.tty || !ok || !term.IsTerminal(int(f.Fd())) {
		return func() {}, nil
	}
	old, err := term.MakeRaw(int(f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("make the terminal raw: %w", err)
	}
	return func() { term.Restore(int(f.Fd()), old) }, nil
}

// terminalSize returns the size of terminal w, or the usual one when w is none
// or does not know.
func terminalSize(w io.Writer) *processpb.PTY_Size {
	if f, ok := w.(*os.File); ok {
		if cols, rows, err := term.GetSize(int(f.Fd())); err == nil && cols > 0 && rows > 0 {
			return &processpb.PTY_Size{Cols: uint32(cols), Rows: uint32(rows)}
		}
	}
	return &processpb.PTY_Size{Cols: 80, Rows: 24}
}
