package ports

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/hutch-run/hutch/internal/testenv"
)

// cluster is an API server of a test.
type cluster struct {
	t      *testing.T
	server *httptest.Server

	mu      sync.Mutex
	lists   int
	items   []string
	version int
	watches chan chan string // what a watch is to say; closed: it ends
	gone    chan struct{}
}

func startCluster(t *testing.T) *cluster {
	testenv.CheckGoroutines(t)
	c := &cluster{t: t, version: 10, watches: make(chan chan string, 10), gone: make(chan struct{})}
	c.server = httptest.NewServer(http.HandlerFunc(c.serve))
	t.Cleanup(c.server.Close)
	return c
}

func (c *cluster) serve(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/api/v1/services" {
		http.NotFound(w, r)
		return
	}
	if r.URL.Query().Get("watch") == "" {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.lists++
		items := []json.RawMessage{}
		for _, i := range c.items {
			items = append(items, json.RawMessage(i))
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"metadata": map[string]string{"resourceVersion": fmt.Sprint(c.version)}, "items": items})
		return
	}
	says := make(chan string)
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	c.watches <- says
	for {
		select {
		case s, ok := <-says:
			if !ok {
				return
			}
			_, _ = fmt.Fprint(w, s)
			w.(http.Flusher).Flush()
		case <-r.Context().Done():
			return
		}
	}
}

func (c *cluster) api() API {
	return API{Gone: c.gone, Get: func(ctx context.Context, path string) (*http.Response, error) {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, c.server.URL+path, nil)
		if err != nil {
			return nil, err
		}
		return c.server.Client().Do(r)
	}}
}

func svc(name, kind string, version int) string {
	return fmt.Sprintf(`{"metadata":{"namespace":"default","name":%q,"resourceVersion":"%d"},"spec":{"type":%q,"ports":[
		{"port":80,"nodePort":30080,"protocol":"TCP"},{"port":53,"nodePort":30053,"protocol":"UDP"},{"port":9,"protocol":"TCP"},{"port":7,"nodePort":30007,"protocol":"SCTP"}]}}`,
		name, version, kind)
}

func watchEvent(kind, object string) string {
	return fmt.Sprintf(`{"type":%q,"object":%s}`+"\n", kind, object)
}

func TestKubernetesServices(t *testing.T) {
	c := startCluster(t)
	c.items = []string{svc("lb", "LoadBalancer", 3), svc("np", "NodePort", 4), svc("inner", "ClusterIP", 5)}
	lives := make(chan API, 2)
	lives <- c.api()
	b := New(quiet())
	defer b.Close()
	b.Start("kubernetes", NewKubernetes(func(ctx context.Context) (API, error) {
		select {
		case a := <-lives:
			return a, nil
		case <-ctx.Done():
			return API{}, ctx.Err()
		}
	}, quiet()))
	w := b.Watch()
	defer w.Close()

	all := map[string][]Binding{}
	for len(all) < 3 {
		e, err := w.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == Changed {
			all[e.Owner.ID] = e.Owner.Bindings
		}
	}
	want := map[string][]Binding{
		"kubernetes":         {{ContainerPort: 6443, Protocol: "tcp", HostIP: "127.0.0.1"}},
		"service/default/lb": {{ContainerPort: 30080, HostPort: 80, Protocol: "tcp"}, {ContainerPort: 30053, HostPort: 53, Protocol: "udp"}},
		"service/default/np": {{ContainerPort: 30080, HostPort: 30080, Protocol: "tcp"}, {ContainerPort: 30053, HostPort: 30053, Protocol: "udp"}},
	}
	if d := cmp.Diff(want, all, cmpopts.EquateComparable(netip.AddrPort{})); d != "" {
		t.Fatalf("published (-want +got):\n%s", d)
	}
	for e, ok := w.take(); ok; e, ok = w.take() {
		if e.Kind != Synced {
			t.Fatalf("and %s", short(e))
		}
	}

	says := <-c.watches
	says <- watchEvent("ADDED", svc("new", "LoadBalancer", 11))
	expect(t, w, "+service/default/new:80:53")
	says <- watchEvent("MODIFIED", svc("new", "ClusterIP", 12))
	expect(t, w, "-service/default/new")
	half := watchEvent("DELETED", svc("np", "NodePort", 13))
	says <- half[:40]
	says <- half[40:]
	expect(t, w, "-service/default/np")

	// The version is too old: all is listed again.
	c.mu.Lock()
	c.items = []string{svc("other", "NodePort", 20)}
	c.mu.Unlock()
	says <- watchEvent("ERROR", `{"kind":"Status","code":410}`)
	expect(t, w, "-service/default/lb", "+service/default/other:30080:30053")

	// The cluster is stopped, and another one comes.
	close(c.gone)
	got := map[string]bool{next(t, w): true, next(t, w): true}
	if !got["-kubernetes"] || !got["-service/default/other"] {
		t.Fatalf("told %v", got)
	}
	lives <- API{Gone: make(chan struct{}), Get: c.api().Get}
	expect(t, w, "+kubernetes:0", "+service/default/other:30080:30053")
}
