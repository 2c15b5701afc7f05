package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/gen/hostagent/v1/hostagentv1connect"
	"github.com/hutch-run/hutch/gen/process/processpbconnect"
)

// Bounds of waits for the daemon.
const (
	readyTimeout = time.Minute
	stopTimeout  = 2 * time.Minute
)

// daemon is a hutchd of the benchmark's own, and clients of its API.
type daemon struct {
	root, socket string
	argv         []string
	cmd          *exec.Cmd
	ended        chan struct{}
	http         *http.Client

	host      hostagentv1connect.HostAgentServiceClient
	sandboxes hostagentv1connect.SandboxServiceClient
	machine   hostagentv1connect.HostServiceClient
	templates hostagentv1connect.TemplateServiceClient
	snapshots hostagentv1connect.SnapshotServiceClient
}

// startDaemon starts hutchd in dir, which need not exist, on hard links of a
// prepared root, and returns when it answers. It starts spares sandboxes ahead.
// The caller stops it.
func startDaemon(ctx context.Context, dir, prepared string, spares int) (*daemon, error) {
	d := &daemon{root: filepath.Join(dir, "root"), socket: filepath.Join(dir, "run/hutchd.sock"), ended: make(chan struct{})}
	// VMMs run as users of their own and must get to their files.
	if err := os.MkdirAll(d.root, 0o711); err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "hutchd.toml")
	if err := os.WriteFile(config, fmt.Appendf(nil, "[warm]\nauto = false\nspares = %d\n", spares), 0o600); err != nil {
		return nil, err
	}
	for _, name := range []string{"kernels", "images", "templates"} {
		if out, err := exec.CommandContext(ctx, "cp", "-al", filepath.Join(prepared, name), d.root+"/").CombinedOutput(); err != nil {
			return nil, fmt.Errorf("link the prepared root (make it with hutchd setup --root %s): %w: %s", prepared, err, out)
		}
	}
	d.argv = []string{
		"bin/hutchd", "--config", config, "--root", d.root, "--run-dir", filepath.Dir(d.socket), "--listen", "unix:" + d.socket, "--log-level", "warn", "--stop-vms",
	}
	d.cmd = exec.Command(d.argv[0], d.argv[1:]...)
	d.cmd.Stdout, d.cmd.Stderr = os.Stderr, os.Stderr
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a Ctrl-C is ours to handle
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start hutchd: %w", err)
	}
	go func() { _ = d.cmd.Wait(); close(d.ended) }() // waited for in stop
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	d.http = &http.Client{Transport: &http.Transport{
		Protocols: &protocols,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", d.socket)
		},
	}}
	const base = "http://localhost"
	d.host = hostagentv1connect.NewHostAgentServiceClient(d.http, base)
	d.sandboxes = hostagentv1connect.NewSandboxServiceClient(d.http, base)
	d.machine = hostagentv1connect.NewHostServiceClient(d.http, base)
	d.templates = hostagentv1connect.NewTemplateServiceClient(d.http, base)
	d.snapshots = hostagentv1connect.NewSnapshotServiceClient(d.http, base)
	if err := d.awaitReady(ctx); err != nil {
		return nil, errors.Join(err, d.stop())
	}
	return d, nil
}

func (d *daemon) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := d.host.ListSandboxes(ctx, connect.NewRequest(&hostagentv1.ListSandboxesRequest{}))
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-d.ended:
			return errors.New("hutchd ended early")
		case <-ctx.Done():
			return fmt.Errorf("hutchd does not answer: %w", err)
		}
	}
}

// stop destroys every sandbox and ends the daemon in order.
func (d *daemon) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	var errs []error
	list, err := d.host.ListSandboxes(ctx, connect.NewRequest(&hostagentv1.ListSandboxesRequest{}))
	if err == nil {
		for _, s := range list.Msg.GetSandboxes() {
			errs = append(errs, d.destroy(ctx, s.GetSandboxId()))
		}
	}
	errs = append(errs, err)
	d.http.CloseIdleConnections()
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		errs = append(errs, err)
	}
	select {
	case <-d.ended:
	case <-ctx.Done():
		errs = append(errs, errors.New("hutchd does not end"), d.cmd.Process.Kill())
		<-d.ended
	}
	return errors.Join(errs...)
}

func (d *daemon) destroy(ctx context.Context, id string) error {
	_, err := d.host.DestroySandbox(ctx, connect.NewRequest(&hostagentv1.DestroySandboxRequest{SandboxId: id}))
	return err
}

func (d *daemon) inspect(ctx context.Context, id string) (*hostagentv1.SandboxRecord, error) {
	res, err := d.sandboxes.InspectSandbox(ctx, connect.NewRequest(&hostagentv1.InspectSandboxRequest{SandboxId: id}))
	if err != nil {
		return nil, err
	}
	return res.Msg.GetSandbox(), nil
}

// exec runs a program over the public API and returns what it printed.
func (d *daemon) exec(ctx context.Context, id, program string, args ...string) (string, error) {
	res, err := d.host.Exec(ctx, connect.NewRequest(&hostagentv1.ExecRequest{SandboxId: id, Cmd: program, Args: args}))
	if err != nil {
		return "", err
	}
	if res.Msg.GetExitCode() != 0 {
		return "", fmt.Errorf("%s in the sandbox: exit %d: %s", program, res.Msg.GetExitCode(), res.Msg.GetStderr())
	}
	return string(res.Msg.GetStdout()), nil
}

// cli runs the hutch program.
func (d *daemon) cli(ctx context.Context, args ...string) error {
	c := exec.CommandContext(ctx, "bin/hutch", args...)
	c.Env = append(os.Environ(), "HUTCH_HOST=unix://"+d.socket)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("hutch %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

func (d *daemon) process(id string, options ...connect.ClientOption) processpbconnect.ProcessClient {
	return processpbconnect.NewProcessClient(d.http, "http://localhost/sandboxes/"+id, options...)
}

// commandLine returns the arguments of a running process.
func commandLine(pid int) ([]string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil, err
	}
	return strings.Split(string(bytes.TrimSuffix(b, []byte{0})), "\x00"), nil
}
