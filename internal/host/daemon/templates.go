package daemon

import (
	"context"
	"log/slog"
	"path/filepath"

	"github.com/hutch-run/hutch/internal/host/disk"
	"github.com/hutch-run/hutch/internal/host/image"
	"github.com/hutch-run/hutch/internal/host/rpc"
	"github.com/hutch-run/hutch/internal/host/template"
)

// openTemplates opens the template store of a root. Programs that recipes put
// into images are beside the agent.
func openTemplates(cfg Config, log *slog.Logger) (*template.Store, error) {
	return template.Open(template.Params{Root: cfg.Root, Programs: filepath.Dir(cfg.Agent), Log: log})
}

// templates is the template store as the API wants it.
type templates struct{ p *parts }

var _ rpc.Templates = templates{}

// Build makes a template from a recipe, a reference or a path on the host.
func (t templates) Build(ctx context.Context, b rpc.BuildTemplate, progress func(step string, done, total int64)) (rpc.TemplateInfo, error) {
	source := image.Source{Ref: b.Reference, Path: b.HostPath, Platform: b.Platform, Insecure: b.InsecureRegistry}
	if len(b.DockerConfig) > 0 {
		source.DockerConfig = b.DockerConfig
	}
	return t.make(ctx, template.ImportParams{Name: b.Name, Recipe: b.Recipe, Source: source, Overrides: overrides(b.Defaults), Progress: progress})
}

// Import makes a template from an archive that the caller sends.
func (t templates) Import(ctx context.Context, i rpc.ImportTemplate) (rpc.TemplateInfo, error) {
	source := image.Source{Stream: i.Archive, Platform: i.Platform, Label: "import"}
	return t.make(ctx, template.ImportParams{Name: i.Name, Source: source, Overrides: overrides(i.Defaults)})
}

func (t templates) make(ctx context.Context, p template.ImportParams) (rpc.TemplateInfo, error) {
	made, err := t.p.templates.Import(ctx, p)
	if err != nil {
		return rpc.TemplateInfo{}, err
	}
	t.p.collect(ctx) // the image that it replaced
	return t.info(made)
}

func overrides(d rpc.TemplateDefaults) template.Overrides {
	return template.Overrides{Env: d.Env, User: d.User, Cwd: d.Cwd, VCPUs: d.VCPUs, MemoryMB: d.MemoryMB, DiskMB: d.DiskMB}
}

// List returns all templates that can be read.
func (t templates) List(context.Context) ([]rpc.TemplateInfo, error) {
	list, broken, err := t.p.templates.List()
	if err != nil {
		return nil, err
	}
	for _, err := range broken {
		t.p.log.Warn("leave out a template", "error", err)
	}
	var out []rpc.TemplateInfo
	for _, one := range list {
		info, err := t.info(one)
		if err != nil {
			t.p.log.Warn("size of a template", "template", one.Name, "error", err)
		}
		out = append(out, info)
	}
	return out, nil
}

// Inspect returns one template.
func (t templates) Inspect(_ context.Context, name string) (rpc.TemplateInfo, error) {
	one, err := t.p.templates.Get(name)
	if err != nil {
		return rpc.TemplateInfo{}, err
	}
	return t.info(one)
}

// Remove forgets a template, and its image when nothing else uses it.
func (t templates) Remove(ctx context.Context, name string) error {
	if err := t.p.templates.Remove(name); err != nil {
		return err
	}
	t.p.collect(ctx)
	return nil
}

func (t templates) info(one template.Template) (rpc.TemplateInfo, error) {
	info := rpc.TemplateInfo{Template: one}
	path, err := t.p.templates.Image(one.ImageDigest)
	if err != nil {
		return info, err
	}
	info.DiskBytes, err = disk.Allocated(path)
	return info, err
}
