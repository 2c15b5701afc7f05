package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
	"github.com/coredns/coredns/plugin/kubernetes"
	"github.com/miekg/dns"
)

// Params say what to serve.
type Params struct {
	Address    string // host:port, UDP and TCP
	Domain     string // cluster.local
	Kubeconfig string
	ResolvConf string // of the node
	Self       []net.IP
}

// Server answers queries.
type Server struct {
	p      Params
	server *dnsserver.Server
	names  *kubernetes.Kubernetes
	synced func() error // waits for the names of the cluster, for a while
	shut   func() error
	up     *upstream
	ready  atomic.Bool
}

// New makes a server. ctx bounds what it asks the API.
func New(ctx context.Context, p Params) (*Server, error) {
	names, err := clusterNames(p)
	if err != nil {
		return nil, err
	}
	s := &Server{p: p, names: names, up: newUpstream(p.ResolvConf, p.Self)}
	if s.synced, s.shut, err = names.InitKubeCache(ctx); err != nil {
		return nil, fmt.Errorf("ask the API for names: %w", err)
	}
	host, port, err := net.SplitHostPort(p.Address)
	if err != nil {
		return nil, fmt.Errorf("address of DNS: %w", err)
	}
	s.server, err = newServer(host, port, func(next plugin.Handler) plugin.Handler {
		names.Next = next
		return names
	}, s.up)
	return s, err
}

// newServer chains the cache, what resolves names of the cluster, and what asks others.
func newServer(host, port string, names plugin.Plugin, up *upstream) (*dnsserver.Server, error) {
	site := &dnsserver.Config{Zone: ".", ListenHosts: []string{host}, Port: port, Transport: "dns"}
	site.AddPlugin(func(next plugin.Handler) plugin.Handler {
		c := cache.New()
		c.Next = next
		return c
	})
	site.AddPlugin(names)
	site.AddPlugin(func(plugin.Handler) plugin.Handler { return up })
	s, err := dnsserver.NewServer("dns://"+net.JoinHostPort(host, port), []*dnsserver.Config{site})
	if err != nil {
		return nil, fmt.Errorf("make the DNS server: %w", err)
	}
	return s, nil
}

// clusterNames has CoreDNS read its own syntax: its settings can't be reached otherwise.
func clusterNames(p Params) (*kubernetes.Kubernetes, error) {
	c := caddy.NewTestController("dns", fmt.Sprintf(`kubernetes %s in-addr.arpa ip6.arpa {
	kubeconfig %s
	pods insecure
	fallthrough in-addr.arpa ip6.arpa
	ttl 5
	startup_timeout 1h
}`, p.Domain, p.Kubeconfig))
	c.Next()
	k, err := kubernetes.ParseStanza(c)
	if err != nil {
		return nil, fmt.Errorf("set up names of the cluster: %w", err)
	}
	return k, nil
}

// Run serves until ctx ends. The API must be there.
func (s *Server) Run(ctx context.Context) (err error) {
	if err := s.waitForNames(ctx); err != nil {
		return err
	}
	stop, err := serve(s.p.Address, s.server)
	if err != nil {
		return err
	}
	s.ready.Store(true)
	<-ctx.Done()
	s.ready.Store(false)
	return errors.Join(stop(), s.shut(), s.up.close())
}

func (s *Server) waitForNames(ctx context.Context) error {
	synced := make(chan error, 1)
	// It ends when the names are there, or in an hour: there is no other way to end it.
	go func() { synced <- s.synced() }()
	select {
	case err := <-synced:
		return err
	case <-ctx.Done():
		return errors.Join(s.shut(), s.up.close())
	}
}

// serve listens at address for s, and returns what ends that and waits for it.
func serve(address string, s *dnsserver.Server) (func() error, error) {
	tcp, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("serve DNS: %w", err)
	}
	udp, err := net.ListenPacket("udp", tcp.Addr().String())
	if err != nil {
		_ = tcp.Close() // nobody has connected
		return nil, fmt.Errorf("serve DNS: %w", err)
	}
	var wg sync.WaitGroup
	errs := make([]error, 2)
	wg.Go(func() { errs[0] = s.Serve(tcp) })
	wg.Go(func() { errs[1] = s.ServePacket(udp) })
	return func() error {
		err := s.Stop()
		// One that had not begun to serve yet isn't ended by Stop.
		_, _ = tcp.Close(), udp.Close()
		wg.Wait()
		return err
	}, nil
}

// Ready asks the server for a name of the cluster.
func (s *Server) Ready(ctx context.Context) error {
	if !s.ready.Load() || !s.names.Ready() {
		return errors.New("the names of the cluster aren't there yet")
	}
	return Ask(ctx, s.p.Address, "kubernetes.default.svc."+s.p.Domain)
}

// Ask asks the server at address for a name's address and says why there is none.
func Ask(ctx context.Context, address, name string) error {
	q := new(dns.Msg)
	q.SetQuestion(dns.Fqdn(name), dns.TypeA)
	c := &dns.Client{Timeout: 2 * time.Second}
	resp, _, err := c.ExchangeContext(ctx, q, address)
	if err != nil {
		return fmt.Errorf("ask for %s: %w", name, err)
	}
	if resp.Rcode != dns.RcodeSuccess || len(resp.Answer) == 0 {
		return fmt.Errorf("ask for %s: %s, %d answers", name, dns.RcodeToString[resp.Rcode], len(resp.Answer))
	}
	return nil
}
