package power

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/testenv"
)

var quiet = slog.New(slog.DiscardHandler)

// journal is a kernel that writes down what it is told.
type journal struct {
	mu     sync.Mutex
	told   []string
	mounts []Mount
	busy   map[string]bool // neither remount nor unmount works
	keeps  map[string]bool // unmount does not work
	hang   chan struct{}   // Sync waits for it; nil: it does not
	alien  bool            // not our machine
	offErr error
	trim   func(Mount) (uint64, error)
}

func (j *journal) say(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.told = append(j.told, fmt.Sprintf(format, args...))
}

func (j *journal) Own() error {
	if j.alien {
		return errors.New("not yours")
	}
	return nil
}

func (j *journal) Mounts() ([]Mount, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.mounts), nil
}

func (j *journal) Sync() {
	j.say("sync")
	if j.hang != nil {
		<-j.hang
	}
}

func (j *journal) RemountReadOnly(point string) error {
	j.say("read-only %s", point)
	if j.busy[point] {
		return unix.EBUSY
	}
	j.setReadOnly(func(m Mount) bool { return m.Point == point })
	return nil
}

func (j *journal) setReadOnly(which func(Mount) bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for i := range j.mounts {
		if which(j.mounts[i]) {
			j.mounts[i].ReadOnly = true
		}
	}
}

func (j *journal) Unmount(point string) error {
	j.say("unmount %s", point)
	if j.busy[point] || j.keeps[point] {
		return unix.EBUSY
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.mounts = slices.DeleteFunc(j.mounts, func(m Mount) bool { return m.Point == point })
	return nil
}

func (j *journal) KillAll() error {
	j.say("kill all")
	return nil
}

func (j *journal) EmergencyReadOnly() error {
	j.say("emergency")
	j.setReadOnly(func(Mount) bool { return true })
	return nil
}

func (j *journal) Trim(m Mount) (uint64, error) {
	j.say("trim %s", m.Point)
	return j.trim(m)
}

func (j *journal) Off() error {
	j.say("off")
	return j.offErr
}

// stopper ends when its processes would: after takes, or killed.
type stopper struct {
	j     *journal
	takes time.Duration // processes end this long after they are asked
	deaf  bool          // never comes back from a call with a grace
}

func (s *stopper) Shutdown(ctx context.Context, grace time.Duration) error {
	s.j.say("stop %v", grace.Round(time.Millisecond))
	if grace == 0 {
		return nil
	}
	if s.deaf {
		<-s.j.hang
	}
	select {
	case <-time.After(min(s.takes, grace)):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// sandboxMounts is how boot leaves a guest.
func sandboxMounts() []Mount {
	return []Mount{
		{Point: "/", Type: "overlay", Source: "overlay", Minor: 30},
		{Point: "/proc", Type: "proc", Source: "proc", Minor: 20},
		{Point: "/run", Type: "tmpfs", Source: "tmpfs", Minor: 21},
		{Point: "/run/hutch/data", Type: "ext4", Source: "/dev/vdb", Major: 254, Minor: 16},
		{Point: "/var/lib/docker", Type: "ext4", Source: "/dev/vdb", Major: 254, Minor: 16},
		{Point: "/lib/modules", Type: "ext4", Source: "/dev/vdc", Major: 254, Minor: 32, ReadOnly: true},
		{Point: "/var/lib/docker/overlay2/x/merged", Type: "overlay", Source: "overlay", Minor: 40},
	}
}

// orderlyEnd is what follows when all processes have ended.
func orderlyEnd() []string {
	return []string{
		"kill all", "sync",
		"read-only /var/lib/docker/overlay2/x/merged", "unmount /var/lib/docker/overlay2/x/merged",
		"read-only /var/lib/docker", "unmount /var/lib/docker",
		"read-only /run/hutch/data", "unmount /run/hutch/data",
		"read-only /", "off",
	}
}

func TestShutdown(t *testing.T) {
	for _, tc := range []struct {
		name   string
		kernel *journal
		stop   stopper
		ask    func(*Power)
		want   []string
		within time.Duration // of fake time, from the first request to the power-off
	}{
		{
			name: "nothing runs",
			ask:  func(p *Power) { p.Shutdown(0) },
			want: append([]string{"stop 25s"}, orderlyEnd()...), within: ackTime,
		},
		{
			name: "processes take a while",
			stop: stopper{takes: 3 * time.Second},
			ask:  func(p *Power) { p.Shutdown(10 * time.Second) },
			want: append([]string{"stop 10s"}, orderlyEnd()...), within: 3 * time.Second,
		},
		{
			name: "a longer grace later changes nothing",
			stop: stopper{takes: time.Hour},
			ask: func(p *Power) {
				p.Shutdown(2 * time.Second)
				p.Shutdown(time.Minute)
				p.Shutdown(0)
			},
			want: append([]string{"stop 2s"}, orderlyEnd()...), within: 2 * time.Second,
		},
		{
			name: "a shorter grace later shortens it",
			stop: stopper{takes: time.Hour},
			ask: func(p *Power) {
				p.Shutdown(time.Minute)
				synctest.Wait()
				p.Shutdown(5 * time.Second)
			},
			want: append([]string{"stop 1m0s", "stop 0s"}, orderlyEnd()...), within: 5 * time.Second,
		},
		{
			name: "grace is bounded",
			stop: stopper{takes: 100 * time.Hour},
			ask:  func(p *Power) { p.Shutdown(99 * time.Hour) },
			want: append([]string{"stop 1h0m0s"}, orderlyEnd()...), within: time.Hour,
		},
		{
			name:   "a stopper and a disk that hang",
			stop:   stopper{deaf: true},
			kernel: &journal{hang: make(chan struct{})},
			ask:    func(p *Power) { p.Shutdown(time.Second) },
			want:   append([]string{"stop 1s", "stop 0s"}, orderlyEnd()...),
			within: time.Second + 2*killTime + syncTime,
		},
		{
			name:   "a mount in use that can still become read-only",
			kernel: &journal{keeps: map[string]bool{"/var/lib/docker": true}},
			ask:    func(p *Power) { p.Shutdown(0) },
			want:   append([]string{"stop 25s"}, orderlyEnd()...), within: ackTime,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := tc.kernel
				if k == nil {
					k = &journal{}
				}
				if k.hang != nil {
					k.hang = make(chan struct{}) // one of this bubble
				}
				k.mounts = sandboxMounts()
				tc.stop.j = k
				p := New(Params{Stopper: &tc.stop, Kernel: k, Log: quiet})
				ended := make(chan error, 1)
				ctx, cancel := context.WithCancel(t.Context())
				go func() { ended <- p.Run(ctx) }()
				start := time.Now()
				tc.ask(p)
				synctest.Wait()
				cancel() // the agent going away must not stop a shutdown
				if err := <-ended; err != nil {
					t.Errorf("run: %v", err)
				}
				if took := time.Since(start); took != tc.within {
					t.Errorf("took %v, want %v", took, tc.within)
				}
				if diff := cmp.Diff(tc.want, k.told); diff != "" {
					t.Errorf("what was done (-want +got):\n%s", diff)
				}
				if k.hang != nil {
					close(k.hang)
				}
			})
		})
	}
}

