package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"
)

// other serves one address for every name, and returns its port.
func other(t *testing.T, address string) string {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg).SetReply(r)
		m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1}, A: net.ParseIP(address)}}
		_ = w.WriteMsg(m)
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.ActivateAndServe() }()
	t.Cleanup(func() { _ = pc.Close(); <-done })
	_, port, err := net.SplitHostPort(pc.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func conf(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	// The file's time is what tells it apart.
	later := time.Now().Add(time.Duration(len(text)) * time.Minute)
	if err := os.Chtimes(path, later, later); err != nil {
		t.Fatal(err)
	}
}

func TestUpstreamFollowsResolvConf(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	u := newUpstream(path, []net.IP{net.ParseIP("10.43.0.10")})
	u.port = other(t, "192.0.2.1")
	again := func() { u.looked = time.Time{} }
	if u.current() != nil {
		t.Fatal("servers without a file")
	}
	conf(t, path, "nameserver 10.43.0.10\nnameserver 0.0.0.0\n")
	again()
	if u.current() != nil {
		t.Fatal("it would ask itself")
	}
	conf(t, path, "nameserver 10.43.0.10\nnameserver 127.0.0.1\n")
	again()
	f := u.current()
	if f == nil || f.Len() != 1 {
		t.Fatalf("servers: %v", f)
	}
	again()
	if u.current() != f {
		t.Fatal("servers of the same file were made anew")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	again()
	if u.current() != f {
		t.Fatal("a file that is away for a moment took the servers with it")
	}
	if err := u.close(); err != nil {
		t.Fatal(err)
	}
}

// served serves at an address of the loopback that was free, until stop.
func served(t *testing.T, u *upstream, names plugin.Plugin) (address string, stop func() error) {
	t.Helper()
	s, err := newServer("127.0.0.1", "0", names, u)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address = l.Addr().String()
	_ = l.Close()
	stop, err = serve(address, s)
	if err != nil {
		t.Fatal(err)
	}
	return address, stop
}

func TestServerAsksUpstreamOverBothTransports(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	conf(t, path, "nameserver 127.0.0.1\n")
	u := newUpstream(path, nil)
	u.port = other(t, "192.0.2.1")
	address, stop := served(t, u, func(next plugin.Handler) plugin.Handler { return next })
	if err := Ask(t.Context(), address, "example.org"); err != nil {
		t.Error(err)
	}
	q := new(dns.Msg).SetQuestion("example.org.", dns.TypeA)
	resp, _, err := (&dns.Client{Net: "tcp", Timeout: 5 * time.Second}).Exchange(q, address)
	if err != nil || len(resp.Answer) != 1 {
		t.Errorf("over tcp: %v, %v", resp, err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if err := u.close(); err != nil {
		t.Error(err)
	}
}

// cluster is names of a cluster: a service with an address, and one with many.
type cluster struct{ next plugin.Handler }

func (cluster) Name() string { return "cluster" }

func (c cluster) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	n := map[string]int{"one.cluster.local.": 1, "many.cluster.local.": 60}[r.Question[0].Name]
	if n == 0 {
		return c.next.ServeDNS(ctx, w, r)
	}
	m := new(dns.Msg).SetReply(r)
	for i := range n {
		m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 5}, A: net.IPv4(10, 43, 1, byte(i))})
	}
	return dns.RcodeSuccess, w.WriteMsg(m)
}

// silence is a server that never answers. asked gets a value for each query.
func silence(t *testing.T) (port string, asked <-chan struct{}) {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	queries, done := make(chan struct{}, 1000), make(chan struct{})
	go func() {
		defer close(done)
		for b := make([]byte, 512); ; {
			if _, _, err := pc.ReadFrom(b); err != nil {
				return
			}
			select {
			case queries <- struct{}{}:
			default: // more than the test counts
			}
		}
	}()
	t.Cleanup(func() { _ = pc.Close(); <-done })
	_, port, err = net.SplitHostPort(pc.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port, queries
}

// TestDeadUpstreamDelaysNoNameOfTheCluster: while 200 queries wait for a server
// that never answers, those for names of the cluster are answered, also those
// whose answer needs TCP.
func TestDeadUpstreamDelaysNoNameOfTheCluster(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	conf(t, path, "nameserver 127.0.0.1\n")
	u := newUpstream(path, nil)
	var asked <-chan struct{}
	u.port, asked = silence(t)
	address, stop := served(t, u, func(next plugin.Handler) plugin.Handler { return cluster{next} })
	var wg sync.WaitGroup
	var answered atomic.Int32
	waiting, giveUp := context.WithCancel(t.Context())
	for i := range 200 {
		wg.Go(func() {
			q := new(dns.Msg).SetQuestion(fmt.Sprintf("n%d.example.org.", i), dns.TypeA)
			if _, _, err := (&dns.Client{Timeout: time.Minute}).ExchangeContext(waiting, q, address); err == nil {
				answered.Add(1)
			}
		})
	}
	for range 200 {
		<-asked
	}
	if err := Ask(t.Context(), address, "one.cluster.local"); err != nil {
		t.Error(err)
	}
	q := new(dns.Msg).SetQuestion("many.cluster.local.", dns.TypeA)
	if resp, _, err := new(dns.Client).Exchange(q, address); err != nil || !resp.Truncated {
		t.Errorf("60 addresses over UDP: %v, %v, want a short answer that says so", resp, err)
	}
	if resp, _, err := (&dns.Client{Net: "tcp"}).Exchange(q, address); err != nil || len(resp.Answer) != 60 {
		t.Errorf("60 addresses over TCP: %v, %v", resp, err)
	}
	if n := answered.Load(); n != 0 {
		t.Logf("%d queries to the dead server were answered meanwhile, so they waited for less than they should", n)
	}
	giveUp()
	wg.Wait()
	if err := errors.Join(stop(), u.close()); err != nil {
		t.Error(err)
	}
}
