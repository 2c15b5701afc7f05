package recipe

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
)

// minimal puts a root filesystem together from busybox (the dynamic one: the
// static one's wget crashes in name resolution), the C library with the other
// libraries that nearly every program wants, and the certificates of the public
// authorities. Nothing of the packages is run: what their scripts would do
// (applet links, accounts, the certificate bundle) is done here.
func minimal(ctx context.Context, k *kitchen) (*Rootfs, error) {
	debs, err := k.download(ctx, "busybox", "libc6", "libcrypt1", "libgcc-s1", "ca-certificates", "base-files")
	if err != nil {
		return nil, err
	}
	t := newRoot()
	extra := ""
	for _, deb := range debs {
		control, err := readDeb(deb, t.unpack)
		if err != nil {
			return nil, err
		}
		if m := gccBase.FindString(control["Depends"]); m != "" {
			extra = m // it holds the licence of libgcc-s1
		}
	}
	if extra != "" {
		more, err := k.download(ctx, extra)
		if err != nil {
			return nil, err
		}
		if _, err := readDeb(more[0], t.unpack); err != nil {
			return nil, err
		}
	}
	k.step("putting minimal together")
	if err := t.finish(); err != nil {
		return nil, err
	}
	b, err := t.tar()
	if err != nil {
		return nil, err
	}
	return &Rootfs{Tar: bytes.NewReader(b)}, nil
}

var gccBase = regexp.MustCompile(`gcc-\d+-base`)

// root is a root filesystem in memory; minimal is a few MB.
type root struct {
	files  map[string]rootFile // by clean path, "etc/passwd"
	certs  map[string][]byte
	newest time.Time // of all files in the packages
}

type rootFile struct {
	h    tar.Header
	body []byte
}

func newRoot() *root { return &root{files: map[string]rootFile{}, certs: map[string][]byte{}} }

// mostFile bounds one file of a package; libc is 2 MB.
const mostFile = 64 << 20

// left matches what minimal leaves out of its packages: what only their
// scripts, other programs or readers of documentation would look at.
var left = regexp.MustCompile(`^(` + strings.Join([]string{
	`usr/lib/[^/]+/(gconv|audit)(/.*)?`, `usr/share/(initramfs-tools|lintian|man|base-files|debianutils|bug|locale)(/.*)?`,
	`usr/share/doc/[^/]+/(.*/)?[^/]*`, `usr/(games|include|local/games|src)(/.*)?`,
	`etc/(update-motd\.d|ca-certificates|dpkg|skel|default)(/.*)?`, `usr/sbin/update-ca-certificates`,
	`usr/lib/[^/]+/lib(BrokenLocale|_malloc_debug|c_malloc_debug|memusage|pcprofile|thread_db|nss_hesiod)\..*`,
	`usr/share/(dict|info|misc|sounds|pixmaps)(/.*)?`, `var/(backups|local|mail|opt|spool)(/.*)?`,
}, "|") + `)$`)

var copyright = regexp.MustCompile(`^usr/share/doc/[^/]+/copyright$`)

// unpack takes one entry of a package.
func (t *root) unpack(h *tar.Header, r io.Reader) error {
	name := merged(strings.TrimPrefix(path.Clean("/"+h.Name), "/"))
	if h.ModTime.After(t.newest) {
		t.newest = h.ModTime
	}
	if cert := strings.HasPrefix(name, "usr/share/ca-certificates/"); cert && h.Typeflag == tar.TypeReg {
		b, err := io.ReadAll(io.LimitReader(r, 1<<20))
		t.certs[name] = b
		return err
	} else if cert || name == "" || left.MatchString(name) && !copyright.MatchString(name) {
		return nil
	}
	f := rootFile{h: tar.Header{
		Typeflag: h.Typeflag, Name: name, Linkname: h.Linkname, Mode: h.Mode, Uid: h.Uid, Gid: h.Gid, ModTime: h.ModTime, Format: tar.FormatPAX,
	}}
	switch h.Typeflag {
	case tar.TypeReg:
		b, err := io.ReadAll(io.LimitReader(r, mostFile))
		if err != nil {
			return err
		}
		f.body, f.h.Size = b, int64(len(b))
	case tar.TypeDir, tar.TypeSymlink:
	case tar.TypeLink:
		f.h.Linkname = merged(strings.TrimPrefix(path.Clean("/"+h.Linkname), "/"))
	default:
		return fmt.Errorf("%s is of type %q, which no package here has", name, string(rune(h.Typeflag)))
	}
	t.files[name] = f
	return nil
}

// merged moves a path out of the directories that are links in a Debian system
// since the merge of /usr.
func merged(name string) string {
	first, _, more := strings.Cut(name, "/")
	if slices.Contains([]string{"bin", "sbin", "lib", "lib32", "lib64", "libx32"}, first) {
		if !more {
			return "usr/" + first
		}
		return "usr/" + name
	}
	return name
}

