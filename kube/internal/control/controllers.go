package control

import (
	"context"
	"fmt"

	cliflag "k8s.io/component-base/cli/flag"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
)

// Controllers is the controller manager.
type Controllers struct {
	options *options.KubeControllerManagerOptions
	flags   cliflag.NamedFlagSets
}

// NewControllers makes its options. It must be called before anything of this package is run.
func NewControllers() (*Controllers, error) {
	o, err := options.NewKubeControllerManagerOptions()
	if err != nil {
		return nil, fmt.Errorf("set up controllers: %w", err)
	}
	c := &Controllers{options: o, flags: o.Flags(app.KnownControllers(), app.ControllersDisabledByDefault(), app.ControllerAliases())}
	o.ParsedFlags = &c.flags
	return c, nil
}

// Run runs the controllers until ctx ends. The API must be there.
func (c *Controllers) Run(ctx context.Context, p Params) error {
	if err := parse(c.flags, p.controllers()); err != nil {
		return err
	}
	if err := c.options.ComponentGlobalsRegistry.Set(); err != nil {
		return err
	}
	config, err := c.options.Config(ctx, app.KnownControllers(), app.ControllersDisabledByDefault(), app.ControllerAliases())
	if err != nil {
		return err
	}
	return app.Run(ctx, config.Complete())
}

func (p Params) controllers() []string {
	return append(p.serving(LeafControllers, p.Controllers),
		"--use-service-account-credentials=true", "--kube-api-qps=1000", "--kube-api-burst=2000", "--controller-start-interval=0s",
		"--service-account-private-key-file="+p.PKI.SignerKey(), "--root-ca-file="+p.PKI.Cert("ca"),
		"--cluster-signing-cert-file="+p.PKI.Cert("ca"), "--cluster-signing-key-file="+p.PKI.Key("ca"),
		"--allocate-node-cidrs=true", "--cluster-cidr="+p.PodCIDR, "--node-cidr-mask-size=24", "--configure-cloud-routes=false",
		"--flex-volume-plugin-dir="+p.VolumePlugin,
	)
}
