package e2e

import (
	"bytes"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/crane"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

// TestTemplatesFromEverywhere takes the root of a running sandbox and makes
// templates of it: from a root tar, a docker archive and a registry.
func TestTemplatesFromEverywhere(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	id := d.Create("-m", "128")
	rootTar := filepath.Join(t.TempDir(), "root.tar")
	out, err := os.Create(rootTar)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	c := d.Command(testenv.Context(t), "exec", id, "--", "sh", "-c", "echo marked > /etc/mark; umount /lib/modules/*; cd /; tar c bin etc lib* root sbin usr 2>/dev/null")
	c.Stdout = out
	if err := c.Run(); err != nil {
		t.Fatal(err)
	}
	d.Hutch("rm", id)

	layer, err := tarball.LayerFromFile(rootTar)
	if err != nil {
		t.Fatal(err)
	}
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		t.Fatal(err)
	}
	image, err = mutate.ConfigFile(image, &v1.ConfigFile{
		OS: "linux", Architecture: "amd64", RootFS: must(t, image.ConfigFile).RootFS,
		Config: v1.Config{Env: []string{"GREETING=hello"}, WorkingDir: "/usr", Entrypoint: []string{"sh", "-c"}, Cmd: []string{"echo $GREETING from $PWD; cat /etc/mark"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	const said = "hello from /usr\nmarked"

	t.Run("root tar", func(t *testing.T) {
		d.Hutch("template", "import", "-e", "GREETING=hello", "-w", "/usr", "from-tar", rootTar)
		if got := d.Hutch("run", "-m", "128", "from-tar", "--", "sh", "-c", "echo $GREETING from $PWD; cat /etc/mark"); got != said {
			t.Errorf("got %q", got)
		}
	})
	t.Run("docker archive on standard input", func(t *testing.T) {
		var saved bytes.Buffer
		if err := tarball.Write(name.MustParseReference("app:1"), image, &saved); err != nil {
			t.Fatal(err)
		}
		c := d.Command(testenv.Context(t), "template", "import", "from-docker", "-")
		c.Stdin = &saved
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if got := d.Hutch("run", "-m", "128", "from-docker"); got != said {
			t.Errorf("got %q", got)
		}
	})
	t.Run("registry", func(t *testing.T) {
		server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
		defer server.Close()
		ref := strings.TrimPrefix(server.URL, "http://") + "/app:1"
		if err := crane.Push(image, ref); err != nil {
			t.Fatal(err)
		}
		d.Hutch("template", "build", "from-registry", ref)
		if got := d.Hutch("run", "-m", "128", "from-registry"); got != said {
			t.Errorf("got %q", got)
		}
		if r := d.Try("template", "build", "none", ref+"0"); r.Code != 125 || !strings.Contains(r.Stderr, "10") {
			t.Errorf("a tag that is not there: %+v", r)
		}
	})
	t.Run("the same input is the same image", func(t *testing.T) {
		list := d.Hutch("template", "ls")
		var digests []string
		for line := range strings.Lines(list) {
			if f := strings.Fields(line); strings.HasPrefix(f[0], "from-") {
				digests = append(digests, f[1])
			}
		}
		if len(digests) != 3 || digests[0] != digests[1] || digests[1] != digests[2] {
			t.Errorf("digests %v in\n%s", digests, list)
		}
	})
	t.Run("rm", func(t *testing.T) {
		d.Hutch("template", "rm", "from-tar", "from-docker", "from-registry")
		if r := d.Try("run", "from-tar", "--", "true"); r.Code != 125 || !strings.Contains(r.Stderr, "from-tar") {
			t.Errorf("%+v", r)
		}
	})
}

func must[T any](t *testing.T, f func() (*T, error)) *T {
	t.Helper()
	v, err := f()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// TestPython builds Debian's Python from packages and computes with it.
func TestPython(t *testing.T) {
	if testing.Short() {
		t.Skip("builds a Debian from packages; -short")
	}
	d := harness.Start(t, harness.Options{})
	d.Hutch("template", "build", "python311")
	if got := d.Hutch("run", "python311", "--", "python3", "-c", "print(2**100)"); got != "1267650600228229401496703205376" {
		t.Errorf("got %q", got)
	}
}