// finish adds what the packages' scripts would have made, and checks that the
// programs can start.
func (t *root) finish() error {
	applets, err := applets(t.files["usr/bin/busybox"].body)
	if err != nil {
		return err
	}
	for _, a := range applets {
		dir := "usr/bin/"
		if slices.Contains(sbin(), a) {
			dir = "usr/sbin/"
		}
		if _, ok := t.files[dir+a]; !ok {
			target := "busybox"
			if dir == "usr/sbin/" {
				target = "../bin/busybox"
			}
			t.link(dir+a, target)
		}
	}
	for _, d := range []string{"bin", "sbin", "lib"} {
		t.link(d, "usr/"+d)
	}
	if t.has("usr/lib64/") {
		t.link("lib64", "usr/lib64")
	}
	var bundle []byte
	for _, name := range slices.Sorted(maps.Keys(t.certs)) {
		bundle = append(bundle, bytes.TrimRight(t.certs[name], "\n")...)
		bundle = append(bundle, '\n')
	}
	t.write("etc/ssl/certs/ca-certificates.crt", 0o644, string(bundle))
	os := t.files["usr/lib/os-release"]
	t.write("usr/lib/os-release", 0o644, string(os.body)+"VARIANT=\"hutch minimal\"\nVARIANT_ID=hutch-minimal\n")
	t.link("etc/os-release", "../usr/lib/os-release")
	for name, f := range baseFiles() {
		t.write(name, f.mode, f.text)
	}
	for name, mode := range baseDirs() {
		t.dir(name, mode)
	}
	home := rootFile{h: tar.Header{Typeflag: tar.TypeDir, Name: "home/" + userName, Mode: 0o755, Uid: userID, Gid: userID, ModTime: t.newest, Format: tar.FormatPAX}}
	t.files[home.h.Name] = home
	t.link("var/run", "/run")
	t.link("var/lock", "/run/lock")
	for name, f := range t.files {
		if f.h.Typeflag == tar.TypeReg && bytes.HasPrefix(f.body, []byte("\x7fELF")) {
			if err := t.checkELF(name, f.body); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *root) write(name string, mode int64, text string) {
	t.files[name] = rootFile{body: []byte(text), h: tar.Header{
		Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(text)), ModTime: t.newest, Format: tar.FormatPAX,
	}}
}

func (t *root) link(name, target string) {
	t.files[name] = rootFile{h: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: t.newest, Format: tar.FormatPAX}}
}

func (t *root) dir(name string, mode int64) {
	t.files[name] = rootFile{h: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode, ModTime: t.newest, Format: tar.FormatPAX}}
}

// has reports whether there is something below a directory.
func (t *root) has(prefix string) bool {
	for name := range t.files {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// checkELF makes sure that the loader and all libraries that a program names
// are in the image: packages split and rename, and an image that boots to
// "not found" helps nobody.
func (t *root) checkELF(name string, body []byte) error {
	f, err := elf.NewFile(bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		b, err := io.ReadAll(p.Open())
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		loader := merged(strings.TrimPrefix(strings.TrimRight(string(b), "\x00"), "/"))
		if _, ok := t.files[loader]; !ok {
			return fault.New(fault.Precondition, "%s wants the loader %s, which is in none of the packages", name, loader)
		}
	}
	libs, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	for _, lib := range libs {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(t.files)), func(n string) bool {
			return strings.HasPrefix(n, "usr/lib") && path.Base(n) == lib
		}) {
			return fault.New(fault.Precondition, "%s wants the library %s, which is in none of the packages", name, lib)
		}
	}
	return nil
}

// tar writes the files in sorted order, with the directories that packages
// leave out.
func (t *root) tar() ([]byte, error) {
	for name := range maps.Clone(t.files) {
		for d := path.Dir(name); d != "."; d = path.Dir(d) {
			if _, ok := t.files[d]; !ok {
				t.dir(d, 0o755)
			}
		}
	}
	t.dir(".", 0o755)
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	names := slices.SortedFunc(maps.Keys(t.files), func(a, b string) int {
		// Hard links behind what they link to.
		la, lb := t.files[a].h.Typeflag == tar.TypeLink, t.files[b].h.Typeflag == tar.TypeLink
		if la != lb {
			if lb {
				return -1
			}
			return 1
		}
		return strings.Compare(a, b)
	})
	for _, name := range names {
		f := t.files[name]
		if f.h.Typeflag == tar.TypeDir {
			f.h.Name += "/"
		}
		if err := tw.WriteHeader(&f.h); err != nil {
			return nil, fmt.Errorf("write %s: %w", name, err)
		}
		if _, err := tw.Write(f.body); err != nil {
			return nil, fmt.Errorf("write %s: %w", name, err)
		}
	}
	if err := tw.Close(); err != nil {
		return nil, fmt.Errorf("write the root filesystem: %w", err)
	}
	return buf.Bytes(), nil
}

// applets reads the names of busybox's applets out of the program, where they
// stand one behind the other, sorted, each ended by a zero byte. So nothing of
// the package has to be run, and it need not be for this host's processor.
func applets(busybox []byte) ([]string, error) {
	at := bytes.Index(busybox, []byte("\x00[\x00[[\x00"))
	if at < 0 {
		return nil, fault.New(fault.Precondition, "the busybox package has no program with a list of applets")
	}
	var names []string
	for rest := busybox[at+1:]; ; {
		name, after, ok := bytes.Cut(rest, []byte{0})
		if !ok || !appletName.Match(name) || len(names) > 0 && string(name) <= names[len(names)-1] {
			break
		}
		names, rest = append(names, string(name)), after
	}
	for _, want := range []string{"ip", "ps", "sh", "tar", "top", "vi", "wget"} {
		if !slices.Contains(names, want) {
			return nil, fault.New(fault.Precondition, "the host's busybox package has no %s", want)
		}
	}
	// The guest's first process is the agent; these would only look like it.
	return slices.DeleteFunc(names, func(n string) bool { return n == "init" || n == "linuxrc" || n == "run-init" }), nil
}

var appletName = regexp.MustCompile(`^(\[{1,2}|[a-z0-9][a-z0-9_-]*)$`)
