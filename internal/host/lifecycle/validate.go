package lifecycle

import (
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Bounds of a spec. The API tells them too; here they hold for every caller.
const (
	minMemoryMB = 96
	maxMemoryMB = 1 << 20
	minDiskMB   = 64
	maxDiskMB   = 1 << 20
	maxTimeout  = 365 * 24 * time.Hour
	maxEnv      = 256
	maxEnvBytes = 1 << 20 // of all names and values
	maxLabels   = 64
	maxAllow    = 256
)

// validate checks a complete spec and returns it in the one form that equal
// requests share.
func validate(s sandbox.Spec, maxVCPUs int) (sandbox.Spec, error) {
	switch {
	case s.VCPUs < 1 || maxVCPUs > 0 && s.VCPUs > maxVCPUs:
		return s, fault.BadField("vcpus", "must be between 1 and %d on this host", maxVCPUs)
	case s.MemoryMB < minMemoryMB || s.MemoryMB > maxMemoryMB:
		return s, fault.BadField("memory_mb", "must be between %d and %d", minMemoryMB, maxMemoryMB)
	case s.DiskMB < minDiskMB || s.DiskMB > maxDiskMB:
		return s, fault.BadField("disk_size_mb", "must be between %d and %d", minDiskMB, maxDiskMB)
	case s.Timeout < 0 || s.Timeout > maxTimeout:
		return s, fault.BadField("timeout_sec", "must be between 0 (never) and %d", maxTimeout/time.Second)
	case s.OnTimeout != "" && s.Timeout == 0:
		return s, fault.BadField("on_timeout", "%q without timeout_sec; give the seconds of inactivity after which it is done", s.OnTimeout)
	case !slices.Contains([]sandbox.OnTimeout{"", sandbox.DestroyOnTimeout, sandbox.PauseOnTimeout, sandbox.HibernateOnTimeout}, s.OnTimeout):
		return s, fault.BadField("on_timeout", "%.32q is none of destroy, pause and hibernate", s.OnTimeout)
	case s.DefaultUser != "" && !regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$`).MatchString(s.DefaultUser):
		return s, fault.BadField("default_user", "%q is no user name", s.DefaultUser)
	}
	err := checkEnv(s.DefaultEnv)
	if err != nil {
		return s, err
	}
	if err := checkLabels(s.Labels); err != nil {
		return s, err
	}
	if s.Shares, err = checkShares(s.Shares); err != nil {
		return s, err
	}
	if len(s.Shares) > 0 && s.OnTimeout == sandbox.HibernateOnTimeout {
		return s, fault.BadField("on_timeout", "a sandbox with shares can't hibernate: %s; use pause or destroy", whyBound)
	}
	policy, err := normal(s.Network)
	if err != nil {
		return s, err
	}
	s.Network = policy
	s.DefaultEnv, s.Labels = ownMap(s.DefaultEnv), ownMap(s.Labels)
	return s, nil
}

// checkCaps checks that a host with a driver of such abilities can do all that
// a spec asks for.
func checkCaps(s sandbox.Spec, c vmm.Caps) error {
	if s.OnTimeout == sandbox.HibernateOnTimeout && !c.Snapshots {
		return fault.New(fault.Unimplemented, "on_timeout: %s can't hibernate sandboxes on this host, because it can't write a VM down; use pause or destroy", c.Name)
	}
	return nil
}

func checkEnv(env map[string]string) error {
	const field = "default_env"
	if len(env) > maxEnv {
		return fault.BadField(field, "has more than %d variables", maxEnv)
	}
	name := regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,255}$`)
	size := 0
	for k, v := range env {
		if !name.MatchString(k) {
			return fault.BadField(field, "%q is no name of a variable", k)
		}
		if strings.Contains(v, "\x00") {
			return fault.BadField(field, "the value of %s has a zero byte", k)
		}
		size += len(k) + len(v)
	}
	if size > maxEnvBytes {
		return fault.BadField(field, "is larger than %d bytes", maxEnvBytes)
	}
	return nil
}

func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return fault.BadField("labels", "has more than %d", maxLabels)
	}
	for k, v := range labels {
		if k == "" || len(k) > 128*4 || len(v) > 1024*4 { // the API counts characters
			return fault.BadField("labels", "%.32q is empty, or it or its value is too long", k)
		}
	}
	return nil
}

// normal checks a policy and brings its prefixes into one form and order.
func normal(p sandbox.Policy) (sandbox.Policy, error) {
	switch p.Mode {
	case sandbox.ModeInternet, sandbox.ModeNone, sandbox.ModeAllow:
	default:
		return p, fault.BadField("network.mode", "%q is unknown", p.Mode)
	}
	if len(p.Allow) > maxAllow {
		return p, fault.BadField("network.allow", "has more than %d entries", maxAllow)
	}
	var allow []string
	for _, a := range p.Allow {
		prefix, err := netip.ParsePrefix(a)
		if addr, addrErr := netip.ParseAddr(a); err != nil && addrErr == nil {
			prefix, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		if err != nil || !prefix.Addr().Is4() || prefix.Masked() != prefix {
			return p, fault.BadField("network.allow", "%q must be an IPv4 address or prefix such as 192.0.2.0/24", a)
		}
		allow = append(allow, prefix.String())
	}
	slices.Sort(allow)
	p.Allow = slices.Compact(allow)
	return p, nil
}

// ownMap returns a copy of m, nil when it is empty.
func ownMap(m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	return maps.Clone(m)
}

// same reports whether two specs in normal form are the same request.
func same(a, b sandbox.Spec) bool {
	return a.Template == b.Template && a.VCPUs == b.VCPUs && a.MemoryMB == b.MemoryMB && a.DiskMB == b.DiskMB &&
		a.Timeout == b.Timeout && a.OnTimeout == b.OnTimeout && a.AutoResume == b.AutoResume && a.DefaultUser == b.DefaultUser &&
		maps.Equal(a.DefaultEnv, b.DefaultEnv) && maps.Equal(a.Labels, b.Labels) &&
		a.TestFeatures == b.TestFeatures && slices.Equal(a.Shares, b.Shares) && samePolicy(a.Network, b.Network)
}

func samePolicy(a, b sandbox.Policy) bool { return a.Mode == b.Mode && slices.Equal(a.Allow, b.Allow) }

// printable makes words of a guest or a VMM safe to show: at most max bytes,
// no control characters, spaces for line breaks.
func printable(s string, max int) string {
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == '\n' || r == '\t':
			r = ' '
		case r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 || r == 0xfffd || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069:
			continue
		}
		if b.Len()+4 > max {
			fmt.Fprint(&b, "...")
			break
		}
		b.WriteRune(r)
	}
	return strings.TrimSpace(b.String())
}
