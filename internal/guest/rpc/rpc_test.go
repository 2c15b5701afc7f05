package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/gen/arcbox/v1/arcboxv1connect"
	guestv1 "github.com/hutch-run/hutch/gen/hutch/guest/v1"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/clock"
	"github.com/hutch-run/hutch/internal/guest/identity"
	"github.com/hutch-run/hutch/internal/guest/power"
	"github.com/hutch-run/hutch/internal/guest/quiesce"
	"github.com/hutch-run/hutch/internal/guest/runtime"
	"github.com/hutch-run/hutch/internal/guest/shares"
	"github.com/hutch-run/hutch/internal/guest/supervise"
	"github.com/hutch-run/hutch/internal/guest/sysinfo"
	"github.com/hutch-run/hutch/internal/rpcx"
	"github.com/hutch-run/hutch/internal/testenv"
)

// The real parts fit.
var (
	_ Clock    = (*clock.Clock)(nil)
	_ Info     = sysinfo.Reader{}
	_ Power    = (*power.Power)(nil)
	_ Identity = (*identity.Identity)(nil)
	_ Quieter  = (*quiesce.Quiet)(nil)
	_ Runtime  = (*runtime.Runtime)(nil)
	_ Logs     = (*supervise.Supervisor)(nil)
)

// guest stands for all parts, and keeps what it was told.
type guest struct {
	host     clock.HostTime
	result   clock.Result
	grace    []time.Duration
	config   identity.Config
	trimmed  power.Trimmed
	quiesced quiesce.Report
	starts   []bool          // of the runtime
	ensured  runtime.Ensured // what it answers
	report   runtime.Report
	followed string // what a Follow was asked for
	chunks   []supervise.Chunk
	cluster  cluster
	err      error // of every part
}

func (g *guest) Sync(host clock.HostTime) (clock.Result, error) {
	g.host = host
	return g.result, g.err
}

func (g *guest) Shutdown(grace time.Duration)                { g.grace = append(g.grace, grace) }
func (g *guest) Trim(context.Context) (power.Trimmed, error) { return g.trimmed, g.err }

func (g *guest) Quiesce(context.Context) (quiesce.Report, error) { return g.quiesced, g.err }

func (g *guest) Ensure(_ context.Context, start bool) runtime.Ensured {
	g.starts = append(g.starts, start)
	return g.ensured
}

func (g *guest) Status(context.Context) runtime.Report { return g.report }

func (g *guest) Follow(_ context.Context, service string, tail int, follow bool, send func(supervise.Chunk) error) error {
	g.followed = fmt.Sprintf("%s %d %v", service, tail, follow)
	for _, c := range g.chunks {
		if err := send(c); err != nil {
			return err
		}
	}
	return g.err
}

func (g *guest) Read() (sysinfo.Info, error) {
	return sysinfo.Info{
		Kernel: "6.1", OSName: "Debian", OSVersion: "12", Arch: "x86_64", Hostname: "sb-1", TotalMemory: 512, AvailableMemory: 400,
		CPUs: 2, Load: [3]float64{1, 2, 3}, Uptime: 99, Addresses: []string{"198.18.0.2"},
	}, g.err
}

func (g *guest) Configure(_ context.Context, c identity.Config) (identity.Facts, error) {
	g.config = c
	return identity.Facts{Kernel: "6.1", BootID: "b-1", Warnings: []string{"w"}, ShareErrors: []string{"s"}}, g.err
}

// serve serves g and returns a client of the service and the server.
func serve(t *testing.T, g *guest, mounts ...Mount) (arcboxv1connect.AgentServiceClient, *httptest.Server) {
	t.Helper()
	srv := httptest.NewServer(New(Params{
		Log: slog.New(slog.DiscardHandler), Version: "1.2.3", Clock: g, Info: g, Power: g, Mounts: mounts,
		Runtime: g, Logs: g, Kubernetes: &g.cluster,
	}))
	t.Cleanup(srv.Close)
	return arcboxv1connect.NewAgentServiceClient(srv.Client(), srv.URL, rpcx.ClientOptions()...), srv
}

func same(t *testing.T, want, got proto.Message) {
	t.Helper()
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("%T (-want +got):\n%s", got, diff)
	}
}

