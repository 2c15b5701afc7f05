package recipe

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"
	"strings"
	"time"
)

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
// changed that the build wrote its day or its host into, and with additions.
// The tar stays open until Close.
func clean(file string, began time.Time, more additions) (*Rootfs, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("open what mmdebstrap made: %w", err)
	}
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		pw.CloseWithError(cleanTar(f, pw, began, more))
	}()
	return &Rootfs{Tar: pr, Clamp: began, close: func() error {
		pr.CloseWithError(io.ErrClosedPipe) // a reader that gave up must not hold the writer
		<-done
		return f.Close()
	}}, nil
}

func cleanTar(r io.Reader, w io.Writer, began time.Time, more additions) error {
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
		if dropped.MatchString(name) && !kept.MatchString(name) && (h.Typeflag != tar.TypeDir || inside.MatchString(name)) || more.replaces(name, h) {
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
	home := tar.Header{Name: "./home/" + userName + "/", Typeflag: tar.TypeDir, Mode: 0o755, Uid: userID, Gid: userID, ModTime: began}
	if err := tw.WriteHeader(&home); err != nil {
		return fmt.Errorf("write %s: %w", home.Name, err)
	}
	if err := more.write(tw, began); err != nil {
		return err
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
