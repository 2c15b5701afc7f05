package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/hutch-run/hutch/internal/fault"
)

// Kind says how to read a path or a stream.
type Kind string

// The kinds. Auto tells them apart by what they hold.
const (
	Auto       Kind = ""
	OCI        Kind = "oci"         // OCI layout: a directory, or a tar of one
	DockerSave Kind = "docker-save" // what docker save, podman save and others write
	RootTar    Kind = "tar"         // a tar of a root filesystem; names in ".wh." are whiteouts here too, and left out
)

// Source is what an image is made from: exactly one of Ref, Path and Stream.
type Source struct {
	// Ref is a reference in a registry: "debian:12", "ghcr.io/a/b@sha256:...".
	Ref string
	// Path is an OCI layout directory or a file: a layout or docker save
	// archive, or a root tar, each plain or packed with gzip, zstd or xz.
	Path string
	// Stream is such a file as it comes in. Build reads it to its end and does
	// not close it. A build whose context ends returns at the next Read that
	// does; close the stream's other end to make that soon.
	Stream io.Reader
	// Label is what the manifest gives as the source of a Stream; "import" if
	// empty. For the others it overrides the reference or path.
	Label string
	// Kind is the format of Path or Stream.
	Kind Kind
	// Image chooses one image of a layout or archive that holds several, by its
	// name in there ("app:1.0"), or by digest.
	Image string
	// Platform is "os/arch" or "os/arch/variant"; that of this host if empty.
	Platform string
	// DockerConfig is the content of a docker config.json; only the credentials
	// written in it are used, credential helpers never. Nil means the usual
	// files and helpers of the user that runs this process.
	DockerConfig []byte
	// PlainHTTP lists registries ("host:port") that may be spoken to without
	// TLS. Those on this host's loopback always may.
	PlainHTTP []string
	// Insecure is PlainHTTP for the registry of Ref.
	Insecure bool
	// DropDevices leaves device nodes below dev/ out instead of refusing them,
	// for tars of debootstrap and its like.
	DropDevices bool
	// Config overrides what the source says, for sources that say nothing (root
	// tars). It is used as it is when not nil.
	Config *Config
	// Clamp, when set, takes files that are not older for made by the build of
	// the source, and gives them the time of the newest one that is older, so
	// that the same packages give the same image whenever they are installed.
	Clamp time.Time
	// Stall is how long a registry may send nothing before the transfer is
	// tried again or given up (default a minute).
	Stall time.Duration
}

func (s Source) stall() time.Duration {
	if s.Stall > 0 {
		return s.Stall
	}
	return stallTime
}

// String names the source for people.
func (s Source) String() string {
	switch {
	case s.Label != "":
		return s.Label
	case s.Ref != "":
		return s.Ref
	case s.Path != "":
		return s.Path
	}
	return "import"
}

func (s Source) check() error {
	n := 0
	for _, given := range []bool{s.Ref != "", s.Path != "", s.Stream != nil} {
		if given {
			n++
		}
	}
	if n != 1 {
		return fault.BadField("source", "give one of a reference, a path and a stream")
	}
	switch s.Kind {
	case Auto, OCI, DockerSave, RootTar:
	default:
		return fault.BadField("kind", "%q is none of %s, %s and %s", s.Kind, OCI, DockerSave, RootTar)
	}
	return nil
}

// opened is a source whose manifests were read: its layers bottom up.
type opened struct {
	layers   []layer
	config   Config
	platform string
	strict   bool // layers without digests: their end mark has to be there
	close    func() error
}

// open reads what there is to read before the layers. dir is for what has to
// be put down to be read at all.
func (s Source) open(ctx context.Context, dir string, lim Limits, progress Progress) (*opened, error) {
	want, err := parsePlatform(s.Platform)
	if err != nil {
		return nil, err
	}
	if s.Ref != "" {
		return openRegistry(ctx, s, want, lim, progress)
	}
	if s.Stream != nil {
		return openStream(ctx, s, streamParams{r: s.Stream, dir: dir, want: want, lim: lim, progress: progress})
	}
	fi, err := os.Stat(s.Path)
	if err != nil {
		if os.IsNotExist(err) {
			return nil, fault.New(fault.NotFound, "there is no file or directory %s on this host", s.Path)
		}
		return nil, fmt.Errorf("open source: %w", err)
	}
	if fi.IsDir() {
		if s.Kind != Auto && s.Kind != OCI {
			return nil, fault.BadField("kind", "%s is a directory, only an OCI layout can be one", s.Path)
		}
		return openLayoutDir(ctx, s, want, lim)
	}
	// Not blocking, should it be a pipe: nobody may ever open the other end.
	f, err := os.OpenFile(s.Path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open source: %w", err)
	}
	if fi, err = f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, errors.Join(fault.New(fault.Invalid, "%s is neither a regular file nor a directory", s.Path), err, f.Close())
	}
	o, err := openStream(ctx, s, streamParams{r: f, file: f, size: fi.Size(), dir: dir, want: want, lim: lim, progress: progress})
	if err != nil {
		_ = f.Close() // only read
		return nil, err
	}
	inner := o.close
	o.close = func() error {
		if inner != nil {
			_ = inner()
		}
		return f.Close()
	}
	return o, nil
}

// parsePlatform reads "os/arch[/variant]".
func parsePlatform(s string) (v1.Platform, error) {
	if s == "" {
		return v1.Platform{OS: "linux", Architecture: runtime.GOARCH}, nil
	}
	parts := strings.Split(s, "/")
	if len(parts) < 2 || len(parts) > 3 || parts[0] == "" || parts[1] == "" {
		return v1.Platform{}, fault.BadField("platform", "%q is no platform: want os/arch or os/arch/variant, like linux/amd64", s)
	}
	p := v1.Platform{OS: parts[0], Architecture: parts[1]}
	if len(parts) == 3 {
		p.Variant = parts[2]
	}
	if p.OS != "linux" {
		return v1.Platform{}, fault.BadField("platform", "%q: only linux images can run here", s)
	}
	return p, nil
}

// platformName writes p as parsePlatform reads it.
func platformName(p v1.Platform) string {
	if p.OS == "" && p.Architecture == "" {
		return ""
	}
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// matches reports whether an image for have runs where want is asked for. A
// variant counts only when both name one; v8 is what arm64 means without.
func matches(have, want v1.Platform) bool {
	if have.OS != want.OS || have.Architecture != want.Architecture {
		return false
	}
	norm := func(p v1.Platform) string {
		if p.Architecture == "arm64" && p.Variant == "v8" {
			return ""
		}
		return p.Variant
	}
	return norm(want) == "" || norm(have) == "" || norm(have) == norm(want)
}
