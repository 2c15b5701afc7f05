package guestconn

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"regexp"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	processpb "github.com/hutch-run/hutch/gen/process"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/link"
)

const (
	// DefaultMaxOutput is what Exec keeps of each stream when MaxOutput is not
	// positive, in bytes.
	DefaultMaxOutput = 8 << 20
	// guardExtra is how much later than the guest the host ends a command that
	// is over its time.
	guardExtra = 3 * time.Second
	// inputChunk is how much input goes in one call.
	inputChunk = 32 << 10
)

// errEnded stops the reading of a command that has told its end.
var errEnded = errors.New("command has ended")

// errGuard is the end of a command's time as the host sees it.
var errGuard = errors.New("command is over its time")

// Exec implements Guest.
//
// A command that is over its time is ended by the guest; when the guest does
// not say so, because it hangs or is paused, the host returns what it has a few
// seconds later, with TimedOut and the exit code of a kill, which the guest
// carries out when it runs again. A command of which the end is not known for
// another reason is an error, Unavailable, and may have run.
func (c *Conn) Exec(ctx context.Context, e Exec) (Result, error) {
	if e.Cmd == "" {
		return Result{}, fault.BadField("cmd", "must not be empty")
	}
	if e.MaxOutput <= 0 {
		e.MaxOutput = DefaultMaxOutput
	}
	session, err := c.session(ctx) // the command's time begins when the guest is there
	if err != nil {
		return Result{}, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if e.Timeout > 0 {
		t := time.AfterFunc(e.Timeout+c.p.guardExtra, func() { cancel(errGuard) })
		defer t.Stop()
	}
	start := startRequest(e)
	request, err := proto.Marshal(start)
	if err != nil {
		return Result{}, fmt.Errorf("run command in guest: %w", err)
	}
	x := &execution{c: c, e: e, tag: start.GetTag()}
	return x.collect(ctx, session, request)
}

// execError says why a command has no result.
func execError(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), errGuard) {
		return fault.New(fault.Deadline, "run command in guest: guest did not start it in time")
	}
	return callError("run command in guest", err)
}

func startRequest(e Exec) *processpb.StartRequest {
	var tag *string
	stdin := len(e.Stdin) > 0
	if stdin {
		// Input is sent to the tag: a pid may be another's by then.
		b := make([]byte, 12)
		rand.Read(b) // never fails
		s := "exec-" + hex.EncodeToString(b)
		tag = &s
	}
	cfg := &processpb.ProcessConfig{Cmd: e.Cmd, Args: e.Args, Envs: e.Env, User: e.User}
	if e.Cwd != "" {
		cfg.Cwd = &e.Cwd
	}
	return &processpb.StartRequest{Process: cfg, Tag: tag, Stdin: &stdin, TimeoutMs: milliseconds(e.Timeout)}
}

// milliseconds rounds up, so that a short time does not become none.
func milliseconds(d time.Duration) uint32 {
	if d <= 0 {
		return 0
	}
	return uint32(min((d+time.Millisecond-1)/time.Millisecond, math.MaxUint32))
}

// execution is one command as its events come in.
type execution struct {
	c   *Conn
	e   Exec
	tag string // set when there is input
	res Result

	started bool
	input   sync.WaitGroup
}

// collect makes the call and follows it to its end.
func (x *execution) collect(ctx context.Context, session *link.Session, request []byte) (Result, error) {
	ictx, endInput := context.WithCancel(ctx)
	defer x.input.Wait()
	defer endInput()
	var m processpb.StartResponse
	err := session.Stream(ctx, link.CallStart, request, func(reply []byte) error {
		if err := proto.Unmarshal(reply, &m); err != nil {
			return fmt.Errorf("read event: %w", err)
		}
		ended, err := x.event(ictx, m.GetEvent())
		if ended && err == nil {
			err = errEnded
		}
		return err
	})
	switch {
	case errors.Is(err, errEnded):
		return x.res, nil
	case x.started && errors.Is(context.Cause(ctx), errGuard):
		x.res.TimedOut, x.res.ExitCode, x.res.Signal = true, 128+int(unix.SIGKILL), "SIGKILL"
		return x.res, nil
	case err == nil:
		return Result{}, fault.New(fault.Unavailable, "run command in guest: guest did not tell how it ended")
	}
	return Result{}, execError(ctx, err)
}

// event takes one event, and tells whether it was the last.
func (x *execution) event(ictx context.Context, ev *processpb.ProcessEvent) (bool, error) {
	switch ev := ev.GetEvent().(type) {
	case *processpb.ProcessEvent_Start:
		if !x.started {
			x.started = true
			x.startInput(ictx)
		}
	case *processpb.ProcessEvent_Data:
		x.res.Stdout, x.res.StdoutTruncated = keep(x.res.Stdout, ev.Data.GetStdout(), x.e.MaxOutput, x.res.StdoutTruncated)
		x.res.Stderr, x.res.StderrTruncated = keep(x.res.Stderr, ev.Data.GetStderr(), x.e.MaxOutput, x.res.StderrTruncated)
	case *processpb.ProcessEvent_End:
		return true, x.end(ev.End)
	}
	return false, nil
}

// keep appends p to kept up to limit bytes, and tells whether anything was
// dropped.
func keep(kept, p []byte, limit int, truncated bool) ([]byte, bool) {
	n := min(len(p), limit-len(kept))
	return append(kept, p[:n]...), truncated || n < len(p)
}

var signalName = regexp.MustCompile(`^SIG[A-Z0-9+]{1,12}$`)

// end makes the result of the last event.
func (x *execution) end(end *processpb.ProcessEvent_EndEvent) error {
	x.res.ExitCode = int(end.GetExitCode())
	x.res.TimedOut, x.res.OOMKilled = end.GetTimedOut(), end.GetOomKilled()
	if s := end.GetSignal(); signalName.MatchString(s) {
		x.res.Signal = s
		if n := unix.SignalNum(s); n > 0 {
			x.res.ExitCode = 128 + int(n)
		}
	}
	if !end.GetExited() && x.res.Signal == "" && !x.res.TimedOut && x.res.ExitCode == 0 {
		// Never let a command whose end is unknown pass for a success.
		return fault.New(fault.Unavailable, "run command in guest: guest lost track of it: %s", text(end.GetError()))
	}
	return nil
}

// startInput sends the command's input while its output is read.
func (x *execution) startInput(ctx context.Context) {
	if len(x.e.Stdin) == 0 {
		return
	}
	// A failure is the command's business: it may end without reading all.
	x.input.Go(func() { _ = x.sendInput(ctx) })
}

func (x *execution) sendInput(ctx context.Context) error {
	to := &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Tag{Tag: x.tag}}
	for rest := x.e.Stdin; len(rest) > 0; {
		n := min(len(rest), inputChunk)
		in := &processpb.ProcessInput{Input: &processpb.ProcessInput_Stdin{Stdin: rest[:n]}}
		if _, err := x.c.process.SendInput(ctx, connect.NewRequest(&processpb.SendInputRequest{Process: to, Input: in})); err != nil {
			return err
		}
		rest = rest[n:]
	}
	_, err := x.c.process.CloseStdin(ctx, connect.NewRequest(&processpb.CloseStdinRequest{Process: to}))
	return err
}
