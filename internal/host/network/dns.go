package network

import (
	"bufio"
	"bytes"
	"net/netip"
	"os"
	"strings"

	"github.com/hutch-run/hutch/internal/fault"
)

// maxResolvers is the most that a resolv.conf may name, see resolv.conf(5).
const maxResolvers = 3

// resolverFiles are where hosts keep their resolvers. Where the first names
// only a local stub, the others name the real ones behind it: those of
// systemd-resolved and of NetworkManager.
func resolverFiles() []string {
	return []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf", "/run/NetworkManager/no-stub-resolv.conf"}
}

// HostResolvers reads the host's resolvers that guests' questions can be
// passed on to: IPv4 addresses that are not the host's loopback, for packets
// from outside never reach that. It is empty when there is none.
func HostResolvers() []netip.Addr { return resolversIn(resolverFiles()) }

func resolversIn(files []string) []netip.Addr {
	for _, name := range files {
		content, err := os.ReadFile(name)
		if err != nil {
			continue // most hosts have only one of the files
		}
		if out := parseResolvers(content); len(out) > 0 {
			return out
		}
	}
	return nil
}

func parseResolvers(content []byte) []netip.Addr {
	var out []netip.Addr
	lines := bufio.NewScanner(bytes.NewReader(content))
	for lines.Scan() && len(out) < maxResolvers {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(fields[1]); err == nil && usableResolver(a) {
			out = append(out, a)
		}
	}
	return out
}

func usableResolver(a netip.Addr) bool {
	return a.Is4() && !a.IsLoopback() && !a.IsUnspecified() && !a.IsMulticast() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// chooseResolvers checks the given resolvers, or takes the host's.
func chooseResolvers(given []netip.Addr) ([]netip.Addr, error) {
	if given == nil {
		return HostResolvers(), nil
	}
	if len(given) > maxResolvers {
		return nil, fault.BadField("resolvers", "%d are given, at most %d can be", len(given), maxResolvers)
	}
	for _, a := range given {
		if !usableResolver(a) {
			return nil, fault.BadField("resolvers", "%s cannot be used: it must be an IPv4 address that is not loopback", a)
		}
	}
	return given, nil
}
