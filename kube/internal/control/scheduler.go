package control

import (
	"context"

	"k8s.io/kubernetes/cmd/kube-scheduler/app"
	"k8s.io/kubernetes/cmd/kube-scheduler/app/options"
)

// RunScheduler gives pods their node until ctx ends. The API must be there.
func RunScheduler(ctx context.Context, p Params) error {
	o := options.NewOptions()
	if err := parse(*o.Flags, p.serving(LeafScheduler, p.Scheduler)); err != nil {
		return err
	}
	if err := o.ComponentGlobalsRegistry.Set(); err != nil {
		return err
	}
	config, scheduler, err := app.Setup(ctx, o)
	if err != nil {
		return err
	}
	err = app.Run(ctx, config, scheduler)
	if ctx.Err() != nil {
		return nil // without an election it ends with an error, always
	}
	return err
}
