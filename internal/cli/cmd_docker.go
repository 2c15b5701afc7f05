package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
)

// tellStart is how long the start of Docker takes before somebody at a terminal
// is told what is waited for.
const tellStart = 2 * time.Second

func (a *App) dockerCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "docker [flags] SANDBOX [--] ARG...",
		Short: "Run this machine's docker client on a sandbox's Docker",
		Long: "The first use starts Docker in the sandbox, which must have been made from a\n" +
			"template that brings it, such as docker. Works with a hutchd elsewhere too.",
		Example: "  hutch docker sb-12 -- ps -a\n" +
			"  hutch docker sb-12 -- run --rm -p 8080:80 IMAGE\n" +
			"  hutch docker sb-12 -- compose up -d",
		Args: cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			argv := program(args[1:])
			if len(argv) == 0 {
				return errors.New("say what docker is to do, as in: hutch docker SANDBOX -- ps")
			}
			return a.runDocker(cmd.Context(), args[0], argv)
		},
	}
	c.Flags().SetInterspersed(false)
	c.AddCommand(a.dockerSocketCommand(), a.dockerContextCommand())
	return c
}

func (a *App) dockerSocketCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "socket SANDBOX",
		Short:   "Print what DOCKER_HOST is for a sandbox's Docker",
		Example: "  export DOCKER_HOST=$(hutch docker socket sb-12)",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, record, err := a.dockerOf(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			address, err := localSocket(record)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.Out, address)
			return err
		},
	}
}

// dockerOf returns the sandbox that arg names, which has a Docker socket.
func (a *App) dockerOf(ctx context.Context, arg string) (*client, *hostagentv1.SandboxRecord, error) {
	cl, err := a.client()
	if err != nil {
		return nil, nil, err
	}
	record, err := cl.find(ctx, arg)
	if err != nil {
		return nil, nil, err
	}
	if record.GetDockerSocket() == "" {
		return nil, nil, fmt.Errorf("sandbox %s has no Docker socket: it is %s and has not run since hutchd knows of them",
			record.GetInfo().GetSandboxId(), record.GetInfo().GetStatus())
	}
	return cl, record, nil
}

// localSocket returns the address of a sandbox's Docker on this machine.
func localSocket(record *hostagentv1.SandboxRecord) (string, error) {
	path := record.GetDockerSocket()
	if !answers(path) {
		id := record.GetInfo().GetSandboxId()
		return "", fmt.Errorf("the socket %s is not this machine's, or not for this user (only root may use it); use hutch docker %s -- ps and the like", path, id)
	}
	return "unix://" + path, nil
}

// answers reports whether somebody listens at a Unix socket.
func answers(path string) bool {
	c, err := net.Dial("unix", path)
	if err != nil {
		return false
	}
	_ = c.Close()
	return true
}

// runDocker runs the docker client on the Docker of the sandbox that arg names.
func (a *App) runDocker(ctx context.Context, arg string, argv []string) error {
	program, err := exec.LookPath("docker")
	if err != nil {
		return exitStatus{exitNotFound, "there is no docker client on this machine; its package is docker.io on Debian 12, docker-cli on newer ones, Alpine and Fedora, and the formula docker on macOS"}
	}
	cl, record, err := a.dockerOf(ctx, arg)
	if err != nil {
		return err
	}
	path := record.GetDockerSocket()
	if cl.target.network != "unix" || !answers(path) {
		var end func()
		if path, end, err = a.tunnelDocker(ctx, cl, record.GetInfo().GetSandboxId()); err != nil {
			return err
		}
		defer end()
	}
	if err := a.awaitDocker(ctx, path, record.GetInfo().GetSandboxId()); err != nil {
		return err
	}
	return a.execDocker(program, argv, "unix://"+path)
}

// tunnelDocker listens at a socket of this process's own, each connection to
// which is carried to the sandbox's Docker through hutchd.
func (a *App) tunnelDocker(ctx context.Context, cl *client, id string) (path string, end func(), err error) {
	dir, err := os.MkdirTemp("", "hutch-docker-")
	if err != nil {
		return "", nil, err
	}
	path = filepath.Join(dir, "docker.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		return "", nil, errors.Join(err, os.RemoveAll(dir))
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var serving sync.WaitGroup
	serving.Go(func() { a.acceptLoop(ctx, cl, l, dockerAuthority(id)) })
	return path, func() {
		cancel()
		_ = l.Close()
		serving.Wait()
		_ = os.RemoveAll(dir)
	}, nil
}

// dockerAuthority is what CONNECT leads to a sandbox's Docker.
func dockerAuthority(id string) string { return id + ".docker:2375" }

// awaitDocker has Docker started, so that the client need not be as patient.
func (a *App) awaitDocker(ctx context.Context, path, id string) error {
	tell := time.AfterFunc(tellStart, func() {
		if isTerminal(a.In) {
			fmt.Fprintf(a.Err, "hutch: Docker is starting in %s\n", id)
		}
	})
	defer tell.Stop()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker/_ping", nil)
	if err != nil {
		return err
	}
	res, err := transport.RoundTrip(r)
	if err != nil {
		return fmt.Errorf("reach Docker in %s: %w", id, err)
	}
	defer res.Body.Close()
	if res.StatusCode == http.StatusOK {
		return nil
	}
	var m struct{ Message string }
	b, _ := io.ReadAll(io.LimitReader(res.Body, 64<<10))
	if json.Unmarshal(b, &m) != nil || m.Message == "" {
		m.Message = fmt.Sprintf("Docker in %s answered %s", id, res.Status)
	}
	return exitStatus{exitHutch, m.Message}
}

// execDocker runs the docker client to its end. Its exit code is hutch's.
func (a *App) execDocker(program string, argv []string, host string) error {
	cmd := exec.Command(program, argv...) // what interrupts hutch is the client's to act on
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.In, a.Out, a.Err
	cmd.Env = append(slices.DeleteFunc(os.Environ(), elsewhere), "DOCKER_HOST="+host)
	if err := cmd.Start(); err != nil {
		return exitStatus{exitNoRun, err.Error()}
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer signal.Stop(signals)
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			// A terminal has told the client itself.
			if s != os.Interrupt && s != syscall.SIGQUIT || !isTerminal(a.In) {
				_ = cmd.Process.Signal(s)
			}
		case err := <-ended:
			return dockerEnd(err)
		}
	}
}

// elsewhere reports whether a variable would lead the docker client to another
// daemon, or another way.
func elsewhere(variable string) bool {
	name, _, _ := strings.Cut(variable, "=")
	return slices.Contains([]string{"DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_TLS", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"}, name)
}

func dockerEnd(err error) error {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return exitStatus{code: 128 + int(status.Signal())}
	}
	return exitStatus{code: exit.ExitCode()}
}
