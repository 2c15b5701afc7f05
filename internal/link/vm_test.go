package link

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/delay"
	"github.com/hutch-run/hutch/internal/testenv"
)

// The tests in this file run the link over QEMU's own virtio-serial. They need
// HUTCH_LINK_KERNEL, a directory as Debian's linux-image package unpacks to
// (boot/vmlinuz-*, lib/modules/*). HUTCH_LINK_SOAK=N kills N times as often.

// machine is a virtual machine with testdata/guestinit in it.
type machine struct {
	t    testing.TB
	dir  string
	pid  int
	logs *bytes.Buffer
}

func startMachine(t testing.TB) *machine {
	t.Helper()
	testenv.RequireVM(t)
	kernel := os.Getenv("HUTCH_LINK_KERNEL")
	if kernel == "" {
		t.Skip("HUTCH_LINK_KERNEL does not name an unpacked kernel package")
	}
	dir, err := os.MkdirTemp("", "hutchlink") // short: unix socket paths are
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	vmlinuz, err := filepath.Glob(filepath.Join(kernel, "boot/vmlinuz-*"))
	if err != nil || len(vmlinuz) != 1 {
		t.Fatalf("%d kernels in %s, %v", len(vmlinuz), kernel, err)
	}
	m := &machine{t: t, dir: dir, logs: &bytes.Buffer{}}
	initrd := m.initramfs(kernel)
	cmd := exec.Command("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-M", "q35",
		"-accel", "tcg", "-cpu", "max", "-m", "256", "-kernel", vmlinuz[0], "-initrd", initrd,
		"-append", "console=ttyS0 quiet panic=-1", "-serial", "stdio", "-no-reboot",
		"-qmp", "unix:"+dir+"/qmp,server=on,wait=off",
		"-chardev", "socket,id=link,path="+dir+"/link,server=on,wait=off",
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=link,name="+PortName)
	cmd.Stdout, cmd.Stderr = m.logs, m.logs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m.pid = cmd.Process.Pid
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("console:\n%s", m.logs)
		}
	})
	return m
}

// initramfs builds init and packs it with the modules.
func (m *machine) initramfs(kernel string) string {
	bin := filepath.Join(m.dir, "init")
	cmd := exec.Command("go", "build", "-o", bin, "./testdata/guestinit")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		m.t.Fatalf("build init: %v\n%s", err, out)
	}
	var b bytes.Buffer
	for _, d := range []string{"modules", "proc", "sys", "dev"} {
		cpioEntry(&b, d, 0o040755, nil)
	}
	cpioEntry(&b, "dev/console", 0o020600, nil)
	files := map[string]string{"init": bin}
	for _, name := range strings.Fields("virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_console") {
		for _, dir := range []string{"virtio", "char"} {
			found, _ := filepath.Glob(filepath.Join(kernel, "lib/modules/*/kernel/drivers", dir, name+".ko"))
			for _, f := range found {
				files["modules/"+name+".ko"] = f
			}
		}
	}
	for name, from := range files {
		content, err := os.ReadFile(from)
		if err != nil {
			m.t.Fatal(err)
		}
		cpioEntry(&b, name, 0o100755, content)
	}
	cpioEntry(&b, "TRAILER!!!", 0, nil)
	initrd := filepath.Join(m.dir, "initrd")
	if err := os.WriteFile(initrd, b.Bytes(), 0o600); err != nil {
		m.t.Fatal(err)
	}
	return initrd
}

// cpioEntry appends a file in the "newc" form that kernels unpack. Its device
// number is that of /dev/console; only devices have use for it.
func cpioEntry(b *bytes.Buffer, name string, mode int, content []byte) {
	ino := b.Len() + 1
	for _, n := range []int{0x070701, ino, mode, 0, 0, 1, 0, len(content), 0, 0, 5, 1, len(name) + 1, 0} {
		if n == 0x070701 {
			b.WriteString("070701")
			continue
		}
		fmt.Fprintf(b, "%08x", n)
	}
	b.WriteString(name + "\x00")
	pad := func() { b.Write(make([]byte, -b.Len()&3)) }
	pad()
	b.Write(content)
	pad()
}

