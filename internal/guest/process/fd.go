package process

import (
	"encoding/binary"
	"os"
)

// control runs fn on the descriptor of f, which stays open and in its mode
// meanwhile.
func control(f *os.File, fn func(fd int) error) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := rc.Control(func(fd uintptr) { inner = fn(int(fd)) }); err != nil {
		return err
	}
	return inner
}

func nativeUint32(b []byte) uint32 { return binary.NativeEndian.Uint32(b) }
