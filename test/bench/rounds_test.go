package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestCompete: everybody is first as often as the others, what is not counted
// leaves no trace, and one that takes part now and then is missing in between.
func TestCompete(t *testing.T) {
	var order []string
	taking := func(name string, every int) side {
		return side{name: name, every: every, do: func(context.Context) ([]time.Duration, error) {
			order = append(order, name)
			return []time.Duration{time.Millisecond, time.Second}, nil
		}}
	}
	held, err := compete(t.Context(), []string{"down", "up"}, 4, 1, []side{taking("a", 0), taking("b", 0), taking("c", 2)})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(order, ""), "ab"+"bca"+"ab"+"abc"+"ba"; got != want {
		t.Errorf("the order was %s, want %s", got, want)
	}
	if len(held) != 2 || held[0].Name != "down" || !slices.Equal(held[0].times("a"), []int64{1000, 1000, 1000, 1000}) ||
		!slices.Equal(held[1].times("c"), []int64{1e6, 1e6}) {
		t.Errorf("%+v", held)
	}
	if got := held[1].pairs("a", "c"); len(got) != 2 {
		t.Errorf("%d pairs, want 2: %+v", len(got), got)
	}
}

func TestCompeteNamesWhoGaveUp(t *testing.T) {
	gone := errors.New("gone")
	_, err := compete(t.Context(), []string{"x"}, 1, 0, []side{{name: "b", do: func(context.Context) ([]time.Duration, error) { return nil, gone }}})
	if !errors.Is(err, gone) || !strings.Contains(err.Error(), "x, b") {
		t.Error(err)
	}
}

// TestBareArgs: no descriptor of hutch's own is left, each would be any file of
// another QEMU.
func TestBareArgs(t *testing.T) {
	argv := []string{
		"qemu", "-S", "-name", "guest=x", "-machine", "q35,memory-backend=ram",
		"-object", "memory-backend-file,id=ram,size=128M,mem-path=/proc/self/fd/8,share=on",
		"-object", "rng-builtin,id=rng", "-kernel", "/proc/self/fd/9", "-append", "quiet", "-initrd", "/proc/self/fd/10",
		"-chardev", "socket,id=link,fd=6,server=on,wait=off", "-add-fd", "fd=11,set=1",
		"-blockdev", "driver=file,node-name=disk0-file,filename=/dev/fdset/1,read-only=on",
		"-device", "virtio-blk-pci,drive=disk0,serial=root", "-netdev", "tap,id=net,fd=14",
	}
	p := barePlan{argv: argv, kernel: "/k", initrd: "/i", disks: map[string]string{"root": "/r"}}
	boot, err := bareArgs(p, "/d")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(boot, " "), "qemu -machine q35,memory-backend=ram -object memory-backend-file,id=ram,size=128M,mem-path=/proc/self/fd/3,share=on"+
		" -object rng-builtin,id=rng -kernel /k -append quiet -initrd /i -chardev socket,id=link,path=/d/link.sock,server=on,wait=off"+
		" -blockdev driver=file,node-name=disk0-file,filename=/r,read-only=on -device virtio-blk-pci,drive=disk0,serial=root -netdev hubport,id=net,hubid=0"; got != want {
		t.Errorf("boot:\n%s\nwant:\n%s", got, want)
	}
	p.from = &bareSaved{}
	restored, err := bareArgs(p, "/d")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(restored, " ")
	if strings.Contains(text, "-kernel") || strings.Contains(text, "-append") || !strings.Contains(text, "fd/3,share=off") || !strings.HasSuffix(text, "-incoming fd:4") {
		t.Errorf("restored: %s", text)
	}
}
