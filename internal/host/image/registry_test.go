package image

import (
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

// testRegistry serves a registry on the loopback; wrap may get in the way of
// requests. It returns "host:port".
func testRegistry(t *testing.T, wrap func(http.Handler) http.Handler) string {
	t.Helper()
	var h http.Handler = registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	if wrap != nil {
		h = wrap(h)
	}
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

func push(t *testing.T, ref string, img v1.Image, opts ...remote.Option) name.Reference {
	t.Helper()
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(r, img, opts...); err != nil {
		t.Fatal(err)
	}
	return r
}

func imageOf(t *testing.T, items ...item) v1.Image {
	t.Helper()
	img, _ := savedArchive(t, writeLayout(t, layoutSpec{layers: []stored{asLayer(t, gzipped, pack(t, items...))}}))
	return img
}

func TestRegistryPlatforms(t *testing.T) {
	host := testRegistry(t, nil)
	amd, arm := imageOf(t, file("amd", "")), imageOf(t, file("arm", ""))
	cf, err := arm.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.Architecture, cf.Variant = "arm64", "v8"
	if arm, err = mutate.ConfigFile(arm, cf); err != nil {
		t.Fatal(err)
	}
	idx := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: arm, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}}},
		mutate.IndexAddendum{Add: amd, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}},
		mutate.IndexAddendum{Add: amd, Descriptor: v1.Descriptor{
			Platform:    &v1.Platform{OS: "unknown", Architecture: "unknown"},
			Annotations: map[string]string{"vnd.docker.reference.type": "attestation-manifest"},
		}},
	)
	ref, err := name.ParseReference(host + "/app")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, idx); err != nil {
		t.Fatal(err)
	}
	s := newStore(t, Limits{})
	for platform, want := range map[string]string{"linux/amd64": "amd", "linux/arm64": "arm", "linux/arm64/v8": "arm"} {
		img := mustBuild(t, s, Source{Ref: ref.String(), Platform: platform})
		if got := debugfs(t, mustPath(t, s, img.Digest), "ls -p /"); !strings.Contains(got, "/"+want+"/") {
			t.Errorf("%s: got the image with %s", platform, got)
		}
	}
	_, err = s.Build(testenv.Context(t), Source{Ref: ref.String(), Platform: "linux/riscv64"}, nil)
	if !fault.Is(err, fault.Invalid) || !strings.HasSuffix(err.Error(), "there is one for linux/amd64, linux/arm64/v8") {
		t.Errorf("a platform that is not there: %v", err)
	}
}

// TestRegistryBreaksOff serves half of each blob twice and the whole the third
// time.
func TestRegistryBreaksOff(t *testing.T) {
	testenv.CheckGoroutines(t)
	var broken, wanted atomic.Int64
	host := testRegistry(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") && broken.Load() < wanted.Load() {
				rec := httptest.NewRecorder()
				h.ServeHTTP(rec, r)
				if rec.Body.Len() > 50_000 {
					broken.Add(1)
					w.Header().Set("Content-Length", fmt.Sprint(rec.Body.Len()))
					w.Write(rec.Body.Bytes()[:rec.Body.Len()/2]) //nolint:errcheck // the client notices
					panic(http.ErrAbortHandler)
				}
				w.Write(rec.Body.Bytes()) //nolint:errcheck // the client notices
				return
			}
			h.ServeHTTP(w, r)
		})
	})
	noise := noisy(200_000)
	ref := push(t, host+"/app:1", imageOf(t, file("noise", noise), file("b", "")))
	s := newStore(t, Limits{UnpackedBytes: 300_000}) // less than two attempts together
	wanted.Store(2)
	img := mustBuild(t, s, Source{Ref: ref.String()})
	if broken.Load() != 2 {
		t.Errorf("%d transfers were broken, want 2", broken.Load())
	}
	if got := debugfs(t, mustPath(t, s, img.Digest), "cat /noise"); got != noise {
		t.Errorf("the file came back wrong, %d bytes", len(got))
	}
	wanted.Store(1000)
	if _, err := s.Build(testenv.Context(t), Source{Ref: ref.String(), Platform: "linux/amd64"}, nil); err == nil || !strings.Contains(err.Error(), "layer 1 of 1") {
		t.Errorf("a registry that always breaks off: %v", err)
	}
	if broken.Load() != 2+layerAttempts {
		t.Errorf("%d transfers, want %d attempts", broken.Load()-2, layerAttempts)
	}
}

