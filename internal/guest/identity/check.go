package identity

import (
	"net/netip"
	"strings"

	"github.com/hutch-run/hutch/internal/fault"
)

const (
	// linkName is the one interface that a sandbox is given.
	linkName = "eth0"

	minEntropy, maxEntropy = 32, 64 << 10 // bytes
	minMTU, maxMTU         = 576, 65535   // bytes; every IPv4 host takes 576
	maxDNS                 = 16
)

// plan is a Config that was found good, its addresses parsed.
type plan struct {
	link LinkParams
	dns  []netip.Addr
}

// LinkParams is what an interface should be.
type LinkParams struct {
	Name    string
	Address netip.Prefix // with the host's own bits; not valid: none
	Gateway netip.Addr   // not valid: none
	MTU     int          // 0: as it is
}

// check refuses a Config that can't be right, with the field named as the API
// names it.
func check(c Config) (plan, error) {
	for _, part := range []func(Config) error{checkNames, checkEntropy, checkDefaults} {
		if err := part(c); err != nil {
			return plan{}, err
		}
	}
	return checkNetwork(c.Network)
}

func checkNames(c Config) error {
	if c.ID != "" && !isHostLabel(c.ID) {
		return fault.BadField("sandbox_id", "%q is no hostname: use up to 63 of a-z, 0-9 and inner hyphens", c.ID)
	}
	if c.MachineID != "" && (len(c.MachineID) != 32 || strings.Trim(c.MachineID, "0123456789abcdef") != "") {
		return fault.BadField("machine_id", "%q is not 32 lower-case hex digits", c.MachineID)
	}
	if c.BootID != "" && !isUUID(c.BootID) {
		return fault.BadField("boot_id", "%q is no lower-case UUID", c.BootID)
	}
	return nil
}

func isUUID(s string) bool {
	for i, r := range s {
		hyphen := i == 8 || i == 13 || i == 18 || i == 23
		if hyphen != (r == '-') || (!hyphen && !strings.ContainsRune("0123456789abcdef", r)) {
			return false
		}
	}
	return len(s) == 36
}

func isHostLabel(s string) bool {
	if len(s) > 63 || strings.HasPrefix(s, "-") || strings.HasSuffix(s, "-") {
		return false
	}
	for _, r := range s {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' {
			return false
		}
	}
	return true
}

func checkEntropy(c Config) error {
	if n := len(c.Entropy); n != 0 && (n < minEntropy || n > maxEntropy) {
		return fault.BadField("entropy", "%d bytes are not between %d and %d", n, minEntropy, maxEntropy)
	}
	return nil
}

func checkDefaults(c Config) error {
	for key, value := range c.Env {
		if key == "" || strings.ContainsAny(key, "=\x00") {
			return fault.BadField("env", "%q is no name of a variable", key)
		}
		if strings.Contains(value, "\x00") {
			return fault.BadField("env", "the value of %s holds a NUL byte", key)
		}
	}
	if strings.ContainsAny(c.User, "\x00\n:") {
		return fault.BadField("default_user", "%q is no name of a user", c.User)
	}
	if c.Cwd != "" && (!strings.HasPrefix(c.Cwd, "/") || strings.Contains(c.Cwd, "\x00")) {
		return fault.BadField("default_cwd", "%q is no absolute path", c.Cwd)
	}
	return nil
}

func checkNetwork(n Network) (plan, error) {
	p := plan{link: LinkParams{Name: linkName, MTU: int(n.MTU)}}
	var err error
	if n.Address != "" {
		if p.link.Address, err = netip.ParsePrefix(n.Address); err != nil {
			return plan{}, fault.BadField("network.address", "%v", err)
		}
	}
	if n.Gateway != "" {
		if p.link.Gateway, err = parseAddr(n.Gateway); err != nil {
			return plan{}, fault.BadField("network.gateway", "%v", err)
		}
		if !p.link.Address.Masked().Contains(p.link.Gateway) {
			return plan{}, fault.BadField("network.gateway", "%s can't be reached from the address %q", n.Gateway, n.Address)
		}
	}
	if n.MTU != 0 && (n.MTU < minMTU || n.MTU > maxMTU) {
		return plan{}, fault.BadField("network.mtu", "%d is not between %d and %d", n.MTU, minMTU, maxMTU)
	}
	if len(n.DNS) > maxDNS {
		return plan{}, fault.BadField("network.dns", "%d servers are more than %d", len(n.DNS), maxDNS)
	}
	for _, s := range n.DNS {
		a, err := parseAddr(s)
		if err != nil {
			return plan{}, fault.BadField("network.dns", "%v", err)
		}
		p.dns = append(p.dns, a)
	}
	return p, nil
}

// parseAddr is netip.ParseAddr; the error names the text.
func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	return a.Unmap(), err
}
