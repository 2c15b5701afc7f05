package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
)

// orphanIdle ends a sandbox of "run" whose hutch command was killed: nothing
// is in flight any more then.
const orphanIdle = time.Minute

func (a *App) runCommand() *cobra.Command {
	var create createFlags
	var exec execFlags
	var keep, timing bool
	c := &cobra.Command{
		Use:   "run [flags] TEMPLATE [--] [COMMAND [ARG...]]",
		Short: "Make a sandbox, run one program in it, destroy it",
		Example: "  hutch run minimal -- uname -a\n" +
			"  hutch run -it debian bash\n" +
			"  hutch run python311 -- python3 -c 'print(2**100)'",
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := create.request(args[0], a.Getenv)
			if err != nil {
				return err
			}
			if req.TimeoutSec == 0 && !keep {
				req.TimeoutSec = int32(orphanIdle / time.Second)
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			return a.runOnce(cmd.Context(), cl, req, runOptions{exec: exec, argv: program(args[1:]), keep: keep, timing: timing})
		},
	}
	create.register(c)
	exec.register(c)
	c.Flags().SetInterspersed(false)
	c.Flags().BoolVar(&keep, "keep", false, "leave the sandbox running, and print its id at the end")
	c.Flags().BoolVar(&timing, "timing", false, "print the time of each stage")
	return c
}

type runOptions struct {
	exec         execFlags
	argv         []string
	keep, timing bool
}

// runOnce makes a sandbox, runs the program, and destroys the sandbox whatever
// happened to the program or to ctx.
func (a *App) runOnce(ctx context.Context, c *client, req *hostagentv1.CreateSandboxRequest, o runOptions) (err error) {
	argv, err := a.programOf(ctx, c, req.GetTemplate(), o.argv)
	if err != nil {
		return err
	}
	started := time.Now()
	created, err := c.host.CreateSandbox(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	id := created.Msg.GetSandboxId()
	if o.timing {
		a.printStages(created.Msg.GetStages(), time.Since(started))
	}
	if o.keep {
		defer fmt.Fprintln(a.Err, id)
	} else {
		defer func() { err = errors.Join(err, a.destroy(ctx, c, id, o.timing)) }()
	}
	began := time.Now()
	err = o.exec.session(argv, termEnv(map[string]string{}, o.exec.tty)).run(ctx, a, c, id)
	if o.timing {
		fmt.Fprintf(a.Err, "%-16s %8.1f ms\n", "program", ms(time.Since(began)))
	}
	return err
}

// programOf returns argv, or what the template runs when argv is empty.
func (a *App) programOf(ctx context.Context, c *client, template string, argv []string) ([]string, error) {
	if len(argv) > 0 {
		return argv, nil
	}
	res, err := c.templates.InspectTemplate(ctx, connect.NewRequest(&hostagentv1.InspectTemplateRequest{Name: template}))
	if err != nil {
		return nil, err
	}
	t := res.Msg.GetTemplate()
	argv = append(append(argv, t.GetEntrypoint()...), t.GetCmd()...)
	if len(argv) == 0 {
		return nil, fmt.Errorf("template %s names no program: say which, after --", template)
	}
	return argv, nil
}

// destroy destroys a sandbox even when ctx is over.
func (a *App) destroy(ctx context.Context, c *client, id string, timing bool) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	began := time.Now()
	_, err := c.host.DestroySandbox(ctx, connect.NewRequest(&hostagentv1.DestroySandboxRequest{SandboxId: id}))
	if timing {
		fmt.Fprintf(a.Err, "%-16s %8.1f ms\n", "destroy", ms(time.Since(began)))
	}
	if err != nil && connect.CodeOf(err) != connect.CodeNotFound {
		return fmt.Errorf("destroy %s: %w", id, err)
	}
	return nil
}

func (a *App) printStages(stages []*hostagentv1.StageTime, total time.Duration) {
	for _, s := range stages {
		fmt.Fprintf(a.Err, "%-16s %8.1f ms\n", s.GetName(), float64(s.GetMicros())/1000)
	}
	fmt.Fprintf(a.Err, "%-16s %8.1f ms\n", "create, in all", ms(total))
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
