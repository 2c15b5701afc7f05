package rpc

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"
	"sync"

	"connectrpc.com/connect"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/lifecycle"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// templates serves hostagent.v1.TemplateService.
type templates struct {
	templates Templates
	boxes     lifecycle.Sandboxes
	snapshots Snapshots
}

// BuildTemplate implements the RPC.
func (t *templates) BuildTemplate(ctx context.Context, r *connect.Request[hostagentv1.BuildTemplateRequest], out *connect.ServerStream[hostagentv1.BuildTemplateResponse]) error {
	if err := t.checkFree(r.Msg.GetName()); err != nil {
		return err
	}
	if err := out.Send(nil); err != nil { // the head: the request is taken
		return err
	}
	made, err := t.build(ctx, buildOf(r.Msg), func(m *hostagentv1.BuildProgress) error {
		return out.Send(&hostagentv1.BuildTemplateResponse{Event: &hostagentv1.BuildTemplateResponse_Progress{Progress: m}})
	})
	if err != nil {
		return err
	}
	return out.Send(&hostagentv1.BuildTemplateResponse{Event: &hostagentv1.BuildTemplateResponse_Template{Template: templateTo(made)}})
}

// build builds while its reports are sent. When nobody listens any more the
// build ends, and leaves nothing.
func (t *templates) build(ctx context.Context, b BuildTemplate, send func(*hostagentv1.BuildProgress) error) (TemplateInfo, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	news := newProgress()
	var relay sync.WaitGroup
	relay.Go(func() { cancel(news.relay(send)) })
	// Here and not in a goroutine, so that a panic is this call's alone.
	defer relay.Wait()
	defer news.end()
	made, err := t.templates.Build(ctx, b, news.report)
	if err != nil && ctx.Err() != nil {
		err = errors.Join(context.Cause(ctx), err)
	}
	return made, err
}

func buildOf(m *hostagentv1.BuildTemplateRequest) BuildTemplate {
	return BuildTemplate{
		Name: m.GetName(), Recipe: m.GetRecipe(), Reference: m.GetReference(), HostPath: m.GetHostPath(),
		Platform: m.GetPlatform(), Defaults: defaultsOf(m.GetDefaults()),
		InsecureRegistry: m.GetInsecureRegistry(), DockerConfig: m.GetDockerConfig(),
	}
}

