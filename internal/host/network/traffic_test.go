package network

import (
	"testing"

	"github.com/hutch-run/hutch/internal/testenv"
)

func TestAGuestReachesTheInternetAndTheHostReachesTheGuest(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	n := w.open(t, nil)
	s := acquire(t, n, internet())
	g := w.guest(t, n, s)
	serve(t, w.outside, "internet", internetIP+":80")
	serve(t, g.ns, "guest", "0.0.0.0:8080")

	for _, network := range []string{"tcp4", "udp4"} {
		answers(t, g.ns, network, internetIP+":80", "internet sees "+hostPublic)
		answers(t, w.host, network, s.HostIP.String()+":8080", "guest sees "+GatewayIP)
	}
}
func TestDbg(t *testing.T) {
	w := newWorld(t)
	for _, f := range Check(testenv.Context(t), Params{HostNetns: w.hostNS}) {
		t.Logf("%+v", f)
	}
}
