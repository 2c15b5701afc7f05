package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/term"

	processpb "github.com/hutch-run/hutch/gen/process"
	"github.com/hutch-run/hutch/gen/process/processpbconnect"
)

// stdinChunk is how much of standard input goes into one message.
const stdinChunk = 32 << 10

// interruptGrace is how long a program has to end after the interrupt that
// Ctrl-C sends it, before it is killed.
const interruptGrace = 5 * time.Second

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
	// The stream does not end with ctx: an interrupt is sent to the program,
	// and its last output is still wanted.
	streamCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	restore, err := s.rawTerminal(a)
	if err != nil {
		return err
	}
	defer restore()
	stream, err := p.Start(streamCtx, connect.NewRequest(s.request(a)))
	if err != nil {
		return startError(err)
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
		if start := ev.GetStart(); start != nil && pump == nil {
			pump = s.startPump(ctx, streamCtx, a, p, start.GetPid())
		}
		if data := ev.GetData(); data != nil {
			if err := a.writeOutput(data); err != nil {
				return err
			}
		}
		if end := ev.GetEnd(); end != nil {
			return ended(end)
		}
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

func (a *App) writeOutput(d *processpb.ProcessEvent_DataEvent) error {
	var err error
	switch out := d.GetOutput().(type) {
	case *processpb.ProcessEvent_DataEvent_Stdout:
		_, err = a.Out.Write(out.Stdout)
	case *processpb.ProcessEvent_DataEvent_Stderr:
		_, err = a.Err.Write(out.Stderr)
	case *processpb.ProcessEvent_DataEvent_Pty:
		_, err = a.Out.Write(out.Pty)
	}
	if err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// ended turns the end of a program into the exit status of hutch.
func ended(e *processpb.ProcessEvent_EndEvent) error {
	switch {
	case e.GetTimedOut():
		return exitStatus{exitTimeout, "time limit reached, the program was killed"}
	case e.GetOomKilled():
		return exitStatus{int(e.GetExitCode()), "the guest ran out of memory and killed the program"}
	case e.GetExitCode() != 0:
		return exitStatus{code: int(e.GetExitCode()) & 0xff}
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

func terminalSize(w io.Writer) *processpb.PTY_Size {
	if f, ok := w.(*os.File); ok {
		if cols, rows, err := term.GetSize(int(f.Fd())); err == nil {
			return &processpb.PTY_Size{Cols: uint32(cols), Rows: uint32(rows)}
		}
	}
	return &processpb.PTY_Size{Cols: 80, Rows: 24}
}

// inputPump carries standard input, terminal sizes and interrupts to a
// program while it runs.
type inputPump struct {
	cancel context.CancelFunc
	done   chan struct{}
}

// startPump starts the pump. live ends with the caller's wish to stop; stream
// lives as long as the program's stream.
func (s session) startPump(live, stream context.Context, a *App, p processpbconnect.ProcessClient, pid uint32) *inputPump {
	ctx, cancel := context.WithCancel(stream)
	pump := &inputPump{cancel: cancel, done: make(chan struct{})}
	who := &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Pid{Pid: pid}}
	go func() {
		defer close(pump.done)
		if s.interactive {
			// A read of standard input can't be taken back, so its goroutine
			// is left to end with the process; all else is waited for.
			go s.sendInput(ctx, a, p, who)
		}
		sizes := func() {}
		if s.tty {
			sizes = watchTerminal(ctx, a.Out, func(size *processpb.PTY_Size) {
				p.Update(ctx, connect.NewRequest(&processpb.UpdateRequest{Process: who, Pty: &processpb.PTY{Size: size}}))
			})
		}
		defer sizes()
		select {
		case <-ctx.Done():
		case <-live.Done():
			interrupt(ctx, p, who)
		}
	}()
	return pump
}

// stop ends the pump and waits for it.
func (p *inputPump) stop() {
	p.cancel()
	<-p.done
}

// interrupt asks the program to end, then kills it with its children.
func interrupt(ctx context.Context, p processpbconnect.ProcessClient, who *processpb.ProcessSelector) {
	p.SendSignal(ctx, connect.NewRequest(&processpb.SendSignalRequest{Process: who, Signal: processpb.Signal_SIGNAL_SIGINT, Tree: true}))
	select {
	case <-ctx.Done():
		return
	case <-time.After(interruptGrace):
	}
	p.SendSignal(ctx, connect.NewRequest(&processpb.SendSignalRequest{Process: who, Signal: processpb.Signal_SIGNAL_SIGKILL, Tree: true}))
}

// sendInput streams standard input to the program, in order, and closes its
// standard input at the end.
func (s session) sendInput(ctx context.Context, a *App, p processpbconnect.ProcessClient, who *processpb.ProcessSelector) {
	stream := p.StreamInput(ctx)
	err := stream.Send(&processpb.StreamInputRequest{Event: &processpb.StreamInputRequest_Start{
		Start: &processpb.StreamInputRequest_StartEvent{Process: who},
	}})
	buf := make([]byte, stdinChunk)
	for err == nil {
		var n int
		n, err = a.In.Read(buf)
		if n == 0 {
			continue
		}
		if sendErr := stream.Send(s.inputMessage(buf[:n])); sendErr != nil {
			err = sendErr
		}
	}
	if _, closeErr := stream.CloseAndReceive(); closeErr != nil || s.tty || !errors.Is(err, io.EOF) {
		return
	}
	p.CloseStdin(ctx, connect.NewRequest(&processpb.CloseStdinRequest{Process: who}))
}

func (s session) inputMessage(b []byte) *processpb.StreamInputRequest {
	in := &processpb.ProcessInput{Input: &processpb.ProcessInput_Stdin{Stdin: b}}
	if s.tty {
		in = &processpb.ProcessInput{Input: &processpb.ProcessInput_Pty{Pty: b}}
	}
	return &processpb.StreamInputRequest{Event: &processpb.StreamInputRequest_Data{
		Data: &processpb.StreamInputRequest_DataEvent{Input: in},
	}}
}
