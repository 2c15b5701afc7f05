package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/hutch-run/hutch/internal/version"
)

// Exit codes besides the guest's own.
const (
	exitTimeout  = 124
	exitHutch    = 125
	exitNoRun    = 126
	exitNotFound = 127
)

// App is the command with its surroundings, so that tests can give it others.
type App struct {
	In     io.Reader
	Out    io.Writer
	Err    io.Writer
	Getenv func(string) string

	host string // --host
	json bool   // --json

	patience time.Duration // 0: interruptGrace
}

// Main runs the command line args of the process and returns its exit code.
func Main() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	app := &App{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Getenv: os.Getenv}
	return app.Run(ctx, os.Args[1:])
}

// Run runs one command line and returns the exit code.
func (a *App) Run(ctx context.Context, args []string) int {
	root := a.root()
	root.SetArgs(args)
	root.SetIn(a.In)
	root.SetOut(a.Out)
	root.SetErr(a.Err)
	err := root.ExecuteContext(ctx)
	var status exitStatus
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		if status.msg != "" {
			fmt.Fprintln(a.Err, "hutch:", status.msg)
		}
		return status.code
	}
	fmt.Fprintln(a.Err, "hutch:", explain(err, a.hostName()))
	return exitHutch
}

func (a *App) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "hutch",
		Short: "Run code that nobody trusts in microVMs of its own",
		Long: "hutch makes, drives and ends microVM sandboxes through hutchd.\n\n" +
			"It finds hutchd by --host or HUTCH_HOST: unix:///path, tcp://host:port or\n" +
			"https://host:port. Default: " + defaultHost + ".",
		Version:       version.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
	}
	root.PersistentFlags().StringVar(&a.host, "host", "", "address of hutchd (default $HUTCH_HOST)")
	root.PersistentFlags().BoolVar(&a.json, "json", false, "print JSON")
	root.AddGroup(
		&cobra.Group{ID: "sandbox", Title: "Sandboxes:"},
		&cobra.Group{ID: "inside", Title: "Clusters:"},
		&cobra.Group{ID: "look", Title: "Looking:"},
		&cobra.Group{ID: "host", Title: "Host:"},
	)
	for group, commands := range map[string][]*cobra.Command{
		"sandbox": {
			a.runCommand(), a.createCommand(), a.execCommand(), a.shellCommand(), a.cpCommand(),
			a.pauseCommand(), a.hibernateCommand(), a.resumeCommand(), a.rmCommand(), a.trimCommand(), a.waitCommand(), a.portCommand(), a.dockerCommand(), a.forkCommand(),
		},
		"inside": {a.kubeCommand(), a.kubeconfigCommand(), a.kubectlCommand()},
		"look":   {a.lsCommand(), a.inspectCommand(), a.logsCommand(), a.eventsCommand(), a.statsCommand()},
		"host":   {a.templateCommand(), a.snapshotCommand(), a.doctorCommand(), a.debugCommand(), a.setupCommand(), a.versionCommand()},
	} {
		for _, c := range commands {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	return root
}