// dial connects to the port, and makes a session.
func (m *machine) dial(ctx context.Context) *Session {
	m.t.Helper()
	conn := m.connect(ctx, "link")
	s, err := Dial(ctx, conn, DialParams{})
	if err != nil {
		m.t.Fatal(err)
	}
	return s
}

func (m *machine) connect(ctx context.Context, name string) net.Conn {
	m.t.Helper()
	for {
		conn, err := net.Dial("unix", filepath.Join(m.dir, name))
		if err == nil {
			return conn
		}
		_ = delay.For(ctx, 10*time.Millisecond)
		if ctx.Err() != nil {
			m.t.Fatal(err)
		}
	}
}

// ask opens a stream for the command what.
func (m *machine) ask(ctx context.Context, s *Session, what string) *Stream {
	m.t.Helper()
	c, err := s.OpenAPI(ctx)
	if err != nil {
		m.t.Fatal(err)
	}
	if _, err := io.WriteString(c, what); err != nil {
		m.t.Fatal(err)
	}
	return c
}

func (m *machine) echo(ctx context.Context, s *Session, msg []byte) {
	m.t.Helper()
	c := m.ask(ctx, s, "E")
	defer c.Close()
	if err := roundTrip(c, msg); err != nil {
		m.t.Fatal(err)
	}
}

// ticks is the processor time of the guest's agent, in hundredths of a second.
func (m *machine) ticks(ctx context.Context, s *Session) int {
	m.t.Helper()
	c := m.ask(ctx, s, "C")
	defer c.Close()
	var user, system int
	if _, err := fmt.Fscan(c, &user, &system); err != nil {
		m.t.Fatal(err)
	}
	return user + system
}

// qmp sends commands to QEMU's monitor and waits for each answer.
func (m *machine) qmp(ctx context.Context, commands ...string) {
	m.t.Helper()
	c := m.connect(ctx, "qmp")
	defer c.Close()
	dec := json.NewDecoder(c)
	for _, name := range append([]string{"", "qmp_capabilities"}, commands...) {
		if name != "" {
			fmt.Fprintf(c, "{\"execute\":%q}\n", name)
		}
		for {
			var answer map[string]any
			if err := dec.Decode(&answer); err != nil {
				m.t.Fatal(err)
			}
			if answer["event"] == nil {
				break
			}
		}
	}
}

func TestVirtioSerial(t *testing.T) {
	testenv.CheckGoroutines(t)
	m := startMachine(t)
	ctx := testenv.Context(t)
	start := time.Now()
	s := m.dial(ctx)
	t.Logf("session %v after the start of the VM", time.Since(start))
	defer func() { _ = s.Close() }()

	step := func(name string, f func()) {
		start := time.Now()
		f()
		t.Logf("%s: %v", name, time.Since(start))
	}
	step("200 times open, echo, close", func() {
		for range 200 {
			m.echo(ctx, s, []byte("hello"))
		}
	})
	step("1000 round trips of a byte", func() { m.roundTrips(ctx, s, 1000) })
	step("64 MiB there and back", func() { m.bulk(ctx, s, 64<<20) })
	step("200 parallel streams", func() { m.parallel(ctx, s, 200) })
	step("paused for a second with both directions full", func() { m.paused(ctx, s) })
	times := 1
	if n, err := strconv.Atoi(os.Getenv("HUTCH_LINK_SOAK")); err == nil {
		times = n
	}
	step(fmt.Sprint(100*times, " hosts killed in a transfer"), func() { s = m.killHosts(ctx, s, 100*times) })
	step(fmt.Sprint(20*times, " guest agents killed in a transfer"), func() { s = m.killGuests(ctx, s, 20*times) })
	step("host away for 3 s", func() {
		before := m.ticks(ctx, s)
		_ = s.Close()
		_ = delay.For(ctx, 3*time.Second)
		s = m.dial(ctx)
		if used := m.ticks(ctx, s) - before; used > 30 {
			t.Errorf("agent used %d ticks while the host was away", used)
		} else {
			t.Logf("agent used %d ticks while the host was away", used)
		}
	})
}

