package daemon

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/hutch-run/hutch/internal/host/auth"
	"github.com/hutch-run/hutch/internal/version"
)

// Main runs the command line of the process and returns its exit code.
func Main() int {
	// Signals are caught before anything slow starts, so that a hutchd that is
	// still coming up can be stopped as well.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := rootCommand(os.Stdout, os.Stderr)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "hutchd:", err)
		return 1
	}
	return 0
}

// flags are the settings that have a flag; the others are set by file.
type flags struct {
	file string
	Config
}

func (f *flags) register(c *cobra.Command) {
	d := DefaultConfig()
	fl := c.PersistentFlags()
	fl.StringVar(&f.file, "config", "", "configuration file (default "+DefaultConfigFile+", when there)")
	fl.StringVar(&f.Root, "root", d.Root, "directory for everything that lasts")
	fl.StringVar(&f.RunDir, "run-dir", d.RunDir, "directory for sockets")
	fl.StringArrayVar(&f.Listen, "listen", nil, "`ADDRESS` to serve, unix:PATH or tcp:HOST:PORT; repeatable (default unix:<run-dir>/hutchd.sock)")
	fl.StringVar(&f.VMM, "vmm", d.VMM, "VMM: qemu")
	fl.StringVar(&f.Accel, "accel", d.Accel, "accelerator: auto, kvm or tcg")
	fl.StringVar(&f.Agent, "agent", "", "hutch-agent binary (default beside hutchd)")
	fl.BoolVar(&f.StopVMs, "stop-vms", d.StopVMs, "power the VMs off when hutchd stops, instead of leaving them running")
	fl.StringVar(&f.LogLevel, "log-level", d.LogLevel, "debug, info, warn or error")
	fl.StringVar(&f.LogFormat, "log-format", d.LogFormat, "text or json")
	fl.StringVar(&f.TokenFile, "token-file", "", "file with the tokens that open the API")
	fl.StringVar(&f.TLSCert, "tls-cert", "", "certificate file for TCP")
	fl.StringVar(&f.TLSKey, "tls-key", "", "key file for TCP")
}

// config returns the file's settings with the flags that were given over them.
func (f *flags) config(c *cobra.Command) (Config, error) {
	cfg, err := ReadConfig(f.file)
	if err != nil {
		return cfg, err
	}
	given := c.Flags().Changed
	for name, set := range map[string]func(){
		"root":       func() { cfg.Root = f.Root },
		"run-dir":    func() { cfg.RunDir = f.RunDir },
		"listen":     func() { cfg.Listen = f.Listen },
		"vmm":        func() { cfg.VMM = f.VMM },
		"accel":      func() { cfg.Accel = f.Accel },
		"agent":      func() { cfg.Agent = f.Agent },
		"stop-vms":   func() { cfg.StopVMs = f.StopVMs },
		"log-level":  func() { cfg.LogLevel = f.LogLevel },
		"log-format": func() { cfg.LogFormat = f.LogFormat },
		"token-file": func() { cfg.TokenFile = f.TokenFile },
		"tls-cert":   func() { cfg.TLSCert = f.TLSCert },
		"tls-key":    func() { cfg.TLSKey = f.TLSKey },
	} {
		if given(name) {
			set()
		}
	}
	return cfg.finish()
}

func rootCommand(out, errOut io.Writer) *cobra.Command {
	var f flags
	root := &cobra.Command{
		Use:   "hutchd",
		Short: "The host agent of hutch: makes, keeps and ends the microVMs of this host",
		Long: "hutchd serves the hutch API. Prepare the host once with: hutchd setup\n\n" +
			"SIGTERM and SIGINT stop it in order. Sandboxes go on running, and the next\n" +
			"hutchd adopts them, unless --stop-vms is set.",
		Args:    cobra.NoArgs,
		Version: version.Version, SilenceUsage: true, SilenceErrors: true,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := f.config(c)
			if err != nil {
				return err
			}
			return Run(c.Context(), cfg, newLogger(cfg, errOut))
		},
	}
	root.SetOut(out)
	root.SetErr(errOut)
	f.register(root)
	root.AddCommand(setupCommand(&f, errOut), tokenCommand(&f, out))
	return root
}

func setupCommand(f *flags, errOut io.Writer) *cobra.Command {
	var o SetupOptions
	c := &cobra.Command{
		Use:   "setup",
		Short: "Prepare this host: packages, kernel pack, templates",
		Long: "setup makes what is needed to start, with the template minimal, and those of --template.\n" +
			"It can be repeated: it makes what is missing and leaves the rest.",
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := f.config(c)
			if err != nil {
				return err
			}
			if cfg.LogLevel == DefaultConfig().LogLevel {
				cfg.LogLevel = "warn" // setup tells its steps by itself
			}
			return Setup(c.Context(), cfg, o, errOut, newLogger(cfg, errOut))
		},
	}
	c.Flags().StringVar(&o.Kernel, "kernel", "", "vmlinuz to use instead of Debian's cloud kernel")
	c.Flags().StringVar(&o.Modules, "modules", "", "its /lib/modules/<release> directory")
	c.Flags().StringSliceVar(&o.Templates, "template", nil, "`RECIPE` to build as a template too, such as docker; repeatable")
	c.Flags().BoolVar(&o.Force, "force", false, "make kernel pack and templates again")
	c.Flags().BoolVar(&o.NoPackages, "no-packages", false, "install no packages")
	return c
}

func tokenCommand(f *flags, out io.Writer) *cobra.Command {
	var read bool
	c := &cobra.Command{
		Use:   "token FILE",
		Short: "Make a token file with one new token, and print the token",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			role := auth.Admin
			if read {
				role = auth.Read
			}
			secret := auth.NewSecret()
			if err := auth.WriteTokenFile(args[0], role.String(), role, secret); err != nil {
				return err
			}
			_, err := fmt.Fprintln(out, secret)
			return err
		},
	}
	c.Flags().BoolVar(&read, "read", false, "a token that may only look")
	return c
}

func newLogger(c Config, w io.Writer) *slog.Logger {
	level, err := c.logLevel()
	if err != nil {
		level = slog.LevelInfo
	}
	o := &slog.HandlerOptions{Level: level}
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}
