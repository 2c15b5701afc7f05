package kubernetes

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// DistributionFile describes the distribution that an image brings.
const DistributionFile = "/usr/lib/hutch/kubernetes.json"

// formatVersion is the version of DistributionFile that this package reads.
const formatVersion = 1

// maxDistributionFile bounds what is read of it.
const maxDistributionFile = 1 << 20

// Distribution is one way to have a cluster: what runs, how it tells that it
// is up, what it leaves behind. It is the content of DistributionFile.
type Distribution struct {
	Version int    `json:"version"` // formatVersion
	Name    string `json:"name"`
	Release string `json:"release"` // for people
	// Command stays in the foreground. Its log is what it writes to its standard
	// streams.
	Command []string `json:"command"`
	Env     []string `json:"env"` // KEY=VALUE, over PATH and HOME
	// Needs names the units that must be ready before: "containerd" or nothing.
	Needs []string `json:"needs"`
	// Modules of the kernel, loaded before. One that can't be is no error.
	Modules []string `json:"modules"`
	// Sysctls are set before, by their names with dots. Nor is that an error.
	Sysctls map[string]string `json:"sysctls"`
	// Data are the directories that hold its state. A start makes them, a
	// delete empties them.
	Data []string `json:"data"`
	// Files are further ones that a delete removes.
	Files      []string `json:"files"`
	Kubeconfig string   `json:"kubeconfig"` // with its certificates inside
	Context    string   `json:"context"`    // name of the context in it
	API        Access   `json:"api"`
	// Components that answer for themselves. All must be well for the node to
	// be ready.
	Components []Component `json:"components"`
	Ready      Ready       `json:"ready"`
	Stop       Stop        `json:"stop"`
	// Reset removes what outlives Command. It runs once that has ended.
	Reset     Reset     `json:"reset"`
	Leftovers Leftovers `json:"leftovers"`
}

// Access is how to reach the API as an administrator. The files are PEM.
type Access struct {
	URL    string `json:"url"`
	Readyz string `json:"readyz"` // the path that answers when it is ready; empty: "/readyz"
	CA     string `json:"ca"`
	Cert   string `json:"cert"`
	Key    string `json:"key"`
}

// Component is a part that answers a GET with 200 when it is well. A URL below
// that of the API is asked with the administrator's rights.
type Component struct {
	Name string `json:"name"`
	URL  string `json:"url"`
	// Insecure: it has made its certificate itself. Only for loopback.
	Insecure bool `json:"insecure"`
}

// Ready is what proves that pods can run, beside the components' own word.
type Ready struct {
	// Node is the name of the one node, which must be Ready and have no taint that
	// keeps pods away. It is the same in every guest.
	Node string `json:"node"`
	// Deployments must have a pod that serves, "NAMESPACE/NAME".
	Deployments []string `json:"deployments"`
	// DNS must answer. Asked at the address of its Service, it proves that those
	// work. Nil: there is none.
	DNS *Question `json:"dns"`
}

// Question is a question for an address, put to a server by UDP.
type Question struct {
	Server string `json:"server"` // address:port
	Name   string `json:"name"`
}

// Stop says how Command is asked to end, and how long it may take.
type Stop struct {
	Signal  string `json:"signal"` // "TERM", "INT" or "QUIT"
	Timeout int    `json:"timeout_seconds"`
}

// Reset is a program with a limit of its time.
type Reset struct {
	Command []string `json:"command"`
	Timeout int      `json:"timeout_seconds"`
}

// Leftovers name what a cluster leaves when it ends badly.
type Leftovers struct {
	Cgroups        []string `json:"cgroups"`         // at the top, with all that runs in them
	ShimNamespaces []string `json:"shim_namespaces"` // of containerd, whose shims outlive it
	Mounts         []string `json:"mounts"`          // directories, below which everything goes
	Netns          string   `json:"netns"`           // what the names of network namespaces begin with
	Interfaces     []string `json:"interfaces"`
	Chains         []string `json:"chains"` // of nf_tables: what their names begin with
	Tables         []string `json:"tables"` // of nf_tables
}

// Find returns the distribution that the image below root brings: the one that
// it describes, else k3s where that is installed.
func Find(root string) (Distribution, error) {
	path := filepath.Join(root, DistributionFile)
	b, err := readBounded(path, maxDistributionFile)
	switch {
	case err == nil:
		d, err := parseDistribution(b)
		if err != nil {
			return Distribution{}, fault.New(fault.Precondition, "read %s: %w", DistributionFile, err)
		}
		return d, nil
	case !errors.Is(err, fs.ErrNotExist):
		return Distribution{}, fault.New(fault.Precondition, "read %s: %w", DistributionFile, err)
	}
	for _, dir := range []string{"/usr/local/bin", "/usr/bin", "/opt/bin"} {
		binary := dir + "/k3s"
		if fi, err := os.Stat(filepath.Join(root, binary)); err == nil && fi.Mode()&0o111 != 0 && fi.Mode().IsRegular() {
			return k3s(binary), nil
		}
	}
	return Distribution{}, fault.New(fault.Precondition,
		"this image brings no Kubernetes: make the sandbox from the template kubernetes (hutch template build kubernetes)")
}

