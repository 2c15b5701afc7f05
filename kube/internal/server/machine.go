package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/hutch-run/hutch/kube/internal/cni"
	"github.com/hutch-run/hutch/kube/internal/pause"
)

// importLimit bounds the import of the pause image.
const importLimit = 2 * time.Minute

// prepare makes the machine ready for pods. What it can't do but may have been done otherwise is told only.
func prepare(o *Options, tell func(error)) error {
	if missing := cni.Missing(o.CNIBin); len(missing) > 0 {
		return fmt.Errorf("network plugins missing in %s: %s", o.CNIBin, strings.Join(missing, ", "))
	}
	if err := hasAddress(o.NodeIP); err != nil {
		return err
	}
	for _, name := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/bridge/bridge-nf-call-iptables"} {
		if err := os.WriteFile(name, []byte("1"), 0); err != nil {
			tell(fmt.Errorf("set up forwarding: %w", err))
		}
	}
	return cni.Write(o.CNIConf, PodCIDR)
}

func hasAddress(ip string) error {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return fmt.Errorf("look for the node's address: %w", err)
	}
	for _, a := range list {
		if n, ok := a.(*net.IPNet); ok && n.IP.String() == ip {
			return nil
		}
	}
	return fmt.Errorf("the node's address %s is on no interface", ip)
}

// importPause puts the pause image into containerd, which may be a moment late.
func importPause(ctx context.Context, cri string) error {
	ctx, cancel := context.WithTimeout(ctx, importLimit)
	defer cancel()
	t := time.NewTicker(500 * time.Millisecond)
	defer t.Stop()
	for {
		_, err := pause.Import(ctx, cri)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		case <-t.C:
		}
	}
}
