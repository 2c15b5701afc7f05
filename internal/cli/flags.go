package cli

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
)

// createFlags are the flags of every command that makes a sandbox.
type createFlags struct {
	cold    bool
	then    string
	auto    bool
	id      string
	vcpus   int32
	memory  string
	disk    string
	idle    time.Duration
	user    string
	env     []string
	labels  []string
	network string
	allow   []string
	shares  []string
}

func (f *createFlags) register(c *cobra.Command) {
	fl := c.Flags()
	fl.StringVar(&f.id, "id", "", "id of the sandbox (default generated)")
	fl.Int32Var(&f.vcpus, "vcpus", 0, "virtual CPUs (default 1)")
	fl.StringVarP(&f.memory, "memory", "m", "", "memory, such as 512 (MiB) or 2g (default 512)")
	fl.StringVar(&f.disk, "disk", "", "size of the writable disk, such as 20g (default 5g)")
	fl.DurationVar(&f.idle, "idle", 0, "time of inactivity after which --on-timeout is done (default never)")
	fl.StringVar(&f.then, "on-timeout", "", "what is done after --idle: destroy, pause or hibernate (default destroy)")
	fl.BoolVar(&f.auto, "auto-resume", false, "resume it when it is used while paused or hibernated")
	fl.BoolVar(&f.cold, "cold", false, "boot it, also where a warm template could be copied")
	fl.StringVar(&f.user, "default-user", "", "user of commands that name none")
	fl.StringArrayVarP(&f.env, "env", "e", nil, "environment `KEY=VALUE` of every command; KEY alone takes the caller's")
	fl.StringArrayVarP(&f.labels, "label", "l", nil, "label `KEY=VALUE`")
	fl.StringVar(&f.network, "network", "internet", "what it may reach: internet, none or allow")
	fl.StringArrayVar(&f.allow, "allow", nil, "IPv4 address or `PREFIX` that it may reach besides")
	fl.StringArrayVar(&f.shares, "share", nil, "directory of hutchd's host that it sees, as `HOST:GUEST[:ro]`")
}

func (f *createFlags) request(template string, getenv func(string) string) (*hostagentv1.CreateSandboxRequest, error) {
	memory, err := megabytes("--memory", f.memory)
	if err != nil {
		return nil, err
	}
	disk, err := megabytes("--disk", f.disk)
	if err != nil {
		return nil, err
	}
	env, err := pairs("--env", f.env, getenv)
	if err != nil {
		return nil, err
	}
	labels, err := pairs("--label", f.labels, nil)
	if err != nil {
		return nil, err
	}
	shares, err := hostShares(f.shares)
	if err != nil {
		return nil, err
	}
	then, err := f.onTimeout()
	if err != nil {
		return nil, err
	}
	mode, ok := map[string]hostagentv1.NetworkPolicy_Mode{
		"internet": hostagentv1.NetworkPolicy_MODE_INTERNET,
		"none":     hostagentv1.NetworkPolicy_MODE_NONE,
		"allow":    hostagentv1.NetworkPolicy_MODE_ALLOW,
	}[f.network]
	if !ok {
		return nil, fmt.Errorf("--network %q: want internet, none or allow", f.network)
	}
	return &hostagentv1.CreateSandboxRequest{
		Template: template, SandboxId: f.id, Vcpus: f.vcpus, MemoryMb: memory, DiskSizeMb: disk,
		TimeoutSec: int32((f.idle + time.Second - 1) / time.Second), DefaultUser: f.user, DefaultEnv: env, Labels: labels,
		Network:   &hostagentv1.NetworkPolicy{Mode: mode, Allow: f.allow},
		ColdStart: f.cold, OnTimeout: then, AutoResume: f.auto, Shares: shares,
	}, nil
}

// hostShares reads HOST:GUEST and HOST:GUEST:ro. Neither path has a colon.
func hostShares(in []string) (shares []*hostagentv1.HostShare, err error) {
	for _, s := range in {
		rest, readOnly := strings.CutSuffix(s, ":ro")
		host, guest, ok := strings.Cut(strings.TrimSuffix(rest, ":rw"), ":")
		if !ok || !strings.HasPrefix(host, "/") || !strings.HasPrefix(guest, "/") || strings.Contains(guest, ":") {
			return nil, fmt.Errorf("--share %q: want HOST:GUEST or HOST:GUEST:ro with two absolute paths, the first on hutchd's host", s)
		}
		shares = append(shares, &hostagentv1.HostShare{HostPath: host, GuestPath: guest, ReadOnly: readOnly})
	}
	return shares, nil
}

