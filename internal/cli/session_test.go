package cli

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/creack/pty"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/gen/hostagent/v1/hostagentv1connect"
	processpb "github.com/hutch-run/hutch/gen/process"
	"github.com/hutch-run/hutch/gen/process/processpbconnect"
	"github.com/hutch-run/hutch/internal/testenv"
)

// guest is a server that stands for hutchd with one sandbox in it. Its one
// program says "up" and runs until end is closed. What goes to a call whose name
// is in refuse fails with that error.
type guest struct {
	processpbconnect.UnimplementedProcessHandler
	hostagentv1connect.UnimplementedSandboxServiceHandler
	hostagentv1connect.UnimplementedTemplateServiceHandler
	refuse    map[string]error
	endBySign processpb.Signal // the signal that ends the program
	stuck     bool             // nothing comes after the call to start

	started chan struct{} // closed when the call to start is there
	end     chan struct{}
	once    sync.Once

	mu    sync.Mutex
	calls []string // guarded by mu
}

func (g *guest) called(name string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.calls = append(g.calls, name)
	return g.refuse[name]
}

func (g *guest) finish() { g.once.Do(func() { close(g.end) }) }

func (g *guest) InspectSandbox(context.Context, *connect.Request[hostagentv1.InspectSandboxRequest]) (*connect.Response[hostagentv1.InspectSandboxResponse], error) {
	info := &hostagentv1.SandboxInfo{SandboxId: "sb-1"}
	return connect.NewResponse(&hostagentv1.InspectSandboxResponse{Sandbox: &hostagentv1.SandboxRecord{Info: info}}), nil
}

func (g *guest) ListTemplates(context.Context, *connect.Request[hostagentv1.ListTemplatesRequest]) (*connect.Response[hostagentv1.ListTemplatesResponse], error) {
	return connect.NewResponse(&hostagentv1.ListTemplatesResponse{Templates: []*hostagentv1.Template{{Name: "box"}, {Name: "minimal"}}}), nil
}

func (g *guest) Start(ctx context.Context, _ *connect.Request[processpb.StartRequest], stream *connect.ServerStream[processpb.StartResponse]) error {
	close(g.started)
	if g.stuck {
		<-ctx.Done()
		return ctx.Err()
	}
	start := &processpb.ProcessEvent_Start{Start: &processpb.ProcessEvent_StartEvent{Pid: 7}}
	up := &processpb.ProcessEvent_Data{Data: &processpb.ProcessEvent_DataEvent{Output: &processpb.ProcessEvent_DataEvent_Stdout{Stdout: []byte("up\n")}}}
	for _, event := range []*processpb.ProcessEvent{{Event: start}, {Event: up}} {
		if err := stream.Send(&processpb.StartResponse{Event: event}); err != nil {
			return err
		}
	}
	select {
	case <-g.end:
	case <-ctx.Done():
		return ctx.Err()
	}
	return stream.Send(&processpb.StartResponse{Event: &processpb.ProcessEvent{Event: &processpb.ProcessEvent_End{
		End: &processpb.ProcessEvent_EndEvent{Exited: true},
	}}})
}

func (g *guest) SendSignal(_ context.Context, req *connect.Request[processpb.SendSignalRequest]) (*connect.Response[processpb.SendSignalResponse], error) {
	err := g.called(req.Msg.GetSignal().String())
	if req.Msg.GetSignal() == g.endBySign {
		g.finish()
	}
	return connect.NewResponse(&processpb.SendSignalResponse{}), err
}

// Update ends the program at its second call: what came of the first is known
// to the client by then.
func (g *guest) Update(context.Context, *connect.Request[processpb.UpdateRequest]) (*connect.Response[processpb.UpdateResponse], error) {
	err := g.called("Update")
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.calls) > 1 {
		g.finish()
	}
	return connect.NewResponse(&processpb.UpdateResponse{}), err
}

