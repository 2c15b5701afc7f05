package recipe

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/hutch-run/hutch/internal/fault"
)

// target is one index of the host's apt sources.
type target struct {
	uri, release, component string
}

// osRelease reads the facts of the host's /etc/os-release.
func osRelease() (id, codename string, err error) {
	b, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", "", fault.New(fault.Precondition, "this host does not say what it is: %w", err)
	}
	for _, l := range lines(b) {
		k, v, _ := strings.Cut(l, "=")
		switch v = strings.Trim(v, `"'`); k {
		case "ID":
			id = v
		case "VERSION_CODENAME":
			codename = v
		}
	}
	return id, codename, nil
}

// targets asks apt for the indexes of Debian's archive that the host uses: apt
// itself reads its configuration best. It fetches the lists if there are none.
func (k *kitchen) targets(ctx context.Context, codename string) ([]target, error) {
	list, err := k.readTargets(ctx, codename)
	if err != nil || len(list) > 0 {
		return list, err
	}
	if err := k.update(ctx); err != nil {
		return nil, err
	}
	list, err = k.readTargets(ctx, codename)
	if err == nil && len(list) == 0 {
		err = fault.New(fault.Precondition, "the apt sources of this host have nothing of Debian's %s", codename)
	}
	return list, err
}

func (k *kitchen) readTargets(ctx context.Context, codename string) ([]target, error) {
	out, err := k.run.output(ctx, command{name: "apt-get", args: []string{
		"indextargets", "--format", "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)", "Created-By: Packages",
	}})
	if err != nil {
		return nil, err
	}
	var list []target
	for _, l := range lines(out) {
		f := strings.Split(l, "|")
		if len(f) != 4 || f[0] != "Debian" || f[2] != codename && !strings.HasPrefix(f[2], codename+"-") {
			continue
		}
		t := target{uri: f[1], release: f[2], component: f[3]}
		if !slices.Contains(list, t) { // once, not once for each architecture
			list = append(list, t)
		}
	}
	return list, nil
}

// update fetches the package lists.
func (k *kitchen) update(ctx context.Context) error {
	if err := needRoot("fetching the package lists (apt-get update)"); err != nil {
		return err
	}
	k.step("fetching package lists")
	_, err := k.run.output(ctx, command{name: "apt-get", args: []string{"-q", "update"}, line: k.step})
	return archiveError(err)
}

// download fetches packages into the work directory and returns their files,
// sorted. If that fails the package lists may be missing or too old for the
// archive; then they are fetched, and the packages tried once more.
func (k *kitchen) download(ctx context.Context, names ...string) ([]string, error) {
	dir, err := os.MkdirTemp(k.Work, "debs-*")
	if err != nil {
		return nil, fmt.Errorf("make a download directory: %w", err)
	}
	args := []string{"-q", "download"}
	if os.Geteuid() == 0 {
		args = append([]string{"-o", "APT::Sandbox::User=root"}, args...) // apt's own user cannot write here
	}
	fetch := command{name: "apt-get", args: append(args, names...), dir: dir, line: k.step}
	k.step("fetching " + strings.Join(names, ", "))
	if _, err := k.run.output(ctx, fetch); err != nil {
		if ctx.Err() != nil || os.Geteuid() != 0 {
			return nil, archiveError(err)
		}
		if err := k.update(ctx); err != nil {
			return nil, err
		}
		if _, err := k.run.output(ctx, fetch); err != nil {
			return nil, archiveError(err)
		}
	}
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return nil, err
	}
	if len(debs) < len(names) {
		return nil, fmt.Errorf("apt-get download fetched %d packages of %d", len(debs), len(names))
	}
	slices.Sort(debs)
	return debs, nil
}

// archiveError tells an archive that cannot be reached from other failures of
// apt, by what apt writes.
func archiveError(err error) error {
	if err != nil && unreachable.MatchString(err.Error()) {
		return fault.New(fault.Unavailable, "the Debian archive cannot be reached with this host's apt configuration: %w", err)
	}
	return err
}

var unreachable = regexp.MustCompile(`(?i)could not resolve|temporary failure resolving|could not connect|connection (failed|timed out|refused)|unable to fetch|failed to` + ` fetch`)

// sources writes targets as a deb822 sources file. Credentials in addresses
// stay out when the file is for an image.
func sources(list []target, forImage bool) string {
	type key struct{ uri, release string }
	var order []key
	comps := map[key][]string{}
	for _, t := range list {
		uri := t.uri
		if u, err := url.Parse(uri); err == nil && forImage {
			u.User = nil
			uri = u.String()
		}
		k := key{uri, t.release}
		if comps[k] == nil {
			order = append(order, k)
		}
		comps[k] = append(comps[k], t.component)
	}
	var b strings.Builder
	for i, k := range order {
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "Types: deb\nURIs: %s\nSuites: %s\nComponents: %s\nSigned-By: %s\n",
			k.uri, k.release, strings.Join(comps[k], " "), keyring)
	}
	return b.String()
}

// keyring is where Debian's package debian-archive-keyring puts the keys.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// acquireOptions returns the host's settings of how apt reaches archives, for
// a tool that starts from an empty configuration.
func (k *kitchen) acquireOptions(ctx context.Context) ([]string, error) {
	out, err := k.run.output(ctx, command{name: "apt-config", args: []string{"dump", "Acquire"}})
	if err != nil {
		return nil, err
	}
	var opts []string
	for _, l := range lines(out) {
		if reach.MatchString(l) {
			opts = append(opts, l)
		}
	}
	return opts, nil
}

var reach = regexp.MustCompile(`^Acquire::(?:(?:https?|ftp)::.*|Check-Valid-Until|Check-Date|Max-FutureTime|Retries|ForceIPv[46]) "[^"\\]+";$`)
