package recipe

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
)

// debian returns the maker of a Debian system of the host's own release, with
// the essential packages, apt, and the given ones.
func debian(more ...string) func(context.Context, *kitchen) (*Rootfs, error) {
	return func(ctx context.Context, k *kitchen) (*Rootfs, error) { return k.bootstrap(ctx, more) }
}

// basics are in every Debian made here: certificates for TLS, and what people
// and programs look for first in a machine.
func basics() []string { return []string{"ca-certificates", "iproute2", "procps"} }

// bootstrap runs mmdebstrap and cleans what it makes.
func (k *kitchen) bootstrap(ctx context.Context, more []string) (*Rootfs, error) {
	id, codename, err := osRelease()
	if err != nil {
		return nil, err
	}
	if id != "debian" || codename == "" {
		return nil, fault.New(fault.Precondition, "this recipe is made from the host's own Debian archive, and the host is %q; pull or import an image instead", id)
	}
	if err := needRoot("making a Debian system"); err != nil {
		return nil, err
	}
	list, err := k.targets(ctx, codename)
	if err != nil {
		return nil, err
	}
	if err := k.checkPython(ctx, more); err != nil {
		return nil, err
	}
	if err := k.ensureMmdebstrap(ctx); err != nil {
		return nil, err
	}
	opts, err := k.acquireOptions(ctx)
	if err != nil {
		return nil, err
	}
	src, out, tmp := filepath.Join(k.Work, "host.sources"), filepath.Join(k.Work, "debian.tar"), filepath.Join(k.Work, "tmp")
	if err := errors.Join(os.WriteFile(src, []byte(sources(list, false)), 0o600), os.Mkdir(tmp, 0o755)); err != nil {
		return nil, fmt.Errorf("prepare mmdebstrap: %w", err)
	}
	args := []string{"--variant=minbase", "--format=tar", "--include=" + strings.Join(append(basics(), more...), ",")}
	for _, o := range opts {
		args = append(args, "--aptopt="+o)
	}
	for _, p := range []string{"/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/doc/*"} {
		args = append(args, "--dpkgopt=path-exclude="+p)
	}
	// Nothing here has to outlive a crash of the host before the tar is there.
	args = append(args, "--dpkgopt=path-include=/usr/share/doc/*/copyright", "--dpkgopt=force-unsafe-io", codename, out, src)
	began := time.Now().Truncate(time.Second)
	k.step("making Debian " + codename)
	// In a mount namespace of its own, nothing that it mounts into its tree can
	// be reached when that tree is removed, not even after a kill.
	_, err = k.run.output(ctx, command{name: "mmdebstrap", args: args, dir: k.Work, env: []string{"TMPDIR=" + tmp}, private: true, line: k.step})
	if err != nil {
		return nil, archiveError(err)
	}
	return clean(out, began, sources(list, true))
}

// checkPython makes sure that python311 is what it says.
func (k *kitchen) checkPython(ctx context.Context, more []string) error {
	if len(more) == 0 {
		return nil
	}
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

// dropped matches what an image is better without: caches and lists that apt
// makes anew, logs and locks of the build, backups, the host's identity, and
// what mmdebstrap needed for itself.
var dropped = regexp.MustCompile(`^(` + strings.Join([]string{
	`dev/.*`, `run/.*`, `tmp/.*`, `var/tmp/.*`, `proc/.*`, `sys/.*`,
	`var/cache/apt/.*`, `var/lib/apt/lists/.*`, `var/cache/ldconfig/.*`, `var/cache/debconf/.*-old`, `var/lib/dpkg/[^/]*-old`,
	`var/log/.*`, `var/lib/dpkg/lock.*`, `var/lib/dpkg/triggers/Lock`, `var/lib/dbus/machine-id`, `var/lib/systemd/random-seed`,
	`etc/(passwd|group|shadow|gshadow|subuid|subgid)-`, `etc/\.pwd\.lock`, `etc/resolv\.conf`, `etc/hostname`, `etc/hosts`,
	`etc/apt/sources\.list(\.d/.*)?`, `etc/apt/apt\.conf\.d/99mmdebstrap`, `etc/dpkg/dpkg\.cfg\.d/99mmdebstrap`,
	`usr/share/(man|info|lintian|linda)/.*`, `usr/share/locale/.*`, `usr/share/doc/.*`,
	`root/\.(bash_history|python_history)`,
}, "|") + `)$`)

// kept matches what dropped must not take.
var kept = regexp.MustCompile(`^(usr/share/doc/[^/]+(/copyright)?|usr/share/locale/locale\.alias)$`)

// clean passes a bootstrapped tar on without what dropped names, with the files
// changed that the build wrote its day or its host into. The tar stays open
// until Close.
func clean(file string, began time.Time, aptSources string) (*Rootfs, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("open what mmdebstrap made: %w", err)
	}
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		pw.CloseWithError(cleanTar(f, pw, began, aptSources))
	}()
	return &Rootfs{Tar: pr, Clamp: began, close: func() error {
		pr.CloseWithError(io.ErrClosedPipe) // a reader that gave up must not hold the writer
		<-done
		return f.Close()
	}}, nil
}