func TestBusyFilesystemsAreForced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &journal{mounts: sandboxMounts(), busy: map[string]bool{"/": true}}
		p := New(Params{Stopper: &stopper{j: k}, Kernel: k, Log: quiet})
		p.Shutdown(time.Second)
		if err := p.Run(t.Context()); err != nil {
			t.Errorf("run: %v", err)
		}
		if n := len(k.told); n < 4 || !slices.Equal(k.told[n-3:], []string{"emergency", "sync", "off"}) {
			t.Errorf("it did not end in an emergency remount: %q", k.told)
		}
		if slices.Contains(k.told, "unmount /") {
			t.Error("the root was unmounted")
		}
	})
}

func TestFailedPowerOffIsTold(t *testing.T) {
	k := &journal{offErr: unix.EPERM}
	p := New(Params{Stopper: &stopper{j: k}, Kernel: k, Log: quiet})
	p.Shutdown(time.Second)
	if err := p.Run(t.Context()); !errors.Is(err, unix.EPERM) {
		t.Errorf("error = %v", err)
	}
}

func TestAHostIsNotShutDown(t *testing.T) {
	k := &journal{alien: true, mounts: sandboxMounts()}
	p := New(Params{Stopper: &stopper{j: k}, Kernel: k, Log: quiet})
	p.Shutdown(time.Second)
	if err := p.Run(t.Context()); err == nil || len(k.told) != 0 {
		t.Errorf("error = %v, done: %q; want nothing done", err, k.told)
	}
	// The machine of this test has another PID 1.
	if err := System(false).Own(); err == nil {
		t.Error("a test may power off the machine it runs on")
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	testenv.CheckGoroutines(t)
	k := &journal{}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	p := New(Params{Stopper: &stopper{j: k}, Kernel: k, Log: quiet})
	if err := p.Run(ctx); err != nil || len(k.told) != 0 {
		t.Errorf("error = %v, done: %q", err, k.told)
	}
}

func TestParseMounts(t *testing.T) {
	const mountinfo = `27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
31 27 0:28 / /a\040b ro,nosuid - tmpfs none rw,size=4k
33 27 0:40 /sub /srv rw - btrfs /dev/vdb rw,subvol=/sub
34 27 254:32 / /lib/modules rw - ext4 /dev/vdc ro
`
	want := []Mount{
		{Major: 254, Point: "/", Type: "ext4", Source: "/dev/vda"},
		{Minor: 28, Point: "/a b", Type: "tmpfs", Source: "none"},
		{Minor: 40, Point: "/srv", Type: "btrfs", Source: "/dev/vdb"},
		{Major: 254, Minor: 32, Point: "/lib/modules", Type: "ext4", Source: "/dev/vdc", ReadOnly: true},
	}
	got, err := parseMounts(mountinfo)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("mounts (-want +got):\n%s", diff)
	}
	var writable []bool
	for _, m := range got {
		writable = append(writable, m.writable())
	}
	if diff := cmp.Diff([]bool{true, false, true, false}, writable); diff != "" {
		t.Errorf("writable (-want +got):\n%s", diff)
	}
	for _, bad := range []string{"\n", "27 1 x / / rw - ext4 a rw", "27 1 254:0 / / rw ext4 a rw", "1 - 2", "27 1 1:1 / / rw - ext4"} {
		if got, err := parseMounts(bad); err == nil {
			t.Errorf("%q is understood as %v", bad, got)
		}
	}
}

