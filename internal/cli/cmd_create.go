package cli

import (
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
)

func (a *App) createCommand() *cobra.Command {
	var flags createFlags
	var timing bool
	c := &cobra.Command{
		Use:     "create [flags] [TEMPLATE]",
		Short:   "Make a sandbox and print its id",
		Example: "  hutch create\n  hutch create --vcpus 2 -m 2g --idle 10m debian",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			template := ""
			if len(args) == 1 {
				template = args[0]
			}
			req, err := flags.request(template, a.Getenv)
			if err != nil {
				return err
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			began := time.Now()
			res, err := cl.host.CreateSandbox(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(res.Msg, false)
			}
			if timing {
				a.printStages(res.Msg.GetStages(), time.Since(began))
			}
			_, err = fmt.Fprintln(a.Out, res.Msg.GetSandboxId())
			return err
		},
	}
	flags.register(c)
	c.Flags().BoolVar(&timing, "timing", false, "print the time of each stage")
	return c
}
