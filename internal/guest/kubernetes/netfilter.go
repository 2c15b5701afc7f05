package kubernetes

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// findNetfilter lists tables and chains of nf_tables, those that iptables makes
// there included. Chains refer to one another, so removing them is left to who
// made them.
func findNetfilter(l Leftovers) ([]Leftover, error) {
	if len(l.Chains) == 0 && len(l.Tables) == 0 {
		return nil, nil
	}
	tables, err := dumpNetfilter(unix.NFT_MSG_GETTABLE)
	if err != nil {
		return nil, fmt.Errorf("list the tables of nf_tables: %w", err)
	}
	var all []Leftover
	for _, t := range tables {
		if name := t[unix.NFTA_TABLE_NAME]; slices.Contains(l.Tables, name) {
			all = append(all, Leftover{What: "nf_tables table " + name})
		}
	}
	chains, err := dumpNetfilter(unix.NFT_MSG_GETCHAIN)
	if err != nil {
		return nil, fmt.Errorf("list the chains of nf_tables: %w", err)
	}
	for _, c := range chains {
		name := c[unix.NFTA_CHAIN_NAME]
		if slices.ContainsFunc(l.Chains, func(prefix string) bool { return strings.HasPrefix(name, prefix) }) {
			all = append(all, Leftover{What: fmt.Sprintf("chain %s of nf_tables table %s", name, c[unix.NFTA_CHAIN_TABLE])})
		}
	}
	return all, nil
}

// dumpNetfilter returns the attributes of all things of one kind, as far as
// they are text.
func dumpNetfilter(what int) ([]map[uint16]string, error) {
	var messages [][]byte
	var err error
	for range 10 { // the kernel starts anew when somebody changes rules meanwhile
		r := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|what, unix.NLM_F_DUMP)
		r.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: unix.NFNETLINK_V0})
		if messages, err = r.Execute(unix.NETLINK_NETFILTER, 0); !errors.Is(err, nl.ErrDumpInterrupted) {
			break
		}
	}
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.ENOENT):
		return nil, nil // a kernel without, or whose module nobody has needed yet
	case err != nil:
		return nil, err
	}
	var all []map[uint16]string
	for _, m := range messages {
		if len(m) < nl.SizeofNfgenmsg {
			continue
		}
		attributes, err := nl.ParseRouteAttr(m[nl.SizeofNfgenmsg:])
		if err != nil {
			return nil, err
		}
		one := map[uint16]string{}
		for _, a := range attributes {
			one[a.Attr.Type] = unix.ByteSliceToString(a.Value)
		}
		all = append(all, one)
	}
	return all, nil
}
