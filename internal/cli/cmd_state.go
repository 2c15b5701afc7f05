package cli

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
)

func (a *App) pauseCommand() *cobra.Command {
	return a.eachCommand("pause SANDBOX...", "Stop the vCPUs of sandboxes; memory stays", func(ctx context.Context, c *client, id string) error {
		_, err := c.host.PauseSandbox(ctx, connect.NewRequest(&hostagentv1.PauseSandboxRequest{SandboxId: id}))
		return err
	})
}

func (a *App) hibernateCommand() *cobra.Command {
	return a.eachCommand("hibernate SANDBOX...", "Write the memory of sandboxes to disk and free it", func(ctx context.Context, c *client, id string) error {
		_, err := c.sandboxes.HibernateSandbox(ctx, connect.NewRequest(&hostagentv1.HibernateSandboxRequest{SandboxId: id}))
		return err
	})
}

func (a *App) resumeCommand() *cobra.Command {
	return a.eachCommand("resume SANDBOX...", "Make sandboxes run again, from whatever was kept of them", func(ctx context.Context, c *client, id string) error {
		_, err := c.host.ResumeSandbox(ctx, connect.NewRequest(&hostagentv1.ResumeSandboxRequest{SandboxId: id}))
		return err
	})
}

func (a *App) trimCommand() *cobra.Command {
	return a.eachCommand("trim SANDBOX...", "Give the disk blocks that sandboxes do not use back to the host", func(ctx context.Context, c *client, id string) error {
		res, err := c.sandboxes.TrimSandbox(ctx, connect.NewRequest(&hostagentv1.TrimSandboxRequest{SandboxId: id}))
		if err != nil {
			return err
		}
		fmt.Fprintf(a.Err, "%s: the host has %s more (%s)\n", id, size(int64(res.Msg.GetFreedBytes())), res.Msg.GetResult()) //nolint:gosec // a disk's size
		return nil
	})
}

func (a *App) rmCommand() *cobra.Command {
	var all bool
	c := a.eachCommand("rm SANDBOX...", "Destroy sandboxes", func(ctx context.Context, c *client, id string) error {
		_, err := c.host.DestroySandbox(ctx, connect.NewRequest(&hostagentv1.DestroySandboxRequest{SandboxId: id}))
		return err
	})
	one := c.RunE
	c.Aliases = []string{"destroy"}
	c.Args = func(cmd *cobra.Command, args []string) error {
		if all == (len(args) > 0) {
			return errors.New("name sandboxes, or give --all")
		}
		return nil
	}
	c.Flags().BoolVar(&all, "all", false, "destroy every sandbox of the host")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if !all {
			return one(cmd, args)
		}
		cl, err := a.client()
		if err != nil {
			return err
		}
		list, err := cl.host.ListSandboxes(cmd.Context(), connect.NewRequest(&hostagentv1.ListSandboxesRequest{}))
		if err != nil {
			return err
		}
		for _, s := range list.Msg.GetSandboxes() {
			args = append(args, s.GetSandboxId())
		}
		return one(cmd, args)
	}
	return c
}

// eachCommand is a command that does one thing to each sandbox named, prints
// the ids it did it to, and fails at the end if any failed.
func (a *App) eachCommand(use, short string, do func(context.Context, *client, string) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			var errs []error
			for _, arg := range args {
				id, err := cl.resolve(cmd.Context(), arg)
				if err == nil {
					err = do(cmd.Context(), cl, id)
				}
				if err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(a.Out, id)
			}
			return errors.Join(errs...)
		},
	}
}

func (a *App) waitCommand() *cobra.Command {
	var states []string
	c := &cobra.Command{
		Use:   "wait [flags] SANDBOX",
		Short: "Wait until a sandbox no longer runs, or is in a given state",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, id, err := a.sandbox(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			res, err := cl.sandboxes.WaitSandbox(cmd.Context(), connect.NewRequest(&hostagentv1.WaitSandboxRequest{SandboxId: id, Status: states}))
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(res.Msg, false)
			}
			_, err = fmt.Fprintln(a.Out, res.Msg.GetStatus())
			return err
		},
	}
	c.Flags().StringSliceVar(&states, "for", nil, "states to wait for, such as paused,gone")
	return c
}
