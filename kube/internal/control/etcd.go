package control

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/storage/wal"
)

const (
	etcdStart = 2 * time.Minute
	// etcdStop bounds the wait for watchers. Everything that was acknowledged is on the disk by then.
	etcdStop = 2 * time.Second
	// segment is what etcd allocates ahead in one file of its log, in bytes.
	segment = 8 << 20
)

// Etcd is the cluster's database: one member, on a unix socket that root alone can reach.
type Etcd struct {
	e      *embed.Etcd
	socket string
}

// StartEtcd starts a database below dir, which must be short enough for a socket's path.
func StartEtcd(ctx context.Context, dir string) (*Etcd, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("start etcd: %w", err)
	}
	wal.SegmentSizeBytes = segment
	d := &Etcd{socket: filepath.Join(dir, "socket")}
	e, err := embed.StartEtcd(config(filepath.Join(dir, "data"), d.socket))
	if err != nil {
		return nil, fmt.Errorf("start etcd: %w", err)
	}
	d.e = e
	late := time.NewTimer(etcdStart)
	defer late.Stop()
	select {
	case <-e.Server.ReadyNotify():
		return d, nil
	case err = <-e.Err():
	case <-ctx.Done():
		err = ctx.Err()
	case <-late.C:
		err = fmt.Errorf("not ready in %v", etcdStart)
	}
	d.Stop()
	return nil, fmt.Errorf("start etcd: %w", err)
}

func config(dir, socket string) *embed.Config {
	c := embed.NewConfig()
	c.Name, c.Dir = "hutch", dir
	c.LogLevel = "error"
	c.EnableGRPCGateway = false
	c.ListenClientUrls = []url.URL{{Scheme: "unix", Path: socket}}
	c.ListenPeerUrls = nil // there is no other member, and there will be none
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	return c
}

// URL is where the API server finds the database.
func (d *Etcd) URL() string { return "unix://" + d.socket }

// Failed gives the error that ends the database.
func (d *Etcd) Failed() <-chan error { return d.e.Err() }

// Ready tells whether it has a leader.
func (d *Etcd) Ready(context.Context) error {
	if d.e.Server.Leader() == 0 {
		return errors.New("no leader")
	}
	return nil
}

// Stop ends the database, within a bound.
func (d *Etcd) Stop() {
	done := make(chan struct{})
	go func() { defer close(done); d.e.Close() }()
	late := time.NewTimer(etcdStop)
	defer late.Stop()
	select {
	case <-done:
	case <-late.C:
	}
}
