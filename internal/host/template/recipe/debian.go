package recipe

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
)

// system is a Debian system of the host's own release: the essential packages,
// apt, and some more.
type system struct {
	packages []string
	// check tells whether the host's archive has what is wanted. May be nil.
	check func(context.Context, *kitchen) error
	// without matches files that are left out besides those that dropped names.
	// May be nil.
	without *regexp.Regexp
	// extras is what no package brings. It is asked first, for a build takes
	// minutes. May be nil.
	extras func(*kitchen) ([]extra, error)
}

// basics are in every Debian made here: certificates for TLS, and what people
// and programs look for first in a machine.
func basics() []string { return []string{"ca-certificates", "iproute2", "procps"} }

// make runs mmdebstrap and cleans what it makes.
func (s system) make(ctx context.Context, k *kitchen) (*Rootfs, error) {
	more := additions{without: s.without}
	if s.extras != nil {
		var err error
		if more.extras, err = s.extras(k); err != nil {
			return nil, err
		}
	}
	codename, list, err := s.archive(ctx, k)
	if err != nil {
		return nil, err
	}
	more.sources = sources(list, true)
	out := filepath.Join(k.Work, "debian.tar")
	began := time.Now().Truncate(time.Second)
	if err := s.bootstrap(ctx, k, codename, list, out); err != nil {
		return nil, err
	}
	return clean(out, began, more)
}

// archive finds what the system is made from, and what makes it.
func (s system) archive(ctx context.Context, k *kitchen) (codename string, list []target, err error) {
	id, codename, err := osRelease()
	if err != nil {
		return "", nil, err
	}
	if id != "debian" || codename == "" {
		return "", nil, fault.New(fault.Precondition, "this recipe is made from the host's own Debian archive, and the host is %q; pull or import an image instead", id)
	}
	if err := needRoot("making a Debian system"); err != nil {
		return "", nil, err
	}
	if list, err = k.targets(ctx, codename); err != nil {
		return "", nil, err
	}
	if s.check != nil {
		if err := s.check(ctx, k); err != nil {
			return "", nil, err
		}
	}
	return codename, list, k.ensureMmdebstrap(ctx)
}

func (s system) bootstrap(ctx context.Context, k *kitchen, codename string, list []target, out string) error {
	opts, err := k.acquireOptions(ctx)
	if err != nil {
		return err
	}
	src, tmp := filepath.Join(k.Work, "host.sources"), filepath.Join(k.Work, "tmp")
	if err := errors.Join(os.WriteFile(src, []byte(sources(list, false)), 0o600), os.Mkdir(tmp, 0o755)); err != nil {
		return fmt.Errorf("prepare mmdebstrap: %w", err)
	}
	args := []string{"--variant=minbase", "--format=tar", "--include=" + strings.Join(append(basics(), s.packages...), ",")}
	for _, o := range opts {
		args = append(args, "--aptopt="+o)
	}
	for _, p := range []string{"/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/doc/*"} {
		args = append(args, "--dpkgopt=path-exclude="+p)
	}
	// Nothing here has to outlive a crash of the host before the tar is there.
	args = append(args, "--dpkgopt=path-include=/usr/share/doc/*/copyright", "--dpkgopt=force-unsafe-io", codename, out, src)
	k.step("making Debian " + codename)
	// In a mount namespace of its own, nothing that it mounts into its tree can
	// be reached when that tree is removed, not even after a kill.
	_, err = k.run.output(ctx, command{name: "mmdebstrap", args: args, dir: k.Work, env: []string{"TMPDIR=" + tmp}, private: true, line: k.step})
	return archiveError(err)
}

// checkPython makes sure that python311 is what it says.
func checkPython(ctx context.Context, k *kitchen) error {
	out, err := k.run.output(ctx, command{name: "apt-cache", args: []string{"policy", "python3"}})
	if err != nil {
		return err
	}
	for _, l := range lines(out) {
		if v, ok := strings.CutPrefix(l, "Candidate: "); ok && !strings.HasPrefix(v, "3.11.") {
			return fault.New(fault.Precondition, "this host's Debian has Python %s, not 3.11; pull or import an image instead", v)
		}
	}
	return nil
}

func (k *kitchen) ensureMmdebstrap(ctx context.Context) error {
	if _, err := exec.LookPath("mmdebstrap"); err == nil {
		return nil
	}
	k.step("installing mmdebstrap")
	_, err := k.run.output(ctx, command{
		name: "apt-get", args: []string{"-q", "-y", "-o", "DPkg::Lock::Timeout=120", "--no-install-recommends", "install", "mmdebstrap"}, line: k.step,
	})
	return archiveError(err)
}
