package image

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/version"
)

// registryContent is a repository of a registry as a store of blobs.
type registryContent struct {
	puller *remote.Puller
	repo   name.Repository
	first  *remote.Descriptor // what the reference led to, read already
	stall  time.Duration
}

func (r registryContent) blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	l, err := r.puller.Layer(ctx, r.repo.Digest(d.Digest.String()))
	if err != nil {
		cancel(nil)
		return nil, registryError(err)
	}
	rc, err := l.Compressed()
	if err != nil {
		cancel(nil)
		return nil, registryError(err)
	}
	return &stallReader{ctx: ctx, cancel: cancel, rc: rc, timer: time.AfterFunc(r.stall, func() { cancel(errStalled) }), stall: r.stall}, nil
}

// stallTime is how long a registry may send nothing before it counts as gone.
const stallTime = time.Minute

var errStalled = fault.New(fault.Unavailable, "the registry sends nothing any longer")

// stallReader gives up on a transfer in which nothing comes.
type stallReader struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	rc     io.ReadCloser
	timer  *time.Timer
	stall  time.Duration
}

func (s *stallReader) Read(p []byte) (int, error) {
	s.timer.Reset(s.stall)
	n, err := s.rc.Read(p)
	if err != nil && context.Cause(s.ctx) == errStalled { //nolint:errorlint // the very value
		err = errStalled
	}
	return n, err
}

func (s *stallReader) Close() error {
	s.timer.Stop()
	s.cancel(nil)
	return s.rc.Close()
}

func (r registryContent) manifest(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	got := r.first
	if got.Digest != d.Digest {
		var err error
		if got, err = r.puller.Get(ctx, r.repo.Digest(d.Digest.String())); err != nil {
			return nil, registryError(err)
		}
	}
	return io.NopCloser(strings.NewReader(string(got.Manifest))), nil
}

func (r registryContent) repeatable() bool { return true }

// openRegistry finds the image behind a reference.
func openRegistry(ctx context.Context, s Source, want v1.Platform, lim Limits, progress Progress) (*opened, error) {
	progress.tell("resolving "+s.Ref, 0, 0)
	ref, err := name.ParseReference(s.Ref)
	if err != nil {
		return nil, fault.BadField("source", "%s is no image reference: %v", quote(s.Ref), err)
	}
	host := ref.Context().RegistryStr()
	if s.Insecure {
		s.PlainHTTP = append(slices.Clone(s.PlainHTTP), host)
	}
	if slices.Contains(s.PlainHTTP, host) {
		if ref, err = name.ParseReference(s.Ref, name.Insecure); err != nil {
			return nil, fault.BadField("source", "%s is no image reference: %v", quote(s.Ref), err)
		}
	}
	keys := authn.Keychain(authn.DefaultKeychain)
	if s.DockerConfig != nil {
		if keys, err = parseDockerConfig(s.DockerConfig); err != nil {
			return nil, err
		}
	}
	next, idle := transportFor(s)
	puller, err := remote.NewPuller(remote.WithAuthFromKeychain(keys), remote.WithTransport(tlsOnly{s.PlainHTTP, next}),
		remote.WithUserAgent("hutch/"+version.Version), remote.WithPlatform(want), remote.WithJobs(lim.Parallel))
	if err != nil {
		return nil, fmt.Errorf("prepare to read %s: %w", s.Ref, err)
	}
	o, err := s.pull(ctx, puller, ref, resolver{want: want, lim: lim})
	if err != nil {
		idle()
		return nil, err
	}
	o.close = func() error { idle(); return nil }
	return o, nil
}

// pull reads what a reference leads to.
func (s Source) pull(ctx context.Context, puller *remote.Puller, ref name.Reference, r resolver) (*opened, error) {
	got, err := puller.Get(ctx, ref)
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", s.Ref, registryError(err))
	}
	// From here on everything goes by digest: the tag may move meanwhile.
	r.from = registryContent{puller, ref.Context(), got, s.stall()}
	o, err := r.resolve(ctx, got.Descriptor)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.Ref, err)
	}
	return o, nil
}

