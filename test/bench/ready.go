package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
)

// Contests of what is up in a guest.
const (
	dockerContest     = "create to first docker ps"
	kubernetesContest = "create to a node that is Ready"
	siteContest       = "create to a pod that answers through its Service"
)

// measureDocker measures a create to the first answer of Docker, from a template
// that was made warm with Docker up, and cold.
func (b *bench) measureDocker(ctx context.Context) error {
	return b.measureReady(ctx, "docker", dockerContest, b.listContainers)
}

// measureReady measures creates of a recipe's template until use returns, warm
// with it up and cold.
func (b *bench) measureReady(ctx context.Context, what, contest string, use func(ctx context.Context, id string) error) error {
	if err := b.prepareReady(ctx, what); err != nil {
		return err
	}
	turn := func(cold bool) func(context.Context) ([]time.Duration, error) {
		return func(ctx context.Context) ([]time.Duration, error) {
			took, err := b.createToUse(ctx, what, cold, use)
			return []time.Duration{took}, err
		}
	}
	held, err := compete(ctx, []string{contest}, b.plan.Ready, 1, []side{
		{name: sideHutch, do: turn(false)},
		{name: sideCold, every: 2, do: turn(true)},
	})
	b.report.Contests = append(b.report.Contests, held...)
	return err
}

// prepareReady builds a recipe that the prepared root lacks, and makes it warm.
func (b *bench) prepareReady(ctx context.Context, what string) error {
	list, err := b.host.templates.ListTemplates(ctx, connect.NewRequest(&hostagentv1.ListTemplatesRequest{}))
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(list.Msg.GetTemplates(), func(t *hostagentv1.Template) bool { return t.GetName() == what }) {
		if err := b.buildRecipe(ctx, what); err != nil {
			return fmt.Errorf("build the template %s: %w", what, err)
		}
	}
	say("  bring %s up, to copy it", what)
	if _, err = b.host.templates.WarmTemplate(ctx, connect.NewRequest(&hostagentv1.WarmTemplateRequest{Name: what, Ready: what})); err != nil {
		return fmt.Errorf("make the template warm: %w", err)
	}
	return nil
}

func (b *bench) buildRecipe(ctx context.Context, what string) error {
	say("  build the template %s", what)
	stream, err := b.host.templates.BuildTemplate(ctx, connect.NewRequest(&hostagentv1.BuildTemplateRequest{
		Name: what, Source: &hostagentv1.BuildTemplateRequest_Recipe{Recipe: what},
	}))
	if err != nil {
		return err
	}
	for stream.Receive() {
	}
	return errors.Join(stream.Err(), stream.Close())
}

// createToUse makes a sandbox, uses it, and destroys it after the clock has
// stopped.
func (b *bench) createToUse(ctx context.Context, template string, cold bool, use func(ctx context.Context, id string) error) (time.Duration, error) {
	began := time.Now()
	res, err := b.host.host.CreateSandbox(ctx, connect.NewRequest(&hostagentv1.CreateSandboxRequest{Template: template, ColdStart: cold}))
	if err != nil {
		return 0, fmt.Errorf("create: %w", err)
	}
	id := res.Msg.GetSandboxId()
	err = use(ctx, id)
	return time.Since(began), errors.Join(err, b.host.destroy(ctx, id))
}

// listContainers asks what docker ps does, on the sandbox's socket.
func (b *bench) listContainers(ctx context.Context, id string) error {
	socket := filepath.Join(filepath.Dir(b.host.socket), "sandboxes", id, "docker.sock")
	c := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	defer c.CloseIdleConnections()
	for _, path := range []string{"/_ping", "/v1.41/containers/json"} {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker"+path, nil)
		if err != nil {
			return err
		}
		res, err := c.Do(r)
		if err != nil {
			return err
		}
		said, err := io.ReadAll(res.Body)
		if err := errors.Join(err, res.Body.Close()); err != nil {
			return err
		}
		if res.StatusCode != http.StatusOK {
			return fmt.Errorf("docker's %s: %s: %s", path, res.Status, said)
		}
	}
	return nil
}
