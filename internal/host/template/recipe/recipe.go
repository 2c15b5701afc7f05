package recipe

import (
	"context"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/image"
)

// Recipe is one image that can be made here.
type Recipe struct {
	Name    string
	Summary string
	Config  image.Config
	Shape   Shape
	make    func(context.Context, *kitchen) (*Rootfs, error)
}

// Shape is what sandboxes need that run what a recipe is for. Zero: no more
// than any other.
type Shape struct{ VCPUs, MemoryMB, DiskMB int }

// Rootfs is a finished root filesystem. Close frees it.
type Rootfs struct {
	Tar io.Reader
	// Clamp is when the build began: what is not older was made by it. Zero if
	// the times in the tar are right as they are.
	Clamp time.Time
	close func() error
}

// Close frees what the tar is read from.
func (r *Rootfs) Close() error {
	if r.close == nil {
		return nil
	}
	return r.close()
}

// Params is what making a recipe takes.
type Params struct {
	Work     string         // an empty directory; the caller removes it
	Programs string         // the directory of hutch's own programs
	Progress image.Progress // may be nil
	Log      *slog.Logger   // nil: nothing is logged
}

// kitchen is one run of a recipe.
type kitchen struct {
	Params
	run runner
}

func (k *kitchen) step(what string) {
	k.Log.Debug("recipe step", "step", what)
	if k.Progress != nil {
		k.Progress(what, 0, 0)
	}
}

// Make builds the root filesystem. It is fault.Precondition if this host cannot
// (no apt, not Debian, not root where that is needed) and fault.Unavailable if
// the archive cannot be reached.
func (r Recipe) Make(ctx context.Context, p Params) (*Rootfs, error) {
	if p.Log == nil {
		p.Log = slog.New(slog.DiscardHandler)
	}
	return r.make(ctx, &kitchen{Params: p, run: runner{log: p.Log}})
}

// Names lists the recipes.
func Names() []string { return slices.Sorted(maps.Keys(all())) }

// Find returns a recipe by its name.
func Find(name string) (Recipe, error) {
	r, ok := all()[name]
	if !ok {
		return Recipe{}, fault.New(fault.NotFound, "there is no recipe %q; there are %s", name, strings.Join(Names(), ", "))
	}
	return r, nil
}

const searchPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func all() map[string]Recipe {
	list := []Recipe{
		{
			Name: "minimal", Summary: "busybox with Debian's C library, a few MB",
			Config: runs("/bin/sh"),
			make:   minimal,
		},
		{
			Name: "debian", Summary: "Debian as on this host, with apt",
			Config: runs("/bin/bash"),
			make:   system{}.make,
		},
		{
			Name: "python311", Summary: "Debian with its own Python 3.11, pip and venv",
			Config: runs("/usr/bin/python3"),
			make:   system{packages: []string{"python3", "python3-pip", "python3-venv"}, check: checkPython}.make,
		},
		{
			Name: "docker", Summary: "Debian with its own Docker",
			Config: runs("/bin/bash"),
			Shape:  Shape{VCPUs: 2, MemoryMB: 1024, DiskMB: 20 << 10},
			make:   docker().make,
		},
		{
			Name: "kubernetes", Summary: "Debian with its own containerd, and a Kubernetes in one program",
			Config: runs("/bin/bash"),
			Shape:  Shape{VCPUs: 2, MemoryMB: 2048, DiskMB: 20 << 10},
			make:   kubernetes().make,
		},
	}
	out := map[string]Recipe{}
	for _, r := range list {
		out[r.Name] = r
	}
	return out
}

// runs is the config of an image that runs a program when told nothing.
func runs(program string) image.Config {
	return image.Config{User: "root", Cwd: "/root", Cmd: []string{program}, Env: map[string]string{"PATH": searchPath, "LANG": "C.UTF-8"}}
}

// needRoot says what cannot be done without.
func needRoot(what string) error {
	if os.Geteuid() != 0 {
		return fault.New(fault.Precondition, "%s needs root on this host", what)
	}
	return nil
}
