package dns

import (
	"context"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/coredns/coredns/plugin/forward"
	"github.com/coredns/coredns/plugin/pkg/proxy"
	"github.com/miekg/dns"
)

// look is how often resolv.conf is looked at, at most.
const look = 5 * time.Second

// upstream asks the servers of resolv.conf.
type upstream struct {
	path string
	self []net.IP
	port string // of the servers; 53 but for tests

	mu      sync.Mutex
	looked  time.Time
	read    os.FileInfo
	servers *forward.Forward // nil when there is none to ask
}

func newUpstream(path string, self []net.IP) *upstream {
	return &upstream{path: path, self: self, port: "53"}
}

// Name implements [plugin.Handler].
func (u *upstream) Name() string { return "upstream" }

// ServeDNS implements [plugin.Handler].
func (u *upstream) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	f := u.current()
	if f == nil {
		return dns.RcodeServerFailure, nil
	}
	return f.ServeDNS(ctx, w, r)
}

// current gives the servers of resolv.conf as it is now.
func (u *upstream) current() *forward.Forward {
	u.mu.Lock()
	defer u.mu.Unlock()
	if age := time.Since(u.looked); age >= 0 && age < look {
		return u.servers
	}
	u.looked = time.Now()
	st, err := os.Stat(u.path)
	if err != nil || u.read != nil && os.SameFile(st, u.read) && st.ModTime().Equal(u.read.ModTime()) {
		return u.servers // one that can't be read for a moment stays what it was
	}
	conf, err := dns.ClientConfigFromFile(u.path)
	if err != nil {
		return u.servers
	}
	u.stop()
	u.read, u.servers = st, u.ask(conf.Servers)
	return u.servers
}

func (u *upstream) ask(servers []string) *forward.Forward {
	var f *forward.Forward
	for _, s := range servers {
		ip := net.ParseIP(s)
		if ip == nil || ip.IsUnspecified() || slices.ContainsFunc(u.self, ip.Equal) {
			continue
		}
		if f == nil {
			f = forward.New()
		}
		f.SetProxy(proxy.NewProxy("forward", net.JoinHostPort(s, u.port), "dns"))
	}
	return f
}

func (u *upstream) stop() {
	if u.servers != nil {
		_ = u.servers.OnShutdown() // it has no error to give
	}
}

func (u *upstream) close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.stop()
	u.servers, u.looked = nil, time.Now().Add(time.Hour)
	return nil
}
