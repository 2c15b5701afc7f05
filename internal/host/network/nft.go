package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	nl "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// elementsPerMessage keeps a message with elements below the 64 KiB that one
// netlink attribute can hold.
const elementsPerMessage = 400

// A transaction is one message to the kernel, and the kernel's answers, one
// per part of it, all come before the first can be read: room for the marks
// of all slots.
const (
	sendBuffer    = 32 << 20
	receiveBuffer = 4 << 20
)

func roomy(s *nl.Conn) error {
	return errors.Join(s.SetWriteBuffer(sendBuffer), s.SetReadBuffer(receiveBuffer))
}

// withNft runs fn with a connection to the nftables of the network namespace
// that the calling thread is in. Every transaction has a connection of its
// own, so that a failed one leaves nothing behind for the next.
func withNft(fn func(*nftables.Conn) error) error {
	c, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(roomy))
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	return errors.Join(fn(c), c.CloseLasting())
}

// rules writes one table. The first error stays and comes back from flush.
type rules struct {
	conn  *nftables.Conn
	table *nftables.Table
	sets  uint32 // how many were added: their ids within the transaction
	err   error
}

// newTable begins the content of a table that is not there yet.
func newTable(c *nftables.Conn, family nftables.TableFamily, name string) *rules {
	return &rules{conn: c, table: c.AddTable(&nftables.Table{Family: family, Name: name})}
}

// replaceTable begins the content of a table that may be there: in the same
// instant as the new content appears, what it held before is gone.
func replaceTable(c *nftables.Conn, family nftables.TableFamily, name string) *rules {
	t := &nftables.Table{Family: family, Name: name}
	c.AddTable(t)
	c.DelTable(t)
	return newTable(c, family, name)
}

// flush sends the transaction.
func (r *rules) flush() error {
	if r.err != nil {
		return r.err
	}
	if err := r.conn.Flush(); err != nil {
		return fmt.Errorf("load nftables table %s: %w", r.table.Name, err)
	}
	return nil
}

// base describes a chain that the kernel calls.
type base struct {
	name   string
	kind   nftables.ChainType
	hook   *nftables.ChainHook
	prio   int32
	drop   bool
	device string
}

func (r *rules) base(b base) *nftables.Chain {
	pol := nftables.ChainPolicyAccept
	if b.drop {
		pol = nftables.ChainPolicyDrop
	}
	return r.conn.AddChain(&nftables.Chain{
		Name: b.name, Table: r.table, Type: b.kind, Hooknum: b.hook,
		Priority: nftables.ChainPriorityRef(nftables.ChainPriority(b.prio)), Policy: &pol, Device: b.device,
	})
}

func (r *rules) chain(name string) *nftables.Chain {
	return r.conn.AddChain(&nftables.Chain{Name: name, Table: r.table})
}

// add appends a rule made of parts to c.
func (r *rules) add(c *nftables.Chain, parts ...part) {
	var exprs []expr.Any
	for _, p := range parts {
		exprs = append(exprs, p...)
	}
	r.conn.AddRule(&nftables.Rule{Table: r.table, Chain: c, Exprs: exprs})
}

// set adds s with its elements, in pieces that fit a message.
func (r *rules) set(s *nftables.Set, elements []nftables.SetElement) *nftables.Set {
	r.sets++
	s.Table, s.ID = r.table, r.sets // the library's own ids are not safe for concurrent use
	if err := r.conn.AddSet(s, nil); err != nil {
		r.err = errors.Join(r.err, fmt.Errorf("add set %s: %w", s.Name, err))
		return s
	}
	r.elements(s, elements)
	return s
}

func (r *rules) elements(s *nftables.Set, elements []nftables.SetElement) {
	for len(elements) > 0 {
		n := min(len(elements), elementsPerMessage)
		if err := r.conn.SetAddElements(s, elements[:n]); err != nil {
			r.err = errors.Join(r.err, fmt.Errorf("add elements to set %s: %w", s.Name, err))
			return
		}
		elements = elements[n:]
	}
}

func spanSet(name string) *nftables.Set {
	return &nftables.Set{Name: name, KeyType: nftables.TypeIPAddr, Interval: true}
}

