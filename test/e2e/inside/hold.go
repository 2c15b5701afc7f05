package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
)

// holdAddress is where a program that holds memory takes its orders.
const holdAddress = "127.0.0.1:7077"

// blockWords is the number of 64-bit words in a MiB.
const blockWords = 1 << 17

// held is memory full of a pattern that its owner can check to the byte.
type held struct {
	blocks [][]uint64
	seeds  []uint64 // of each block; 0: it is all zero
	turns  uint64
	// There is a connection of the program with itself. All it says passes
	// through that.
	in  *bufio.Reader
	out net.Conn
}

// hold fills megabytes of memory with the pattern of a seed, and serves orders.
func hold(megabytes, seed string) error {
	mb, err := strconv.Atoi(megabytes)
	if err != nil {
		return err
	}
	first, err := strconv.ParseUint(seed, 10, 64)
	if err != nil {
		return err
	}
	h := &held{blocks: make([][]uint64, mb), seeds: make([]uint64, mb)}
	for i := range h.blocks {
		h.blocks[i] = make([]uint64, blockWords)
		h.fill(i, first+uint64(i)+1)
	}
	l, err := net.Listen("tcp", holdAddress)
	if err != nil {
		return err
	}
	if err := h.connect(); err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		if err := h.serve(c); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		c.Close()
	}
}

// connect makes the connection of the program with itself.
func (h *held) connect() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	if h.out, err = net.Dial("tcp", l.Addr().String()); err != nil {
		return err
	}
	in, err := l.Accept()
	if err != nil {
		return err
	}
	h.in = bufio.NewReader(in)
	return nil
}

func (h *held) serve(c net.Conn) error {
	order, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(h.out, h.obey(strings.TrimSpace(order))); err != nil {
		return err
	}
	said, err := h.in.ReadString('\n')
	if err != nil {
		return err
	}
	_, err = io.WriteString(c, said)
	return err
}

func (h *held) obey(order string) string {
	switch order {
	case "turn":
		h.turn()
		return fmt.Sprintf("turned %d", h.turns)
	case "check":
		return h.check()
	}
	return fmt.Sprintf("order %q is not understood", order)
}

// turn changes a tenth of the memory: half of that becomes zero, half gets
// another pattern.
func (h *held) turn() {
	h.turns++
	for k := range uint64(len(h.blocks)) / 10 {
		i := int((h.turns*37 + k*11) % uint64(len(h.blocks)))
		seed := uint64(0)
		if k%2 == 0 {
			seed = h.turns<<32 + k + 1
		}
		h.fill(i, seed)
	}
}

func (h *held) fill(block int, seed uint64) {
	h.seeds[block] = seed
	for i := range h.blocks[block] {
		h.blocks[block][i] = word(seed, i)
	}
}

func word(seed uint64, i int) uint64 {
	if seed == 0 {
		return 0
	}
	return (seed ^ uint64(i)) * 0x9e3779b97f4a7c15
}

func (h *held) check() string {
	for n, block := range h.blocks {
		for i, got := range block {
			if want := word(h.seeds[n], i); got != want {
				return fmt.Sprintf("wrong: word %d of block %d is %#x, not %#x, after %d turns", i, n, got, want, h.turns)
			}
		}
	}
	return fmt.Sprintf("right after %d turns", h.turns)
}

// tell gives an order to the program that holds memory.
func tell(ctx context.Context, order string) (string, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", holdAddress)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := fmt.Fprintln(c, order); err != nil {
		return "", err
	}
	said, err := io.ReadAll(c)
	return strings.TrimSpace(string(said)), err
}
