package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/hutch-run/hutch/internal/delay"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/snapshot"
)

// A machine can be copied after Docker or Kubernetes is up in it, and then is up
// in every copy. The guest says when that is: it tells of it no sooner than its
// API answers, and of a cluster when pods run. There is nothing to wait for, so
// it is asked, ever less often.
const (
	firstLook  = 250 * time.Millisecond
	rarestLook = 2 * time.Second
	// lookTime bounds one answer, which is none of the guest's start.
	lookTime = 20 * time.Second
	// maxCrashes is how often a service may end by itself before it is given up.
	maxCrashes = 5
)

// readiness is how something is brought up in a guest.
type readiness struct {
	name   string
	within time.Duration
	// start asks for it, once.
	start func(context.Context, guestconn.Guest) error
	// look tells whether it is up, and what there is to say of it.
	look func(context.Context, guestconn.Guest) (up bool, detail string, services []guestconn.Service, err error)
	// use has it do what its copies are asked first. Nil: nothing.
	use func(context.Context, guestconn.Guest) error
}

// readinessOf returns how what is to be ready is brought up; it is
// fault.Invalid when nothing is known of it.
func readinessOf(what snapshot.Ready) (readiness, error) {
	switch what {
	case snapshot.ReadyDocker:
		return readiness{"Docker", 5 * time.Minute, startDocker, lookAtDocker, useDocker}, nil
	case snapshot.ReadyKubernetes:
		return readiness{"Kubernetes", 15 * time.Minute, startKubernetes, lookAtKubernetes, nil}, nil
	}
	return readiness{}, fault.BadField("ready", "%q is neither docker nor kubernetes", string(what))
}

func startDocker(ctx context.Context, g guestconn.Guest) error {
	e, err := g.EnsureRuntime(ctx, true)
	if err == nil && e.Status == guestconn.EnsureFailed {
		return fault.New(fault.Precondition, "the guest can't: %s", e.Message)
	}
	return err
}

func lookAtDocker(ctx context.Context, g guestconn.Guest) (bool, string, []guestconn.Service, error) {
	s, err := g.RuntimeStatus(ctx)
	return s.Containerd && s.Docker, s.Detail, s.Services, err
}

// useDocker asks what docker ps does.
func useDocker(ctx context.Context, g guestconn.Guest) error {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return g.DialDocker(ctx)
	}}
	for _, path := range []string{"/_ping", "/containers/json"} {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker"+path, nil)
		if err != nil {
			return err
		}
		res, err := transport.RoundTrip(r)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, io.LimitReader(res.Body, 1<<20))
		if err := errors.Join(err, res.Body.Close()); err != nil {
			return err
		}
	}
	return nil
}

func startKubernetes(ctx context.Context, g guestconn.Guest) error {
	_, err := g.StartKubernetes(ctx)
	return err
}

func lookAtKubernetes(ctx context.Context, g guestconn.Guest) (bool, string, []guestconn.Service, error) {
	s, err := g.KubernetesStatus(ctx)
	if err == nil && !s.Running && s.Detail != "" {
		// While it starts, it runs.
		return false, "", nil, fault.New(fault.Precondition, "the guest could not begin: %s", s.Detail)
	}
	return s.Running && s.APIReady && s.NodeReady, s.Detail, s.Services, err
}

// getReady brings something up in the guest, and returns when it is. What is
// empty is at once.
func (b *box) getReady(what snapshot.Ready) error {
	if what == "" {
		return nil
	}
	r, err := readinessOf(what)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(b.life, r.within, errSlow)
	defer cancel()
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	defer context.AfterFunc(b.m.closing, func() { giveUp(context.Cause(b.m.closing)) })()
	ctx, stop := whileAlive(ctx, b.vm)
	defer stop()
	if err := b.at(ctx, "warm ready"); err != nil {
		return err
	}
	if err := b.bringUp(ctx, r); err != nil {
		return fmt.Errorf("bring %s up: %w", r.name, err)
	}
	if r.use != nil {
		if err := b.asks(ctx, r.use); err != nil { // it is up all the same
			b.log.Debug("what is ready was not used", slog.String("what", r.name), slog.Any("error", err))
		}
	}
	return nil
}

func (b *box) bringUp(ctx context.Context, r readiness) error {
	if err := b.asks(ctx, r.start); err != nil {
		return err
	}
	last := "it said nothing"
	for pause := firstLook; ; pause = min(pause*3/2, rarestLook) {
		var up bool
		var detail string
		var services []guestconn.Service
		err := b.asks(ctx, func(ctx context.Context, g guestconn.Guest) (err error) {
			up, detail, services, err = r.look(ctx, g)
			return err
		})
		switch {
		case err == nil && up:
			return nil
		case err == nil:
			last = orElse(printable(detail, 512), last)
			if err := givenUp(services); err != nil {
				return err
			}
		case !fault.Is(err, fault.Deadline) && !fault.Is(err, fault.Unavailable) || ctx.Err() != nil:
			return whyEnded(ctx, last, err)
		default:
			last = err.Error()
		}
		if err := delay.For(ctx, pause); err != nil {
			return whyEnded(ctx, last, err)
		}
	}
}

// asks has one bounded call to the guest made.
func (b *box) asks(ctx context.Context, call func(context.Context, guestconn.Guest) error) error {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	return call(ctx, b.guest)
}

// whyEnded is err, or why ctx ended, with the last that was heard.
func whyEnded(ctx context.Context, last string, err error) error {
	cause := context.Cause(ctx)
	switch {
	case cause == nil:
		return err
	case errors.Is(cause, errSlow):
		return fault.New(fault.Deadline, "it is not up in time: %s", last)
	case errors.As(cause, &vmDied{}):
		return fault.New(fault.Unavailable, "%w; before: %s", cause, last)
	}
	return cause
}

// givenUp is the error of a service that does not stay up.
func givenUp(services []guestconn.Service) error {
	for _, s := range services {
		if s.Crashes >= maxCrashes && s.Status != "ready" {
			return fault.New(fault.Precondition, "%s has ended %d times by itself: %s", printable(s.Name, 64), s.Crashes, printable(s.Detail, 512))
		}
	}
	return nil
}
