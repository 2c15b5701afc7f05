package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	nl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const tunDevice = "/dev/net/tun"

// attachTap opens the tap of the namespace that the thread is in, and makes it
// if it is not there.
func attachTap() (*os.File, error) {
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", tunDevice, err)
	}
	ifr, err := unix.NewIfreq(tapName)
	if err == nil {
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("attach to %s: %w", tapName, err)
	}
	return os.NewFile(uintptr(fd), tapName), nil
}

// makeTap makes the tap so that it stays when nobody has it open. Only root
// may attach to it.
func makeTap() error {
	f, err := attachTap()
	if err != nil {
		return err
	}
	raw, err := f.SyscallConn()
	if err == nil {
		var ioctl error
		err = raw.Control(func(fd uintptr) {
			ioctl = errors.Join(unix.IoctlSetInt(int(fd), unix.TUNSETOWNER, 0), unix.IoctlSetInt(int(fd), unix.TUNSETPERSIST, 1))
		})
		err = errors.Join(err, ioctl)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("make %s: %w", tapName, err)
	}
	return nil
}

// tapUpTimeout is how long the kernel may take to bring an attached tap up. It
// takes a millisecond or so.
const tapUpTimeout = 5 * time.Second

// openTap attaches to the tap of the namespace that the thread is in and
// returns when it passes packets: the kernel drops those for a tap that was
// attached just now, and a guest that was restored may send its first at once.
func openTap(ctx context.Context) (*os.File, error) {
	events, err := nl.Dial(unix.NETLINK_ROUTE, &nl.Config{Groups: unix.RTMGRP_LINK})
	if err != nil {
		return nil, fmt.Errorf("open link events: %w", err)
	}
	defer events.Close()
	tap, err := attachTap()
	if err != nil {
		return nil, err
	}
	if err := waitUp(ctx, events, tapName); err != nil {
		tap.Close()
		return nil, fmt.Errorf("wait for %s to come up: %w", tapName, err)
	}
	return tap, nil
}

// waitUp returns when link name passes packets. events must have been opened
// before, in the same namespace.
func waitUp(ctx context.Context, events *nl.Conn, name string) error {
	ctx, cancel := context.WithTimeout(ctx, tapUpTimeout)
	defer cancel()
	unblock := context.AfterFunc(ctx, func() { events.SetReadDeadline(time.Unix(1, 0)) })
	defer unblock()
	return withRoutes(func(h *netlink.Handle) error {
		for {
			link, err := h.LinkByName(name)
			if err != nil {
				return err
			}
			if link.Attrs().OperState == netlink.OperUp {
				return nil
			}
			if _, err := events.Receive(); err != nil && !errors.Is(err, unix.ENOBUFS) {
				return errors.Join(err, ctx.Err())
			}
		}
	})
}

// tapStats reads the counters of the tap of the namespace that the thread is
// in. What the tap sends, the sandbox receives.
func tapStats() (Stats, error) {
	var out Stats
	err := withRoutes(func(h *netlink.Handle) error {
		link, err := h.LinkByName(tapName)
		if err != nil {
			return fmt.Errorf("read counters of %s: %w", tapName, err)
		}
		if s := link.Attrs().Statistics; s != nil {
			out = Stats{RxBytes: s.TxBytes, TxBytes: s.RxBytes, RxPackets: s.TxPackets, TxPackets: s.RxPackets}
		}
		return nil
	})
	return out, err
}
