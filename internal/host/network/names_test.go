package network

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

func TestEveryIndexHasAValidNameAndAddressesOfItsOwn(t *testing.T) {
	n := names{tagOf("/var/lib/hutch", 0)}
	slots, links := netip.MustParsePrefix(HostRange), netip.MustParsePrefix("198.18.0.0/16")
	known := netip.MustParsePrefix(GuestAddr).Masked()
	for index := 1; index <= MaxSlots; index++ {
		name := n.slot(index)
		if back, ok := n.index(name); !ok || back != index || len(name) >= unix.IFNAMSIZ {
			t.Fatalf("slot %d is named %q, which is read as %d, %t", index, name, back, ok)
		}
		a, b := hostIPOf(index), vethIPOf(index)
		if back, ok := indexOf(a); !ok || back != index || !slots.Contains(a) {
			t.Fatalf("slot %d has address %s, which is read as %d, %t", index, a, back, ok)
		}
		if !links.Contains(b) || known.Contains(b) || b.String() == "198.18.255.255" {
			t.Fatalf("slot %d's veth has address %s", index, b)
		}
	}
	if last := vethIPOf(MaxSlots + 1).String(); last != "198.18.255.255" {
		t.Errorf("the limit is not where the addresses end: the next one is %s", last)
	}
}

func TestNamesOfOthersAreNotRead(t *testing.T) {
	n := names{"3fa2c1"}
	for _, name := range []string{
		"", "eth0", "hu-", "hu-3fa2c1", "hu-3fa2c1-", "hu-3fa2c1-0", "hu-3fa2c1--1", "hu-3fa2c1-+1", "hu-3fa2c1-01",
		"hu-3fa2c1-65532", "hu-3fa2c1-1x", "hu-3fa2c2-1", "hu-3fa2c1-99999999999999999999",
	} {
		if index, ok := n.index(name); ok {
			t.Errorf("%q is read as slot %d", name, index)
		}
	}
	for _, a := range []string{"198.19.0.0", "198.19.255.255", "198.18.0.5", "10.0.0.5", "::1", "::ffff:198.19.0.1"} {
		if index, ok := indexOf(netip.MustParseAddr(a)); ok {
			t.Errorf("%s is read as slot %d", a, index)
		}
	}
}

func TestRootsHaveTagsOfTheirOwn(t *testing.T) {
	a, b, c := tagOf("/a", 0), tagOf("/b", 0), tagOf("/a", 1)
	if a == b || a == c || len(a) != 6 || a != tagOf("/a", 0) {
		t.Errorf("tags are %s, %s, %s", a, b, c)
	}
}
