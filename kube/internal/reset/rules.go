package reset

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"regexp"
	"strings"
)

// ours matches what names a chain of kube-proxy, kubelet or a CNI plugin in the output of iptables-save.
var ours = regexp.MustCompile(`\b(KUBE|CNI)-[A-Z0-9]|comment (cnitool|"name: \\"hutch)`)

// table matches the tables of kube-proxy in the output of nft list tables.
var table = regexp.MustCompile(`^table (ip6?) kube-proxy$`)

func removeRules(ctx context.Context, m Machine, r *Result) {
	removeTables(ctx, m, r)
	for _, family := range []string{"iptables", "ip6tables"} {
		told, err := removeChains(ctx, m, family)
		r.tell("rules of "+family, told, err)
	}
}

func removeTables(ctx context.Context, m Machine, r *Result) {
	out, err := m.Run(ctx, nil, "nft", "list", "tables")
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		r.left("nftables: %v", err)
		return
	}
	for line := range strings.Lines(string(out)) {
		f := table.FindStringSubmatch(strings.TrimSpace(line))
		if f == nil {
			continue
		}
		_, err := m.Run(ctx, nil, "nft", "delete", "table", f[1], "kube-proxy")
		r.tell("nftables "+f[1]+" kube-proxy", true, err)
	}
}

// removeChains writes the rules back without ours. Rules of others keep their order; their counters begin anew.
func removeChains(ctx context.Context, m Machine, family string) (bool, error) {
	out, err := m.Run(ctx, nil, family+"-save")
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !ours.Match(out) {
		return false, nil
	}
	var keep bytes.Buffer
	for line := range bytes.Lines(out) {
		if !ours.Match(line) {
			keep.Write(line)
		}
	}
	if _, err := m.Run(ctx, keep.Bytes(), family+"-restore"); err != nil {
		return true, err
	}
	return true, nil
}