func TestPing(t *testing.T) {
	for _, tc := range []struct {
		name string
		req  *arcboxv1.AgentPingRequest
		told clock.HostTime
		done clock.Result
		want *arcboxv1.AgentPingResponse
	}{
		{
			"bare", &arcboxv1.AgentPingRequest{}, clock.HostTime{}, clock.Result{Action: clock.None},
			&arcboxv1.AgentPingResponse{Message: "pong", Version: "1.2.3", Clock: "none"},
		},
		{
			"whole seconds", &arcboxv1.AgentPingRequest{Message: "hi", TimestampSecs: 1_900_000_000},
			clock.HostTime{Secs: 1_900_000_000}, clock.Result{Action: clock.Stepped, Offset: -time.Hour},
			&arcboxv1.AgentPingResponse{Message: "pong: hi", Version: "1.2.3", Clock: "stepped", ClockOffsetNanos: -3_600_000_000_000},
		},
		{
			"exact, zero nanoseconds", &arcboxv1.AgentPingRequest{TimestampSecs: 1_900_000_000, TimestampNanos: proto.Int32(0)},
			clock.HostTime{Secs: 1_900_000_000, Exact: true}, clock.Result{Action: clock.Slewed, Offset: time.Second / 2},
			&arcboxv1.AgentPingResponse{Message: "pong", Version: "1.2.3", Clock: "slewed", ClockOffsetNanos: 500_000_000},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := &guest{result: tc.done}
			c, _ := serve(t, g)
			res, err := c.Ping(testenv.Context(t), connect.NewRequest(tc.req))
			if err != nil {
				t.Fatal(err)
			}
			same(t, tc.want, res.Msg)
			if diff := cmp.Diff(tc.told, g.host); diff != "" {
				t.Errorf("told to the clock (-want +got):\n%s", diff)
			}
		})
	}
}

func TestPingWithAClockThatFails(t *testing.T) {
	g := &guest{err: unix.EPERM, result: clock.Result{Action: clock.None, Offset: 5}}
	c, _ := serve(t, g)
	res, err := c.Ping(testenv.Context(t), connect.NewRequest(&arcboxv1.AgentPingRequest{TimestampSecs: 1}))
	if err != nil || res.Msg.GetClock() != "none" || res.Msg.GetClockOffsetNanos() != 5 {
		t.Errorf("ping = %v, %v; want an answer all the same", res, err)
	}
	g.err = fault.BadField("timestamp_secs", "is silly")
	var fe *fault.Error
	if _, err = c.Ping(testenv.Context(t), connect.NewRequest(&arcboxv1.AgentPingRequest{})); !errors.As(err, &fe) || fe.Field != "timestamp_secs" {
		t.Errorf("error = %v, want the field named", err)
	}
}

func TestGetSystemInfo(t *testing.T) {
	g := &guest{}
	c, _ := serve(t, g)
	res, err := c.GetSystemInfo(testenv.Context(t), connect.NewRequest(&arcboxv1.Empty{}))
	if err != nil {
		t.Fatal(err)
	}
	same(t, &arcboxv1.SystemInfo{
		KernelVersion: "6.1", OsName: "Debian", OsVersion: "12", Arch: "x86_64", TotalMemory: 512, AvailableMemory: 400,
		CpuCount: 2, LoadAverage: []float64{1, 2, 3}, Hostname: "sb-1", Uptime: 99, IpAddresses: []string{"198.18.0.2"},
	}, res.Msg)
}

func TestShutdown(t *testing.T) {
	g := &guest{}
	c, _ := serve(t, g)
	for _, seconds := range []uint32{0, 7, 1<<32 - 1} {
		res, err := c.Shutdown(testenv.Context(t), connect.NewRequest(&arcboxv1.ShutdownRequest{TimeoutSeconds: seconds}))
		if err != nil || !res.Msg.GetAccepted() {
			t.Errorf("shutdown = %v, %v", res, err)
		}
	}
	want := []time.Duration{0, 7 * time.Second, (1<<32 - 1) * time.Second}
	if diff := cmp.Diff(want, g.grace); diff != "" {
		t.Errorf("graces (-want +got):\n%s", diff)
	}
}