func readBounded(path string, limit int64) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > limit {
		return nil, fmt.Errorf("%s is no file of at most %d bytes", path, limit)
	}
	return os.ReadFile(path)
}

func parseDistribution(b []byte) (Distribution, error) {
	var version struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &version); err != nil {
		return Distribution{}, err
	}
	if version.Version != formatVersion {
		return Distribution{}, fmt.Errorf("its version is %d, this hutch-agent reads version %d", version.Version, formatVersion)
	}
	var d Distribution
	decoder := json.NewDecoder(bytes.NewReader(b))
	decoder.DisallowUnknownFields() // a misspelt key would be found out by a cluster that leaves things behind
	if err := decoder.Decode(&d); err != nil {
		return Distribution{}, err
	}
	if d.API.Readyz == "" {
		d.API.Readyz = "/readyz"
	}
	return d, d.check()
}

// check refuses what can't work, and what would wipe the machine by mistake.
func (d Distribution) check() error {
	var errs []error
	bad := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	bad(d.Name != "", "name is missing")
	bad(len(d.Command) > 0 && filepath.IsAbs(d.Command[0]), "command must begin with an absolute path")
	bad(len(d.Reset.Command) == 0 || filepath.IsAbs(d.Reset.Command[0]), "reset.command must begin with an absolute path")
	bad(d.Stop.Timeout >= 0 && d.Reset.Timeout >= 0, "timeout_seconds can't be negative")
	bad(d.Ready.Node != "", "ready.node is missing")
	for _, need := range d.Needs {
		bad(need == "containerd", "needs: unit %q is not known", need)
	}
	for _, e := range d.Env {
		bad(strings.Contains(e, "="), "env: %q is not KEY=VALUE", e)
	}
	for _, path := range slices.Concat(d.Data, d.Files, d.Leftovers.Mounts) {
		bad(filepath.Clean(path) == path && strings.Count(path, "/") >= 2 && path[0] == '/', "%q must be absolute, clean, and not at the top", path)
	}
	for _, name := range d.Leftovers.Cgroups {
		bad(name != "" && name != "." && name != ".." && name != "agent" && !strings.HasPrefix(name, "hutch") && !strings.Contains(name, "/"), "leftovers.cgroups: %q can't go", name)
	}
	bad(d.Leftovers.Netns == "" || strings.HasPrefix(d.Leftovers.Netns, "/run/netns/"), "leftovers.netns must begin with /run/netns/")
	for _, name := range d.Ready.Deployments {
		bad(strings.Count(name, "/") == 1, "ready.deployments: %q is not NAMESPACE/NAME", name)
	}
	if q := d.Ready.DNS; q != nil {
		_, err := netip.ParseAddrPort(q.Server)
		bad(err == nil && q.Name != "", "ready.dns: %q is no address with a port, or the name is missing", q.Server)
	}
	for key := range d.Sysctls {
		bad(!strings.Contains(key, "/"), "sysctls: %q is not a name with dots", key)
	}
	_, ok := d.Stop.signal()
	bad(ok, "stop.signal: %q is not TERM, INT or QUIT", d.Stop.Signal)
	for _, u := range append([]string{d.API.URL}, d.urls()...) {
		parsed, err := url.Parse(u)
		bad(err == nil && (parsed.Scheme == "https" || parsed.Scheme == "http") && parsed.Host != "", "%q is no URL", u)
	}
	for _, file := range []string{d.Kubeconfig, d.API.CA, d.API.Cert, d.API.Key} {
		bad(filepath.IsAbs(file), "kubeconfig and the files of api must be absolute paths, not %q", file)
	}
	return errors.Join(errs...)
}

func (d Distribution) urls() []string {
	var all []string
	for _, c := range d.Components {
		all = append(all, c.URL)
	}
	return all
}

func (s Stop) signal() (unix.Signal, bool) {
	switch s.Signal {
	case "", "TERM":
		return unix.SIGTERM, true
	case "INT":
		return unix.SIGINT, true
	case "QUIT":
		return unix.SIGQUIT, true
	}
	return 0, false
}

// seconds returns n seconds, or otherwise where n is not given.
func seconds(n int, otherwise time.Duration) time.Duration {
	if n == 0 {
		return otherwise
	}
	return time.Duration(n) * time.Second
}
