package shares

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// journal is a kernel that writes down what it is told.
type journal struct {
	said    []string
	mounted string
	fails   map[string]error
}

func (j *journal) note(format string, args ...any) error {
	j.said = append(j.said, fmt.Sprintf(format, args...))
	return j.fails[j.said[len(j.said)-1]]
}

func (j *journal) LoadModule(name string) error { return j.note("load %s", name) }
func (j *journal) MakeDir(path string) error    { return j.note("mkdir %s", path) }
func (j *journal) Mount(tag, path string, flags uintptr) error {
	return j.note("mount %s %s %#x", tag, path, flags)
}
func (j *journal) Mounted(tag, path string) (bool, error) {
	return mounted(j.mounted, tag, path), nil
}

func TestMount(t *testing.T) {
	const flags = unix.MS_NOSUID | unix.MS_NODEV
	j := &journal{
		mounted: "42 28 0:39 / /there\\040now rw,nosuid - virtiofs share1 rw\n",
		fails:   map[string]error{"mkdir /bad": errors.New("no")},
	}
	problems := Mount(j, []Share{{"share0", "/data", false}, {"share1", "/there now", false}, {"share2", "/bad", false}, {"share3", "/ro", true}, {"share4", "rel", true}})
	want := []string{
		"load virtiofs", "mkdir /data", fmt.Sprintf("mount share0 /data %#x", flags), "mkdir /bad",
		"mkdir /ro", fmt.Sprintf("mount share3 /ro %#x", flags|unix.MS_RDONLY),
	}
	if diff := cmp.Diff(want, j.said); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	if len(problems) != 2 || problems[0] != "/bad: no" || !strings.HasPrefix(problems[1], "rel: ") {
		t.Errorf("problems %q", problems)
	}
}

func TestWithoutSharesNothingIsLoaded(t *testing.T) {
	j := &journal{}
	if problems := Mount(j, nil); problems != nil || j.said != nil {
		t.Errorf("%q, %q", problems, j.said)
	}
	j.fails = map[string]error{"load virtiofs": errors.New("this kernel has no such module")}
	if problems := Mount(j, []Share{{"share0", "/data", false}}); len(problems) != 1 || len(j.said) != 1 {
		t.Errorf("%q, %q", problems, j.said)
	}
}

func TestMountedIsExact(t *testing.T) {
	const info = "42 28 0:39 / /data rw,nosuid - virtiofs share0 rw\n43 28 0:40 / /tmp rw shared:1 - tmpfs share1 rw\n"
	for _, c := range []struct {
		tag, path string
		want      bool
	}{{"share0", "/data", true}, {"share0", "/dat", false}, {"share1", "/data", false}, {"share1", "/tmp", false}} {
		if got := mounted(info, c.tag, c.path); got != c.want {
			t.Errorf("%s at %s: %v", c.tag, c.path, got)
		}
	}
}
