// Package network gives every sandbox a place in the network: a slot.
//
// It owns the network namespaces, veths, taps, routes, nftables tables and
// flows of one hutch root, their addresses and names, the policies on them,
// and what guests' questions for names are translated to. It never starts
// another program, never touches tables, links or settings of others (but for
// turning IPv4 forwarding on), and never knows a VMM: it hands out a tap.
//
// # The path of a packet
//
//	 guest           slot's own netns                                host
//	┌───────────────┐ ┌─────────────────────────────────────────────┐ ┌─────────────────────────────┐
//	│ eth0          │ │ tap0            forward            host0    │ │ hu-3fa2c1-5         eth0    │
//	│ 198.18.0.2/30─┼─┼─198.18.0.1/30 ─ policy ─ SNAT ─ 198.19.0.5──┼─┼─198.18.0.8  policy  masq. ──┼─► internet
//	│ fixed MAC     │ │ source check    (or DNAT of DNS)            │ │ source check                │
//	└───────────────┘ └─────────────────────────────────────────────┘ └─────────────────────────────┘
//
//	host_ip 198.19.0.5 = 198.19.0.0 + slot index; veth end 198.18.0.8 = 198.18.0.0 + 3 + index
//
// Every guest has the same addresses, so any snapshot fits any slot. What tells
// sandboxes apart, host_ip, exists outside of the guest only: packets from
// the host to host_ip are translated to 198.18.0.2 inside the slot, and seem
// to the guest to come from its gateway. So a guest never learns an address
// of the host or its own host_ip, and networks inside the guest (Docker's,
// Kubernetes') cannot collide with the host's.
//
// The veth's host end has an address of its own, a /32, so that the host has
// a source address for the slot even when it has no other network. Neighbours
// are set for ever on both ends and on the tap: the kernel's neighbour table
// holds 1024 learned entries for all namespaces together, permanent ones are
// not counted, and guests cannot add any.
//
// # Policies
//
// The policy stands twice, each by itself enough. In the slot, where the VMM
// runs unprivileged and can't change it; and on the host, in the root's table.
// Should a VMM turn hostile it can open sockets in the slot's namespace, but
// the output chain there lets only refusals out.
//
//	            198.18/15 (slots, gateway) and the host   private, metadata, reserved   public   DNS by the gateway
//	internet    refused                                   refused                       yes      yes
//	allow       refused                                   refused                       refused  yes
//	none        refused                                   refused                       refused  refused
//	+ prefixes  refused                                   those listed                  those    as the mode
//
// Refused means a TCP reset or "administratively prohibited" at once; frames
// with a wrong source, IPv6 and broadcasts are dropped without a word. New
// connections are limited to 500 a second and 8192 open ones per sandbox, since
// the host's connection table is shared by all.
//
// # The rules of a slot
//
//	table netdev hutch {
//	  chain source { type filter hook ingress device tap0 priority 0; policy drop
//	    ether saddr != GuestMAC drop
//	    ip saddr 198.18.0.2 accept
//	    arp saddr ether GuestMAC arp saddr ip 198.18.0.2 accept
//	  }
//	}
//	table inet hutch {
//	  set martian { 0.0.0.0/8, 127.0.0.0/8 }   set hutch { 198.18.0.0/15 }
//	  set open { the policy's prefixes }       set refused { private, link-local, multicast, reserved … }
//	  chain guard { type filter hook prerouting priority raw; policy accept
//	    meta nfproto ipv6 drop
//	    iifname host0 ip daddr != HOSTIP drop
//	    iifname tap0 ip saddr != 198.18.0.2 drop
//	    iifname tap0 ip daddr @martian goto refuse
//	  }
//	  chain prerouting { type nat hook prerouting priority dstnat
//	    iifname host0 ip daddr HOSTIP dnat to 198.18.0.2
//	    iifname tap0 ip daddr 198.18.0.1 udp dport 53 dnat to RESOLVER1   # and tcp; not for mode none
//	    …                     198.18.0.53, .54: RESOLVER2, 3
//	  }
//	  chain postrouting { type nat hook postrouting priority srcnat
//	    oifname host0 snat to HOSTIP
//	    oifname tap0 snat to 198.18.0.1
//	  }
//	  chain input  { type filter hook input; policy drop
//	    iifname tap0 goto refuse
//	  }
//	  chain output { type filter hook output; policy drop
//	    icmp type { destination-unreachable, time-exceeded } accept
//	    oifname tap0 tcp flags rst accept
//	  }
//	  chain forward { type filter hook forward; policy drop
//	    ct state established,related accept
//	    ct state invalid drop
//	    iifname host0 oifname tap0 ct status dnat accept
//	    iifname host0 drop
//	    ct status dnat goto permit          # DNS
//	    ip daddr @hutch goto refuse
//	    ip daddr @open goto permit
//	    goto refuse                         # modes none and allow end here
//	    ip daddr @refused goto refuse       # mode internet instead
//	    goto permit
//	  }
//	  chain permit { limit rate over 500/second burst 2000 drop; ct count over 8192 goto refuse; accept }
//	  chain refuse { meta l4proto tcp reject with tcp reset; reject with icmpx admin-prohibited }
//	}
//
// # The rules of the host
//
// One table per root. It has no rule per slot, and elements only for slots
// whose policy isn't the default. When somebody takes it away, as "nft flush
// ruleset" does, it is loaded again at once.
//
//	table inet hutch-3fa2c1 {
//	  set owner { ifname: the root's prefix, commented with a hash of the root }
//	  set silent { ifname: mode none }   set closed { ifname: mode allow }
//	  set open { ifname . ipv4_addr, interval: prefixes }
//	  set resolvers { … }   set refused { as above }   set hutch { 198.18.0.0/15 }   set slots { 198.19.0.0/16 }
//	  chain guard { type filter hook prerouting priority raw; policy accept
//	    iifname "hu-3fa2c1-*" meta nfproto ipv6 drop
//	    iifname "hu-3fa2c1-*" fib saddr . iif oif missing drop     # only host_ip
//	  }
//	  chain input   { type filter hook input; policy accept;  iifname "hu-3fa2c1-*" goto to-host }
//	  chain forward { type filter hook forward; policy accept
//	    iifname "hu-3fa2c1-*" goto from-slot
//	    oifname "hu-3fa2c1-*" goto to-slot
//	    oifname != "hu-*" ip daddr @slots goto refuse              # a slot that is gone
//	  }
//	  chain output  { type filter hook output; policy accept; oifname != "hu-*" ip daddr @slots goto refuse }
//	  chain to-host   { ct established,related accept; iifname @silent goto refuse; @resolvers port 53 accept; goto refuse }
//	  chain to-slot   { ct established,related accept; goto refuse }
//	  chain from-slot { ct established,related accept; ct invalid drop; ip daddr @hutch goto refuse; iifname . ip daddr @open accept
//	                    iifname @silent goto refuse; @resolvers port 53 accept; iifname @closed goto refuse
//	                    ip daddr @refused goto refuse; accept }
//	  chain segment-size { type filter hook forward priority mangle; iifname "hu-3fa2c1-*" tcp syn: maxseg size set rt mtu }
//	  chain postrouting  { type nat hook postrouting priority srcnat; iifname "hu-3fa2c1-*" oifname != "hu-*" masquerade }
//	}
//
// An accept here does not overrule a drop in somebody else's chain at the same
// hook. Docker and some firewalls drop forwarded packets by default; Check
// finds that and says what to add there. Only the host's own processes can
// open connections to a slot: others that it forwards for cannot.
//
// The host must forward IPv4. If it does not, Open turns that on for the whole
// host, tells so in the log, notes the old value beside the namespaces, and
// never turns it off again. The host then forwards between its other
// interfaces too, as far as its own firewall lets it.
//
// # Names, owners, crashes
//
// A slot of root R has one name for its veth and its namespace file, "hu-" +
// tag of R + "-" + index; the table carries the tag as well. All roots of a
// host share the addresses. The claim on one is the /32 route to it: the
// kernel gives it to one root only, and it goes with the veth. So there is
// no file that could disagree with the kernel after a crash: Reclaim looks
// for what carries the own tag, Adopt for what must be there. The namespaces
// are kept in a directory of the root, not in that of ip(8), so that nobody
// else's clean-up meets them; nsenter --net=FILE enters one.
//
// An index comes back as late as possible, after all others. Release silences
// the slot from inside, forgets the flows of its address, and only then gives
// the address up; what cannot be removed is set aside, not used again.
//
// # Names for guests
//
// Guests ask their gateway (DNS tells the addresses), which translates to the
// host's resolvers, one address each. Resolvers on loopback cannot be reached
// from outside of the host: systemd-resolved's and NetworkManager's stubs are
// replaced by the resolvers behind them, others have to be configured. The
// host's files are read once, by Open.
//
// # Tests
//
// The tests need root. They make a host of network namespaces with an outside
// and guests whose kernels send real packets through real taps, and touch no
// other network.
package network