// spanElements are the elements of an interval set: the first address of each
// span, and the first one behind it as an end. A span that reaches the last
// address has no end, for there is no address behind it.
func spanElements(spans []span) []nftables.SetElement {
	var out []nftables.SetElement
	for _, s := range spans {
		out = append(out, nftables.SetElement{Key: be32(s.lo)})
		if s.hi != ^uint32(0) {
			out = append(out, nftables.SetElement{Key: be32(s.hi + 1), IntervalEnd: true})
		}
	}
	return out
}

func addrSet(name string) *nftables.Set {
	return &nftables.Set{Name: name, KeyType: nftables.TypeIPAddr, KeyByteOrder: binaryutil.BigEndian}
}

func addrElements(addrs []netip.Addr) []nftables.SetElement {
	var out []nftables.SetElement
	for _, a := range addrs {
		out = append(out, nftables.SetElement{Key: a.AsSlice()})
	}
	return out
}

func linkSet(name string) *nftables.Set {
	return &nftables.Set{Name: name, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian}
}

func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }

// linkKey is an interface name as the kernel compares it.
func linkKey(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// part is a piece of a rule: one match or one verdict. Parts use register 1
// and, where a key is joined of two values, the 4-byte register behind it.
type part []expr.Any

func meta(key expr.MetaKey, op expr.CmpOp, value []byte) part {
	return part{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: value}}
}

// fromLink and toLink match one interface; the Any forms match every
// interface whose name begins with prefix.
func fromLink(name string) part { return meta(expr.MetaKeyIIFNAME, expr.CmpOpEq, linkKey(name)) }
func toLink(name string) part   { return meta(expr.MetaKeyOIFNAME, expr.CmpOpEq, linkKey(name)) }
func fromAny(prefix string) part {
	return meta(expr.MetaKeyIIFNAME, expr.CmpOpEq, []byte(prefix))
}
func toAny(prefix string) part { return meta(expr.MetaKeyOIFNAME, expr.CmpOpEq, []byte(prefix)) }
func notToAny(prefix string) part {
	return meta(expr.MetaKeyOIFNAME, expr.CmpOpNeq, []byte(prefix))
}

func isIPv4() part { return meta(expr.MetaKeyNFPROTO, expr.CmpOpEq, []byte{unix.NFPROTO_IPV4}) }
func isIPv6() part { return meta(expr.MetaKeyNFPROTO, expr.CmpOpEq, []byte{unix.NFPROTO_IPV6}) }
func proto(p byte) part {
	return meta(expr.MetaKeyL4PROTO, expr.CmpOpEq, []byte{p})
}
func etherType(t uint16) part { return meta(expr.MetaKeyPROTOCOL, expr.CmpOpEq, be16(t)) }

func load(b expr.PayloadBase, at, length uint32) expr.Any {
	return &expr.Payload{DestRegister: 1, Base: b, Offset: at, Len: length}
}

func payload(b expr.PayloadBase, at uint32, op expr.CmpOp, value []byte) part {
	return part{load(b, at, uint32(len(value))), &expr.Cmp{Op: op, Register: 1, Data: value}}
}

// Offsets in the headers of Ethernet, ARP over Ethernet, IPv4, TCP and UDP.
const (
	atEtherSource  = 6
	atARPSenderMAC = 8
	atARPSenderIP  = 14
	atIPSource     = 12
	atIPDest       = 16
	atDestPort     = 2
	atTCPFlags     = 13
	atICMPType     = 0
)

const (
	linkHeader = expr.PayloadBaseLLHeader
	netHeader  = expr.PayloadBaseNetworkHeader
	l4Header   = expr.PayloadBaseTransportHeader
)

func mac(text string) []byte {
	hw, err := net.ParseMAC(text)
	if err != nil {
		panic(err) // the addresses are constants of this package
	}
	return hw
}

func notFrom(a netip.Addr) part {
	return append(isIPv4(), payload(netHeader, atIPSource, expr.CmpOpNeq, a.AsSlice())...)
}
func to(a netip.Addr) part {
	return append(isIPv4(), payload(netHeader, atIPDest, expr.CmpOpEq, a.AsSlice())...)
}
func notTo(a netip.Addr) part {
	return append(isIPv4(), payload(netHeader, atIPDest, expr.CmpOpNeq, a.AsSlice())...)
}

func toSet(s *nftables.Set) part {
	return append(isIPv4(), load(netHeader, atIPDest, 4),
		&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID})
}