// ImportTemplate implements the RPC.
func (t *templates) ImportTemplate(ctx context.Context, in *connect.ClientStream[hostagentv1.ImportTemplateRequest]) (*connect.Response[hostagentv1.ImportTemplateResponse], error) {
	if !in.Receive() {
		return nil, noHeader(in.Err())
	}
	header := in.Msg().GetHeader()
	if header == nil {
		return nil, noHeader(nil)
	}
	if err := t.checkFree(header.GetName()); err != nil {
		return nil, err
	}
	made, err := t.templates.Import(ctx, ImportTemplate{
		Name: header.GetName(), Platform: header.GetPlatform(), Defaults: defaultsOf(header.GetDefaults()),
		Archive: &chunks{in: in},
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&hostagentv1.ImportTemplateResponse{Template: templateTo(made)}), nil
}

func noHeader(err error) error {
	if err != nil {
		return err
	}
	return fault.BadField("header", "must be the first message")
}

// ListTemplates implements the RPC.
func (t *templates) ListTemplates(ctx context.Context, _ *connect.Request[hostagentv1.ListTemplatesRequest]) (*connect.Response[hostagentv1.ListTemplatesResponse], error) {
	list, err := t.templates.List(ctx)
	res := &hostagentv1.ListTemplatesResponse{}
	for _, one := range list {
		res.Templates = append(res.Templates, templateTo(one))
	}
	for _, s := range t.snapshots.Snapshots() {
		if s.Name != "" {
			res.Templates = append(res.Templates, templateOfSnapshot(s))
		}
	}
	slices.SortFunc(res.Templates, func(a, b *hostagentv1.Template) int { return cmp.Compare(a.GetName(), b.GetName()) })
	return answer(res, err)
}

// InspectTemplate implements the RPC.
func (t *templates) InspectTemplate(ctx context.Context, r *connect.Request[hostagentv1.InspectTemplateRequest]) (*connect.Response[hostagentv1.InspectTemplateResponse], error) {
	if s, ok := t.snapshot(r.Msg.GetName()); ok {
		return connect.NewResponse(&hostagentv1.InspectTemplateResponse{Template: templateOfSnapshot(s), SandboxIds: texts(s.Users)}), nil
	}
	one, err := t.templates.Inspect(ctx, r.Msg.GetName())
	if err != nil {
		return nil, err
	}
	res := &hostagentv1.InspectTemplateResponse{Template: templateTo(one)}
	for _, view := range t.boxes.List() {
		if view.ImageDigest == one.ImageDigest {
			res.SandboxIds = append(res.SandboxIds, string(view.ID))
		}
	}
	return connect.NewResponse(res), nil
}

// RemoveTemplate implements the RPC.
func (t *templates) RemoveTemplate(ctx context.Context, r *connect.Request[hostagentv1.RemoveTemplateRequest]) (*connect.Response[hostagentv1.RemoveTemplateResponse], error) {
	if s, ok := t.snapshot(r.Msg.GetName()); ok {
		return nil, fault.New(fault.Precondition, "%s is a snapshot; `hutch snapshot rm %s` removes it", s.Name, s.Name)
	}
	return answer(&hostagentv1.RemoveTemplateResponse{}, t.templates.Remove(ctx, r.Msg.GetName()))
}

// WarmTemplate implements the RPC.
func (t *templates) WarmTemplate(ctx context.Context, r *connect.Request[hostagentv1.WarmTemplateRequest]) (*connect.Response[hostagentv1.WarmTemplateResponse], error) {
	s, err := t.snapshots.WarmTemplate(ctx, sandbox.Spec{
		Template: r.Msg.GetName(), VCPUs: int(r.Msg.GetVcpus()), MemoryMB: int(r.Msg.GetMemoryMb()), DiskMB: int(r.Msg.GetDiskSizeMb()),
	}, snapshot.Ready(r.Msg.GetReady()))
	if err != nil {
		return nil, err
	}
	res := &hostagentv1.WarmTemplateResponse{
		SnapshotId: s.ID, Vcpus: int32(s.Fits.VCPUs), MemoryMb: int32(s.Fits.MemoryMB), DiskSizeMb: int32(s.DiskMB),
		MemoryBytes: s.Memory.Stored, DiskBytes: s.Stored(), Ready: string(s.Ready),
	}
	return connect.NewResponse(res), nil
}

// snapshot returns the snapshot with a name.
func (t *templates) snapshot(name string) (lifecycle.SnapshotView, bool) {
	for _, s := range t.snapshots.Snapshots() {
		if s.Name == name && name != "" {
			return s, true
		}
	}
	return lifecycle.SnapshotView{}, false
}

// checkFree refuses a name for a template that a snapshot has.
func (t *templates) checkFree(name string) error {
	if _, ok := t.snapshot(name); ok {
		return fault.New(fault.Exists, "a snapshot is called %s; remove it first, or choose another name", name)
	}
	return nil
}

// chunks reads the archive out of the messages behind the header. A stream
// that breaks off is an error, never an end.
type chunks struct {
	in   *connect.ClientStream[hostagentv1.ImportTemplateRequest]
	rest []byte
	err  error
}

// Read implements io.Reader.
func (c *chunks) Read(p []byte) (int, error) {
	for len(c.rest) == 0 && c.err == nil {
		c.err = c.next()
	}
	if len(c.rest) == 0 {
		return 0, c.err
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

func (c *chunks) next() error {
	if !c.in.Receive() {
		if err := c.in.Err(); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		return io.EOF
	}
	if c.in.Msg().GetHeader() != nil {
		return fault.BadField("header", "is there twice")
	}
	c.rest = c.in.Msg().GetChunk()
	return nil
}

// progress carries reports of a build to its caller. The build never waits
// for the caller: of each step only the latest report is kept.
type progress struct {
	mu     sync.Mutex
	latest []*hostagentv1.BuildProgress // one a step, not yet sent; guarded by mu
	news   chan struct{}                // holds one when latest is not empty
	done   chan struct{}                // closed when the build has ended
}

// maxSteps bounds the reports that wait; the oldest goes first.
const maxSteps = 256

func newProgress() *progress {
	return &progress{news: make(chan struct{}, 1), done: make(chan struct{})}
}

// report is what the build calls.
func (p *progress) report(step string, done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := &hostagentv1.BuildProgress{Step: step, DoneBytes: done, TotalBytes: total}
	for i, waiting := range p.latest {
		if waiting.GetStep() == step {
			p.latest[i] = m
			return
		}
	}
	if len(p.latest) == maxSteps {
		p.latest = p.latest[1:]
	}
	p.latest = append(p.latest, m)
	select {
	case p.news <- struct{}{}:
	default:
	}
}

func (p *progress) end() { close(p.done) }

// relay sends reports until the build has ended and all are sent.
func (p *progress) relay(send func(*hostagentv1.BuildProgress) error) error {
	for {
		ended := false
		select {
		case <-p.news:
		case <-p.done:
			ended = true
		}
		p.mu.Lock()
		batch := p.latest
		p.latest = nil
		p.mu.Unlock()
		for _, m := range batch {
			if err := send(m); err != nil {
				return err
			}
		}
		if ended {
			return nil
		}
	}
}
