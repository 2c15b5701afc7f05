package recipe

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
)

// runner runs the tools of the host that recipes need.
type runner struct{ log *slog.Logger }

// command is one run of a tool.
type command struct {
	name string
	args []string
	dir  string
	env  []string // over the process's own
	// private gives the tool and its children a mount namespace of their own, so
	// that nothing they mount is left or can be reached from here. Root only.
	private bool
	// line is told each line of output; may be nil.
	line func(string)
}

const (
	lastLines  = 12              // of the output, in errors
	stopGrace  = 5 * time.Second // between SIGTERM and SIGKILL
	mostOutput = 16 << 20        // of stdout that is kept
)

// output runs c and returns its standard output. When it fails, the error has
// the last lines that it wrote. When ctx ends, its whole process group does.
func (r runner) output(ctx context.Context, c command) ([]byte, error) {
	cmd := exec.CommandContext(ctx, c.name, c.args...)
	cmd.Dir = c.dir
	cmd.Env = append(environment(), c.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if c.private && os.Geteuid() == 0 {
		cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = stopGrace
	tail := &lineTail{line: c.line}
	out := &bounded{most: mostOutput}
	cmd.Stdout, cmd.Stderr = io.MultiWriter(out, tail), tail
	r.log.Debug("run", "command", c.name, "args", c.args)
	err := cmd.Run()
	if cmd.Process != nil {
		// Whatever of the group outlived its leader; gone already is no error.
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	}
	switch {
	case err == nil:
		return out.buf.Bytes(), nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.Is(err, exec.ErrNotFound):
		return nil, fault.New(fault.Precondition, "%s is not on this host; recipes need a Debian host, other images can be pulled or imported", c.name)
	}
	return nil, fmt.Errorf("run %s: %w: %s", c.name, err, tail.last())
}

// environment is what the tools get of ours: how to find programs and the
// network, and nothing that may hold a secret.
func environment() []string {
	env := []string{"LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"}
	for _, k := range []string{"PATH", "HOME", "APT_CONFIG", "http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"} {
		if v, ok := os.LookupEnv(k); ok {
			env = append(env, k+"="+v)
		}
	}
	return env
}

// bounded keeps the first bytes written.
type bounded struct {
	buf  bytes.Buffer
	most int
}

func (b *bounded) Write(p []byte) (int, error) {
	if room := b.most - b.buf.Len(); room > 0 {
		b.buf.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// lineTail passes lines on and keeps the last ones. Stdout and stderr both
// write to it.
type lineTail struct {
	line func(string)

	mu   sync.Mutex
	part []byte
	kept []string
}

const mostLine = 4 << 10

func (t *lineTail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, b := range p {
		if b != '\n' && b != '\r' {
			if len(t.part) < mostLine {
				t.part = append(t.part, b)
			}
			continue
		}
		t.endLocked()
	}
	return len(p), nil
}

func (t *lineTail) endLocked() {
	s := strings.TrimSpace(string(t.part))
	t.part = t.part[:0]
	if s == "" {
		return
	}
	if t.kept = append(t.kept, s); len(t.kept) > lastLines {
		t.kept = t.kept[1:]
	}
	if t.line != nil {
		t.line(s)
	}
}

func (t *lineTail) last() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.endLocked()
	if len(t.kept) == 0 {
		return "it said nothing"
	}
	return strings.Join(t.kept, " | ")
}

// lines splits the output of a command.
func lines(b []byte) []string {
	var out []string
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		if s := strings.TrimSpace(sc.Text()); s != "" {
			out = append(out, s)
		}
	}
	return out
}
