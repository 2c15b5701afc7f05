package image

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
)

// tree is the image as the layers so far make it: names and inodes, contents
// by reference. Layers are applied bottom up.
//
// Whiteouts hide what layers below brought, never what their own layer brings,
// wherever they stand in it; so they come first. Then the entries, in their
// order. An entry replaces what is there, but a directory over a directory
// only changes its owner, mode, times and attributes. Refused is what has no
// clear meaning, or one that differs between unpackers:
//
//   - an entry whose parent is a symbolic link or a file, in this layer or
//     below: written through a link it would land elsewhere than it says
//   - a path that one layer uses both as a directory and as something else
//   - a hard link to what is not there at that point, or to a directory
//
// Parents that no layer describes are made as root's, mode 0755, time 0.
type tree struct {
	root  *node
	layer int32 // the one being applied
	count int64 // of nodes, the root included
	limit int64 // of count; made-up parents count too
}

// node is one name in a directory.
type node struct {
	name     string
	ino      *inode
	children map[string]*node // of a directory, nil while it is empty
	layer    int32            // that named it last
}

func newTree(limit int64) *tree {
	return &tree{limit: limit, root: &node{ino: &inode{kind: kindDir, mode: 0o755}}, count: 1}
}

// apply puts one layer on top.
func (t *tree) apply(entries []entry) error {
	t.layer++
	for i := range entries {
		if e := &entries[i]; e.kind == kindWhiteout || e.kind == kindOpaque {
			t.hide(e)
		}
	}
	for i := range entries {
		e := &entries[i]
		if e.kind == kindWhiteout || e.kind == kindOpaque {
			continue
		}
		if err := t.put(e); err != nil {
			return err
		}
	}
	return nil
}

// find returns the node at path, nil if there is none. It follows no links:
// below anything but a directory there is nothing.
func (t *tree) find(path string) *node {
	n := t.root
	for path != "" && n != nil {
		var part string
		part, path, _ = strings.Cut(path, "/")
		n = n.children[part]
	}
	return n
}

// hide removes what a whiteout names from the layers below.
func (t *tree) hide(e *entry) {
	if e.kind == kindOpaque {
		if n := t.find(e.path); n != nil {
			t.count -= size(n) - 1
			n.children = nil
		}
		return
	}
	dir, base := "", e.path
	if i := strings.LastIndexByte(e.path, '/'); i >= 0 {
		dir, base = e.path[:i], e.path[i+1:]
	}
	if n := t.find(dir); n != nil && n.children[base] != nil {
		t.count -= size(n.children[base])
		delete(n.children, base)
	}
}

// size counts the nodes from n on.
func size(n *node) int64 {
	sum := int64(1)
	for _, c := range n.children {
		sum += size(c)
	}
	return sum
}

// parent returns the directory that path is to stand in and the last part of
// path. It makes the directories that are missing.
func (t *tree) parent(path string) (*node, string, error) {
	n, rest := t.root, path
	for {
		part, after, more := strings.Cut(rest, "/")
		if !more {
			return n, part, nil
		}
		child := n.children[part]
		switch {
		case child == nil:
			child = &node{name: part, ino: &inode{kind: kindDir, mode: 0o755}, layer: t.layer}
			if err := t.add(n, child); err != nil {
				return nil, "", err
			}
		case child.ino.kind != kindDir:
			return nil, "", refuse(path, "its parent %s is a %v, not a directory",
				quote(path[:len(path)-len(after)-1]), child.ino.kind)
		}
		n, rest = child, after
	}
}

func (t *tree) add(dir, child *node) error {
	if t.count >= t.limit {
		return fault.New(fault.Invalid, "the image has more than %d files and directories, the limit", t.limit)
	}
	if dir.children == nil {
		dir.children = map[string]*node{}
	}
	dir.children[child.name] = child
	t.count++
	return nil
}

// put applies one entry.
func (t *tree) put(e *entry) error {
	if e.path == "" {
		t.root.ino, t.root.layer = e.ino, t.layer
		return nil
	}
	dir, base, err := t.parent(e.path)
	if err != nil {
		return err
	}
	ino := e.ino
	if e.kind == kindHardlink {
		target := t.find(e.target)
		switch {
		case target == nil:
			return refuse(e.path, "it is a hard link to %s, which is not in the image before it", quote(e.target))
		case target.ino.kind == kindDir:
			return refuse(e.path, "it is a hard link to the directory %s", quote(e.target))
		}
		ino = target.ino
	}
	old := dir.children[base]
	if old == nil {
		return t.add(dir, &node{name: base, ino: ino, layer: t.layer})
	}
	if ino.kind != kindDir || old.ino.kind != kindDir {
		if t.touched(old) {
			return refuse(e.path, "the layer has it as a %v and as a %v", old.ino.kind, ino.kind)
		}
		t.count -= size(old) - 1
		old.children = nil
	}
	old.ino, old.layer = ino, t.layer
	return nil
}

// touched reports whether the layer being applied brought n or anything in it.
func (t *tree) touched(n *node) bool {
	if n.layer == t.layer {
		return true
	}
	for _, c := range n.children {
		if t.touched(c) {
			return true
		}
	}
	return false
}

// sorted returns the children of n in the order of their bytes.
func (n *node) sorted() []*node {
	out := slices.Collect(maps.Values(n.children))
	slices.SortFunc(out, func(a, b *node) int { return strings.Compare(a.name, b.name) })
	return out
}

// walk calls f for n and everything in it, parents first, in sorted order.
func (n *node) walk(path string, f func(path string, n *node) error) error {
	if err := f(path, n); err != nil {
		return err
	}
	for _, c := range n.sorted() {
		sub := c.name
		if path != "" {
			sub = path + "/" + c.name
		}
		if err := c.walk(sub, f); err != nil {
			return err
		}
	}
	return nil
}

// check counts the names of every inode and holds the tree to what ext4 can
// hold.
func (t *tree) check() error {
	if n := t.root.children["lost+found"]; n != nil && n.ino.kind != kindDir {
		return refuse("lost+found", "it is a %v; ext4 needs a directory of that name", n.ino.kind)
	}
	return t.root.walk("", func(path string, n *node) error {
		if n.ino.kind != kindDir {
			if n.ino.names++; n.ino.names > maxLinks-1 {
				return refuse(path, "its file has more than %d names", maxLinks-1)
			}
			return nil
		}
		dirs := 0
		for _, c := range n.children {
			if c.ino.kind == kindDir {
				dirs++
			}
		}
		if dirs > maxLinks-3 {
			return refuse(path, "it has more than %d directories in it", maxLinks-3)
		}
		return nil
	})
}

// clamp replaces times from limit on by the newest one before it: files that a
// build made get a time that depends on what it was built from, not on when.
func (t *tree) clamp(limit time.Time) {
	newest, at := int64(0), limit.Unix()
	see := func(_ string, n *node) error {
		if m := n.ino.mtime; m < at {
			newest = max(newest, m)
		}
		return nil
	}
	set := func(_ string, n *node) error {
		if n.ino.mtime >= at {
			n.ino.mtime = newest
		}
		return nil
	}
	// Neither function returns an error.
	_ = t.root.walk("", see)
	_ = t.root.walk("", set)
}
