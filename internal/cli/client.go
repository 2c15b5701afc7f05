package cli

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/hutch-run/hutch/gen/arcbox/v1/arcboxv1connect"
	"github.com/hutch-run/hutch/gen/filesystem/filesystempbconnect"
	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/gen/hostagent/v1/hostagentv1connect"
	"github.com/hutch-run/hutch/gen/process/processpbconnect"
)

// defaultHost is where hutchd listens unless told otherwise.
const defaultHost = "unix:///run/hutch/hutchd.sock"

// target is where and how to reach hutchd.
type target struct {
	network, address string // for net.Dial
	base             string // URL of the API
	tls              bool
}

// parseHost reads the forms that HUTCH_HOST may have.
func parseHost(s string) (target, error) {
	u, err := url.Parse(s)
	if err != nil {
		return target{}, fmt.Errorf("HUTCH_HOST %q: %w", s, err)
	}
	switch {
	case u.Scheme == "unix" && u.Host == "" && strings.HasPrefix(u.Path, "/"):
		return target{network: "unix", address: u.Path, base: "http://localhost"}, nil
	case u.Scheme == "tcp" && u.Port() != "" && u.Path == "":
		return target{network: "tcp", address: u.Host, base: "http://" + u.Host}, nil
	case u.Scheme == "https" && u.Hostname() != "" && strings.Trim(u.Path, "/") == "":
		address := u.Host
		if u.Port() == "" {
			address = net.JoinHostPort(u.Hostname(), "443")
		}
		return target{network: "tcp", address: address, base: "https://" + u.Host, tls: true}, nil
	}
	return target{}, fmt.Errorf("HUTCH_HOST %q: want unix:///path, tcp://host:port or https://host:port", s)
}

func (a *App) hostName() string {
	for _, h := range []string{a.host, a.Getenv("HUTCH_HOST")} {
		if h != "" {
			return h
		}
	}
	return defaultHost
}

// client speaks with one hutchd.
type client struct {
	target  target
	token   string
	http    *http.Client
	options []connect.ClientOption

	host      hostagentv1connect.HostAgentServiceClient
	sandboxes hostagentv1connect.SandboxServiceClient
	templates hostagentv1connect.TemplateServiceClient
	snapshots hostagentv1connect.SnapshotServiceClient
	machine   hostagentv1connect.HostServiceClient
	ports     hostagentv1connect.PortServiceClient
}

func (a *App) client() (*client, error) {
	t, err := parseHost(a.hostName())
	if err != nil {
		return nil, err
	}
	token := a.Getenv("HUTCH_TOKEN")
	if file := a.Getenv("HUTCH_TOKEN_FILE"); token == "" && file != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("read HUTCH_TOKEN_FILE: %w", err)
		}
		token = strings.TrimSpace(string(b))
	}
	var protocols http.Protocols
	protocols.SetHTTP2(t.tls)
	protocols.SetUnencryptedHTTP2(!t.tls)
	transport := &http.Transport{
		Protocols: &protocols, DisableCompression: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			d := net.Dialer{Timeout: 10 * time.Second}
			return d.DialContext(ctx, t.network, t.address)
		},
	}
	c := &client{target: t, token: token, http: &http.Client{Transport: &authorizer{token, transport}}}
	// Compressing would cost a guest more than the way to it gains.
	c.options = []connect.ClientOption{connect.WithAcceptCompression("gzip", nil, nil)}
	c.host = hostagentv1connect.NewHostAgentServiceClient(c.http, t.base, c.options...)
	c.sandboxes = hostagentv1connect.NewSandboxServiceClient(c.http, t.base, c.options...)
	c.templates = hostagentv1connect.NewTemplateServiceClient(c.http, t.base, c.options...)
	c.snapshots = hostagentv1connect.NewSnapshotServiceClient(c.http, t.base, c.options...)
	c.ports = hostagentv1connect.NewPortServiceClient(c.http, t.base, c.options...)
	c.machine = hostagentv1connect.NewHostServiceClient(c.http, t.base, c.options...)
	return c, nil
}

// authorizer adds the token to every request.
type authorizer struct {
	token string
	next  http.RoundTripper
}

// RoundTrip sends r with the token.
func (t *authorizer) RoundTrip(r *http.Request) (*http.Response, error) {
	if t.token != "" {
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "Bearer "+t.token)
	}
	return t.next.RoundTrip(r)
}

// guestURL is where the guest APIs of a sandbox are.
func (c *client) guestURL(id string) string { return c.target.base + "/sandboxes/" + id }

// guest is the service of a sandbox's guest agent.
func (c *client) guest(id string) arcboxv1connect.AgentServiceClient {
	return arcboxv1connect.NewAgentServiceClient(c.http, c.guestURL(id), c.options...)
}

func (c *client) process(id string) processpbconnect.ProcessClient {
	return processpbconnect.NewProcessClient(c.http, c.guestURL(id), c.options...)
}

func (c *client) files(id string) filesystempbconnect.FilesystemClient {
	return filesystempbconnect.NewFilesystemClient(c.http, c.guestURL(id), c.options...)
}

// find returns the record of the sandbox that arg names: its id or a prefix
// that no other id has.
func (c *client) find(ctx context.Context, arg string) (*hostagentv1.SandboxRecord, error) {
	res, err := c.sandboxes.InspectSandbox(ctx, connect.NewRequest(&hostagentv1.InspectSandboxRequest{SandboxId: arg}))
	if err != nil {
		return nil, err
	}
	return res.Msg.GetSandbox(), nil
}

// resolve returns the full id that arg names.
func (c *client) resolve(ctx context.Context, arg string) (string, error) {
	r, err := c.find(ctx, arg)
	if err != nil {
		return "", err
	}
	return r.GetInfo().GetSandboxId(), nil
}

// sandbox returns a client and the full id of the sandbox that arg names.
func (a *App) sandbox(ctx context.Context, arg string) (*client, string, error) {
	c, err := a.client()
	if err != nil {
		return nil, "", err
	}
	id, err := c.resolve(ctx, arg)
	return c, id, err
}
