package ports

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/hutch-run/hutch/internal/delay"
)

// How long the source waits before it asks a daemon again that answers, but not
// as it should. One that is not there is waited for by its socket.
const (
	firstBackoff = 100 * time.Millisecond
	lastBackoff  = 5 * time.Second
	steady       = 5 * time.Second
)

const (
	// inspectTimeout bounds one question to the daemon.
	inspectTimeout = 30 * time.Second
	// maxInspect bounds what is read of one answer, in bytes.
	maxInspect = 4 << 20
	// maxPending is how many containers may wait to be looked at; beyond that
	// all are listed anew.
	maxPending = 4096
)

// Docker is a Source: the containers of one docker daemon.
type Docker struct {
	socket string
	log    *slog.Logger
	client *http.Client
}

// NewDocker returns the source of the daemon behind a unix socket, which need
// not be there yet.
func NewDocker(socket string, log *slog.Logger) *Docker {
	return &Docker{socket: socket, log: log, client: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		DisableCompression: true, MaxIdleConns: 2, IdleConnTimeout: inspectTimeout,
	}}}
}

// Run implements Source. What is on the board stays there while the daemon is
// away: containers outlive it, and so do their ports.
func (d *Docker) Run(ctx context.Context, to *Sink) {
	defer d.client.CloseIdleConnections()
	wait := firstBackoff
	for ctx.Err() == nil {
		if err := d.awaitSocket(ctx, to); err != nil {
			if ctx.Err() == nil {
				d.log.Error("wait for docker's socket", "socket", d.socket, "error", err)
			}
			return
		}
		began := time.Now()
		err := d.follow(ctx, to)
		if ctx.Err() != nil {
			return
		}
		d.log.Debug("follow docker", "error", err)
		d.client.CloseIdleConnections()
		if time.Since(began) > steady {
			wait = firstBackoff
		}
		if delay.For(ctx, wait) != nil {
			return
		}
		wait = min(2*wait, lastBackoff)
	}
}

// follow tells what the daemon publishes until it ends. It subscribes first, so
// that nothing is missed between the list and the events.
func (d *Docker) follow(ctx context.Context, to *Sink) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events, err := d.subscribe(ctx)
	if err != nil {
		return err
	}
	defer events.Close()
	seen := newPending()
	read := make(chan error, 1)
	go func() { read <- readEvents(events, seen) }()
	defer func() {
		cancel()
		events.Close()
		<-read
	}()
	if err := d.listAll(ctx, to); err != nil {
		return err
	}
	for {
		select {
		case err := <-read:
			read <- err
			return fmt.Errorf("read docker's events: %w", err)
		case <-seen.kick:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		ids, all := seen.take()
		if all {
			if err := d.listAll(ctx, to); err != nil {
				return err
			}
		}
		for _, id := range ids {
			if err := d.look(ctx, id, to); err != nil {
				return err
			}
		}
	}
}

// look asks for one container and tells what it publishes.
func (d *Docker) look(ctx context.Context, id string, to *Sink) error {
	o, err := d.inspect(ctx, id)
	if errors.Is(err, errGone) {
		to.Remove(id)
		return nil
	}
	if err != nil {
		return err
	}
	to.Set(o)
	return nil
}

// listAll asks for all containers that run.
func (d *Docker) listAll(ctx context.Context, to *Sink) error {
	var list []dockerListed
	if err := d.get(ctx, "/containers/json", &list); err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	var all []Owner
	for _, c := range list {
		o, err := d.inspect(ctx, c.ID)
		if errors.Is(err, errGone) {
			continue
		}
		if err != nil {
			return err
		}
		if len(o.Bindings) > 0 {
			all = append(all, o)
		}
	}
	to.Replace(all)
	return nil
}

func (d *Docker) inspect(ctx context.Context, id string) (Owner, error) {
	var c dockerContainer
	if err := d.get(ctx, "/containers/"+url.PathEscape(id)+"/json", &c); err != nil {
		return Owner{}, fmt.Errorf("inspect container %s: %w", id, err)
	}
	return c.owner(id), nil
}

// errGone is a container that does not exist.
var errGone = errors.New("no such container")

// get asks the daemon and reads its answer.
func (d *Docker) get(ctx context.Context, path string, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, inspectTimeout)
	defer cancel()
	res, err := d.send(ctx, path)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body := io.LimitReader(res.Body, maxInspect)
	if err := json.NewDecoder(body).Decode(answer); err != nil {
		return fmt.Errorf("read docker's answer: %w", err)
	}
	_, _ = io.Copy(io.Discard, body) // so that the connection serves again
	return nil
}

// send asks the daemon; the answer is 200.
func (d *Docker) send(ctx context.Context, path string) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker"+path, nil)
	if err != nil {
		return nil, err
	}
	res, err := d.client.Do(r)
	if err != nil {
		return nil, err
	}
	switch res.StatusCode {
	case http.StatusOK:
		return res, nil
	case http.StatusNotFound:
		err = errGone
	default:
		b, _ := io.ReadAll(io.LimitReader(res.Body, 256))
		err = fmt.Errorf("docker answers %s: %q", res.Status, b)
	}
	res.Body.Close()
	return nil, err
}
