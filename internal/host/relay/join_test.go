package relay

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"

	"github.com/hutch-run/hutch/internal/testenv"
)

// pair returns both ends of a Unix socket.
func pair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
		ends[i] = c.(*net.UnixConn)
		t.Cleanup(func() { _ = c.Close() })
	}
	return ends[0], ends[1]
}

// joined returns a caller and a guest with a Join between them, and what waits
// for its end.
func joined(t testing.TB, buffers *Buffers) (caller, guest *net.UnixConn, wait func()) {
	t.Helper()
	caller, near := pair(t)
	far, guest := pair(t)
	var wg sync.WaitGroup
	wg.Go(func() { Join(NewConn(near, nil), NewConn(far, nil), buffers) })
	t.Cleanup(wg.Wait)
	return caller, guest, wg.Wait
}

func TestJoinHalfClose(t *testing.T) {
	testenv.CheckGoroutines(t)
	var buffers Buffers
	for i := range 1000 {
		caller, guest, wait := joined(t, &buffers)
		first, second := caller, guest
		if i%2 == 1 {
			first, second = guest, caller
		}
		fmt.Fprintf(first, "said %d", i)
		if err := first.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(second); err != nil || string(b) != fmt.Sprintf("said %d", i) {
			t.Fatalf("%d: %q, %v", i, b, err)
		}
		fmt.Fprintf(second, "answered %d", i)
		_ = second.CloseWrite()
		if b, err := io.ReadAll(first); err != nil || string(b) != fmt.Sprintf("answered %d", i) {
			t.Fatalf("%d: answer %q, %v", i, b, err)
		}
		wait() // both ends are still open here
		_ = caller.Close()
		_ = guest.Close()
	}
}

// TestJoinGuestReadsNoMore: a guest that closes its reading side still has all
// that it says carried, while the caller goes on sending.
func TestJoinGuestReadsNoMore(t *testing.T) {
	testenv.CheckGoroutines(t)
	caller, guest, wait := joined(t, new(Buffers))
	_ = guest.CloseRead()
	var sending sync.WaitGroup
	sending.Go(func() {
		for {
			if _, err := caller.Write(make([]byte, 8<<10)); err != nil {
				return
			}
		}
	})
	want := bytes.Repeat([]byte("all of it "), 1<<16)
	sending.Go(func() {
		_, _ = guest.Write(want)
		_ = guest.Close()
	})
	if got, err := io.ReadAll(caller); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d of %d bytes, %v", len(got), len(want), err)
	}
	_ = caller.Close()
	sending.Wait()
	wait()
}

// TestJoinCallerGone: a caller that only ended its side is waited for, one that
// is gone as a whole is not.
func TestJoinCallerGone(t *testing.T) {
	testenv.CheckGoroutines(t)
	for _, half := range []bool{true, false} {
		caller, guest, wait := joined(t, new(Buffers))
		_, _ = caller.Write([]byte("x"))
		if half {
			_ = caller.CloseWrite()
			if b, err := io.ReadAll(guest); err != nil || string(b) != "x" {
				t.Fatalf("%q, %v", b, err)
			}
			if _, err := guest.Write([]byte("there?")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(caller, make([]byte, 6)); err != nil {
				t.Fatalf("a caller that ended its side: %v", err)
			}
		}
		_ = caller.Close()
		wait() // though the guest says nothing
		if b, err := io.ReadAll(guest); err != nil || half != (len(b) == 0) {
			t.Errorf("the guest read %q, %v", b, err)
		}
	}
}

func TestJoinGuestDies(t *testing.T) {
	testenv.CheckGoroutines(t)
	caller, guest, wait := joined(t, new(Buffers))
	_, _ = guest.Write([]byte("bye"))
	_ = guest.Close()
	if b, err := io.ReadAll(caller); err != nil || string(b) != "bye" {
		t.Errorf("%q, %v", b, err)
	}
	_ = caller.Close()
	wait()
}
