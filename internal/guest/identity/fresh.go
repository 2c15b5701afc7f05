package identity

import (
	"fmt"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fresh configures an interface that nobody has configured before, which is
// what every create meets: a handful of ioctls that look nothing up. It reports
// false, and has changed nothing, where the case is another one: the interface
// is up, has an address or does not exist, or IPv6 is asked for.
func (s ioctls) fresh(p LinkParams) (bool, error) {
	if !p.Address.Addr().Is4() || (p.Gateway.IsValid() && !p.Gateway.Is4()) {
		return false, nil
	}
	flags, err := s.flags()
	if err != nil || flags&unix.IFF_UP != 0 || s.hasAddress() {
		return false, nil // an error shows again on the other way, with its words
	}
	if p.MTU != 0 {
		if err := s.setMTU(p.MTU); err != nil {
			return true, fmt.Errorf("set MTU %d: %w", p.MTU, err)
		}
	}
	if err := s.setAddress(p.Address); err != nil {
		return true, fmt.Errorf("add address %s: %w", p.Address, err)
	}
	if err := s.up(); err != nil {
		return true, fmt.Errorf("bring it up: %w", err)
	}
	if p.Gateway.IsValid() {
		if err := s.addDefaultRoute(p.Gateway); err != nil {
			return true, fmt.Errorf("set default route by %s: %w", p.Gateway, err)
		}
	}
	return true, nil
}

// socket is what the ioctls of netdevice(7) are made on; below 0: not open.
type socket int

func (s *socket) open() error {
	if *s >= 0 {
		return nil
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a socket to configure the network: %w", err)
	}
	*s = socket(fd)
	return nil
}

// ioctls is one interface by the ioctls of netdevice(7).
type ioctls struct {
	socket
	name string
}

// do makes one request, with what set puts into it, and returns the answer.
func (s ioctls) do(request uint, set func(*unix.Ifreq) error) (*unix.Ifreq, error) {
	r, err := unix.NewIfreq(s.name)
	if err == nil && set != nil {
		err = set(r)
	}
	if err == nil {
		err = unix.IoctlIfreq(int(s.socket), request, r)
	}
	return r, err
}

func (s ioctls) flags() (uint16, error) {
	r, err := s.do(unix.SIOCGIFFLAGS, nil)
	if err != nil {
		return 0, err
	}
	return r.Uint16(), nil
}

func (s ioctls) up() error {
	flags, err := s.flags()
	if err != nil || flags&unix.IFF_UP != 0 {
		return err
	}
	_, err = s.do(unix.SIOCSIFFLAGS, func(r *unix.Ifreq) error {
		r.SetUint16(flags | unix.IFF_UP)
		return nil
	})
	return err
}

func (s ioctls) hasAddress() bool {
	_, err := s.do(unix.SIOCGIFADDR, nil)
	return err != unix.EADDRNOTAVAIL
}

func (s ioctls) setMTU(mtu int) error {
	_, err := s.do(unix.SIOCSIFMTU, func(r *unix.Ifreq) error {
		r.SetUint32(uint32(mtu))
		return nil
	})
	return err
}

func (s ioctls) setAddress(p netip.Prefix) error {
	address, mask := p.Addr().As4(), maskOf(p.Bits())
	if _, err := s.do(unix.SIOCSIFADDR, func(r *unix.Ifreq) error { return r.SetInet4Addr(address[:]) }); err != nil {
		return err
	}
	_, err := s.do(unix.SIOCSIFNETMASK, func(r *unix.Ifreq) error { return r.SetInet4Addr(mask[:]) })
	return err
}

func maskOf(bits int) [4]byte {
	m := uint32(0xffffffff) << (32 - bits)
	return [4]byte{byte(m >> 24), byte(m >> 16), byte(m >> 8), byte(m)}
}

// rtEntry is struct rtentry of linux/route.h.
type rtEntry struct {
	_                  uintptr
	dst, gateway, mask unix.RawSockaddrInet4
	flags              uint16
	_                  int16
	_                  uintptr
	_                  uintptr
	_                  int16 // metric
	device             *byte
	_, _               uintptr // MTU, window
	_                  uint16  // initial round trip time
}

func (s ioctls) addDefaultRoute(gateway netip.Addr) error {
	device, err := unix.BytePtrFromString(s.name)
	if err != nil {
		return err
	}
	inet := unix.RawSockaddrInet4{Family: unix.AF_INET}
	r := rtEntry{dst: inet, gateway: inet, mask: inet, flags: unix.RTF_UP | unix.RTF_GATEWAY, device: device}
	r.gateway.Addr = gateway.As4()
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s.socket), unix.SIOCADDRT, uintptr(unsafe.Pointer(&r)))
	if errno != 0 {
		return errno
	}
	return nil
}
