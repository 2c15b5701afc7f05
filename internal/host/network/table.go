package network

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/nftables"
	nl "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// takeTable finds the root's tag and loads its table.
func (n *Network) takeTable(root string) error {
	const tags = 8
	return n.host.do(func() error {
		for attempt := range tags {
			n.names = names{tagOf(root, attempt)}
			var mine bool
			err := withNft(func(c *nftables.Conn) error {
				exists, owner, err := n.hostRules().find(c)
				if err != nil {
					return err
				}
				if mine = !exists || owner == n.owner; !mine {
					return nil
				}
				n.policies = map[int]policy{}
				if exists {
					if n.policies, err = n.hostRules().read(c); err != nil {
						return err
					}
				}
				return n.hostRules().load(c)
			})
			if err != nil || mine {
				return err
			}
		}
		return fault.New(fault.Exists, "the tags of root %s are all taken by other roots on this host", root)
	})
}

func (n *Network) hostRules() hostRules {
	return hostRules{names: n.names, owner: n.owner, resolvers: n.resolvers, policies: n.policies}
}

// mark tells the host's table the policy of slot index.
func (n *Network) mark(index int, p policy) error {
	n.tableMu.Lock()
	defer n.tableMu.Unlock()
	was, marked := n.policies[index]
	if !marked {
		was = defaultPolicy()
	}
	if was.plain() && p.plain() {
		return nil
	}
	err := n.host.do(func() error {
		return withNft(func(c *nftables.Conn) error { return n.hostRules().change(c, index, was, p) })
	})
	if err != nil && !gone(err) {
		return err
	}
	if p.plain() {
		delete(n.policies, index)
	} else {
		n.policies[index] = p
	}
	if err != nil { // somebody took the table away
		return n.restoreLocked()
	}
	return nil
}

// ensureTable loads the host's table again when somebody took it away, as
// "nft flush ruleset" does.
func (n *Network) ensureTable() error {
	n.tableMu.Lock()
	defer n.tableMu.Unlock()
	exists := false
	err := n.host.do(func() error {
		return withNft(func(c *nftables.Conn) (err error) {
			exists, _, err = n.hostRules().find(c)
			return err
		})
	})
	if err != nil || exists {
		return err
	}
	return n.restoreLocked()
}

func (n *Network) restoreLocked() error {
	n.log.Warn("nftables table was removed by somebody else, loading it again", "table", n.names.table())
	return n.host.do(func() error { return withNft(n.hostRules().load) })
}

// watchAgain is how long to wait after the watch on nftables broke.
const watchAgain = 5 * time.Second

// keepTable loads the host's table again whenever somebody takes it away, until
// ctx ends.
func (n *Network) keepTable(ctx context.Context) {
	again := time.NewTimer(0)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-again.C:
		}
		if err := n.watchTables(ctx); err != nil && ctx.Err() == nil {
			n.log.Warn("watching nftables did not work, trying again later", "error", err)
		}
		again.Reset(watchAgain)
	}
}

// watchTables sees to the table after each removal of any table, until ctx
// ends or the watch breaks.
func (n *Network) watchTables(ctx context.Context) error {
	var c *nl.Conn
	err := n.host.do(func() (err error) {
		c, err = nl.Dial(unix.NETLINK_NETFILTER, nil)
		return err
	})
	if err != nil {
		return fmt.Errorf("open nftables events: %w", err)
	}
	defer c.Close()
	unblock := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer unblock()
	if err := c.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return fmt.Errorf("join nftables events: %w", err)
	}
	for {
		if err := n.ensureTable(); err != nil {
			return err
		}
		for removed := false; !removed; {
			messages, err := c.Receive()
			switch {
			case ctx.Err() != nil:
				return nil
			case errors.Is(err, unix.ENOBUFS): // more events than we could read
				removed = true
			case err != nil:
				return fmt.Errorf("read nftables events: %w", err)
			}
			for _, m := range messages {
				removed = removed || m.Header.Type == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_DELTABLE
			}
		}
	}
}
