package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/sandbox"
)

const (
	eq  = expr.CmpOpEq
	neq = expr.CmpOpNeq
)

// Where our chains stand among others at the same hook.
const (
	priorityRaw       = -300
	priorityMangle    = -150
	priorityDestNAT   = -100
	priorityFilter    = 0
	prioritySourceNAT = 100
)

const dnsPort = 53

// hostRules is what the root's table on the host depends on. It has no rule
// and, for the default policy, no element per slot.
type hostRules struct {
	names     names
	owner     string // rootHash
	resolvers []netip.Addr
	policies  map[int]policy // of the slots whose policy isn't plain
}

func (h hostRules) table() *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: h.names.table()}
}

// The table's sets. owner tells which root the tag belongs to.
func ownerSet() *nftables.Set  { return linkSet("owner") }
func silentSet() *nftables.Set { return linkSet("silent") }
func closedSet() *nftables.Set { return linkSet("closed") }
func openSet() *nftables.Set {
	return &nftables.Set{Name: "open", Interval: true, Concatenation: true,
		KeyType: nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIPAddr)}
}

func (h hostRules) ownerElement() nftables.SetElement {
	return nftables.SetElement{Key: linkKey(h.names.prefix()), Comment: h.owner}
}

// marks are the elements that tell slot index's policy, by set.
func (h hostRules) marks(index int, p policy) map[string][]nftables.SetElement {
	link := linkKey(h.names.slot(index))
	out := map[string][]nftables.SetElement{}
	switch p.mode {
	case sandbox.ModeNone:
		out["silent"] = []nftables.SetElement{{Key: link}}
	case sandbox.ModeAllow:
		out["closed"] = []nftables.SetElement{{Key: link}}
	}
	for _, s := range p.open {
		out["open"] = append(out["open"], nftables.SetElement{
			Key:    binary.BigEndian.AppendUint32(linkKey(h.names.slot(index)), s.lo),
			KeyEnd: binary.BigEndian.AppendUint32(linkKey(h.names.slot(index)), s.hi),
		})
	}
	return out
}

func markSets() []*nftables.Set { return []*nftables.Set{silentSet(), closedSet(), openSet()} }

// load replaces the whole table.
func (h hostRules) load(c *nftables.Conn) error {
	r := replaceTable(c, nftables.TableFamilyINet, h.names.table())
	r.set(ownerSet(), []nftables.SetElement{h.ownerElement()})
	marks := map[string][]nftables.SetElement{}
	for index, p := range h.policies {
		for name, elements := range h.marks(index, p) {
			marks[name] = append(marks[name], elements...)
		}
	}
	sets := map[string]*nftables.Set{}
	for _, s := range markSets() {
		sets[s.Name] = r.set(s, marks[s.Name])
	}
	refuse := r.refuseChain()
	h.guard(r)
	h.filter(r, sets, refuse)
	h.outside(r)
	return r.flush()
}

// guard drops what does not come from the slot's own address.
func (h hostRules) guard(r *rules) {
	c := r.base(base{name: "guard", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, prio: priorityRaw})
	r.add(c, fromAny(h.names.prefix()), isIPv6(), drop())
	r.add(c, fromAny(h.names.prefix()), noWayBack(), drop())
}

func (h hostRules) filter(r *rules, sets map[string]*nftables.Set, refuse *nftables.Chain) {
	hutch := r.set(spanSet("hutch"), spanElements(hutchSpans()))
	hosts := r.set(spanSet("slots"), spanElements(spansOf(HostRange)))
	refused := r.set(spanSet("refused"), spanElements(refusedSpans()))
	resolvers := r.set(addrSet("resolvers"), addrElements(h.resolvers))
	toResolver := func(c *nftables.Chain) {
		for _, p := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			r.add(c, toSet(resolvers), proto(p), toPort(dnsPort), accept())
		}
	}
	mine := h.names.prefix()

	toHost := r.chain("to-host")
	r.add(toHost, known(), accept())
	r.add(toHost, fromLinkSet(sets["silent"]), pass(refuse))
	toResolver(toHost)
	r.add(toHost, pass(refuse))

	toSlot := r.chain("to-slot")
	r.add(toSlot, known(), accept())
	r.add(toSlot, pass(refuse))

	fromSlot := r.chain("from-slot")
	r.add(fromSlot, known(), accept())
	r.add(fromSlot, invalid(), drop())
	r.add(fromSlot, toSet(hutch), pass(refuse))
	r.add(fromSlot, fromLinkToSet(sets["open"]), accept())
	r.add(fromSlot, fromLinkSet(sets["silent"]), pass(refuse))
	toResolver(fromSlot)
	r.add(fromSlot, fromLinkSet(sets["closed"]), pass(refuse))
	r.add(fromSlot, toSet(refused), pass(refuse))
	r.add(fromSlot, accept())

	in := r.base(base{name: "input", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, prio: priorityFilter})
	r.add(in, fromAny(mine), pass(toHost))
	forward := r.base(base{name: "forward", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, prio: priorityFilter})
	r.add(forward, fromAny(mine), pass(fromSlot))
	r.add(forward, toAny(mine), pass(toSlot))
	r.add(forward, notToAny(anyPrefix), toSet(hosts), pass(refuse))
	// A slot that is gone: say so, instead of asking the default gateway.
	out := r.base(base{name: "output", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookOutput, prio: priorityFilter})
	r.add(out, notToAny(anyPrefix), toSet(hosts), pass(refuse))
}

