package ports

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
)

// publishedLocked is bd as callers see it. The table's mu is held.
func (bd *binding) publishedLocked() Published {
	p := Published{
		Sandbox: bd.owner.box.id, Owner: bd.owner.id, Name: bd.owner.name,
		Binding: bd.Binding, Port: bd.port, Problem: bd.note,
	}
	for _, l := range slices.Concat(bd.open, bd.shared) {
		p.Addresses = append(p.Addresses, l.key.at.Addr())
	}
	slices.SortFunc(p.Addresses, netip.Addr.Compare)
	if bd.err != nil {
		p.Problem = strings.ReplaceAll(bd.err.Error(), "\n", "; ")
		if bd.note != "" {
			p.Problem = bd.note + "; " + p.Problem
		}
	}
	return p
}

func comparePublished(a, b Published) int {
	return cmp.Or(
		strings.Compare(string(a.Sandbox), string(b.Sandbox)), strings.Compare(a.Owner, b.Owner), strings.Compare(a.Protocol, b.Protocol),
		strings.Compare(a.HostIP, b.HostIP), cmp.Compare(a.Port, b.Port), cmp.Compare(a.ContainerPort, b.ContainerPort),
	)
}