func (f *createFlags) onTimeout() (hostagentv1.OnTimeout, error) {
	if f.then != "" && f.idle <= 0 {
		return 0, fmt.Errorf("--on-timeout %s: say after which time of inactivity, with --idle", f.then)
	}
	switch f.then {
	case "":
		return hostagentv1.OnTimeout_ON_TIMEOUT_UNSPECIFIED, nil
	case "destroy":
		return hostagentv1.OnTimeout_ON_TIMEOUT_DESTROY, nil
	case "pause":
		return hostagentv1.OnTimeout_ON_TIMEOUT_PAUSE, nil
	case "hibernate":
		return hostagentv1.OnTimeout_ON_TIMEOUT_HIBERNATE, nil
	}
	return 0, fmt.Errorf("--on-timeout %q: want destroy, pause or hibernate", f.then)
}

// megabytes reads a size: a number of MiB, or one with the unit m, g or t.
func megabytes(flag, s string) (int32, error) {
	if s == "" {
		return 0, nil
	}
	number, factor := strings.ToLower(s), int64(1)
	number = strings.TrimSuffix(strings.TrimSuffix(number, "b"), "i")
	switch {
	case strings.HasSuffix(number, "m"):
		number = strings.TrimSuffix(number, "m")
	case strings.HasSuffix(number, "g"):
		number, factor = strings.TrimSuffix(number, "g"), 1024
	case strings.HasSuffix(number, "t"):
		number, factor = strings.TrimSuffix(number, "t"), 1024*1024
	}
	n, err := strconv.ParseInt(number, 10, 32)
	if err != nil || n <= 0 || n*factor >= 1<<31 {
		return 0, fmt.Errorf("%s %q: want a size such as 512, 512m or 2g", flag, s)
	}
	return int32(n * factor), nil
}

// pairs reads KEY=VALUE flags. With getenv, a KEY alone takes the caller's
// value, and is left out when there is none.
func pairs(flag string, in []string, getenv func(string) string) (map[string]string, error) {
	out := map[string]string{}
	for _, s := range in {
		key, value, ok := strings.Cut(s, "=")
		switch {
		case key == "" || !ok && getenv == nil:
			return nil, fmt.Errorf("%s %q: want KEY=VALUE", flag, s)
		case !ok:
			if value = getenv(key); value == "" {
				continue
			}
		}
		out[key] = value
	}
	return out, nil
}

// execFlags are the flags of every command that runs a program.
type execFlags struct {
	interactive bool
	tty         bool
	user        string
	cwd         string
	timeout     time.Duration
}

func (f *execFlags) register(c *cobra.Command) {
	fl := c.Flags()
	fl.BoolVarP(&f.interactive, "interactive", "i", false, "send standard input to the program")
	fl.BoolVarP(&f.tty, "tty", "t", false, "give the program a terminal")
	fl.StringVarP(&f.user, "user", "u", "", "user to run as")
	fl.StringVarP(&f.cwd, "workdir", "w", "", "working directory")
	fl.DurationVar(&f.timeout, "timeout", 0, "kill the program and its children after this time (default never)")
}

func (f *execFlags) session(argv []string, env map[string]string) session {
	return session{
		cmd: argv[0], args: argv[1:], env: env, cwd: f.cwd, user: f.user,
		interactive: f.interactive, tty: f.tty, timeout: f.timeout,
	}
}

// termEnv hands the name of the caller's terminal to a tty session.
func termEnv(env map[string]string, tty bool) map[string]string {
	if name := os.Getenv("TERM"); tty && name != "" && env["TERM"] == "" {
		env["TERM"] = name
	}
	return env
}

// program returns the command line behind a sandbox or template, without the
// "--" that may set it off.
func program(args []string) []string {
	if len(args) > 0 && args[0] == "--" {
		return args[1:]
	}
	return args
}
