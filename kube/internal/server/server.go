package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/hutch-run/hutch/kube/internal/bootstrap"
	"github.com/hutch-run/hutch/kube/internal/control"
	"github.com/hutch-run/hutch/kube/internal/status"
)

// renewEvery is how often the clock is looked at for certificates that must be renewed.
const renewEvery = time.Minute

// Server is a cluster that runs.
type Server struct {
	o           *Options
	keys        *keys
	board       *status.Board
	controllers *control.Controllers
	client      *http.Client
	start       time.Time

	failed chan error
	etcd   *control.Etcd
	api    *group // the API server
	parts  *group // everything that needs the API
	own    *group // what needs nothing: status, renewal of keys
}

// Run runs a cluster until ctx ends or a part of it fails. After a nil error everything but the pods and their network has ended.
func Run(ctx context.Context, o *Options) error {
	s := &Server{o: o, start: time.Now(), failed: make(chan error, 1)}
	s.api, s.parts, s.own = newGroup(s.failed), newGroup(s.failed), newGroup(s.failed)
	err := s.up(ctx)
	if err == nil {
		s.board.Whole()
		s.mark("everything is started")
		select {
		case <-ctx.Done():
		case err = <-s.failed:
		case err = <-s.etcd.Failed():
			err = fmt.Errorf("etcd ended: %w", err)
		}
	}
	s.down()
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		return nil
	}
	return err
}

func (s *Server) mark(what string) {
	klog.InfoS("hutch-kube: "+what, "after", time.Since(s.start).Round(10*time.Millisecond).String())
}

func (s *Server) tell(err error) { klog.ErrorS(err, "hutch-kube") }

func (s *Server) up(ctx context.Context) error {
	var err error
	// Before anything else of Kubernetes: see package control.
	if s.controllers, err = control.NewControllers(); err != nil {
		return err
	}
	if s.keys, err = openKeys(s.o); err != nil {
		return err
	}
	s.client = client(s.keys.dir)
	if err := s.serveStatus(); err != nil {
		return err
	}
	s.own.once("keys", func(ctx context.Context) error {
		s.keys.dir.Keep(ctx, renewEvery, s.keys.leaves, s.keys.export, s.tell)
		return nil
	})
	if !s.o.WithoutNode {
		if err := prepare(s.o, s.tell); err != nil {
			return err
		}
		s.own.once("pause image", func(ctx context.Context) error { return importPause(ctx, s.o.CRI) })
	}
	s.mark("keys are there")
	if err := s.upAPI(ctx); err != nil {
		return err
	}
	s.mark("the API is ready")
	return s.upParts(ctx)
}

func (s *Server) serveStatus() error {
	s.board = status.New(status.Report{Version: Version(), PID: os.Getpid(), Started: s.start}, time.Now)
	l, err := net.Listen("tcp", s.o.Status)
	if err != nil {
		return fmt.Errorf("serve the state of the parts: %w", err)
	}
	h := &http.Server{Handler: s.board.Handler(), ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 8 << 10}
	s.own.run("status", func(ctx context.Context) error {
		stop := context.AfterFunc(ctx, func() { _ = h.Close() }) // who reads then has no use for it
		defer stop()
		return h.Serve(l)
	})
	return nil
}

func (s *Server) upAPI(ctx context.Context) error {
	e, err := control.StartEtcd(ctx, s.o.Data+"/etcd")
	if err != nil {
		return err
	}
	s.etcd = e
	s.board.Add("etcd", e.Ready)
	s.mark("etcd is ready")
	ready := healthy(s.client, s.o.api()+"/readyz")
	s.board.Add("apiserver", ready)
	s.api.run("apiserver", func(ctx context.Context) error { return control.RunAPIServer(ctx, s.control()) })
	if err := await(ctx, ready, s.failed); err != nil {
		return fmt.Errorf("wait for the API: %w", err)
	}
	return nil
}

// connect makes a client of the API for a user.
func (s *Server) connect(leaf string) (kubernetes.Interface, error) {
	c, err := clientcmd.BuildConfigFromFlags("", s.keys.kubeconfig(leaf))
	if err != nil {
		return nil, fmt.Errorf("connect to the API as %s: %w", leaf, err)
	}
	c.QPS, c.Burst = 50, 100
	api, err := kubernetes.NewForConfig(c)
	if err != nil {
		return nil, fmt.Errorf("connect to the API as %s: %w", leaf, err)
	}
	return api, nil
}

func (s *Server) bootstrap(ctx context.Context, api kubernetes.Interface) error {
	dns := bootstrap.DNS{ServiceIP: DNSIP, NodeIP: s.o.NodeIP, Port: int32(s.o.DNS)}
	return await(ctx, func(ctx context.Context) error {
		err := bootstrap.Apply(ctx, api, dns)
		if err != nil {
			s.tell(err)
		}
		return err
	}, s.failed)
}

// down ends what was started, the last first.
func (s *Server) down() {
	s.mark("ending")
	parts := s.parts.stop(5 * time.Second)
	api := s.api.stop(5 * time.Second)
	if s.etcd != nil {
		s.etcd.Stop()
	}
	own := s.own.stop(time.Second)
	if !parts || !api || !own {
		s.mark(fmt.Sprintf("not all parts ended in time: parts %v, API %v, own %v", parts, api, own))
	}
	s.mark("ended")
	klog.Flush()
}