// TestRegistryStalls lets the first transfer of a blob hang after half of it.
func TestRegistryStalls(t *testing.T) {
	testenv.CheckGoroutines(t)
	var hung atomic.Int64
	host := testRegistry(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
				h.ServeHTTP(w, r)
				return
			}
			rec := httptest.NewRecorder()
			h.ServeHTTP(rec, r)
			b := rec.Body.Bytes()
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			if len(b) > 50_000 && hung.Add(1) == 1 {
				w.Write(b[:len(b)/2]) //nolint:errcheck // the client notices
				if err := http.NewResponseController(w).Flush(); err != nil {
					t.Error(err)
				}
				<-r.Context().Done() // the client gave up
				return
			}
			w.Write(b) //nolint:errcheck // the client notices
		})
	})
	ref := push(t, host+"/app:1", imageOf(t, file("noise", noisy(200_000))))
	mustBuild(t, newStore(t, Limits{}), Source{Ref: ref.String(), Stall: 300 * time.Millisecond})
	if hung.Load() != 2 {
		t.Errorf("%d transfers, want the one that hung and one more", hung.Load())
	}
}

// noisy returns n bytes that do not compress, the same every time.
func noisy(n int) string {
	b := make([]byte, n)
	x := uint32(1)
	for i := range b {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		b[i] = byte(x)
	}
	return string(b)
}

func TestRegistryCredentials(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	host := testRegistry(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if u, p, _ := r.BasicAuth(); u != "ann" || p != "s:cret" {
				w.Header().Set("WWW-Authenticate", `Basic realm="r"`)
				http.Error(w, "no", http.StatusUnauthorized)
				return
			}
			h.ServeHTTP(w, r)
		})
	})
	ref := push(t, host+"/app:1", imageOf(t, file("a", "")), remote.WithAuth(&authn.Basic{Username: "ann", Password: "s:cret"}))
	s := newStore(t, Limits{})
	auth := base64.StdEncoding.EncodeToString([]byte("ann:s:cret"))
	for _, cfg := range []string{
		`{"auths":{"` + host + `":{"auth":"` + auth + `"}}}`,
		`{"auths":{"https://` + host + `/v1/":{"username":"ann","password":"s:cret"}},"credsStore":"../../bin/true"}`,
	} {
		mustBuild(t, s, Source{Ref: ref.String(), DockerConfig: []byte(cfg)})
	}
	for what, cfg := range map[string][]byte{"nothing": nil, "other registry": []byte(`{"auths":{"example.com":{"auth":"` + auth + `"}}}`)} {
		_, err := s.Build(testenv.Context(t), Source{Ref: ref.String(), DockerConfig: cfg}, nil)
		if !fault.Is(err, fault.Denied) || !strings.Contains(err.Error(), "docker login") {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, cfg := range []string{"{", `{"auths":{"h":{"auth":"!!"}}}`, `{"auths":{"h":{"auth":"bm9jb2xvbg=="}}}`} {
		_, err := s.Build(testenv.Context(t), Source{Ref: ref.String(), DockerConfig: []byte(cfg)}, nil)
		if !fault.Is(err, fault.Invalid) || strings.Contains(err.Error(), "bm9j") {
			t.Errorf("%s: %v", cfg, err)
		}
	}
}

func TestRegistryErrors(t *testing.T) {
	host := testRegistry(t, nil)
	s := newStore(t, Limits{})
	if _, err := s.Build(testenv.Context(t), Source{Ref: host + "/none:1"}, nil); !fault.Is(err, fault.NotFound) {
		t.Errorf("an image that is not there: %v", err)
	}
	gone := httptest.NewServer(http.NotFoundHandler())
	addr := strings.TrimPrefix(gone.URL, "http://")
	gone.Close()
	if _, err := s.Build(testenv.Context(t), Source{Ref: addr + "/none:1"}, nil); !fault.Is(err, fault.Unavailable) {
		t.Errorf("a registry that is not there: %v", err)
	}
}

func TestNoTLSOnlyWhereAllowed(t *testing.T) {
	sent := 0
	rt := tlsOnly{allowed: []string{"10.1.2.3:5000"}, next: roundTrip(func(r *http.Request) (*http.Response, error) {
		sent++
		return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, nil
	})}
	for url, want := range map[string]bool{
		"https://10.9.9.9/v2/":       true,
		"http://10.9.9.9/v2/":        false,
		"http://10.1.2.3:5000/v2/":   true,
		"http://10.1.2.3:5001/v2/":   false,
		"http://localhost:5000/v2/":  true,
		"http://127.0.0.1:5000/v2/":  true,
		"http://[::1]:5000/v2/":      true,
		"http://localhost.evil/v2/":  false,
		"http://registry.local/v2/":  false,
		"http://127.0.0.1.evil/v2/":  false,
		"https://registry.local/v2/": true,
	} {
		r, err := http.NewRequestWithContext(testenv.Context(t), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		before := sent
		resp, err := rt.RoundTrip(r)
		if err == nil {
			resp.Body.Close() //nolint:errcheck // http.NoBody
		}
		if got := err == nil && sent == before+1; got != want {
			t.Errorf("%s: sent %v, want %v (%v)", url, got, want, err)
		}
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
