package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"

	"github.com/hutch-run/hutch/internal/host/ports"
)

// DefaultConfigFile is read when there is one and no other is named.
const DefaultConfigFile = "/etc/hutch/hutchd.toml"

// Config is what hutchd can be told, by file and by flags. docs/configuration.md
// explains every key.
type Config struct {
	Root   string   `toml:"root"`    // where everything that lasts is
	RunDir string   `toml:"run_dir"` // sockets and namespaces
	Listen []string `toml:"listen"`  // unix:PATH or tcp:HOST:PORT
	VMM    string   `toml:"vmm"`     // "qemu"
	Accel  string   `toml:"accel"`   // "auto", "kvm", "tcg"
	Agent  string   `toml:"agent"`   // hutch-agent; empty: beside hutchd
	Domain string   `toml:"domain"`  // of <port>-<id>.<domain>
	// StopVMs powers the VMs off when hutchd stops, instead of leaving them
	// running for the next hutchd to adopt.
	StopVMs bool `toml:"stop_vms"`
	// SocketGroup may use the unix socket besides root.
	SocketGroup string `toml:"socket_group"`
	LogLevel    string `toml:"log_level"`  // debug, info, warn, error
	LogFormat   string `toml:"log_format"` // text, json

	TokenFile string `toml:"token_file"`
	TLSCert   string `toml:"tls_cert"`
	TLSKey    string `toml:"tls_key"`

	Limits LimitsConfig `toml:"limits"`
	Slots  SlotsConfig  `toml:"slots"`
	Warm   WarmConfig   `toml:"warm"`
	Ports  PortsConfig  `toml:"ports"`
	Shares SharesConfig `toml:"shares"`
}

// LimitsConfig bounds what sandboxes take of the host. Zero: see each.
type LimitsConfig struct {
	MaxSandboxes    int `toml:"max_sandboxes"`      // 0: no bound but the host's
	MaxStarts       int `toml:"max_starts"`         // booting at once; 0: one a CPU, at least 2
	MaxQueue        int `toml:"max_queue"`          // waiting for their turn; 0: 64
	MaxMemoryMB     int `toml:"max_memory_mb"`      // of all VMs together; 0: no bound
	MinFreeMemoryMB int `toml:"min_free_memory_mb"` // left for the host
	MinFreeDiskMB   int `toml:"min_free_disk_mb"`   // left on the disk
}

// SlotsConfig is about the network.
type SlotsConfig struct {
	Prepared int      `toml:"prepared"` // slots kept ready
	DNS      []string `toml:"dns"`      // resolvers of guests; empty: the host's
}

// WarmConfig is about warm templates.
type WarmConfig struct {
	// Auto makes a warm template of every shape that was booted.
	Auto     bool `toml:"auto"`
	MemoryMB int  `toml:"memory_mb"` // kept in RAM at most; 0: no bound
	DiskMB   int  `toml:"disk_mb"`   // kept on disk at most; 0: no bound
	// Spares is how many sandboxes are started ahead, one for each of the shapes
	// that were copied last.
	Spares int `toml:"spares"`
}

// PortsConfig is about the ports of the host that containers and Services in
// sandboxes publish.
type PortsConfig struct {
	Bind       string `toml:"bind"`       // "loopback", "any", "none"
	Privileged bool   `toml:"privileged"` // ports below 1024 too
}

// SharesConfig is about directories of the host in sandboxes.
type SharesConfig struct {
	// Allow lists the directories that sandboxes may be given, with all below
	// them. Empty: none.
	Allow []string `toml:"allow"`
}

func (s SharesConfig) check() error {
	for _, dir := range s.Allow {
		if !filepath.IsAbs(dir) || filepath.Clean(dir) != dir || dir == "/" {
			return fmt.Errorf("shares.allow %q: want a plain absolute path of a directory, and not the whole host", dir)
		}
	}
	return nil
}

// DefaultConfig is what hutchd does when told nothing.
func DefaultConfig() Config {
	return Config{
		Root:   "/var/lib/hutch",
		RunDir: "/run/hutch",
		VMM:    "qemu", Accel: "auto",
		Domain:   "localhost",
		LogLevel: "info", LogFormat: "text",
		Limits: LimitsConfig{MinFreeMemoryMB: 256, MinFreeDiskMB: 512},
		Slots:  SlotsConfig{Prepared: 2},
		Warm:   WarmConfig{Auto: true, MemoryMB: 2048, DiskMB: 20480, Spares: 1},
		Ports:  PortsConfig{Bind: string(ports.Loopback)},
	}
}

// ReadConfig reads a file over the defaults. A missing file is an error only
// when it was asked for.
func ReadConfig(path string) (Config, error) {
	c := DefaultConfig()
	asked := path != ""
	if !asked {
		path = DefaultConfigFile
	}
	meta, err := toml.DecodeFile(path, &c)
	if errors.Is(err, fs.ErrNotExist) && !asked {
		return c, nil
	}
	if err != nil {
		return c, fmt.Errorf("read configuration %s: %w", path, err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return c, fmt.Errorf("read configuration %s: unknown key %q", path, unknown[0].String())
	}
	return c, nil
}

// finish checks c and fills in what follows from the rest.
func (c Config) finish() (Config, error) {
	var err error
	if c.Root, err = filepath.Abs(c.Root); err != nil {
		return c, fmt.Errorf("root: %w", err)
	}
	if c.RunDir, err = filepath.Abs(c.RunDir); err != nil {
		return c, fmt.Errorf("run_dir: %w", err)
	}
	if len(c.Listen) == 0 {
		c.Listen = []string{"unix:" + filepath.Join(c.RunDir, "hutchd.sock")}
	}
	if c.Agent == "" {
		self, err := os.Executable()
		if err != nil {
			return c, fmt.Errorf("find hutch-agent: %w", err)
		}
		c.Agent = filepath.Join(filepath.Dir(self), "hutch-agent")
	}
	if c.VMM != "qemu" {
		return c, fmt.Errorf("vmm %q: this hutchd knows only qemu", c.VMM)
	}
	if !slices.Contains(ports.Binds(), ports.Bind(c.Ports.Bind)) {
		return c, fmt.Errorf("ports.bind %q: want loopback, any or none", c.Ports.Bind)
	}
	if !slices.Contains([]string{"auto", "kvm", "tcg"}, c.Accel) {
		return c, fmt.Errorf("accel %q: want auto, kvm or tcg", c.Accel)
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		return c, errors.New("tls_cert and tls_key belong together: give both or none")
	}
	if err := c.Shares.check(); err != nil {
		return c, err
	}
	if _, err := c.logLevel(); err != nil {
		return c, err
	}
	if !slices.Contains([]string{"text", "json"}, c.LogFormat) {
		return c, fmt.Errorf("log_format %q: want text or json", c.LogFormat)
	}
	return c, nil
}

func (c Config) logLevel() (slog.Level, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(strings.ToUpper(c.LogLevel))); err != nil {
		return l, fmt.Errorf("log_level %q: want debug, info, warn or error", c.LogLevel)
	}
	return l, nil
}