// outside makes the slots' packets fit for where they leave the host.
func (h hostRules) outside(r *rules) {
	mss := r.base(base{name: "segment-size", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, prio: priorityMangle})
	r.add(mss, fromAny(h.names.prefix()), isIPv4(), lowerMSS())
	post := r.base(base{name: "postrouting", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, prio: prioritySourceNAT})
	r.add(post, fromAny(h.names.prefix()), isIPv4(), notToAny(anyPrefix), masquerade())
}

// change replaces the marks of slot index. The table must exist.
func (h hostRules) change(c *nftables.Conn, index int, from, to policy) error {
	r := &rules{conn: c, table: h.table()}
	before, after := h.marks(index, from), h.marks(index, to)
	for _, s := range markSets() {
		s.Table = r.table
		if old := before[s.Name]; len(old) > 0 {
			if err := c.SetDeleteElements(s, old); err != nil {
				return fmt.Errorf("delete elements of set %s: %w", s.Name, err)
			}
		}
		r.elements(s, after[s.Name])
	}
	return r.flush()
}

// find tells whether the table exists and which root it belongs to.
func (h hostRules) find(c *nftables.Conn) (exists bool, owner string, err error) {
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, "", fmt.Errorf("list nftables tables: %w", err)
	}
	for _, t := range tables {
		exists = exists || t.Name == h.names.table()
	}
	if !exists {
		return false, "", nil
	}
	s := ownerSet()
	s.Table = h.table()
	elements, err := c.GetSetElements(s)
	if gone(err) {
		return true, "", nil // somebody else's table
	}
	if err != nil {
		return true, "", fmt.Errorf("read owner of nftables table %s: %w", h.names.table(), err)
	}
	for _, e := range elements {
		owner = e.Comment
	}
	return true, owner, nil
}

// read tells the policies that the table marks. A set that is not there, as in
// a table of another version, counts as empty.
func (h hostRules) read(c *nftables.Conn) (map[int]policy, error) {
	out := map[int]policy{}
	for _, s := range markSets() {
		s.Table = h.table()
		elements, err := c.GetSetElements(s)
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read set %s: %w", s.Name, err)
		}
		for _, e := range elements {
			h.readMark(out, s.Name, e)
		}
	}
	return out, nil
}

func (h hostRules) readMark(out map[int]policy, set string, e nftables.SetElement) {
	if len(e.Key) < unix.IFNAMSIZ {
		return
	}
	index, ok := h.names.index(strings.TrimRight(string(e.Key[:unix.IFNAMSIZ]), "\x00"))
	if !ok {
		return
	}
	p, seen := out[index]
	if !seen {
		p = defaultPolicy()
	}
	switch {
	case set == "silent":
		p.mode = sandbox.ModeNone
	case set == "closed":
		p.mode = sandbox.ModeAllow
	case len(e.Key) == unix.IFNAMSIZ+4 && len(e.KeyEnd) == unix.IFNAMSIZ+4:
		p.open = merge(append(p.open, span{binary.BigEndian.Uint32(e.Key[unix.IFNAMSIZ:]), binary.BigEndian.Uint32(e.KeyEnd[unix.IFNAMSIZ:])}))
	}
	out[index] = p
}

// remove takes the table away. That it is not there is no error.
func (h hostRules) remove(c *nftables.Conn) error {
	t := h.table()
	c.AddTable(t)
	c.DelTable(t)
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove nftables table %s: %w", t.Name, err)
	}
	return nil
}
