package processrpc

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	processpb "github.com/hutch-run/hutch/gen/process"
	"github.com/hutch-run/hutch/gen/process/processpbconnect"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/account"
	"github.com/hutch-run/hutch/internal/guest/process"
)

// Keep-alives: how often a silent stream says that it lives, and the bounds of
// what a client may ask for with the header.
const (
	keepaliveHeader  = "Keepalive-Ping-Interval" // whole seconds
	defaultKeepalive = 25 * time.Second
	maxKeepalive     = time.Hour
)

// maxTag bounds the length of a tag, in bytes.
const maxTag = 256

// Handler implements processpbconnect.ProcessHandler.
type Handler struct {
	table     *process.Table
	keepalive time.Duration
}

var _ processpbconnect.ProcessHandler = (*Handler)(nil)

// New returns the handler for the programs of table. The caller closes table.
func New(table *process.Table) *Handler { return &Handler{table: table, keepalive: defaultKeepalive} }

// Mount returns the path prefix of the service and what serves it.
func (h *Handler) Mount(opts ...connect.HandlerOption) (string, http.Handler) {
	path, inner := processpbconnect.NewProcessHandler(h, opts...)
	return path, liftDeadline(inner)
}

// List tells the running programs and those that ended lately.
func (h *Handler) List(_ context.Context, _ *connect.Request[processpb.ListRequest]) (*connect.Response[processpb.ListResponse], error) {
	res := &processpb.ListResponse{}
	for _, info := range h.table.List() {
		res.Processes = append(res.Processes, infoMessage(info))
	}
	return connect.NewResponse(res), nil
}

// Start runs a program and streams what it does.
func (h *Handler) Start(ctx context.Context, req *connect.Request[processpb.StartRequest], stream *connect.ServerStream[processpb.StartResponse]) error {
	spec, err := startSpec(req.Msg, limitFrom(ctx))
	if err != nil {
		return err
	}
	spec.HeaderUser = account.HeaderUser(req.Header())
	p, sub, err := h.table.Start(ctx, spec)
	if err != nil {
		return err
	}
	defer sub.Close()
	return h.follow(ctx, p, sub, req.Header(), func(ev *processpb.ProcessEvent) error {
		return stream.Send(&processpb.StartResponse{Event: ev})
	})
}

// Connect streams a program from its oldest retained output on.
func (h *Handler) Connect(ctx context.Context, req *connect.Request[processpb.ConnectRequest], stream *connect.ServerStream[processpb.ConnectResponse]) error {
	p, err := h.find(req.Msg.GetProcess())
	if err != nil {
		return err
	}
	sub := p.Subscribe()
	defer sub.Close()
	return h.follow(ctx, p, sub, req.Header(), func(ev *processpb.ProcessEvent) error {
		return stream.Send(&processpb.ConnectResponse{Event: ev})
	})
}

func (h *Handler) follow(ctx context.Context, p *process.Process, sub *process.Subscription, header http.Header, send func(*processpb.ProcessEvent) error) error {
	first := &processpb.ProcessEvent_StartEvent{Pid: uint32(p.Info().Pid), MissedBytes: sub.Missed()}
	if err := send(&processpb.ProcessEvent{Event: &processpb.ProcessEvent_Start{Start: first}}); err != nil {
		return err
	}
	idle := interval(header, h.keepalive)
	for {
		ev, err := sub.Next(ctx, idle)
		if err != nil {
			return err
		}
		if err := send(eventMessage(ev)); err != nil {
			return err
		}
		if ev.Kind == process.End {
			return nil
		}
	}
}

func interval(header http.Header, def time.Duration) time.Duration {
	n, err := strconv.Atoi(header.Get(keepaliveHeader))
	if err != nil || n <= 0 {
		return def
	}
	return min(time.Duration(min(n, int(maxKeepalive/time.Second)))*time.Second, maxKeepalive)
}

// Update resizes a program's terminal.
func (h *Handler) Update(_ context.Context, req *connect.Request[processpb.UpdateRequest]) (*connect.Response[processpb.UpdateResponse], error) {
	p, err := h.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if req.Msg.GetPty() == nil {
		return connect.NewResponse(&processpb.UpdateResponse{}), nil
	}
	size, err := sizeOf(req.Msg.GetPty())
	if err != nil {
		return nil, err
	}
	if err := p.Resize(size); err != nil {
		return nil, err
	}
	return connect.NewResponse(&processpb.UpdateResponse{}), nil
}

// SendInput gives a program one piece of input.
func (h *Handler) SendInput(ctx context.Context, req *connect.Request[processpb.SendInputRequest]) (*connect.Response[processpb.SendInputResponse], error) {
	p, err := h.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := write(ctx, p, req.Msg.GetInput()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&processpb.SendInputResponse{}), nil
}

// StreamInput gives a program input piece by piece, in order. The end of the
// stream does not close the program's input: CloseStdin does.
func (h *Handler) StreamInput(ctx context.Context, stream *connect.ClientStream[processpb.StreamInputRequest]) (*connect.Response[processpb.StreamInputResponse], error) {
	var p *process.Process
	for stream.Receive() {
		msg := stream.Msg()
		switch {
		case msg.GetStart() != nil:
			if p != nil {
				return nil, fault.BadField("start", "came twice: one stream feeds one program")
			}
			found, err := h.find(msg.GetStart().GetProcess())
			if err != nil {
				return nil, err
			}
			p = found
		case msg.GetData() != nil:
			if p == nil {
				return nil, fault.BadField("start", "must come before data: it names the program")
			}
			if err := write(ctx, p, msg.GetData().GetInput()); err != nil {
				return nil, err
			}
		}
	}
	if err := stream.Err(); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if p == nil {
		return nil, fault.BadField("start", "is missing: it names the program")
	}
	return connect.NewResponse(&processpb.StreamInputResponse{}), nil
}