func (g *guest) StreamInput(_ context.Context, stream *connect.ClientStream[processpb.StreamInputRequest]) (*connect.Response[processpb.StreamInputResponse], error) {
	err := g.called("StreamInput")
	for err == nil && stream.Receive() {
	}
	return connect.NewResponse(&processpb.StreamInputResponse{}), err
}

func (g *guest) CloseStdin(context.Context, *connect.Request[processpb.CloseStdinRequest]) (*connect.Response[processpb.CloseStdinResponse], error) {
	err := g.called("CloseStdin")
	if err == nil || isGone(err) {
		g.finish()
	}
	return connect.NewResponse(&processpb.CloseStdinResponse{}), err
}

// serve makes an App that talks to g. Its streams are to be replaced.
func (g *guest) serve(t *testing.T) *App {
	t.Helper()
	g.started, g.end = make(chan struct{}), make(chan struct{})
	path, process := processpbconnect.NewProcessHandler(g)
	mux := http.NewServeMux()
	mux.Handle("/sandboxes/sb-1"+path, http.StripPrefix("/sandboxes/sb-1", process))
	mux.Handle(hostagentv1connect.NewSandboxServiceHandler(g))
	mux.Handle(hostagentv1connect.NewTemplateServiceHandler(g))
	server := httptest.NewUnstartedServer(mux)
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	t.Cleanup(server.Close)
	host := "tcp://" + server.Listener.Addr().String()
	return &App{patience: time.Second, In: strings.NewReader(""), Out: io.Discard, Err: io.Discard, Getenv: func(k string) string {
		return map[string]string{"HUTCH_HOST": host}[k]
	}}
}

// broken is an error of the way to the guest, not of the guest.
func broken(why string) error { return connect.NewError(connect.CodeUnavailable, errors.New(why)) }

func gone() error { return connect.NewError(connect.CodeNotFound, errors.New("process 7 has ended")) }

// listener is standard output or error; what is written there is heard.
type listener struct {
	bytes.Buffer
	heard func()
}

func (l *listener) Write(b []byte) (int, error) {
	defer l.heard()
	return l.Buffer.Write(b)
}

// badReader gives a few bytes and then fails.
type badReader struct{ left int }

func (r *badReader) Read(b []byte) (int, error) {
	if r.left == 0 {
		return 0, syscall.EIO
	}
	n := min(r.left, len(b))
	r.left -= n
	return n, nil
}

func TestInputThatDoesNotGetThrough(t *testing.T) {
	for _, c := range []struct {
		name   string
		refuse map[string]error
		in     io.Reader
		says   string // in standard error; empty: nothing at all
		code   int
	}{
		{"all is well", nil, strings.NewReader("hello"), "", 0},
		{"the program wants no more", map[string]error{"StreamInput": connect.NewError(connect.CodeFailedPrecondition, errors.New("closed"))}, strings.NewReader("hello"), "", 0},
		{"the program has ended", map[string]error{"StreamInput": gone(), "CloseStdin": gone()}, strings.NewReader("hello"), "", 0},
		{"the stream breaks", map[string]error{"StreamInput": broken("the link is lost")}, strings.NewReader("hello"), "hutch: send standard input: the link is lost\n", exitHutch},
		{"the caller's input breaks", nil, &badReader{5}, "hutch: read standard input: input/output error\n", exitHutch},
		{"the end can't be told", map[string]error{"CloseStdin": broken("the link is lost")}, strings.NewReader("hello"), "hutch: close the program's standard input: the link is lost\n", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := &guest{refuse: c.refuse}
			a := g.serve(t)
			// A program whose input is never closed ends when that was said.
			says := listener{heard: func() {
				if c.refuse["CloseStdin"] != nil {
					g.finish()
				}
			}}
			a.In, a.Err = c.in, &says
			if code := a.Run(testenv.Context(t), []string{"exec", "-i", "sb-1", "--", "cat"}); code != c.code || says.String() != c.says {
				t.Errorf("exit %d, want %d; said %q, want %q", code, c.code, says.String(), c.says)
			}
		})
	}
}

