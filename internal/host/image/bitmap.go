package image

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Where things are in an ext4 filesystem of 4 KiB blocks and 32-byte group
// descriptors, as the writer makes it: Documentation/filesystems/ext4.
const (
	ext4Block         = 4096
	superblockAt      = 1024
	sbInodesCount     = 0x0
	sbInodesPerGroup  = 0x28
	sbMagic           = 0x38
	ext4Magic         = 0xef53
	groupDescriptor   = 32
	gdInodeBitmap     = 4
	inodesPerBitmap   = ext4Block * 8
	groupDescriptorAt = ext4Block // behind the superblock's block
)

// readerWriterAt is what padBitmaps needs of a file.
type readerWriterAt interface {
	io.ReaderAt
	io.WriterAt
}

// padBitmaps sets the bits of the inode bitmaps that stand for no inode. The
// writer leaves them clear, about which e2fsck complains; with them set it
// finds nothing at all, and a complaint means something again.
func padBitmaps(f readerWriterAt) error {
	var sb [1024]byte
	if _, err := f.ReadAt(sb[:], superblockAt); err != nil {
		return fmt.Errorf("read the superblock: %w", err)
	}
	perGroup := binary.LittleEndian.Uint32(sb[sbInodesPerGroup:])
	if binary.LittleEndian.Uint16(sb[sbMagic:]) != ext4Magic || perGroup == 0 || perGroup > inodesPerBitmap || perGroup%8 != 0 {
		return fmt.Errorf("the filesystem that was written has no superblock as expected (%d inodes a group)", perGroup)
	}
	groups := binary.LittleEndian.Uint32(sb[sbInodesCount:]) / perGroup
	pad := make([]byte, ext4Block-perGroup/8)
	for i := range pad {
		pad[i] = 0xff
	}
	for g := range int64(groups) {
		var gd [groupDescriptor]byte
		if _, err := f.ReadAt(gd[:], groupDescriptorAt+g*groupDescriptor); err != nil {
			return fmt.Errorf("read group descriptor %d: %w", g, err)
		}
		at := int64(binary.LittleEndian.Uint32(gd[gdInodeBitmap:]))*ext4Block + int64(perGroup/8)
		if _, err := f.WriteAt(pad, at); err != nil {
			return fmt.Errorf("write inode bitmap %d: %w", g, diskError(err))
		}
	}
	return nil
}
