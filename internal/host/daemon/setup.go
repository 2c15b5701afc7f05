package daemon

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/kernel"
	"github.com/hutch-run/hutch/internal/host/store"
	"github.com/hutch-run/hutch/internal/host/template"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// SetupOptions say what setup does besides the usual.
type SetupOptions struct {
	Kernel, Modules string   // use these instead of Debian's
	Templates       []string // recipes to build besides the default one
	Force           bool     // make again what is there
	NoPackages      bool     // install nothing
}

// recipes are the templates that setup sees to.
func (o SetupOptions) recipes() []string {
	all := []string{sandbox.DefaultTemplate}
	for _, name := range o.Templates {
		if !slices.Contains(all, name) {
			all = append(all, name)
		}
	}
	return all
}

// neededPackages are the Debian packages that hutchd and setup use.
func neededPackages() []string { return []string{"qemu-system-x86", "e2fsprogs", "kmod"} }

// Setup prepares a host: packages, kernel pack, templates. It makes
// what is missing and tells each step on out, so it can be repeated.
func Setup(ctx context.Context, cfg Config, o SetupOptions, out io.Writer, log *slog.Logger) error {
	if os.Geteuid() != 0 {
		return fault.New(fault.Denied, "setup needs root: it installs packages and writes %s", cfg.Root)
	}
	if !o.NoPackages {
		if err := installPackages(ctx, out); err != nil {
			return err
		}
	}
	// The lock keeps a hutchd from serving a root that is being made.
	s, err := store.Open(cfg.Root, log)
	if err != nil {
		return setupBeside(cfg, o, out, log, err)
	}
	err = prepare(ctx, cfg, o, out, log)
	if closeErr := s.Close(); err == nil {
		err = closeErr
	}
	return err
}

// setupBeside is setup while a hutchd has the root: nothing can be made, and
// nothing needs to be when it is all there.
func setupBeside(cfg Config, o SetupOptions, out io.Writer, log *slog.Logger, locked error) error {
	if !fault.Is(locked, fault.Precondition) {
		return fmt.Errorf("prepare %s: %w", cfg.Root, locked)
	}
	kernels, err := kernel.Open(cfg.Root)
	if err != nil {
		return err
	}
	pack, packErr := kernels.Current()
	templates, err := openTemplates(cfg, log)
	if err != nil {
		return err
	}
	there := []template.Template{}
	for _, name := range o.recipes() {
		if t, _, err := templates.Resolve(name); err == nil {
			there = append(there, t)
		}
	}
	if packErr == nil && len(there) == len(o.recipes()) && !o.Force && o.Kernel == "" {
		printPrepared(out, pack, there)
		return nil
	}
	return fmt.Errorf("%w; stop it for setup (sandboxes go on running), or make templates with: hutch template build NAME", locked)
}

// printPrepared tells what a prepared root has.
func printPrepared(out io.Writer, pack kernel.Pack, templates []template.Template) {
	fmt.Fprintf(out, "kernel pack   %s (%s)\n", pack.ID, pack.Release)
	for _, t := range templates {
		fmt.Fprintf(out, "template      %s (%.19s, %d MiB)\n", t.Name, t.ImageDigest, t.SizeBytes>>20)
	}
}

func prepare(ctx context.Context, cfg Config, o SetupOptions, out io.Writer, log *slog.Logger) error {
	kernels, err := kernel.Open(cfg.Root)
	if err != nil {
		return err
	}
	pack, err := kernels.Refresh(cfg.Agent)
	if o.Force || o.Kernel != "" || fault.Is(err, fault.Precondition) || fault.Is(err, fault.NotFound) {
		pack, err = makePack(ctx, kernels, cfg, o, out)
	}
	if err != nil {
		return err
	}
	templates, err := openTemplates(cfg, log)
	if err != nil {
		return err
	}
	var there []template.Template
	for _, name := range o.recipes() {
		t, _, err := templates.Resolve(name)
		if o.Force || fault.Is(err, fault.NotFound) {
			steps := &stepPrinter{out: out}
			t, err = templates.Import(ctx, template.ImportParams{Name: name, Recipe: name, Progress: steps.step})
		}
		if err != nil {
			return err
		}
		there = append(there, t)
	}
	printPrepared(out, pack, there)
	return nil
}

func makePack(ctx context.Context, kernels *kernel.Store, cfg Config, o SetupOptions, out io.Writer) (kernel.Pack, error) {
	var src kernel.Source
	var err error
	if o.Kernel != "" || o.Modules != "" {
		src, err = kernel.Files(o.Kernel, o.Modules)
	} else {
		dir, tmpErr := os.MkdirTemp("", "hutch-kernel-")
		if tmpErr != nil {
			return kernel.Pack{}, fmt.Errorf("make kernel pack: %w", tmpErr)
		}
		defer os.RemoveAll(dir)
		fmt.Fprintln(out, "downloading Debian's cloud kernel")
		src, err = kernel.FetchDebian(ctx, dir)
	}
	if err != nil {
		return kernel.Pack{}, err
	}
	fmt.Fprintln(out, "making the kernel pack from", src.Name)
	return kernels.Build(ctx, src, cfg.Agent)
}

// installPackages installs those of the needed packages that are missing.
func installPackages(ctx context.Context, out io.Writer) error {
	var missing []string
	for _, name := range neededPackages() {
		b, err := exec.CommandContext(ctx, "dpkg-query", "-W", "-f=${db:Status-Status}", name).Output()
		if err != nil || string(b) != "installed" {
			missing = append(missing, name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	fmt.Fprintln(out, "installing", strings.Join(missing, " "))
	if err := apt(ctx, "update"); err != nil {
		return err
	}
	return apt(ctx, append([]string{"install", "-y", "--no-install-recommends"}, missing...)...)
}

// apt runs apt-get; its error carries the last of what it said.
func apt(ctx context.Context, args ...string) error {
	c := exec.CommandContext(ctx, "apt-get", args...)
	c.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
	var said bytes.Buffer
	c.Stdout, c.Stderr = &said, &said
	if err := c.Run(); err != nil {
		lines := strings.Split(strings.TrimSpace(said.String()), "\n")
		return fmt.Errorf("apt-get %s: %w: %s", strings.Join(args, " "), err, strings.Join(lines[max(0, len(lines)-3):], "; "))
	}
	return nil
}

// stepPrinter prints a line for each new step of a build.
type stepPrinter struct {
	out io.Writer

	mu   sync.Mutex
	last string // guarded by mu
}

func (s *stepPrinter) step(step string, _, _ int64) {
	if strings.HasPrefix(step, "Get:") || strings.HasPrefix(step, "Fetched ") {
		return // apt's own chatter, a line for every package
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if step != s.last {
		fmt.Fprintln(s.out, " ", step)
		s.last = step
	}
}
