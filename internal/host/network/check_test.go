package network

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/hutch-run/hutch/internal/testenv"
)

func (w *world) check(t *testing.T) map[string]Level {
	t.Helper()
	out := map[string]Level{}
	for _, f := range Check(testenv.Context(t), Params{HostNetns: w.hostNS, Resolvers: []netip.Addr{netip.MustParseAddr(resolverIP)}}) {
		out[f.Name] = f.Level
		if (f.Level == OK) != (f.Advice == "") || f.Detail == "" {
			t.Errorf("a finding without what is or what to do: %+v", f)
		}
	}
	return out
}

func TestCheckFindsWhatIsWrongWithAHost(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	n := w.open(t, nil)
	acquire(t, n, internet())
	before := w.state(t)
	fine := map[string]Level{
		"namespace": OK, "tap": OK, "rules": OK, "flows": OK, "forwarding": OK, "route": OK,
		"firewall": OK, "addresses": OK, "resolvers": OK,
	}
	if diff := cmp.Diff(fine, w.check(t)); diff != "" {
		t.Errorf("a good host (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(before, w.state(t)); diff != "" {
		t.Errorf("checking changed the host (-before +after):\n%s", diff)
	}
	must(t, w.host.do(func() error {
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0); err != nil {
			return err
		}
		err := withRoutes(func(h *netlink.Handle) error {
			if err := addr(t, h, "wan0", "198.18.200.1/24"); err != nil {
				return err
			}
			l, err := h.LinkByName("wan0")
			if err != nil {
				return err
			}
			return h.RouteDel(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: []byte{203, 0, 113, 2}})
		})
		if err != nil {
			return err
		}
		return withNft(func(c *nftables.Conn) error {
			// As Docker does it.
			r := newTable(c, nftables.TableFamilyIPv4, "filter")
			r.base(base{name: "FORWARD", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, drop: true})
			return r.flush()
		})
	}))
	bad := map[string]Level{
		"namespace": OK, "tap": OK, "rules": OK, "flows": OK, "forwarding": Warn, "route": Warn,
		"firewall": Warn, "addresses": Warn, "resolvers": OK,
	}
	if diff := cmp.Diff(bad, w.check(t)); diff != "" {
		t.Errorf("a bad host (-want +got):\n%s", diff)
	}
	mustBeHome(t)
}

func TestCheckTellsThatItCannotLook(t *testing.T) {
	testenv.RequireRoot(t)
	found := false
	for _, f := range Check(testenv.Context(t), Params{HostNetns: filepath.Join(t.TempDir(), "nothing")}) {
		found = found || f.Name == "host" && f.Level == Problem && strings.Contains(f.Detail, "nothing")
	}
	if !found {
		t.Error("no word of the namespace that does not exist")
	}
	if got := checkResolvers([]netip.Addr{}); got.Level != Warn || got.Advice == "" {
		t.Errorf("a host without resolvers: %+v", got)
	}
}
