package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/cobra"
)

func (a *App) kubectlCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "kubectl SANDBOX [--] [ARG...]",
		Short: "Run kubectl on a sandbox's Kubernetes",
		Long: "kubectl of this machine is run with credentials of its own, and reads and changes no\n" +
			"file of yours. Where there is none, that of the sandbox is run in there.",
		Example: "  hutch kubectl sb-12 -- get nodes\n  hutch kubectl sb-12 -- apply -f app.yaml",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, id, err := a.sandbox(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			argv := program(args[1:])
			binary, err := exec.LookPath("kubectl")
			if errors.Is(err, exec.ErrNotFound) {
				return a.guestKubectl(cmd.Context(), cl, id, argv)
			}
			if err != nil {
				return fmt.Errorf("find kubectl: %w", err)
			}
			return a.hostKubectl(cmd.Context(), cl, id, binary, argv)
		},
	}
	c.Flags().SetInterspersed(false)
	return c
}

// guestKubectl runs the kubectl of the sandbox, which knows its own cluster.
func (a *App) guestKubectl(ctx context.Context, c *client, id string, argv []string) error {
	flags := execFlags{interactive: true, tty: isTerminal(a.In) && isTerminal(a.Out)}
	err := flags.session(append([]string{"kubectl"}, argv...), termEnv(map[string]string{}, flags.tty)).run(ctx, a, c, id)
	var status exitStatus
	if errors.As(err, &status) && status.code == exitNotFound && status.msg != "" {
		return exitStatus{exitNotFound, "there is no kubectl in PATH, nor in sandbox " + id}
	}
	return err
}

// hostKubectl runs kubectl here.
func (a *App) hostKubectl(ctx context.Context, c *client, id, binary string, argv []string) (err error) {
	server, end, err := a.kubeWay(ctx, c, id)
	if err != nil {
		return err
	}
	defer end()
	entries, err := c.kubeEntries(ctx, id, func() (string, error) { return server, nil })
	if err != nil {
		return err
	}
	yaml, err := entries.YAML()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "hutch-kubectl-") // of this user alone
	if err != nil {
		return fmt.Errorf("make a kubeconfig: %w", err)
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "config")
	if err := os.WriteFile(file, yaml, 0o600); err != nil {
		return fmt.Errorf("make a kubeconfig: %w", err)
	}
	return a.runHere(ctx, binary, argv, "KUBECONFIG="+file)
}

// endTime is what a program gets to end after an interrupt.
const endTime = 10 * time.Second

// runHere runs a program of this machine with the caller's streams.
func (a *App) runHere(ctx context.Context, binary string, argv []string, env ...string) error {
	cmd := exec.CommandContext(ctx, binary, argv...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.In, a.Out, a.Err
	cmd.Env = append(os.Environ(), env...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = endTime
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		return exitStatus{code: exit.ExitCode()}
	case err != nil:
		return fmt.Errorf("run %s: %w", binary, err)
	}
	return nil
}

// kubeWay returns the URL of the API from here: its port on this host when it
// has one, else a tunnel that lasts until end.
func (a *App) kubeWay(ctx context.Context, c *client, id string) (server string, end func(), err error) {
	if c.target.isLocal() {
		address, _, err := c.kubeAddress(ctx, id)
		if err == nil && address != "" {
			return "https://" + address, func() {}, nil
		}
	}
	address, end, err := a.openTunnel(ctx, c, id, kubePort)
	return "https://" + address, end, err
}

// openTunnel listens on a free port of the loopback, and leads what comes to a
// port of the sandbox.
func (a *App) openTunnel(ctx context.Context, c *client, id string, port uint16) (address string, end func(), err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var serving sync.WaitGroup
	serving.Go(func() { a.acceptLoop(ctx, c, l, fmt.Sprintf("%s:%d", id, port)) })
	return l.Addr().String(), func() {
		cancel()
		l.Close()
		serving.Wait()
	}, nil
}