// transportFor returns the way to a registry, and what to call when its
// connections are needed no longer.
func transportFor(s Source) (http.RoundTripper, func()) {
	tr, ok := remote.DefaultTransport.(*http.Transport)
	if !ok {
		return remote.DefaultTransport, func() {}
	}
	tr = tr.Clone()
	tr.ResponseHeaderTimeout = s.stall()
	return tr, tr.CloseIdleConnections
}

// tlsOnly lets requests without TLS through only to registries that may be
// spoken to so. The client library would also try it with private addresses,
// and follow a redirect to it, with the credentials in its headers.
type tlsOnly struct {
	allowed []string
	next    http.RoundTripper
}

func (t tlsOnly) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" && !slices.Contains(t.allowed, r.URL.Host) && !loopback(r.URL.Hostname()) {
		return nil, fault.New(fault.Denied, "the registry %s is only reachable without TLS; list it as a plain HTTP registry if that is meant", r.URL.Host)
	}
	return t.next.RoundTrip(r)
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// registryError gives errors of the registry client their classes.
func registryError(err error) error {
	var te *transport.Error
	var ne net.Error
	var f *fault.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.As(err, &f):
		return f // the client wraps it in the address once more for every try
	case errors.As(err, &te):
		switch {
		case te.StatusCode == http.StatusUnauthorized || te.StatusCode == http.StatusForbidden:
			return fault.New(fault.Denied, "the registry gives no access; is the name right, and are you logged in (docker login)? %w", err)
		case te.StatusCode == http.StatusNotFound:
			return fault.New(fault.NotFound, "the registry does not have it: %w", err)
		case te.StatusCode == http.StatusTooManyRequests || te.StatusCode >= 500 || te.Temporary():
			return fault.As(fault.Unavailable, err)
		}
		return fault.As(fault.Invalid, err)
	case errors.As(err, &ne):
		return fault.As(fault.Unavailable, err)
	}
	return err
}

// dockerConfig is the part of a docker config.json that holds credentials. It
// serves callers over the API, so it never runs credential helpers: those are
// programs named by the config.
type dockerConfig struct {
	Auths map[string]struct {
		Auth          string `json:"auth"`
		Username      string `json:"username"`
		Password      string `json:"password"`
		IdentityToken string `json:"identitytoken"`
		RegistryToken string `json:"registrytoken"`
	} `json:"auths"`
}

func parseDockerConfig(raw []byte) (authn.Keychain, error) {
	var c dockerConfig
	if err := json.Unmarshal(raw, &c); err != nil {
		return nil, fault.BadField("docker_config", "it is no docker config.json") // the parser's words may quote a secret
	}
	for host, a := range c.Auths {
		if a.Auth == "" {
			continue
		}
		b, err := base64.StdEncoding.DecodeString(a.Auth)
		user, pass, ok := strings.Cut(strings.TrimRight(string(b), "\x00"), ":")
		if err != nil || !ok {
			return nil, fault.BadField("docker_config", "the credentials for %s are not as docker writes them", quote(host))
		}
		a.Username, a.Password = user, pass
		c.Auths[host] = a
	}
	return c, nil
}

// Resolve implements authn.Keychain.
func (c dockerConfig) Resolve(target authn.Resource) (authn.Authenticator, error) {
	for host, a := range c.Auths {
		if registryHost(host) != registryHost(target.RegistryStr()) {
			continue
		}
		return authn.FromConfig(authn.AuthConfig{
			Username: a.Username, Password: a.Password,
			IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken,
		}), nil
	}
	return authn.Anonymous, nil
}

// registryHost brings the names that config files have for a registry into one
// form: "https://index.docker.io/v1/" is "index.docker.io".
func registryHost(s string) string {
	s = strings.TrimPrefix(strings.TrimPrefix(s, "https://"), "http://")
	s, _, _ = strings.Cut(s, "/")
	if s == "docker.io" || s == "registry-1.docker.io" {
		return name.DefaultRegistry
	}
	return s
}
