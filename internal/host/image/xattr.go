package image

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// xattr is one extended attribute, its value in the form that ext4 stores.
type xattr struct {
	name  string
	value string
}

const (
	xattrRecord = "SCHILY.xattr." // the PAX record that GNU tar, docker and Go use
	aclAccess   = "system.posix_acl_access"
	aclDefault  = "system.posix_acl_default"
)

// readXattrs takes the extended attributes out of the records of a header, in
// sorted order. Kept are those that Linux filesystems have a place for: user.,
// security. (file capabilities are there), trusted. and POSIX ACLs. Left out
// are trusted.overlay. and user.overlay., by which a lower layer would steer
// the overlay mounted over it, and other systems' (com.apple.).
//
// The limits are those of the ext4 writer: all of an inode's attributes share
// one block, and the writer orders the entries of a block as the kernel's
// lookup needs them only as long as there are few enough that sort.Slice
// inserts one by one (its comparison is no strict order).
func readXattrs(records map[string]string, most int) ([]xattr, error) {
	var out []xattr
	sum := 0
	for rec, value := range records {
		name, ok := strings.CutPrefix(rec, xattrRecord)
		if !ok || !keepXattr(name) {
			continue
		}
		if len(name) > maxName || strings.IndexByte(name, 0) >= 0 {
			return nil, fmt.Errorf("an extended attribute's name is longer than %d bytes or has a zero byte", maxName)
		}
		if name == aclAccess || name == aclDefault {
			disk, err := aclToDisk(value)
			if err != nil {
				return nil, fmt.Errorf("its %s: %w", name, err)
			}
			value = disk
		}
		sum += 24 + len(name) + len(value)
		out = append(out, xattr{name, value})
	}
	if sum > most || len(out) > maxXattrs {
		return nil, fmt.Errorf("it has %d extended attributes of %d bytes together; the limits are %d and %d", len(out), sum, maxXattrs, most)
	}
	slices.SortFunc(out, func(a, b xattr) int { return strings.Compare(a.name, b.name) })
	return out, nil
}

func keepXattr(name string) bool {
	for _, p := range []string{"trusted.overlay.", "user.overlay."} {
		if strings.HasPrefix(name, p) {
			return false
		}
	}
	if name == aclAccess || name == aclDefault {
		return true
	}
	for _, p := range []string{"user.", "security.", "trusted."} {
		if strings.HasPrefix(name, p) && len(name) > len(p) {
			return true
		}
	}
	return false
}

// aclToDisk turns a POSIX ACL from the form of the xattr system calls (version
// 2, eight bytes an entry) into that of ext4 on disk (version 1, ids only where
// they mean something). Stored as it came, the kernel would find the ACL
// invalid and refuse every access that has to look at it. Layouts:
// linux/posix_acl_xattr.h and fs/ext4/acl.h.
func aclToDisk(v string) (string, error) {
	const user, group = 0x02, 0x08
	b := []byte(v)
	if len(b) < 4 || (len(b)-4)%8 != 0 || binary.LittleEndian.Uint32(b) != 2 {
		return "", fmt.Errorf("not a POSIX ACL of version 2")
	}
	out := binary.LittleEndian.AppendUint32(nil, 1)
	for e := b[4:]; len(e) > 0; e = e[8:] {
		tag := binary.LittleEndian.Uint16(e)
		switch tag {
		case 0x01, 0x04, 0x10, 0x20: // owner, owning group, mask, others
			out = append(out, e[:4]...)
		case user, group:
			out = append(out, e[:8]...)
		default:
			return "", fmt.Errorf("unknown tag %#x", tag)
		}
	}
	return string(out), nil
}
