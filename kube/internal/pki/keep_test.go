package pki

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"sync"
	"testing"
	"time"
)

func loadLeaf(t *testing.T, d *Dir, file string) *x509.Certificate {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(d.Cert(file), d.Key(file))
	if err != nil {
		t.Fatal(err)
	}
	return pair.Leaf
}

func TestKeepRenewsAfterALongSleep(t *testing.T) {
	var mu sync.Mutex
	now := time.Now()
	clock := func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	d, err := Open(t.TempDir(), clock)
	if err != nil {
		t.Fatal(err)
	}
	ensure(t, d, server(), true)
	before := loadLeaf(t, d, "api")
	ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	done := make(chan struct{})
	renewed := make(chan struct{}, 1)
	go func() {
		defer close(done)
		d.Keep(ctx, time.Millisecond, []Leaf{server()}, func() error { renewed <- struct{}{}; return nil }, func(err error) { t.Error(err) })
	}()
	mu.Lock()
	now = now.Add(2 * leafLife)
	mu.Unlock()
	select {
	case <-renewed:
	case <-ctx.Done():
		t.Fatal("nothing was renewed")
	}
	stop()
	<-done
	if after := loadLeaf(t, d, "api"); !after.NotAfter.After(before.NotAfter) {
		t.Fatalf("it ends at %v, before at %v", after.NotAfter, before.NotAfter)
	}
}
