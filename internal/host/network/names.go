package network

import (
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"strconv"
	"strings"
)

// MaxSlots is the number of slots that can really be used on one host, by all
// hutch roots on it together. The limit is the host's end of the veth, which
// has address 198.18.0.0 + 3 + n: it must stay below 198.18.255.255, and above
// the four addresses that every sandbox knows. Names end at 65535
// ("hu-" + 6 + "-" + 5 digits are the 15 bytes that a name may have).
const MaxSlots = 65531

const (
	anyPrefix  = "hu-"   // every interface of every hutch on the host
	tapName    = "tap0"  // in the slot: towards the guest
	uplinkName = "host0" // in the slot: towards the host
	guestIP    = "198.18.0.2"
	uplinkMAC  = "02:68:74:63:68:04"
	vethMAC    = "02:68:74:63:68:03"
)

// names makes the names of one root's things. The tag in them tells the roots
// of one host apart.
type names struct {
	tag string // 6 hex digits
}

// rootHash is what tells two roots apart beyond their tags.
func rootHash(root string) string {
	sum := sha256.Sum256([]byte(root))
	return hex.EncodeToString(sum[:16])
}

// tagOf is the root's tag. A tag that another root holds already is passed
// over by a higher attempt.
func tagOf(root string, attempt int) string {
	sum := sha256.Sum256([]byte(strconv.Itoa(attempt) + "\x00" + root))
	return hex.EncodeToString(sum[:3])
}

// prefix begins the name of every interface and namespace of the root.
func (n names) prefix() string { return anyPrefix + n.tag + "-" }

// table is the root's nftables table on the host.
func (n names) table() string { return "hutch-" + n.tag }

// slot names the host's interface and the namespace file of slot index.
func (n names) slot(index int) string { return n.prefix() + strconv.Itoa(index) }

// index is the inverse of slot; ok is false for any other name.
func (n names) index(name string) (index int, ok bool) {
	digits, found := strings.CutPrefix(name, n.prefix())
	if !found {
		return 0, false
	}
	index, err := strconv.Atoi(digits)
	if err != nil || index < 1 || index > MaxSlots || n.slot(index) != name {
		return 0, false
	}
	return index, true
}

func offset(base string, by int) netip.Addr {
	b := netip.MustParseAddr(base).As4()
	v := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	return addrOf(v + uint32(by))
}

func addrOf(v uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)})
}

// hostIPOf is the sandbox of slot index, as the host sees it.
func hostIPOf(index int) netip.Addr { return offset("198.19.0.0", index) }

// indexOf is the inverse of hostIPOf; ok is false outside of the slots.
func indexOf(a netip.Addr) (index int, ok bool) {
	if !a.Is4() {
		return 0, false
	}
	b := a.As4()
	index = int(b[2])<<8 | int(b[3])
	return index, b[0] == 198 && b[1] == 19 && index >= 1 && index <= MaxSlots
}

// vethIPOf is the host's own end of slot index.
func vethIPOf(index int) netip.Addr { return offset("198.18.0.0", index+3) }
