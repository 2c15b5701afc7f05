package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/hutch-run/hutch/kube/internal/pki"
	"github.com/hutch-run/hutch/kube/internal/status"
)

// client asks parts how they are.
func client(dir *pki.Dir) *http.Client {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(dir.Authority())
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, IdleConnTimeout: 30 * time.Second,
	}}
}

// healthy is a check of a part by its URL.
func healthy(c *http.Client, url string) status.Check {
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := c.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", resp.Status, body)
		}
		return nil
	}
}

// tryLimit bounds one try of await: an emulated machine that shares a busy host's processor takes its time.
const tryLimit = time.Minute

// await asks until the check is fine, or ctx ends, or a part failed.
func await(ctx context.Context, check status.Check, failed <-chan error) error {
	t := time.NewTicker(100 * time.Millisecond)
	defer t.Stop()
	for {
		try, cancel := context.WithTimeout(ctx, tryLimit)
		err := check(try)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-failed:
			return err
		case <-t.C:
		}
	}
}

// nodeReady checks the node's own word.
func nodeReady(api kubernetes.Interface, name string) status.Check {
	return func(ctx context.Context) error {
		n, err := api.CoreV1().Nodes().Get(ctx, name, meta.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range n.Status.Conditions {
			if c.Type != core.NodeReady {
				continue
			}
			if c.Status == core.ConditionTrue {
				return nil
			}
			return errors.New(c.Message)
		}
		return errors.New("the node has not told its state yet")
	}
}

// nodeAddressed checks that the node told its address.
func nodeAddressed(api kubernetes.Interface, name string) status.Check {
	return func(ctx context.Context) error {
		n, err := api.CoreV1().Nodes().Get(ctx, name, meta.GetOptions{})
		if err != nil {
			return err
		}
		if len(n.Status.Addresses) == 0 {
			return errors.New("the node has not told its address yet")
		}
		return nil
	}
}

func both(a, b status.Check) status.Check {
	return func(ctx context.Context) error {
		if err := a(ctx); err != nil {
			return err
		}
		return b(ctx)
	}
}
