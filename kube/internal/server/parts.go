package server

import (
	"context"
	"fmt"
	"net"
	"path/filepath"

	"k8s.io/client-go/kubernetes"

	"github.com/hutch-run/hutch/kube/internal/bootstrap"
	"github.com/hutch-run/hutch/kube/internal/control"
	"github.com/hutch-run/hutch/kube/internal/dns"
	"github.com/hutch-run/hutch/kube/internal/loadbalancer"
	"github.com/hutch-run/hutch/kube/internal/node"
	"github.com/hutch-run/hutch/kube/internal/pause"
	"github.com/hutch-run/hutch/kube/internal/probe"
	"github.com/hutch-run/hutch/kube/internal/storage"
)

func (s *Server) control() control.Params {
	return control.Params{
		Data: s.o.Data, PKI: s.keys.dir, Etcd: s.etcd.URL(), NodeIP: s.o.NodeIP, Port: s.o.Port,
		PodCIDR: PodCIDR, ServiceCIDR: ServiceCIDR, Domain: Domain,
		Controllers: s.o.Controllers, Scheduler: s.o.Scheduler,
		VolumePlugin: s.node().VolumePlugins(), Kubeconfig: s.keys.kubeconfig,
	}
}

func (s *Server) node() node.Params {
	return node.Params{
		Name: s.o.NodeName, IP: s.o.NodeIP, Dir: s.o.Kubelet, CRI: s.o.CRI, PKI: s.keys.dir,
		ClusterDNS: DNSIP, Domain: Domain, PodCIDR: PodCIDR, Kubeconfig: s.keys.kubeconfig,
	}
}

// upParts starts everything that needs the API.
func (s *Server) upParts(ctx context.Context) error {
	admin, err := s.connect(leafAdmin)
	if err != nil {
		return err
	}
	// The controllers give the API ten seconds to be well and end the process if it isn't, so they come first and alone.
	if err := await(ctx, healthy(s.client, s.o.api()+"/healthz"), s.failed); err != nil {
		return fmt.Errorf("wait for the API: %w", err)
	}
	s.parts.run("controller-manager", func(ctx context.Context) error { return s.controllers.Run(ctx, s.control()) })
	controllers := healthy(s.client, fmt.Sprintf("https://127.0.0.1:%d/healthz", s.o.Controllers))
	s.board.Add("controller-manager", controllers)
	if err := await(ctx, controllers, s.failed); err != nil {
		return fmt.Errorf("wait for the controllers: %w", err)
	}
	s.mark("the controllers are ready")
	s.parts.run("scheduler", func(ctx context.Context) error { return control.RunScheduler(ctx, s.control()) })
	s.board.Add("scheduler", healthy(s.client, fmt.Sprintf("https://127.0.0.1:%d/readyz", s.o.Scheduler)))
	if !s.o.WithoutNode {
		s.upNode(admin)
	}
	if err := s.bootstrap(ctx, admin); err != nil {
		return err
	}
	if err := s.upStorage(); err != nil {
		return err
	}
	if err := s.upLoadBalancer(); err != nil {
		return err
	}
	return s.upDNS()
}

func (s *Server) upNode(admin kubernetes.Interface) {
	s.parts.leave("kubelet", func(ctx context.Context) error { return node.RunKubelet(ctx, s.node()) })
	s.board.Add("kubelet", both(
		healthy(s.client, fmt.Sprintf("http://127.0.0.1:%d/healthz", node.KubeletPort)), nodeReady(admin, s.o.NodeName)))
	s.parts.leave("kube-proxy", func(ctx context.Context) error {
		// One that started without the node's address ends the process when it learns it.
		if err := await(ctx, nodeAddressed(admin, s.o.NodeName), nil); err != nil {
			return err
		}
		return node.RunProxy(ctx, s.node())
	})
	s.board.Add("kube-proxy", healthy(s.client, fmt.Sprintf("http://127.0.0.1:%d/livez", node.ProxyPort)))
	p := probe.New(admin, pause.Reference)
	s.parts.once("probe", p.Run)
	s.board.Add("pods", p.Ready)
}

func (s *Server) upStorage() error {
	api, err := s.connect(leafStorage)
	if err != nil {
		return err
	}
	c := storage.New(storage.Params{
		API: api, Provisioner: bootstrap.Provisioner, Node: s.o.NodeName, Dir: filepath.Join(s.o.Data, "volumes"), Tell: s.tell,
	})
	s.parts.run("storage", c.Run)
	s.board.Add("storage", c.Ready)
	return nil
}

func (s *Server) upLoadBalancer() error {
	api, err := s.connect(leafLoadBalancer)
	if err != nil {
		return err
	}
	c := loadbalancer.New(api, s.tell)
	s.parts.run("loadbalancer", c.Run)
	s.board.Add("loadbalancer", c.Ready)
	return nil
}

func (s *Server) upDNS() error {
	d, err := dns.New(s.parts.ctx, dns.Params{
		Address: net.JoinHostPort(s.o.NodeIP, fmt.Sprint(s.o.DNS)), Domain: Domain, Kubeconfig: s.keys.kubeconfig(leafDNS),
		ResolvConf: s.o.ResolvConf, Self: []net.IP{net.ParseIP(DNSIP)},
	})
	if err != nil {
		return err
	}
	s.parts.run("dns", d.Run)
	s.board.Add("dns", d.Ready)
	return nil
}