func fromLinkSet(s *nftables.Set) part {
	return part{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID}}
}

// fromLinkToSet matches the pair of incoming interface and destination. The
// name fills register 1, which is 16 bytes long and begins at the 4-byte
// register 8; the address goes behind it, into 4-byte register 12.
func fromLinkToSet(s *nftables.Set) part {
	return append(isIPv4(),
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Payload{DestRegister: unix.NFT_REG32_00 + 4, Base: netHeader, Offset: atIPDest, Len: 4},
		&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID})
}

func toPort(p uint16) part { return payload(l4Header, atDestPort, expr.CmpOpEq, be16(p)) }

func masked(first expr.Any, mask, want []byte, op expr.CmpOp) part {
	return part{first,
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(len(mask)), Mask: mask, Xor: make([]byte, len(mask))},
		&expr.Cmp{Op: op, Register: 1, Data: want}}
}

func tcpFlags(mask, want byte) part {
	return append(proto(unix.IPPROTO_TCP), masked(load(l4Header, atTCPFlags, 1), []byte{mask}, []byte{want}, expr.CmpOpEq)...)
}

func icmpType(t byte) part {
	return append(isIPv4(), append(proto(unix.IPPROTO_ICMP), payload(l4Header, atICMPType, expr.CmpOpEq, []byte{t})...)...)
}

// flow matches connections by any of the given bits of a conntrack word.
func flow(key expr.CtKey, bits uint32) part {
	return masked(&expr.Ct{Key: key, Register: 1}, binaryutil.NativeEndian.PutUint32(bits), make([]byte, 4), expr.CmpOpNeq)
}

func known() part {
	return flow(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)
}
func invalid() part { return flow(expr.CtKeySTATE, expr.CtStateBitINVALID) }

// translated matches connections whose destination one of our rules changed:
// IPS_DST_NAT of nf_conntrack_common.h.
func translated() part { return flow(expr.CtKeySTATUS, 1<<5) }

// noWayBack matches packets whose source is not reached through the interface
// that they came in by.
func noWayBack() part {
	return append(isIPv4(), &expr.Fib{Register: 1, FlagSADDR: true, FlagIIF: true, ResultOIF: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: make([]byte, 4)})
}

func faster(perSecond uint64, burst uint32) part {
	return part{&expr.Limit{Type: expr.LimitTypePkts, Rate: perSecond, Unit: expr.LimitTimeSecond, Burst: burst, Over: true}}
}

func moreFlowsThan(n uint32) part {
	return part{&expr.Connlimit{Count: n, Flags: expr.NFT_CONNLIMIT_F_INV}}
}

// lowerMSS lowers the segment size that a SYN asks for to what its route can
// carry. Option 2 is the maximum segment size, two bytes long at offset 2.
func lowerMSS() part {
	return append(tcpFlags(0x06, 0x02), // SYN set, RST not
		&expr.Rt{Register: 1, Key: expr.RtTCPMSS},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 2, Size: 2},
		&expr.Exthdr{SourceRegister: 1, Type: 2, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt})
}

func accept() part { return part{&expr.Verdict{Kind: expr.VerdictAccept}} }
func drop() part   { return part{&expr.Verdict{Kind: expr.VerdictDrop}} }
func pass(c *nftables.Chain) part {
	return part{&expr.Verdict{Kind: expr.VerdictGoto, Chain: c.Name}}
}

// changeDest and changeSource translate an address to a.
func changeDest(a netip.Addr) part   { return translate(expr.NATTypeDestNAT, a) }
func changeSource(a netip.Addr) part { return translate(expr.NATTypeSourceNAT, a) }

func translate(t expr.NATType, a netip.Addr) part {
	return part{&expr.Immediate{Register: 1, Data: a.AsSlice()},
		&expr.NAT{Type: t, Family: unix.NFPROTO_IPV4, RegAddrMin: 1}}
}

func masquerade() part { return part{&expr.Masq{}} }

// refuseChain adds a chain that ends a packet so that its sender knows at
// once: a reset for TCP, "administratively prohibited" for the rest.
func (r *rules) refuseChain() *nftables.Chain {
	c := r.chain("refuse")
	r.add(c, proto(unix.IPPROTO_TCP), part{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}})
	r.add(c, part{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}})
	return c
}

// gone reports whether err says that the thing does not exist.
func gone(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV)
}