func (m *machine) roundTrips(ctx context.Context, s *Session, n int) {
	c := m.ask(ctx, s, "E")
	defer c.Close()
	b := make([]byte, 1)
	for range n {
		if _, err := c.Write(b); err != nil {
			m.t.Fatal(err)
		}
		if _, err := io.ReadFull(c, b); err != nil {
			m.t.Fatal(err)
		}
	}
}

func (m *machine) bulk(ctx context.Context, s *Session, size int64) {
	c := m.ask(ctx, s, "E")
	defer c.Close()
	in, out := sha256.New(), sha256.New()
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = io.Copy(io.MultiWriter(in, c), io.LimitReader(rand.NewChaCha8([32]byte{}), size))
		_ = c.CloseWrite()
	})
	n, err := io.Copy(out, c)
	wg.Wait()
	if err != nil || n != size || !bytes.Equal(in.Sum(nil), out.Sum(nil)) {
		m.t.Fatalf("%d of %d bytes came back, %v", n, size, err)
	}
}

func (m *machine) parallel(ctx context.Context, s *Session, n int) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			c, err := s.OpenAPI(ctx)
			if err != nil {
				m.t.Error(err)
				return
			}
			defer c.Close()
			msg := append([]byte("E"), bytes.Repeat(forgery([]byte{byte(i)}), 1+rand.IntN(100))...)
			if _, err := c.Write(msg[:1]); err != nil {
				m.t.Error(err)
				return
			}
			if err := roundTrip(c, msg[1:]); err != nil {
				m.t.Error(err)
			}
		})
	}
	wg.Wait()
}

// paused pauses the machine in the middle of a transfer, and has the session
// carry on after it.
func (m *machine) paused(ctx context.Context, s *Session) {
	c := m.ask(ctx, s, "E")
	defer c.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		_, _ = c.Write(make([]byte, 8<<20))
		_ = c.CloseWrite()
	})
	head, _ := io.CopyN(io.Discard, c, 1<<20)
	m.qmp(ctx, "stop")
	other, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if _, err := s.OpenAPI(other); !errors.Is(err, context.DeadlineExceeded) {
		m.t.Errorf("open while paused: %v, want deadline exceeded", err)
	}
	m.qmp(ctx, "cont")
	rest, err := io.Copy(io.Discard, c)
	if err != nil || head+rest != 8<<20 {
		m.t.Fatalf("%d bytes came back over the pause, %v", head+rest, err)
	}
}

// churn writes copies of handshakes, reads some of them back, and then has
// something die.
func (m *machine) churn(ctx context.Context, s *Session, die func()) {
	c := m.ask(ctx, s, "E")
	var wg sync.WaitGroup
	wg.Go(func() {
		for payload := bytes.Repeat(forgery(nil), 50); ; {
			if _, err := c.Write(payload); err != nil {
				return
			}
		}
	})
	_, _ = io.CopyN(io.Discard, c, int64(rand.IntN(512<<10)))
	die()
	<-s.Done()
	_ = s.Close()
	wg.Wait()
}

func (m *machine) killHosts(ctx context.Context, s *Session, n int) *Session {
	var worst time.Duration
	var skipped uint64
	for range n {
		m.churn(ctx, s, func() { _ = s.conn.Close() })
		start := time.Now()
		s = m.dial(ctx)
		worst = max(worst, time.Since(start))
		skipped += s.skipped
		m.echo(ctx, s, []byte("again"))
	}
	m.t.Logf("slowest handshake %v, %d stale bytes skipped each", worst, skipped/uint64(n))
	return s
}

func (m *machine) killGuests(ctx context.Context, s *Session, n int) *Session {
	for range n {
		m.churn(ctx, s, func() { m.ask(ctx, s, "X") })
		s = m.dial(ctx)
		m.echo(ctx, s, []byte("again"))
	}
	return s
}
