package ports

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/hutch-run/hutch/internal/delay"
)

const (
	// maxDatagram is the largest datagram and a little more, in bytes.
	maxDatagram = 64 << 10
	// maxQueue and maxQueued bound what waits for the guest, of one flow: in
	// datagrams and in bytes. What does not fit is lost, as on any network.
	maxQueue  = 256
	maxQueued = 256 << 10
	// evictAfter is how long a flow must be unused to make room for another.
	evictAfter = 2 * time.Second
	// refusedFor is how long datagrams of a client are dropped whose flow could
	// not be opened.
	refusedFor = time.Second
)

// flowTable is the flows of one listener, by client. It is guarded by the box's
// flowsMu.
type flowTable map[netip.AddrPort]*flow

// flow is one client of one UDP port: a stream to the guest, which has a socket
// of its own for it there.
type flow struct {
	l      *listener
	client netip.AddrPort
	in     chan []byte
	queued atomic.Int64 // bytes in in
	used   atomic.Int64 // when the last datagram passed, in Unix nanoseconds
	ctx    context.Context
	end    context.CancelFunc
}

// receiveOne takes one datagram and hands it to its client's flow.
func (l *listener) receiveOne(buf []byte) error {
	n, from, err := l.udp.ReadFromUDPAddrPort(buf)
	if err != nil {
		return err
	}
	if f := l.flowOf(from); f != nil {
		f.offer(buf[:n])
	}
	return nil
}

// flowOf returns the flow of a client, a new one where there is room: that of
// the flow that was used least lately, unless all are busy.
func (l *listener) flowOf(client netip.AddrPort) *flow {
	b := l.box
	b.flowsMu.Lock()
	defer b.flowsMu.Unlock()
	if f := l.flows[client]; f != nil {
		return f
	}
	if len(b.flows) >= MaxFlows && !b.evictLocked() {
		return nil
	}
	f := &flow{l: l, client: client, in: make(chan []byte, maxQueue)}
	f.ctx, f.end = context.WithCancel(l.ctx)
	f.touch()
	if l.flows == nil {
		l.flows = flowTable{}
	}
	l.flows[client] = f
	b.flows[f] = struct{}{}
	b.t.wg.Go(f.run)
	return f
}

// evictLocked ends the flow that was used least lately, if it may. b.flowsMu is
// held.
func (b *box) evictLocked() bool {
	var oldest *flow
	for f := range b.flows {
		if oldest == nil || f.used.Load() < oldest.used.Load() {
			oldest = f
		}
	}
	if oldest == nil || oldest.idle() < evictAfter {
		return false
	}
	oldest.forgetLocked()
	return true
}

// forgetLocked ends f and makes room for another. The box's flowsMu is held.
func (f *flow) forgetLocked() {
	f.end()
	delete(f.l.box.flows, f)
	if f.l.flows[f.client] == f {
		delete(f.l.flows, f.client)
	}
}

func (f *flow) touch()              { f.used.Store(time.Now().UnixNano()) }
func (f *flow) idle() time.Duration { return time.Duration(time.Now().UnixNano() - f.used.Load()) }

// offer queues a copy of a datagram, or drops it.
func (f *flow) offer(b []byte) {
	f.touch()
	if f.queued.Load() > 0 && f.queued.Load()+int64(len(b)) > maxQueued {
		return
	}
	select {
	case f.in <- bytes.Clone(b):
		f.queued.Add(int64(len(b)))
	default:
	}
}

// run carries datagrams until the flow is idle for too long, or its listener is
// closed. The sandbox is in use meanwhile.
func (f *flow) run() {
	defer func() {
		f.l.box.flowsMu.Lock()
		defer f.l.box.flowsMu.Unlock()
		f.forgetLocked()
	}()
	b := f.l.box
	guest, done, err := f.l.connect(f.ctx, func(ctx context.Context, g Guest) (net.Conn, error) { return g.DialUDP(ctx, f.l.guestPort) })
	if err != nil {
		b.t.p.Log.Debug("published port can't be reached", "sandbox_id", b.id, "port", f.l.key.at, "error", err)
		_ = delay.For(f.ctx, refusedFor)
		return
	}
	defer done()
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		f.answer(guest)
		f.end()
	}()
	stop := context.AfterFunc(f.ctx, func() { guest.Close() })
	f.pass(guest)
	f.end()
	stop()
	guest.Close()
	<-answered
}

// pass carries datagrams to the guest.
func (f *flow) pass(guest net.Conn) {
	limit := f.l.box.t.p.flowIdle
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		select {
		case d := <-f.in:
			f.queued.Add(-int64(len(d)))
			if _, err := guest.Write(d); err != nil {
				return
			}
		case <-timer.C:
			left := limit - f.idle()
			if left <= 0 {
				return
			}
			timer.Reset(left)
		case <-f.ctx.Done():
			return
		}
	}
}

// answer carries datagrams to the client.
func (f *flow) answer(guest net.Conn) {
	buf := make([]byte, maxDatagram)
	for {
		n, err := guest.Read(buf)
		if err != nil {
			return
		}
		f.touch()
		// What the client does not take is lost, as on any network.
		_, _ = f.l.udp.WriteToUDPAddrPort(buf[:n], f.client)
	}
}
