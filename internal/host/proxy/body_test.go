package proxy

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/testenv"
)

// pattern is n bytes that no buffer mix-up leaves as they are.
type pattern struct{ n, at int64 }

func (p *pattern) Read(b []byte) (int, error) {
	if p.at == p.n {
		return 0, io.EOF
	}
	b = b[:min(int64(len(b)), p.n-p.at)]
	for i := range b {
		v := uint64(p.at+int64(i)) * 0x9E3779B97F4A7C15
		b[i] = byte(v >> 32)
	}
	p.at += int64(len(b))
	return len(b), nil
}

// TestLargeBodies carries files both ways: equal digests, flat memory.
func TestLargeBodies(t *testing.T) {
	size := int64(128 << 20)
	if testing.Short() {
		size = 16 << 20
	}
	want := digest(t, &pattern{n: size})
	bothProtocols(t, func(t *testing.T, http2 bool) {
		w := newWorld(t, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if r.Method == "POST" {
				fmt.Fprint(rw, digest(t, r.Body))
				return
			}
			io.Copy(rw, &pattern{n: size})
		}))
		c := w.client(t, http2)
		stop := watchHeap(t, 48<<20)
		defer stop()
		req, err := http.NewRequestWithContext(testenv.Context(t), "POST", "http://front/sandboxes/sb-abc/files?path=/x", &pattern{n: size})
		if err != nil {
			t.Fatal(err)
		}
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if string(got) != want {
			t.Errorf("upload: %s, want %s", got, want)
		}
		if res, err = c.Get("http://front/sandboxes/sb-abc/files?path=/x"); err != nil {
			t.Fatal(err)
		}
		if got := digest(t, res.Body); got != want {
			t.Errorf("download: %s, want %s", got, want)
		}
		res.Body.Close()
		w.awaitUse(t, 0)
	})
}

func digest(t *testing.T, r io.Reader) string {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		t.Error(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// watchHeap fails the test when the live heap grows by more than limit bytes.
func watchHeap(t *testing.T, limit uint64) (stop func()) {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	base := m.HeapAlloc
	end, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-end:
				return
			case <-tick.C:
			}
			runtime.GC()
			runtime.ReadMemStats(&m)
			if m.HeapAlloc > base+limit {
				t.Errorf("heap grew by %d MiB", (m.HeapAlloc-base)>>20)
				return
			}
		}
	}()
	return func() { close(end); <-done }
}

// TestEarlyAnswer: a guest that answers without reading an upload is heard, at
// once, and the next request is whole.
func TestEarlyAnswer(t *testing.T) {
	bothProtocols(t, func(t *testing.T, http2 bool) {
		w := newWorld(t, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if r.Method == "POST" {
				rw.WriteHeader(http.StatusRequestEntityTooLarge)
				io.WriteString(rw, "too large")
				return
			}
			io.WriteString(rw, "fine")
		}))
		c := w.client(t, http2)
		for range 6 {
			pr, pw := io.Pipe() // an upload that never ends by itself
			req, err := http.NewRequestWithContext(testenv.Context(t), "POST", "http://front/sandboxes/sb-abc/files", pr)
			if err != nil {
				t.Fatal(err)
			}
			res, err := c.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(res.Body); res.StatusCode != 413 || string(got) != "too large" {
				t.Fatalf("%d %q %v", res.StatusCode, got, err)
			}
			res.Body.Close()
			pw.Close()
			if res, body := get(t, c, "http://front/sandboxes/sb-abc/files", ""); res.StatusCode != 200 || body != "fine" {
				t.Fatalf("next: %d %q", res.StatusCode, body)
			}
		}
		w.awaitUse(t, 0)
	})
}

// TestEarlyAnswerToABusyCaller: a caller that goes on sending is answered too,
// and nothing of what it sends is taken for a request.
func TestEarlyAnswerToABusyCaller(t *testing.T) {
	w := newWorld(t, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		rw.WriteHeader(http.StatusRequestEntityTooLarge)
		io.WriteString(rw, "too large")
	}))
	var callers sync.WaitGroup
	for range 8 {
		c := w.client(t, false)
		callers.Go(func() {
			for range 4 {
				req, err := http.NewRequestWithContext(testenv.Context(t), "POST", w.front.URL+"/sandboxes/sb-abc/files", &pattern{n: 64 << 20})
				if err != nil {
					t.Error(err)
					return
				}
				res, err := c.Do(req)
				if err != nil {
					t.Error(err)
					return
				}
				if got, err := io.ReadAll(res.Body); res.StatusCode != 413 || string(got) != "too large" {
					t.Errorf("%d %q %v", res.StatusCode, got, err)
				}
				res.Body.Close()
			}
		})
	}
	callers.Wait()
	w.awaitUse(t, 0)
}