func TestTrim(t *testing.T) {
	mounts := append(sandboxMounts(),
		Mount{Point: "/b1", Type: "btrfs", Source: "/dev/vdd", Minor: 50},
		Mount{Point: "/b2", Type: "btrfs", Source: "/dev/vdd", Minor: 51},
		Mount{Point: "/old", Type: "vfat", Source: "/dev/vde", Major: 254, Minor: 64},
		Mount{Point: "/sick", Type: "xfs", Source: "/dev/vdf", Major: 254, Minor: 80},
	)
	k := &journal{mounts: mounts, trim: func(m Mount) (uint64, error) {
		switch m.Point {
		case "/run/hutch/data":
			return 0, fmt.Errorf("x: %w", errCovered)
		case "/old":
			return 0, unix.EOPNOTSUPP
		case "/sick":
			return 0, unix.EIO
		}
		return 1000, nil
	}}
	p := New(Params{Stopper: &stopper{j: k}, Kernel: k, Log: quiet})
	got, err := p.Trim(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	wantTold := []string{"trim /run/hutch/data", "trim /var/lib/docker", "trim /b1", "trim /old", "trim /sick"}
	if diff := cmp.Diff(wantTold, k.told); diff != "" {
		t.Errorf("trims (-want +got):\n%s", diff)
	}
	want := "/var/lib/docker: 1000 bytes; /b1: 1000 bytes; /old: its filesystem or disk can't discard; /sick: input/output error"
	if got.String() != want || got.Total() != 2000 {
		t.Errorf("result = %q, %d bytes; want %q, 2000 bytes", got, got.Total(), want)
	}
	if s := (Trimmed{}).String(); !strings.Contains(s, "no writable filesystem") {
		t.Errorf("result without disks = %q", s)
	}
}

func TestTrimHonoursItsContext(t *testing.T) {
	k := &journal{mounts: sandboxMounts()}
	p := New(Params{Stopper: &stopper{j: k}, Kernel: k, Log: quiet})
	entered, leave := make(chan struct{}), make(chan struct{})
	k.trim = func(Mount) (uint64, error) {
		close(entered)
		<-leave
		return 1, nil
	}
	first := make(chan error, 1)
	go func() {
		_, err := p.Trim(t.Context())
		first <- err
	}()
	<-entered
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Trim(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a trim that waits for another, cancelled: %v", err)
	}
	close(leave)
	if err := <-first; err != nil {
		t.Errorf("the trim that ran: %v", err)
	}
}

// TestSharesGoFirst has one share that is not served any more: unmounting it
// never ends, and keeps nothing else from being brought to rest.
func TestSharesGoFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &stuck{journal: &journal{mounts: []Mount{
			{Major: 254, Point: "/data", Type: "ext4", Source: "/dev/vdb"},
			{Point: "/mnt/a", Type: "virtiofs", Source: "share0"},
			{Point: "/mnt/b", Type: "virtiofs", Source: "share1"},
		}}, at: "/mnt/b", free: make(chan struct{})}
		p := New(Params{Stopper: &stopper{j: j.journal}, Kernel: j, Log: quiet})
		p.Shutdown(time.Second)
		if err := p.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		close(j.free)
		synctest.Wait()
		want := []string{"unmount /mnt/a", "sync", "read-only /data", "unmount /data", "off"}
		got := slices.DeleteFunc(slices.Clone(j.told), func(s string) bool { return !slices.Contains(want, s) })
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("told (-want +got):\n%s", diff)
		}
	})
}

// stuck is a journal with one mount that can't be removed.
type stuck struct {
	*journal
	at   string
	free chan struct{}
}

func (s *stuck) Unmount(point string) error {
	if point == s.at {
		<-s.free
		return unix.EBUSY
	}
	return s.journal.Unmount(point)
}
