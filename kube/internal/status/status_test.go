package status

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func board(clock *time.Time, parts map[string]Check, order ...string) *Board {
	b := New(Report{Version: "v1"}, func() time.Time { return *clock })
	for _, name := range order {
		b.Add(name, parts[name])
	}
	return b
}

func TestReportFollowsItsParts(t *testing.T) {
	clock, down := time.Unix(1000, 0), errors.New("down")
	api, node := down, down
	b := board(&clock, map[string]Check{
		"apiserver": func(context.Context) error { return api },
		"kubelet":   func(context.Context) error { return node },
	}, "apiserver", "kubelet")
	r := b.Report(t.Context())
	if r.Ready || r.APIReady || r.NodeReady || r.Components[0].Error != "down" {
		t.Fatalf("while down: %+v", r)
	}
	api = nil
	if r = b.Report(t.Context()); r.APIReady {
		t.Fatal("asked again within a second")
	}
	clock = clock.Add(2 * time.Second)
	r = b.Report(t.Context())
	if !r.APIReady || r.NodeReady || r.Ready || !r.Components[0].Since.Equal(clock) {
		t.Fatalf("with the API: %+v", r)
	}
	node, clock = nil, clock.Add(2*time.Second)
	if r = b.Report(t.Context()); r.Ready {
		t.Fatal("ready before every part is on the board")
	}
	b.Whole()
	if r = b.Report(t.Context()); !r.Ready || r.Version != "v1" {
		t.Fatalf("with everything: %+v", r)
	}
	if r.Components[0].Since.Equal(clock) {
		t.Fatal("a part that stayed ready has a new time")
	}
}

func TestPartThatPanicsOrTellsMuch(t *testing.T) {
	clock := time.Unix(1000, 0)
	b := board(&clock, map[string]Check{
		"a": func(context.Context) error { var m map[string]int; m["x"] = 1; return nil },
		"b": func(context.Context) error { return errors.New(strings.Repeat("x", 2*maxError)) },
	}, "a", "b")
	r := b.Report(t.Context())
	if r.Components[0].Ready || len(r.Components[1].Error) != maxError {
		t.Fatalf("%+v", r)
	}
}

func TestServed(t *testing.T) {
	clock := time.Unix(1000, 0)
	b := board(&clock, map[string]Check{
		"etcd": func(context.Context) error { return nil },
		"dns":  func(context.Context) error { return errors.New("no answer") },
	}, "etcd", "dns")
	s := httptest.NewServer(b.Handler())
	defer s.Close()
	for path, want := range map[string]int{"/healthz": 503, "/healthz/etcd": 200, "/healthz/dns": 503, "/healthz/x": 404, "/": 404} {
		resp, err := http.Get(s.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: %d, want %d", path, resp.StatusCode, want)
		}
	}
	r, err := Get(t.Context(), strings.TrimPrefix(s.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	if r.Ready || len(r.Components) != 2 || !r.Components[0].Ready {
		t.Fatalf("%+v", r)
	}
}
