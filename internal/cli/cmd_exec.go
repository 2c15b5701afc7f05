package cli

import (
	"context"
	"errors"

	"github.com/spf13/cobra"
)

func (a *App) execCommand() *cobra.Command {
	var flags execFlags
	var env []string
	c := &cobra.Command{
		Use:   "exec [flags] SANDBOX [--] COMMAND [ARG...]",
		Short: "Run a program in a sandbox",
		Example: "  hutch exec sb-12 -- uname -a\n" +
			"  tar c dir | hutch exec -i sb-12 -- tar x -C /srv",
		Args: cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			vars, err := pairs("--env", env, a.Getenv)
			if err != nil {
				return err
			}
			argv := program(args[1:])
			if len(argv) == 0 {
				return errors.New("name a program to run")
			}
			cl, id, err := a.sandbox(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return flags.session(argv, termEnv(vars, flags.tty)).run(cmd.Context(), a, cl, id)
		},
	}
	flags.register(c)
	c.Flags().SetInterspersed(false)
	c.Flags().StringArrayVarP(&env, "env", "e", nil, "environment `KEY=VALUE`; KEY alone takes the caller's")
	return c
}

func (a *App) shellCommand() *cobra.Command {
	var user, cwd string
	c := &cobra.Command{
		Use:   "shell [flags] SANDBOX",
		Short: "Open a terminal in a sandbox",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !isTerminal(a.In) {
				return errors.New("shell needs a terminal: use hutch exec -i SANDBOX -- sh for piped input")
			}
			cl, id, err := a.sandbox(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.openShell(cmd.Context(), cl, id, user, cwd)
		},
	}
	c.Flags().StringVarP(&user, "user", "u", "", "user to run as")
	c.Flags().StringVarP(&cwd, "workdir", "w", "", "working directory")
	return c
}

// openShell runs bash, or sh where there is no bash.
func (a *App) openShell(ctx context.Context, c *client, id, user, cwd string) error {
	for _, argv := range [][]string{{"bash", "-l"}, {"sh", "-l"}} {
		flags := execFlags{interactive: true, tty: true, user: user, cwd: cwd}
		err := flags.session(argv, termEnv(map[string]string{}, true)).run(ctx, a, c, id)
		var status exitStatus
		if errors.As(err, &status) && status.code == exitNotFound && status.msg != "" && argv[0] == "bash" {
			continue
		}
		return err
	}
	return nil
}
