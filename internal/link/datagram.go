package link

import (
	"encoding/binary"
	"io"
	"slices"
	"sync"
	"syscall"
)

// maxDatagram bounds a datagram, in bytes: two bytes tell its length.
const maxDatagram = 1<<16 - 1

// Datagrams is a stream to a UDP port of the guest, as a connected UDP socket
// would be one: each Read returns one datagram, what does not fit is cut off,
// and each Write is one.
type Datagrams struct {
	*Stream
	rmu sync.Mutex // held for a whole Read
	in  datagramReader
}

func newDatagrams(s *Stream) *Datagrams { return &Datagrams{Stream: s, in: datagramReader{r: s}} }

// Read waits for the next datagram. A deadline that passes loses nothing.
func (d *Datagrams) Read(p []byte) (int, error) {
	d.rmu.Lock()
	defer d.rmu.Unlock()
	b, err := d.in.next()
	return copy(p, b), err
}

// Write sends p as one datagram. It never waits: when there is no room, as in
// front of a paused guest, the datagram is lost, which is no error.
func (d *Datagrams) Write(p []byte) (int, error) {
	if len(p) > maxDatagram {
		return 0, d.opError("write", syscall.EMSGSIZE)
	}
	b := binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(p)), uint16(len(p)))
	if err := d.offer(append(b, p...)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// datagramReader cuts a stream into datagrams: two bytes for the length, and
// that many bytes.
type datagramReader struct {
	r     io.Reader
	frame []byte // what is there of the one that is being read
}

// next returns the next datagram, valid until the call after. io.EOF is an end
// between two. What was read before another error is kept.
func (d *datagramReader) next() ([]byte, error) {
	for {
		need := 2
		if len(d.frame) >= 2 {
			need += int(binary.BigEndian.Uint16(d.frame))
			if len(d.frame) == need {
				whole := d.frame[2:]
				d.frame = d.frame[:0]
				return whole, nil
			}
		}
		have := len(d.frame)
		d.frame = slices.Grow(d.frame, need-have)
		n, err := d.r.Read(d.frame[have:need])
		d.frame = d.frame[:have+n]
		if n > 0 || err == nil {
			continue
		}
		if err == io.EOF && have > 0 {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
}
