package identity

import (
	"bytes"
	"errors"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kept reports that an interface is what p says already, which is what every
// copy of a configured guest meets: a handful of ioctls, and no netlink. Other
// cases than IPv4 with a gateway it leaves to netlink. It may add the default
// route where that is missing, and then reports false.
func (s ioctls) kept(p LinkParams) bool {
	if !p.Address.Addr().Is4() || !p.Gateway.Is4() {
		return false
	}
	flags, err := s.flags()
	if err != nil || flags&unix.IFF_UP == 0 || !s.hasMTU(p.MTU) || !s.hasOnly(p.Address) {
		return false // an error shows again on the other way, with its words
	}
	return errors.Is(s.addDefaultRoute(p.Gateway), unix.EEXIST)
}

// hasMTU reports whether the interface has an MTU; 0: any will do.
func (s ioctls) hasMTU(mtu int) bool {
	if mtu == 0 {
		return true
	}
	r, err := s.do(unix.SIOCGIFMTU, nil)
	return err == nil && r.Uint32() == uint32(mtu)
}

// hasOnly reports whether the interface has that IPv4 address and no other.
func (s ioctls) hasOnly(want netip.Prefix) bool {
	if all, err := s.addresses(); err != nil || len(all) != 1 || all[0] != want.Addr() {
		return false
	}
	r, err := s.do(unix.SIOCGIFNETMASK, nil)
	if err != nil {
		return false
	}
	mask, err := r.Inet4Addr()
	is := maskOf(want.Bits())
	return err == nil && bytes.Equal(mask, is[:])
}

// ifAddress is struct ifreq of linux/if.h with an IPv4 address.
type ifAddress struct {
	label [unix.IFNAMSIZ]byte
	inet  unix.RawSockaddrInet4
	_     [8]byte
}

// ifConf is struct ifconf.
type ifConf struct {
	bytes int32
	list  *ifAddress
}

// addresses returns the IPv4 addresses of the interface, those with a label of
// their own included.
func (s ioctls) addresses() ([]netip.Addr, error) {
	var list [32]ifAddress
	conf := ifConf{bytes: int32(unsafe.Sizeof(list)), list: &list[0]}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s.socket), unix.SIOCGIFCONF, uintptr(unsafe.Pointer(&conf)))
	if errno != 0 {
		return nil, errno
	}
	n := int(conf.bytes) / int(unsafe.Sizeof(list[0]))
	if n >= len(list) {
		return nil, unix.E2BIG
	}
	var all []netip.Addr
	for _, a := range list[:n] {
		if name, _, _ := bytes.Cut(bytes.TrimRight(a.label[:], "\x00"), []byte{':'}); string(name) == s.name {
			all = append(all, netip.AddrFrom4(a.inet.Addr))
		}
	}
	return all, nil
}
