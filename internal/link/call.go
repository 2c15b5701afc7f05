package link

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"github.com/hutch-run/hutch/internal/fault"
)

// MaxCall bounds the request and each reply of a call, in bytes.
const MaxCall = 1 << 20

// The calls.
const (
	// CallConfigure makes the guest a sandbox: hutch.guest.v1.ConfigureRequest
	// to one ConfigureResponse.
	CallConfigure = "configure"
	// CallStart runs a program: process.StartRequest to the StartResponses of
	// process.Process/Start.
	CallStart = "start"
	// CallQuiesce holds the guest still until it is configured again:
	// hutch.guest.v1.QuiesceRequest to one QuiesceResponse.
	CallQuiesce = "quiesce"
	// CallClock reads the guest's clock, and corrects it:
	// hutch.guest.v1.ClockRequest to one ClockResponse.
	CallClock = "clock"
	// CallPorts tells what the guest publishes, without a request: any number of
	// arcbox.v1.WatchPortsResponse, none as long as nothing in there could
	// publish anything.
	CallPorts = "ports"
)

// CallFunc answers a call by any number of replies; send waits when the host
// does not read them. Its error reaches the host with class and words. The
// context ends when the host gives the call up.
type CallFunc func(ctx context.Context, request []byte, send func(reply []byte) error) error

// The kinds of records that a call consists of: one byte, the length (4 bytes),
// and that many bytes. The host sends its request and ends its side of the
// stream when it wants no more; the guest sends replies and ends its side.
const (
	recordMessage = 0
	recordFailure = 1 // name of the error's class, '\n', words
	recordHeader  = 5
)

// Call makes the call name in the guest, which answers once. See Stream.
func (s *Session) Call(ctx context.Context, name string, request []byte) ([]byte, error) {
	var result []byte
	got := 0
	err := s.Stream(ctx, name, request, func(reply []byte) error {
		result = append(result, reply...)
		got++
		return nil
	})
	if err == nil && got != 1 {
		err = protocolError("%d replies to call %s", got, name)
	}
	if err != nil {
		return nil, err
	}
	return result, nil
}

// Stream makes the call name in the guest, and hands each its replies until the
// call ends. A reply is valid until each returns; an error of each ends the
// call and is returned.
//
// Calls exist for what somebody waits for by the millisecond: a boot, a
// restore, a command. Unlike a request to the API, a call costs the guest no
// HTTP and no RPC library, and sends its request without waiting for the stream
// to be answered. A call that the guest answered with an error returns that
// error, of the same class; the guest may have done something whenever an error
// is returned.
func (s *Session) Stream(ctx context.Context, name string, request []byte, each func(reply []byte) error) error {
	if len(request) > MaxCall {
		return tooLong("request", len(request))
	}
	stream, err := s.m.begin(targetCall+name, true)
	if err != nil {
		return err
	}
	defer stream.Close()
	stop := context.AfterFunc(ctx, stream.Reset)
	defer stop()
	out := recordWriter{w: stream}
	if err = out.write(recordMessage, request); err == nil {
		err = readReplies(&records{r: bufio.NewReader(stream)}, each)
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return err
}

func readReplies(r *records, each func([]byte) error) error {
	for {
		kind, b, err := r.next()
		switch {
		case err == io.EOF: // an end within a record is another error
			return nil
		case err != nil:
			return fmt.Errorf("call the guest: %w", err)
		case kind == recordFailure:
			name, words, _ := strings.Cut(string(b), "\n")
			return fault.New(className(name), "%s", statusText(words))
		case kind != recordMessage:
			return protocolError("record of kind %d in a call", kind)
		}
		if err := each(b); err != nil {
			return err
		}
	}
}

// records reads the records of one side of a call.
type records struct {
	r   *bufio.Reader
	buf []byte
}

// next returns a record, valid until the next call, or io.EOF at the end.
func (r *records) next() (kind byte, b []byte, err error) {
	var header [recordHeader]byte
	if _, err := io.ReadFull(r.r, header[:]); err != nil {
		return 0, nil, err
	}
	n := int(binary.BigEndian.Uint32(header[1:]))
	if n > MaxCall {
		return 0, nil, tooLong("record", n)
	}
	if cap(r.buf) < n {
		r.buf = make([]byte, n)
	}
	if _, err := io.ReadFull(r.r, r.buf[:n]); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return header[0], r.buf[:n], nil
}

// recordWriter writes records, each by one Write.
type recordWriter struct {
	w   io.Writer
	buf []byte
}

func (r *recordWriter) write(kind byte, b []byte) error {
	r.buf = append(r.buf[:0], kind)
	r.buf = binary.BigEndian.AppendUint32(r.buf, uint32(len(b)))
	r.buf = append(r.buf, b...)
	_, err := r.w.Write(r.buf)
	return err
}

func tooLong(what string, n int) error {
	return fault.New(fault.Exhausted, "%s of %d bytes, of which a call takes %d", what, n, MaxCall)
}

// className returns the class of that name; Internal when there is none.
func className(name string) fault.Class {
	for _, c := range fault.Classes() {
		if c.String() == name {
			return c
		}
	}
	return fault.Internal
}

// serveCall serves one call of the host on s.
func serveCall(ctx context.Context, s *Stream, call CallFunc) {
	s.accept()
	defer context.AfterFunc(ctx, s.Reset)()
	in, out := records{r: bufio.NewReader(s)}, recordWriter{w: s}
	kind, request, err := in.next()
	if err != nil || kind != recordMessage {
		s.Reset()
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() { // the host says nothing more, but may go
		_, _ = io.Copy(io.Discard, in.r)
		cancel()
	})
	err = guardCall(func() error {
		return call(ctx, request, func(reply []byte) error {
			if len(reply) > MaxCall {
				return tooLong("reply", len(reply))
			}
			return out.write(recordMessage, reply)
		})
	})
	if err != nil {
		err = out.write(recordFailure, fmt.Appendf(nil, "%v\n%v", fault.Of(err), err))
	}
	if err != nil {
		s.Reset()
	}
	_ = s.Close()
	watch.Wait()
}

// guardCall makes a panic an error of the call: the agent has other callers.
func guardCall(call func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	return call()
}