func TestDiskTrim(t *testing.T) {
	g := &guest{trimmed: power.Trimmed{Disks: []power.TrimmedDisk{
		{Point: "/run/hutch/data", Bytes: 4096}, {Point: "/mnt", Err: unix.EOPNOTSUPP},
	}}}
	c, _ := serve(t, g)
	res, err := c.DiskTrim(testenv.Context(t), connect.NewRequest(&arcboxv1.DiskTrimRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	same(t, &arcboxv1.DiskTrimResponse{
		Result: "/run/hutch/data: 4096 bytes; /mnt: its filesystem or disk can't discard", BytesTrimmed: 4096,
	}, res.Msg)
}

// callConfigure makes the call as the link does.
func callConfigure(t *testing.T, g *guest, request *guestv1.ConfigureRequest) (*guestv1.ConfigureResponse, error) {
	t.Helper()
	b, err := proto.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	var response guestv1.ConfigureResponse
	return &response, Configure("1.2.3", g)(testenv.Context(t), b, func(reply []byte) error {
		return proto.Unmarshal(reply, &response)
	})
}

func TestGarbageIsNoConfiguration(t *testing.T) {
	g := &guest{}
	for _, b := range []string{"\xff", "\x0a", "\x0a\x05abc", "\x20", "\x1a\x02\x0a\x09", "\x32\x02\x0a\x09", "\x0b"} {
		if err := Configure("1.2.3", g)(testenv.Context(t), []byte(b), nil); !fault.Is(err, fault.Invalid) || g.config.ID != "" {
			t.Errorf("%q: error = %v", b, err)
		}
	}
}

// TestConfigureOfALaterHost has fields in it that this guest does not know.
func TestConfigureOfALaterHost(t *testing.T) {
	g := &guest{}
	b, err := proto.Marshal(&guestv1.ConfigureRequest{SandboxId: "sb-1"})
	if err != nil {
		t.Fatal(err)
	}
	b = append(b, "\xa2\x06\x03new\xa8\x06\x07\xb5\x06abcd\xb9\x06abcdefgh"...)
	if err := Configure("1.2.3", g)(testenv.Context(t), b, func([]byte) error { return nil }); err != nil || g.config.ID != "sb-1" {
		t.Errorf("config %+v, error %v", g.config, err)
	}
}

func TestConfigure(t *testing.T) {
	g := &guest{}
	res, err := callConfigure(t, g, &guestv1.ConfigureRequest{
		SandboxId: "sb-1", MachineId: "m", UnixNanos: 1_900_000_000_000_000_005, Entropy: []byte("e"),
		Network: &guestv1.Network{Address: "a", Gateway: "g", Dns: []string{"d", "e"}, Mtu: 9000},
		Env:     map[string]string{"A": "1", "B": "", "": "x"}, DefaultUser: "u", DefaultCwd: "/c", BootId: "b-1",
		Shares: []*guestv1.Share{{Tag: "share0", Path: "/mnt/a", ReadOnly: true}, {Tag: "share1", Path: "/mnt/b"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	same(t, &guestv1.ConfigureResponse{AgentVersion: "1.2.3", KernelVersion: "6.1", BootId: "b-1", Warnings: []string{"w"}, ShareErrors: []string{"s"}}, res)
	want := identity.Config{
		ID: "sb-1", MachineID: "m", Host: clock.HostTime{Secs: 1_900_000_000, Nanos: 5, Exact: true}, Entropy: []byte("e"),
		Network: identity.Network{Address: "a", Gateway: "g", DNS: []string{"d", "e"}, MTU: 9000},
		Env:     map[string]string{"A": "1", "B": "", "": "x"}, User: "u", Cwd: "/c", BootID: "b-1",
		Shares: []shares.Share{{Tag: "share0", Path: "/mnt/a", ReadOnly: true}, {Tag: "share1", Path: "/mnt/b"}},
	}
	if diff := cmp.Diff(want, g.config); diff != "" {
		t.Errorf("config (-want +got):\n%s", diff)
	}
	if _, err := callConfigure(t, g, &guestv1.ConfigureRequest{}); err != nil || !cmp.Equal(g.config, identity.Config{}) {
		t.Errorf("an empty request became %+v, %v", g.config, err)
	}
}

// watch is a clock that stands.
type watch struct {
	now    time.Time
	ahead  time.Duration
	forced bool
}

func (w *watch) Now() time.Time { return w.now }
func (w *watch) Correct(ahead time.Duration, forced bool) (clock.Result, error) {
	w.ahead, w.forced = ahead, forced
	return clock.Result{}, nil
}

func TestReadClock(t *testing.T) {
	w := &watch{now: time.Unix(1_900_000_000, 5)}
	for _, ask := range []*guestv1.ClockRequest{{}, {AheadNanos: -7, Forced: true}, {AheadNanos: 9}} {
		b, err := proto.Marshal(ask)
		if err != nil {
			t.Fatal(err)
		}
		var res guestv1.ClockResponse
		if err := ReadClock(w)(testenv.Context(t), b, func(reply []byte) error { return proto.Unmarshal(reply, &res) }); err != nil {
			t.Fatal(err)
		}
		same(t, &guestv1.ClockResponse{UnixNanos: 1_900_000_000_000_000_005}, &res)
		if w.ahead != time.Duration(ask.GetAheadNanos()) || w.forced != ask.GetForced() {
			t.Errorf("%v became %v, %v", ask, w.ahead, w.forced)
		}
	}
	if err := ReadClock(w)(testenv.Context(t), []byte{0xff}, nil); !fault.Is(err, fault.Invalid) {
		t.Errorf("nonsense: %v", err)
	}
}

func TestQuiesce(t *testing.T) {
	g := &guest{quiesced: quiesce.Report{Flush: 1, Freeze: 2 * time.Hour, Sync: 3, Frozen: []string{"hutch", "odd\xff"}}}
	call := func() (*guestv1.QuiesceResponse, error) {
		var res guestv1.QuiesceResponse
		return &res, Quiesce(g)(testenv.Context(t), nil, func(reply []byte) error { return proto.Unmarshal(reply, &res) })
	}
	res, err := call()
	if err != nil {
		t.Fatal(err)
	}
	same(t, &guestv1.QuiesceResponse{FlushNanos: 1, FreezeNanos: 7_200_000_000_000, SyncNanos: 3, Frozen: []string{"hutch", "odd?"}}, res)
	g.quiesced.Frozen = make([]string, 1000)
	if res, err := call(); err != nil || len(res.GetFrozen()) != maxFrozen {
		t.Errorf("%d names, %v", len(res.GetFrozen()), err)
	}
	g.err = fault.New(fault.Unavailable, "not now")
	if _, err := call(); !fault.Is(err, fault.Unavailable) {
		t.Errorf("error = %v", err)
	}
}

func TestFailuresKeepTheirClass(t *testing.T) {
	g := &guest{err: fault.New(fault.Precondition, "not now")}
	a, _ := serve(t, g)
	ctx := testenv.Context(t)
	_, info := a.GetSystemInfo(ctx, connect.NewRequest(&arcboxv1.Empty{}))
	_, trim := a.DiskTrim(ctx, connect.NewRequest(&arcboxv1.DiskTrimRequest{}))
	_, configure := callConfigure(t, g, &guestv1.ConfigureRequest{})
	for name, err := range map[string]error{"GetSystemInfo": info, "DiskTrim": trim, "Configure": configure} {
		if !fault.Is(err, fault.Precondition) || err.Error() != "not now" {
			t.Errorf("%s: error = %v", name, err)
		}
	}
}

func TestWhatIsMissingSaysSo(t *testing.T) {
	c, _ := serve(t, &guest{})
	ctx := testenv.Context(t)
	_, err := c.MmapReadFile(ctx, connect.NewRequest(&arcboxv1.MmapReadFileRequest{}))
	if !fault.Is(err, fault.Unimplemented) || !strings.Contains(err.Error(), "/files") {
		t.Errorf("error = %v", err)
	}
}

func TestPlainHTTP(t *testing.T) {
	mounted := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "mounted "+r.Method) })
	_, srv := serve(t, &guest{}, Mount{Path: "/files", Handler: mounted})
	for _, tc := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"GET", "/health", "", 204, ""},
		{"POST", "/health", "", 405, ""},
		{"PUT", "/files", "", 200, "mounted PUT"},
		{"GET", "/nowhere", "", 404, ""},
		{"POST", "/arcbox.v1.AgentService/Ping", `{"message":"curl"}`, 200, `"pong: curl"`},
		{"POST", "/arcbox.v1.AgentService/MmapReadFile", `{}`, 501, `"unimplemented"`},
		{"POST", "/arcbox.v1.AgentService/Ping", `{`, 400, `"invalid_argument"`},
	} {
		req, err := http.NewRequestWithContext(testenv.Context(t), tc.method, srv.URL+tc.path, strings.NewReader(tc.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		res, err := srv.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || res.StatusCode != tc.status || !strings.Contains(string(body), tc.want) {
			t.Errorf("%s %s = %d %q, %v; want %d with %q", tc.method, tc.path, res.StatusCode, body, err, tc.status, tc.want)
		}
	}
}
