package rpc

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/internal/host/events"
	"github.com/hutch-run/hutch/internal/host/lifecycle"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// sandboxes serves hostagent.v1.SandboxService.
type sandboxes struct {
	boxes     lifecycle.Sandboxes
	docker    Docker // nil: none
	subscribe func(after int64) (*events.Reader, error)
	logPath   func(sandbox.ID, LogSource) string
	stats     func(context.Context, sandbox.ID) (Stats, error)
	trim      func(context.Context, sandbox.ID) (lifecycle.Trimmed, error)
	draining  context.Context // ends when hutchd stops
}

// InspectSandbox implements the RPC.
func (s *sandboxes) InspectSandbox(_ context.Context, r *connect.Request[hostagentv1.InspectSandboxRequest]) (*connect.Response[hostagentv1.InspectSandboxResponse], error) {
	view, err := s.boxes.Get(r.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	m := recordOf(view, time.Now())
	m.DockerSocket = socketOf(s.docker, view.ID)
	return connect.NewResponse(&hostagentv1.InspectSandboxResponse{Sandbox: m}), nil
}

// HibernateSandbox implements the RPC.
func (s *sandboxes) HibernateSandbox(ctx context.Context, r *connect.Request[hostagentv1.HibernateSandboxRequest]) (*connect.Response[hostagentv1.HibernateSandboxResponse], error) {
	id, err := idOf(r.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	return answer(&hostagentv1.HibernateSandboxResponse{}, s.boxes.Hibernate(ctx, id))
}

// KeepAlive implements the RPC.
func (s *sandboxes) KeepAlive(ctx context.Context, r *connect.Request[hostagentv1.KeepAliveRequest]) (*connect.Response[hostagentv1.KeepAliveResponse], error) {
	id, err := idOf(r.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	return answer(&hostagentv1.KeepAliveResponse{}, s.boxes.KeepAlive(ctx, id))
}

// WaitSandbox implements the RPC.
func (s *sandboxes) WaitSandbox(ctx context.Context, r *connect.Request[hostagentv1.WaitSandboxRequest]) (*connect.Response[hostagentv1.WaitSandboxResponse], error) {
	id, err := idOf(r.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	states, err := statesOf(r.Msg.GetStatus())
	if err != nil {
		return nil, err
	}
	ctx, stop := s.patience(ctx)
	defer stop()
	view, err := s.boxes.Wait(ctx, id, states...)
	return answer(&hostagentv1.WaitSandboxResponse{Status: string(view.State), Reason: view.Reason}, ended(ctx, err))
}

// WatchEvents implements the RPC.
func (s *sandboxes) WatchEvents(ctx context.Context, r *connect.Request[hostagentv1.WatchEventsRequest], out *connect.ServerStream[hostagentv1.WatchEventsResponse]) error {
	reader, err := s.subscribe(r.Msg.GetAfter())
	if err != nil {
		return err
	}
	if err := out.Send(nil); err != nil { // the head: the cursor is set
		return err
	}
	ctx, stop := s.patience(ctx)
	defer stop()
	w := watch{reader: reader, only: sandbox.ID(r.Msg.GetSandboxId()), follow: !r.Msg.GetNoFollow(), send: out.Send}
	return ended(ctx, w.run(ctx))
}

// ReadLogs implements the RPC.
func (s *sandboxes) ReadLogs(ctx context.Context, r *connect.Request[hostagentv1.ReadLogsRequest], out *connect.ServerStream[hostagentv1.ReadLogsResponse]) error {
	view, err := s.boxes.Get(r.Msg.GetSandboxId())
	if err != nil {
		return err
	}
	if err := out.Send(nil); err != nil { // the head, also of an empty log
		return err
	}
	ctx, stop := s.patience(ctx)
	defer stop()
	l := logFile{path: s.logPath(view.ID, sourceOf(r.Msg.GetSource())), send: func(b []byte) error {
		return out.Send(&hostagentv1.ReadLogsResponse{Data: b})
	}}
	if !r.Msg.GetFollow() {
		return ended(ctx, l.read(ctx))
	}
	return ended(ctx, s.followLog(ctx, view.ID, &l))
}

// followLog follows a log until the sandbox is gone.
func (s *sandboxes) followLog(ctx context.Context, id sandbox.ID, l *logFile) error {
	ctx, gone := context.WithCancelCause(ctx)
	defer gone(nil)
	waited := make(chan struct{})
	go func() {
		defer close(waited)
		if _, err := s.boxes.Wait(ctx, id); err == nil {
			gone(errGone)
		}
	}()
	err := l.follow(ctx)
	gone(nil)
	<-waited
	if errors.Is(context.Cause(ctx), errGone) {
		return nil
	}
	return err
}

// errGone ends following the log of a sandbox that is gone.
var errGone = errors.New("sandbox is gone")

// GetStats implements the RPC.
func (s *sandboxes) GetStats(ctx context.Context, r *connect.Request[hostagentv1.GetStatsRequest]) (*connect.Response[hostagentv1.GetStatsResponse], error) {
	id, err := idOf(r.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	stats, err := s.stats(ctx, id)
	return answer(statsTo(stats), err)
}

// TrimSandbox implements the RPC.
func (s *sandboxes) TrimSandbox(ctx context.Context, r *connect.Request[hostagentv1.TrimSandboxRequest]) (*connect.Response[hostagentv1.TrimSandboxResponse], error) {
	id, err := idOf(r.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	t, err := s.trim(ctx, id)
	return answer(&hostagentv1.TrimSandboxResponse{TrimmedBytes: t.Guest, FreedBytes: t.Host, Result: t.Detail}, err)
}

func sourceOf(m hostagentv1.ReadLogsRequest_Source) LogSource {
	if m == hostagentv1.ReadLogsRequest_SOURCE_VMM {
		return VMMLog
	}
	return ConsoleLog
}

// patience returns a context for what only waits: it ends with hutchd too.
func (s *sandboxes) patience(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.draining, func() { cancel(context.Cause(s.draining)) })
	return ctx, func() { stop(); cancel(nil) }
}

// ended is err, told as what ended ctx when that is why.
func ended(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return context.Cause(ctx)
	}
	return err
}

// watch sends events from a reader.
type watch struct {
	reader *events.Reader
	only   sandbox.ID // empty: of all
	follow bool
	send   func(*hostagentv1.WatchEventsResponse) error
	missed int64 // since the last one sent
}

func (w *watch) run(ctx context.Context) error {
	for {
		batch, err := w.reader.Read()
		if err != nil {
			return err
		}
		if len(batch.Events) == 0 {
			if !w.follow {
				return nil
			}
			if batch, err = w.reader.Next(ctx); err != nil {
				return err
			}
		}
		w.missed += batch.Missed
		for _, e := range batch.Events {
			if err := w.tell(e); err != nil {
				return err
			}
		}
	}
}

func (w *watch) tell(e sandbox.Event) error {
	if w.only != "" && e.ID != w.only {
		return nil
	}
	m := &hostagentv1.WatchEventsResponse{Event: eventOf(e), Missed: w.missed}
	w.missed = 0
	return w.send(m)
}
