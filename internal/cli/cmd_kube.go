package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
)

func (a *App) kubeCommand() *cobra.Command {
	c := &cobra.Command{Use: "kube", Short: "Run Kubernetes in a sandbox", Args: cobra.NoArgs}
	c.AddCommand(a.kubeStart(), a.kubeStop(), a.kubeDelete(), a.kubeStatus())
	return c
}

// kubeVerb is a command about the cluster of one sandbox.
func (a *App) kubeVerb(use, short string, do func(ctx context.Context, c *client, id string) error) *cobra.Command {
	return &cobra.Command{
		Use: use + " SANDBOX", Short: short, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, id, err := a.sandbox(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return do(cmd.Context(), cl, id)
		},
	}
}

func (a *App) kubeStart() *cobra.Command {
	var wait bool
	var limit time.Duration
	c := a.kubeVerb("start", "Start Kubernetes", func(ctx context.Context, c *client, id string) error {
		res, err := answerOf(c.guest(id).StartKubernetes(ctx, connect.NewRequest(&arcboxv1.KubernetesStartRequest{})))
		if err != nil {
			return err
		}
		if wait {
			return a.awaitKube(ctx, c, id, limit)
		}
		if a.json {
			return a.printJSON(res, false)
		}
		_, err = fmt.Fprintln(a.Out, res.GetDetail())
		return err
	})
	c.Long = "Start asks for the cluster and returns. It comes up behind that, and stays up until\n" +
		"it is stopped. The sandbox must be made from a template that brings a cluster, such\n" +
		"as the recipe kubernetes."
	c.Example = "  hutch kube start --wait sb-12\n  hutch kubeconfig --merge sb-12\n  kubectl --context hutch-sb-12 get nodes"
	c.Flags().BoolVar(&wait, "wait", false, "return when pods can run, and tell how far it is until then")
	c.Flags().DurationVar(&limit, "timeout", 10*time.Minute, "how long --wait waits")
	return c
}

// kubePace is how often a cluster is asked how far it is: each time costs the
// guest some work that it has for its start.
const kubePace = time.Second

// awaitKube waits until pods can run, and tells what is missing.
func (a *App) awaitKube(ctx context.Context, c *client, id string, limit time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, exitStatus{exitTimeout, fmt.Sprintf("Kubernetes is not ready after %s", limit)})
	defer cancel()
	bar := newProgress(a.Err)
	defer bar.end()
	tick := time.NewTicker(kubePace)
	defer tick.Stop()
	for {
		s, err := c.kubeState(ctx, id)
		if err != nil {
			return errors.Join(context.Cause(ctx), err)
		}
		bar.update(s.GetDetail(), 0, 0)
		switch {
		case s.GetNodeReady():
			bar.end()
			if a.json {
				return a.printJSON(s, false)
			}
			_, err := fmt.Fprintln(a.Out, id)
			return err
		case !s.GetRunning():
			return fmt.Errorf("the cluster of %s is not running any more: %s", id, s.GetDetail())
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (c *client) kubeState(ctx context.Context, id string) (*arcboxv1.KubernetesStatusResponse, error) {
	return answerOf(c.guest(id).GetKubernetesStatus(ctx, connect.NewRequest(&arcboxv1.KubernetesStatusRequest{})))
}

func (a *App) kubeStop() *cobra.Command {
	return a.kubeVerb("stop", "Stop Kubernetes and all its pods; its data stays", func(ctx context.Context, c *client, id string) error {
		res, err := answerOf(c.guest(id).StopKubernetes(ctx, connect.NewRequest(&arcboxv1.KubernetesStopRequest{})))
		if err != nil {
			return err
		}
		if a.json {
			err = a.printJSON(res, false)
		} else {
			_, err = fmt.Fprintln(a.Out, res.GetDetail())
		}
		if err == nil && !res.GetStopped() {
			return exitStatus{exitHutch, "not all of the cluster is gone"}
		}
		return err
	})
}

func (a *App) kubeDelete() *cobra.Command {
	return a.kubeVerb("delete", "Stop Kubernetes and wipe its data; the next start makes another cluster", func(ctx context.Context, c *client, id string) error {
		res, err := answerOf(c.guest(id).DeleteKubernetes(ctx, connect.NewRequest(&arcboxv1.KubernetesDeleteRequest{})))
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(res, false)
		}
		_, err = fmt.Fprintln(a.Out, res.GetDetail())
		return err
	})
}

func (a *App) kubeStatus() *cobra.Command {
	return a.kubeVerb("status", "Show how Kubernetes and its parts are", func(ctx context.Context, c *client, id string) error {
		s, err := c.kubeState(ctx, id)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(s, false)
		}
		if _, err := fmt.Fprintln(a.Out, s.GetDetail()); err != nil || len(s.GetServices()) == 0 {
			return err
		}
		var rows [][]string
		for _, p := range s.GetServices() {
			rows = append(rows, []string{p.GetName(), p.GetStatus(), fmt.Sprint(p.GetCrashes()), orDash(p.GetDetail())})
		}
		return a.table([]string{"PART", "STATUS", "CRASHES", "DETAIL"}, rows)
	})
}