func TestInterruptThatDoesNotGetThrough(t *testing.T) {
	for _, c := range []struct {
		name string
		g    *guest
		says string
		code int
	}{
		{"all is well", &guest{endBySign: processpb.Signal_SIGNAL_SIGINT}, "", 0},
		{"the program has ended", &guest{refuse: map[string]error{"SIGNAL_SIGINT": gone()}, endBySign: processpb.Signal_SIGNAL_SIGINT}, "", 0},
		{"killed instead", &guest{refuse: map[string]error{"SIGNAL_SIGINT": broken("the link is lost")}, endBySign: processpb.Signal_SIGNAL_SIGKILL},
			"hutch: interrupt the program: the link is lost\n", 0},
		{"nothing runs yet", &guest{stuck: true}, "hutch: " + notKnown + "\n", exitHutch},
		{"nor killed", &guest{refuse: map[string]error{"SIGNAL_SIGINT": broken("the link is lost"), "SIGNAL_SIGKILL": broken("it is still lost")}},
			"hutch: interrupt the program: the link is lost\nhutch: kill the program: it is still lost; it may still run\n", exitHutch},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := c.g.serve(t)
			var says bytes.Buffer
			a.Err = &says
			ctx, interrupt := context.WithCancel(testenv.Context(t))
			defer interrupt()
			a.Out = &listener{heard: interrupt}
			if c.g.stuck {
				go func() { <-c.g.started; interrupt() }() // ends with the call to start
			}
			if code := a.Run(ctx, []string{"exec", "sb-1", "--", "sleep", "60"}); code != c.code || says.String() != c.says {
				t.Errorf("exit %d, want %d; said %q, want %q", code, c.code, says.String(), c.says)
			}
		})
	}
}

// resizeUntilEnd tells this process again and again that its terminal has a new
// size: when it begins to listen, nobody knows.
func (g *guest) resizeUntilEnd() {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			syscall.Kill(os.Getpid(), syscall.SIGWINCH)
		case <-g.end:
			return
		}
	}
}

// TestResizeThatDoesNotGetThrough is told when the program has given the
// terminal back, not in the middle of its screen.
func TestResizeThatDoesNotGetThrough(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		says string
	}{
		"refused":               {broken("the link is lost"), "hutch: resize the program's terminal: the link is lost\n"},
		"the program has ended": {gone(), ""},
	} {
		t.Run(name, func(t *testing.T) {
			g := &guest{refuse: map[string]error{"Update": c.err}}
			a := g.serve(t)
			screen, tty, err := pty.Open()
			if err != nil {
				t.Skip(err)
			}
			defer screen.Close()
			defer tty.Close()
			var says bytes.Buffer
			a.Out, a.Err = tty, &says
			resized := make(chan struct{})
			go func() {
				defer close(resized)
				g.resizeUntilEnd()
			}()
			code := a.Run(testenv.Context(t), []string{"exec", "-t", "sb-1", "--", "vi"})
			<-resized
			if code != 0 || says.String() != c.says {
				t.Errorf("exit %d; said %q, want %q", code, says.String(), c.says)
			}
		})
	}
}

func TestComplaintsAreKeptOnce(t *testing.T) {
	var w bytes.Buffer
	c := &complaints{w: &w, keep: true}
	c.complain("one")
	c.complain("one")
	c.complain("two")
	if w.Len() > 0 {
		t.Errorf("said before the end: %q", w.String())
	}
	c.end()
	c.complain("late")
	if w.String() != "hutch: one\nhutch: two\n" {
		t.Errorf("said %q", w.String())
	}
}

func TestTemplateLsQuiet(t *testing.T) {
	g := &guest{}
	a := g.serve(t)
	var out bytes.Buffer
	a.Out = &out
	if code := a.Run(testenv.Context(t), []string{"template", "ls", "-q"}); code != 0 || out.String() != "box\nminimal\n" {
		t.Errorf("exit %d, printed %q", code, out.String())
	}
}
