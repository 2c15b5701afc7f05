package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
)

// dockerAPI is the few questions that the agent asks dockerd.
type dockerAPI struct {
	socket string
	client *http.Client
}

// maxReply bounds what is read of one answer, in bytes.
const maxReply = 1 << 20

func newDockerAPI(socket string) *dockerAPI {
	return &dockerAPI{socket, &http.Client{Transport: &http.Transport{
		DialContext: dialer(socket), DisableKeepAlives: true, // a kept connection would outlive its dockerd
	}}}
}

// dialer connects to a socket whatever address is asked for.
func dialer(socket string) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
}

func (d *dockerAPI) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker"+path, nil)
	if err != nil {
		return nil, err
	}
	res, err := d.client.Do(req)
	if err != nil {
		return nil, plain(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxReply))
	if err != nil {
		return nil, fmt.Errorf("read answer to %s: %w", path, err)
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("dockerd answers %s to %s: %.200s", res.Status, path, body)
	}
	return body, nil
}

// plain takes away the URL that an HTTP client puts before its errors: there is
// only one server, at a socket that they name.
func plain(err error) error {
	var e *url.Error
	if errors.As(err, &e) {
		return e.Err
	}
	return err
}

// ping returns nil when dockerd serves its API.
func (d *dockerAPI) ping(ctx context.Context) error {
	_, err := d.get(ctx, "/_ping")
	return err
}

// dockerInfo is the part of /info that is told or acted on.
type dockerInfo struct {
	ServerVersion      string
	Driver             string
	Containers         int
	ContainersRunning  int
	ContainersPaused   int
	LiveRestoreEnabled bool
	ContainerdCommit   struct{ ID string }
}

// connected returns an error when dockerd has no connection to containerd. After
// a crash of that it tries again once a second at first, and until then answers
// every ping and starts no container.
func (i dockerInfo) connected() error {
	if i.ContainerdCommit.ID == "N/A" {
		return errors.New("dockerd has lost containerd and connects again")
	}
	return nil
}

func (d *dockerAPI) info(ctx context.Context) (dockerInfo, error) {
	body, err := d.get(ctx, "/info")
	if err != nil {
		return dockerInfo{}, err
	}
	var i dockerInfo
	if err := json.Unmarshal(body, &i); err != nil {
		return dockerInfo{}, fmt.Errorf("read answer to /info: %w", err)
	}
	return i, nil
}

// String is for people.
func (i dockerInfo) String() string {
	return fmt.Sprintf("Docker %.60s, %.60s, %d containers, %d running", i.ServerVersion, i.Driver, i.Containers, i.ContainersRunning)
}