func write(ctx context.Context, p *process.Process, in *processpb.ProcessInput) error {
	switch in := in.GetInput().(type) {
	case *processpb.ProcessInput_Stdin:
		return p.Write(ctx, in.Stdin, false)
	case *processpb.ProcessInput_Pty:
		return p.Write(ctx, in.Pty, true)
	}
	return fault.BadField("input", "is empty: give stdin or pty")
}

// SendSignal signals a program or its whole tree.
func (h *Handler) SendSignal(_ context.Context, req *connect.Request[processpb.SendSignalRequest]) (*connect.Response[processpb.SendSignalResponse], error) {
	sig := req.Msg.GetSignal()
	if _, known := processpb.Signal_name[int32(sig)]; !known || sig == processpb.Signal_SIGNAL_UNSPECIFIED {
		return nil, fault.BadField("signal", "%d is none that can be sent", int32(sig))
	}
	p, err := h.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	// The numbers of the enum are Linux's.
	if err := p.Signal(unix.Signal(sig), req.Msg.GetTree()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&processpb.SendSignalResponse{}), nil
}

// CloseStdin ends a program's standard input.
func (h *Handler) CloseStdin(_ context.Context, req *connect.Request[processpb.CloseStdinRequest]) (*connect.Response[processpb.CloseStdinResponse], error) {
	p, err := h.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := p.CloseInput(); err != nil {
		return nil, err
	}
	return connect.NewResponse(&processpb.CloseStdinResponse{}), nil
}

func (h *Handler) find(sel *processpb.ProcessSelector) (*process.Process, error) {
	switch s := sel.GetSelector().(type) {
	case *processpb.ProcessSelector_Pid:
		return h.table.Find(process.Selector{Pid: int(s.Pid)})
	case *processpb.ProcessSelector_Tag:
		if s.Tag == "" {
			return nil, fault.BadField("process.tag", "is empty")
		}
		return h.table.Find(process.Selector{Tag: s.Tag})
	}
	return nil, fault.BadField("process", "is empty: name the program by pid or tag")
}

func startSpec(msg *processpb.StartRequest, deadline time.Duration) (process.Spec, error) {
	cfg := msg.GetProcess()
	spec := process.Spec{
		Cmd: cfg.GetCmd(), Args: cfg.GetArgs(), Env: cfg.GetEnvs(), User: cfg.GetUser(), Tag: msg.GetTag(),
		NoStdin: msg.Stdin != nil && !msg.GetStdin(),
		Timeout: cmp.Or(time.Duration(msg.GetTimeoutMs())*time.Millisecond, deadline),
	}
	if cfg != nil {
		spec.Cwd = cfg.Cwd
	}
	if len(spec.Tag) > maxTag {
		return spec, fault.BadField("tag", "is longer than %d bytes", maxTag)
	}
	if msg.GetPty() != nil {
		size, err := sizeOf(msg.GetPty())
		if err != nil {
			return spec, err
		}
		spec.Size = &size
	}
	return spec, nil
}

func sizeOf(pty *processpb.PTY) (process.Size, error) {
	cols, rows := pty.GetSize().GetCols(), pty.GetSize().GetRows()
	if cols > 1<<16-1 || rows > 1<<16-1 {
		return process.Size{}, fault.BadField("pty.size", "%d columns and %d rows: the most is 65535", cols, rows)
	}
	return process.Size{Cols: uint16(cols), Rows: uint16(rows)}, nil
}

func infoMessage(info process.Info) *processpb.ProcessInfo {
	m := &processpb.ProcessInfo{
		Config:      &processpb.ProcessConfig{Cmd: info.Cmd, Args: info.Args, Envs: info.Env, Cwd: &info.Cwd, User: info.User},
		Pid:         uint32(info.Pid),
		Ended:       info.Ended,
		User:        info.User,
		StartedAtMs: info.Started.UnixMilli(),
	}
	if info.Tag != "" {
		m.Tag = &info.Tag
	}
	return m
}

func eventMessage(ev process.Event) *processpb.ProcessEvent {
	switch ev.Kind {
	case process.Data:
		return &processpb.ProcessEvent{Event: &processpb.ProcessEvent_Data{Data: dataMessage(ev)}}
	case process.End:
		return &processpb.ProcessEvent{Event: &processpb.ProcessEvent_End{End: endMessage(ev.Exit)}}
	case process.Idle:
	}
	return &processpb.ProcessEvent{Event: &processpb.ProcessEvent_Keepalive{Keepalive: &processpb.ProcessEvent_KeepAlive{}}}
}

func dataMessage(ev process.Event) *processpb.ProcessEvent_DataEvent {
	m := &processpb.ProcessEvent_DataEvent{}
	switch ev.Stream {
	case process.Stdout:
		m.Output = &processpb.ProcessEvent_DataEvent_Stdout{Stdout: ev.Data}
	case process.Stderr:
		m.Output = &processpb.ProcessEvent_DataEvent_Stderr{Stderr: ev.Data}
	case process.Terminal:
		m.Output = &processpb.ProcessEvent_DataEvent_Pty{Pty: ev.Data}
	}
	return m
}

func endMessage(e process.Exit) *processpb.ProcessEvent_EndEvent {
	m := &processpb.ProcessEvent_EndEvent{
		ExitCode: int32(e.Code), Exited: e.Normal(), Status: e.Status(), Signal: e.SignalName(),
		TimedOut: e.TimedOut, OomKilled: e.OOMKilled,
	}
	if problem := e.Problem(); problem != "" {
		m.Error = &problem
	}
	return m
}
