package guestconn

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/gen/arcbox/v1/arcboxv1connect"
	guestv1 "github.com/hutch-run/hutch/gen/hutch/guest/v1"
	"github.com/hutch-run/hutch/gen/process/processpbconnect"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/link"
	"github.com/hutch-run/hutch/internal/rpcx"
)

// Limits of what a guest may tell.
const (
	maxMessage = 1 << 20
	maxText    = 512
	maxTexts   = 32
	entropyLen = 64
)

func (c *Conn) makeClients() {
	hc := &http.Client{
		Transport: c.transport,
		// A guest does not send its host elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	opts := append(rpcx.ClientOptions(), connect.WithReadMaxBytes(maxMessage))
	c.agent = arcboxv1connect.NewAgentServiceClient(hc, baseURL, opts...)
	c.process = processpbconnect.NewProcessClient(hc, baseURL, opts...)
}

// Configure implements Guest.
func (c *Conn) Configure(ctx context.Context, cfg Config) (Facts, error) {
	entropy := make([]byte, entropyLen)
	rand.Read(entropy) // never fails
	session, err := c.session(ctx)
	if err != nil {
		return Facts{}, err
	}
	if err := setClock(ctx, session, true); err != nil {
		return Facts{}, fmt.Errorf("configure guest: %w", err)
	}
	request, err := proto.Marshal(&guestv1.ConfigureRequest{
		Shares:    sharesTo(cfg.Shares),
		SandboxId: cfg.ID, MachineId: cfg.MachineID, Entropy: entropy, Env: cfg.Env,
		DefaultUser: cfg.DefaultUser, DefaultCwd: cfg.DefaultCwd, BootId: cfg.BootID, TestFeatures: cfg.TestFeatures,
		Network: &guestv1.Network{Address: cfg.Address, Gateway: cfg.Gateway, Dns: cfg.DNS, Mtu: uint32(max(cfg.MTU, 0))},
	})
	if err != nil {
		return Facts{}, fmt.Errorf("configure guest: %w", err)
	}
	reply, err := session.Call(ctx, link.CallConfigure, request)
	if err != nil {
		return Facts{}, callError("configure guest", err)
	}
	return parseFacts(reply)
}

func sharesTo(shares []Share) (all []*guestv1.Share) {
	for _, s := range shares {
		all = append(all, &guestv1.Share{Tag: s.Tag, Path: s.Path, ReadOnly: s.ReadOnly})
	}
	return all
}

func parseFacts(reply []byte) (Facts, error) {
	var m guestv1.ConfigureResponse
	if err := proto.Unmarshal(reply, &m); err != nil {
		return Facts{}, fmt.Errorf("configure guest: read its reply: %w", err)
	}
	f := Facts{
		AgentVersion:  text(m.GetAgentVersion()),
		KernelVersion: text(m.GetKernelVersion()),
		BootID:        text(m.GetBootId()),
		Warnings:      texts(m.GetWarnings()),
		ShareErrors:   texts(m.GetShareErrors()),
	}
	return f, nil
}

// Quiesce implements Guest.
func (c *Conn) Quiesce(ctx context.Context) (Quiesced, error) {
	session, err := c.session(ctx)
	if err != nil {
		return Quiesced{}, err
	}
	reply, err := session.Call(ctx, link.CallQuiesce, nil) // an empty QuiesceRequest
	if err != nil {
		return Quiesced{}, callError("quiesce guest", err)
	}
	var m guestv1.QuiesceResponse
	if err := proto.Unmarshal(reply, &m); err != nil {
		return Quiesced{}, fmt.Errorf("quiesce guest: read its reply: %w", err)
	}
	return Quiesced{
		Flush: time.Duration(m.GetFlushNanos()), Freeze: time.Duration(m.GetFreezeNanos()), Sync: time.Duration(m.GetSyncNanos()),
		Frozen: texts(m.GetFrozen()),
	}, nil
}

// Shutdown implements Guest. A grace below a second counts as one.
func (c *Conn) Shutdown(ctx context.Context, grace time.Duration) error {
	if _, err := c.session(ctx); err != nil {
		return err
	}
	seconds := uint32(max(1, min((grace+time.Second-1)/time.Second, 3600)))
	res, err := c.agent.Shutdown(ctx, connect.NewRequest(&arcboxv1.ShutdownRequest{TimeoutSeconds: seconds}))
	if err != nil {
		return callError("shut guest down", err)
	}
	if !res.Msg.GetAccepted() {
		return fault.New(fault.Unavailable, "shut guest down: its agent did not accept")
	}
	return nil
}

// Trim implements Guest.
func (c *Conn) Trim(ctx context.Context) (Trimmed, error) {
	if _, err := c.session(ctx); err != nil {
		return Trimmed{}, err
	}
	res, err := c.agent.DiskTrim(ctx, connect.NewRequest(&arcboxv1.DiskTrimRequest{}))
	if err != nil {
		return Trimmed{}, callError("trim the disks of guest", err)
	}
	return Trimmed{Bytes: res.Msg.GetBytesTrimmed(), Detail: text(res.Msg.GetResult())}, nil
}

// Memory implements Guest.
func (c *Conn) Memory(ctx context.Context) (used, total uint64, err error) {
	if _, err := c.session(ctx); err != nil {
		return 0, 0, err
	}
	res, err := c.agent.GetSystemInfo(ctx, connect.NewRequest(&arcboxv1.Empty{}))
	if err != nil {
		return 0, 0, callError("ask guest for its memory", err)
	}
	total, free := res.Msg.GetTotalMemory(), res.Msg.GetAvailableMemory()
	return total - min(free, total), total, nil
}

// callError says what was asked of the guest, and keeps the class. A nil err
// stays nil.
func callError(what string, err error) error {
	if err == nil {
		return nil
	}
	err = rpcx.FromConnect(err)
	class := fault.Of(err)
	if status := (*link.StatusError)(nil); errors.As(err, &status) {
		class = statusClass(status.Status)
	}
	if errors.Is(err, link.ErrEnded) && class != fault.Canceled && class != fault.Deadline {
		// The RPC library calls an answer that was cut off the peer's mistake.
		class = fault.Unavailable
	}
	if class == fault.Unauthenticated {
		// Who may call is hutchd's to say: a guest must not make its callers
		// look for other credentials.
		class = fault.Internal
	}
	return fault.New(class, "%s: %w", what, err)
}

// texts is text of the first few of a list.
func texts(list []string) []string {
	var out []string
	for _, s := range list[:min(len(list), maxTexts)] {
		out = append(out, text(s))
	}
	return out
}

// text makes a guest's words fit to be logged and stored.
func text(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '.'
		}
		return r
	}, strings.ToValidUTF8(s, "."))
}
