package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	processpb "github.com/hutch-run/hutch/gen/process"
	"github.com/hutch-run/hutch/gen/process/processpbconnect"
)

// stdinChunk is how much of standard input goes into one message.
const stdinChunk = 32 << 10

// interruptGrace is how long a program has to end after the interrupt that
// Ctrl-C sends it, before it is killed. Each of both calls may take as long.
const interruptGrace = 5 * time.Second

// inputPump carries standard input, terminal sizes and interrupts to a
// program while it runs.
type inputPump struct {
	session
	a    *App
	p    processpbconnect.ProcessClient
	pid  uint32
	says *complaints

	cut    atomic.Bool // standard input did not get through to its end
	cancel context.CancelFunc
	done   chan struct{}
}

// start starts the pump. live ends with the caller's wish to stop; stream
// lives as long as the program's stream, which giveUp ends when the program
// can't be killed.
func (u *inputPump) start(live, stream context.Context, giveUp context.CancelCauseFunc) {
	ctx, cancel := context.WithCancel(stream)
	u.cancel, u.done = cancel, make(chan struct{})
	go func() {
		defer close(u.done)
		if u.interactive {
			// A read of standard input can't be taken back, so its goroutine
			// is left to end with the process; all else is waited for.
			go u.sendInput(ctx)
		}
		sizes := func() {}
		if u.tty {
			sizes = watchTerminal(ctx, u.a.Out, func(size *processpb.PTY_Size) { u.resize(ctx, size) })
		}
		defer sizes()
		select {
		case <-ctx.Done():
		case <-live.Done():
			if err := u.interrupt(ctx); err != nil {
				giveUp(err)
			}
		}
	}()
}

// stop ends the pump and waits for it.
func (u *inputPump) stop() {
	u.cancel()
	<-u.done
}

func (a *App) grace() time.Duration { return cmp.Or(a.patience, interruptGrace) }

func (u *inputPump) who() *processpb.ProcessSelector {
	return &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Pid{Pid: u.pid}}
}

// interrupt asks the program to end, then kills it with its children. The
// error is that of the kill: the program may run on.
func (u *inputPump) interrupt(ctx context.Context) error {
	if err := u.signal(ctx, processpb.Signal_SIGNAL_SIGINT); err != nil {
		u.says.complain("interrupt the program: " + said(err))
	}
	select {
	case <-ctx.Done():
		return nil
	case <-time.After(u.a.grace()):
	}
	if err := u.signal(ctx, processpb.Signal_SIGNAL_SIGKILL); err != nil {
		return exitStatus{exitHutch, "kill the program: " + said(err) + "; it may still run"}
	}
	return nil
}

// signal signals the program and its children. A program that has ended is no
// error.
func (u *inputPump) signal(ctx context.Context, sig processpb.Signal) error {
	limited, cancel := context.WithTimeout(ctx, u.a.grace())
	defer cancel()
	_, err := u.p.SendSignal(limited, connect.NewRequest(&processpb.SendSignalRequest{Process: u.who(), Signal: sig, Tree: true}))
	switch {
	case ctx.Err() != nil || isGone(err):
		return nil
	case err != nil && limited.Err() != nil:
		return fmt.Errorf("no answer within %s", u.a.grace())
	}
	return err
}

func (u *inputPump) resize(ctx context.Context, size *processpb.PTY_Size) {
	_, err := u.p.Update(ctx, connect.NewRequest(&processpb.UpdateRequest{Process: u.who(), Pty: &processpb.PTY{Size: size}}))
	if err != nil && ctx.Err() == nil && !isGone(err) {
		u.says.complain("resize the program's terminal: " + said(err))
	}
}

// sendInput streams standard input to the program, in order, and closes its
// standard input at the end, also when that is not the end of all: else the
// program would wait for the rest.
func (u *inputPump) sendInput(ctx context.Context) {
	if err := u.copyInput(ctx); err != nil && ctx.Err() == nil {
		u.cut.Store(true)
		u.says.complain(err.Error())
	}
	if u.tty {
		return
	}
	_, err := u.p.CloseStdin(ctx, connect.NewRequest(&processpb.CloseStdinRequest{Process: u.who()}))
	if err != nil && ctx.Err() == nil && !isGone(err) {
		u.says.complain("close the program's standard input: " + said(err))
	}
}

// copyInput returns nil at the end of standard input, and when the program
// wants no more of it.
func (u *inputPump) copyInput(ctx context.Context) error {
	stream := u.p.StreamInput(ctx)
	err := stream.Send(&processpb.StreamInputRequest{Event: &processpb.StreamInputRequest_Start{
		Start: &processpb.StreamInputRequest_StartEvent{Process: u.who()},
	}})
	buf := make([]byte, stdinChunk)
	var readErr error
	for err == nil && readErr == nil {
		var n int
		if n, readErr = u.a.In.Read(buf); n > 0 {
			err = stream.Send(u.inputMessage(buf[:n])) // the reason comes with the answer
		}
	}
	_, err = stream.CloseAndReceive()
	switch {
	case err != nil && !isGone(err):
		return fmt.Errorf("send standard input: %s", said(err))
	case readErr != nil && !errors.Is(readErr, io.EOF):
		return fmt.Errorf("read standard input: %w", readErr)
	}
	return nil
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

// isGone reports whether err is the guest's word that the program has ended or
// has closed its input: nothing to tell, its own end is on its way.
func isGone(err error) bool {
	var ce *connect.Error
	if !errors.As(err, &ce) || ce.Meta().Get("Hutch-Error") != "" {
		return false
	}
	return ce.Code() == connect.CodeNotFound || ce.Code() == connect.CodeFailedPrecondition
}

// said returns what err says, without the code that connect writes before
// it.
func said(err error) string {
	var ce *connect.Error
	if errors.As(err, &ce) {
		return ce.Message()
	}
	return err.Error()
}