func cleanTar(r io.Reader, w io.Writer, began time.Time, aptSources string) error {
	tr, tw := tar.NewReader(r), tar.NewWriter(w)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read what mmdebstrap made: %w", err)
		}
		name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
		if dropped.MatchString(name) && !kept.MatchString(name) && (h.Typeflag != tar.TypeDir || inside.MatchString(name)) {
			continue
		}
		if change := changes(name); change != nil && h.Typeflag == tar.TypeReg {
			b, err := io.ReadAll(io.LimitReader(tr, 1<<20))
			if err != nil {
				return fmt.Errorf("read %s: %w", name, err)
			}
			if err := writeText(tw, h, change(string(b))); err != nil {
				return err
			}
			continue
		}
		if err := tw.WriteHeader(h); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		if _, err := io.Copy(tw, tr); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	added := tar.Header{Name: "./etc/apt/sources.list.d/debian.sources", Typeflag: tar.TypeReg, Mode: 0o644, ModTime: began}
	if err := writeText(tw, &added, aptSources); err != nil {
		return err
	}
	home := tar.Header{Name: "./home/" + userName + "/", Typeflag: tar.TypeDir, Mode: 0o755, Uid: userID, Gid: userID, ModTime: began}
	if err := tw.WriteHeader(&home); err != nil {
		return fmt.Errorf("write %s: %w", home.Name, err)
	}
	return tw.Close()
}

// inside matches directories that go with their contents; of the others dropped
// takes only the files, for programs expect the directories.
var inside = regexp.MustCompile(`^(dev|run|tmp|var/tmp|proc|sys|usr/share/(man|info|lintian|linda)|usr/share/locale|usr/share/doc/[^/]+)/`)

func writeText(tw *tar.Writer, h *tar.Header, text string) error {
	h.Size = int64(len(text))
	if err := tw.WriteHeader(h); err != nil {
		return fmt.Errorf("write %s: %w", h.Name, err)
	}
	if _, err := io.WriteString(tw, text); err != nil {
		return fmt.Errorf("write %s: %w", h.Name, err)
	}
	return nil
}

// changes returns what becomes of a file, nil if it stays as it is.
func changes(name string) func(string) string {
	add := func(line string) func(string) string {
		return func(s string) string { return strings.TrimRight(s, "\n") + "\n" + line + "\n" }
	}
	switch name {
	case "etc/machine-id":
		return func(string) string { return "" } // set at the first start
	case "etc/passwd":
		return add("user:x:1000:1000::/home/user:/bin/bash")
	case "etc/group":
		return add("user:x:1000:")
	case "etc/gshadow":
		return add("user:!::")
	case "etc/shadow":
		return func(s string) string {
			// The third field is the day of the build.
			return add("user:!:19000:0:99999:7:::")(shadowDay.ReplaceAllString(s, "${1}19000${2}"))
		}
	}
	return nil
}

var shadowDay = regexp.MustCompile(`(?m)^([^:\n]*:[^:\n]*:)\d+(:.*)$`)
