package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// nodeIP is the address that every guest has.
	nodeIP = "198.18.0.2"
	// nodeLink is the interface that holds the node's address beside eth0, which
	// has it only while the sandbox has a network.
	nodeLink = "hutch-node"
	// lastResort is the metric of the route that leads to nodeLink where no
	// other does: without any, addresses of Services could not be reached, which
	// get their real way only behind that decision.
	lastResort = 4096
)

// addNodeLink makes the interface of the node's address.
func addNodeLink(ip string) error {
	link, err := nodeInterface()
	if err != nil {
		return fmt.Errorf("make interface %s: %w", nodeLink, err)
	}
	address := &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(ip).To4(), Mask: net.CIDRMask(32, 32)}}
	if err := netlink.AddrReplace(link, address); err != nil {
		return fmt.Errorf("add its address: %w", err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring %s up: %w", nodeLink, err)
	}
	all := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: all, Scope: netlink.SCOPE_LINK, Priority: lastResort}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("set the last route: %w", err)
	}
	return nil
}

// nodeInterface returns the interface, which it makes when there is none. A
// bridge without ports does as well as a dummy, and a cluster needs bridges
// anyway.
func nodeInterface() (netlink.Link, error) {
	link, err := netlink.LinkByName(nodeLink)
	var missing netlink.LinkNotFoundError
	if !errors.As(err, &missing) {
		return link, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = nodeLink
	err = netlink.LinkAdd(&netlink.Dummy{LinkAttrs: attrs})
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
	}
	if err != nil {
		return nil, err
	}
	return netlink.LinkByName(nodeLink)
}

// dropLink removes an interface. None at all is fine.
func dropLink(name string) error {
	link, err := netlink.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil
	}
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil {
		return fmt.Errorf("remove interface %s: %w", name, err)
	}
	return nil
}

func findInterfaces(l Leftovers) ([]Leftover, error) {
	var all []Leftover
	for _, name := range l.Interfaces {
		_, err := netlink.LinkByName(name)
		var missing netlink.LinkNotFoundError
		if errors.As(err, &missing) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look for interface %s: %w", name, err)
		}
		all = append(all, Leftover{"interface " + name, func(context.Context) error { return dropLink(name) }})
	}
	return all, nil
}
