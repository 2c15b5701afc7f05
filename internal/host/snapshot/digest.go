package snapshot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// chunk is what is hashed, and left out when it is zero, in one piece, in
// bytes.
const chunk = 1 << 20

const digestPrefix = "hutch-sparse-1\n"

// measure reads all of src, which is size bytes, and describes it. When dst is
// not nil, what is not zero is written there at the same place; dst must be
// empty or all zero.
func measure(ctx context.Context, src, dst *os.File, size int64) (Part, error) {
	sums, err := hashChunks(ctx, src, dst, size)
	if err != nil {
		return Part{}, err
	}
	h := sha256.New()
	h.Write([]byte(digestPrefix))
	h.Write(binary.BigEndian.AppendUint64(nil, uint64(size)))
	p := Part{Size: size}
	for i, sum := range sums {
		if sum == nil {
			continue
		}
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(i)))
		h.Write(sum)
		p.Stored += min(chunk, size-int64(i)*chunk)
	}
	p.Digest = "sha256:" + hex.EncodeToString(h.Sum(nil))
	return p, nil
}

// hashChunks returns the hash of every chunk, nil for those that are zero.
func hashChunks(ctx context.Context, src, dst *os.File, size int64) ([][]byte, error) {
	numbers, err := dataChunks(src, size)
	if err != nil {
		return nil, err
	}
	sums := make([][]byte, (size+chunk-1)/chunk)
	work := make(chan int64)
	errs := make([]error, min(runtime.GOMAXPROCS(0), 8))
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	for w := range errs {
		wg.Go(func() {
			buf := make([]byte, chunk)
			for i := range work {
				if sums[i], errs[w] = hashChunk(src, dst, i, buf[:min(chunk, size-i*chunk)]); errs[w] != nil {
					cancel()
					return
				}
			}
		})
	}
feed:
	for _, i := range numbers {
		select {
		case work <- i:
		case <-ctx.Done():
			break feed
		}
	}
	close(work)
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return sums, context.Cause(ctx)
}

func hashChunk(src, dst *os.File, i int64, buf []byte) ([]byte, error) {
	if _, err := src.ReadAt(buf, i*chunk); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%s is cut", src.Name())
		}
		return nil, err
	}
	if len(bytes.TrimLeft(buf, "\x00")) == 0 {
		return nil, nil
	}
	if dst != nil {
		if err := writeData(dst, buf, i*chunk); err != nil {
			return nil, err
		}
	}
	sum := sha256.Sum256(buf)
	return sum[:], nil
}

// page is what is left out of a copy when it is zero, in bytes.
const page = 4096

// writeData writes the pages of buf that are not zero.
func writeData(dst *os.File, buf []byte, at int64) error {
	zero := make([]byte, page)
	for begin := 0; begin < len(buf); {
		end := begin
		for end < len(buf) && !bytes.Equal(buf[end:min(end+page, len(buf))], zero[:min(page, len(buf)-end)]) {
			end = min(end+page, len(buf))
		}
		if end > begin {
			if _, err := dst.WriteAt(buf[begin:end], at+int64(begin)); err != nil {
				return err
			}
		}
		begin = end + page
	}
	return nil
}

// dataChunks returns the numbers of the chunks that are not in holes.
func dataChunks(f *os.File, size int64) ([]int64, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != size {
		return nil, fmt.Errorf("%s has %d bytes, not %d", f.Name(), info.Size(), size)
	}
	var numbers []int64
	err = eachExtent(f, size, func(begin, end int64) error {
		first, last := begin/chunk, (end-1)/chunk
		if n := len(numbers); n > 0 && numbers[n-1] >= first {
			first = numbers[n-1] + 1
		}
		for i := first; i <= last; i++ {
			numbers = append(numbers, i)
		}
		return nil
	})
	return numbers, err
}

// eachExtent calls do for all of f that is not in holes. It moves the offset of
// f, and does not depend on it.
func eachExtent(f *os.File, size int64, do func(begin, end int64) error) error {
	for at := int64(0); at < size; {
		begin, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return &os.PathError{Op: "seek data", Path: f.Name(), Err: err}
		}
		end, err := unix.Seek(int(f.Fd()), begin, unix.SEEK_HOLE)
		if err != nil {
			return &os.PathError{Op: "seek hole", Path: f.Name(), Err: err}
		}
		if err := do(begin, end); err != nil {
			return err
		}
		at = end
	}
	return nil
}
