package testguest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

// MaxMB is how much of its memory a guest can be told to fill.
const MaxMB = 256

// Memory is memory of the guest's own, of MaxMB and one page. It keeps what is
// written into it for as long as the machine lives, and is zero before.
type Memory interface {
	io.ReaderAt
	io.WriterAt
}

// The first page of Memory says what is in the others: a seed, how many MB
// are filled, and a note with its length.
const (
	pageSize   = 4096
	headerSize = 24
	maxNote    = pageSize - headerSize
)

type header struct{ seed, mb, note uint64 }

func readHeader(m Memory) (h header, err error) {
	b := make([]byte, headerSize)
	if _, err := m.ReadAt(b, 0); err != nil {
		return h, err
	}
	words := binary.LittleEndian
	return header{words.Uint64(b), words.Uint64(b[8:]), words.Uint64(b[16:])}, nil
}

func (h header) write(m Memory) error {
	b := make([]byte, headerSize)
	for i, word := range []uint64{h.seed, h.mb, h.note} {
		binary.LittleEndian.PutUint64(b[i*8:], word)
	}
	_, err := m.WriteAt(b, 0)
	return err
}

// fill fills mb MB of memory with a pattern that depends on the seed: three
// pages of bytes that look random, then one that was written and is zero.
func fill(m Memory, mb, seed uint64) error {
	if mb > MaxMB {
		return fmt.Errorf("%d MB are more than %d", mb, MaxMB)
	}
	h, err := readHeader(m)
	if err != nil {
		return err
	}
	page, zero := make([]byte, pageSize), make([]byte, pageSize)
	for i := range mb << 20 / pageSize {
		pattern(page, seed, i)
		if _, err := m.WriteAt(page, place(i)); err != nil {
			return err
		}
		if !isZero(i) {
			continue
		}
		if _, err := m.WriteAt(zero, place(i)); err != nil {
			return err
		}
	}
	h.seed, h.mb = seed, mb
	return h.write(m)
}

// check compares memory with the pattern, and says "ok <MB> <seed>" or which
// byte is the first wrong one.
func check(m Memory) (string, error) {
	h, err := readHeader(m)
	if err != nil {
		return "", err
	}
	if h.mb > MaxMB {
		return "the header is wrong", nil
	}
	want, got, zero := make([]byte, pageSize), make([]byte, pageSize), make([]byte, pageSize)
	for i := range h.mb << 20 / pageSize {
		if _, err := m.ReadAt(got, place(i)); err != nil {
			return "", err
		}
		expect := zero
		if !isZero(i) {
			pattern(want, h.seed, i)
			expect = want
		}
		if bytes.Equal(got, expect) {
			continue
		}
		for j := range got {
			if got[j] != expect[j] {
				return fmt.Sprintf("byte %d of page %d is %#x, not %#x", j, i, got[j], expect[j]), nil
			}
		}
	}
	return fmt.Sprintf("ok %d %d", h.mb, h.seed), nil
}

// note keeps a text in memory; noted returns it.
func note(m Memory, text string) error {
	h, err := readHeader(m)
	if err != nil {
		return err
	}
	if len(text) > maxNote {
		return fmt.Errorf("a note has room for %d bytes", maxNote)
	}
	h.note = uint64(len(text))
	if _, err := m.WriteAt([]byte(text), headerSize); err != nil {
		return err
	}
	return h.write(m)
}

func noted(m Memory) (string, error) {
	h, err := readHeader(m)
	if err != nil {
		return "", err
	}
	b := make([]byte, min(h.note, maxNote))
	_, err = m.ReadAt(b, headerSize)
	return string(b), err
}

func place(i uint64) int64 { return int64(i+1) * pageSize }
func isZero(i uint64) bool { return i%4 == 3 }

// pattern fills a page with what page i of a seed has (xorshift64).
func pattern(page []byte, seed, i uint64) {
	x := (seed+1)*0x9e3779b97f4a7c15 ^ (i+1)*0xbf58476d1ce4e5b9 | 1
	for j := 0; j < len(page); j += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(page[j:], x)
	}
}
