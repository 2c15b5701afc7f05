package network

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
)

func TestResolversAreThoseThatGuestsCanBeSentTo(t *testing.T) {
	for _, c := range []struct {
		name, etc, resolved string
		want                []string
	}{
		{"plain", "search x\nnameserver 10.0.0.1\nnameserver\t9.9.9.9 \n", "", []string{"10.0.0.1", "9.9.9.9"}},
		{"a stub with the real ones behind it", "nameserver 127.0.0.53\n", "nameserver 192.168.1.1\n", []string{"192.168.1.1"}},
		{"a stub and a real one", "nameserver 127.0.0.1\nnameserver 1.1.1.1\n", "nameserver 192.168.1.1\n", []string{"1.1.1.1"}},
		{"only IPv6", "nameserver fd00::1\nnameserver fe80::1%eth0\nnameserver ::1\n", "", nil},
		{"nonsense", "nameserver\nnameserver x\nnameserver 0.0.0.0\nnameserver 255.255.255.255\nnameserver 224.0.0.1\n#nameserver 1.1.1.1\n;nameserver 1.1.1.1\n", "", nil},
		{"more than three", "nameserver 1.0.0.1\nnameserver 1.0.0.2\nnameserver 1.0.0.3\nnameserver 1.0.0.4\n", "", []string{"1.0.0.1", "1.0.0.2", "1.0.0.3"}},
		{"a line without end", strings.Repeat("x", 1<<17), "nameserver 1.1.1.1", []string{"1.1.1.1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			files := []string{filepath.Join(dir, "missing"), filepath.Join(dir, "etc"), filepath.Join(dir, "resolved")}
			must(t, os.WriteFile(files[1], []byte(c.etc), 0o600))
			must(t, os.WriteFile(files[2], []byte(c.resolved), 0o600))
			var got []string
			for _, a := range resolversIn(files) {
				got = append(got, a.String())
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestResolversThatCannotWorkAreRefused(t *testing.T) {
	for _, bad := range [][]netip.Addr{
		{netip.MustParseAddr("127.0.0.53")},
		{netip.MustParseAddr("fd00::1")},
		{{}},
		{netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("1.1.1.2"), netip.MustParseAddr("1.1.1.3"), netip.MustParseAddr("1.1.1.4")},
	} {
		if _, err := chooseResolvers(bad); !fault.Is(err, fault.Invalid) {
			t.Errorf("%v: %v", bad, err)
		}
	}
	none, err := chooseResolvers([]netip.Addr{})
	if err != nil || len(none) != 0 {
		t.Errorf("none on purpose: %v, %v", none, err)
	}
}
