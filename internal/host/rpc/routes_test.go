package rpc

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/host/auth"
	"github.com/hutch-run/hutch/internal/host/proxy"
)

// TestProxyRoutesHaveRules: the two packages do not know each other and must
// mean the same.
func TestProxyRoutesHaveRules(t *testing.T) {
	want := []string{auth.RouteGuestHealth, auth.RouteGuestFiles, auth.RouteGuestPort, auth.RouteGuestTunnel, auth.RouteGuestDocker, auth.DefaultDomain}
	got := []string{proxy.RouteGuestHealth, proxy.RouteGuestFiles, proxy.RouteGuestPort, proxy.RouteGuestTunnel, proxy.RouteGuestDocker, proxy.DefaultDomain}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("auth (-) and proxy (+) differ:\n%s", diff)
	}
}
