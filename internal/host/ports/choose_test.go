package ports

import (
	"context"
	"errors"
	"net"
	"strconv"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// choose has numbers chosen, all of which must be open then.
func (w *world) choose(id sandbox.ID, wishes ...Wish) ([]uint16, func()) {
	w.t.Helper()
	numbers, release, err := w.table.Choose(w.t.Context(), id, "web", wishes)
	if err != nil {
		w.t.Fatal(err)
	}
	for i, n := range numbers {
		if c, err := net.Listen("tcp", at(n)); wishes[i].Protocol == "tcp" && err == nil {
			_ = c.Close()
			w.t.Errorf("%d was chosen and is free", n)
		}
	}
	return numbers, release
}

// TestChooseForTwoSandboxes, whose dockers would take the same numbers.
func TestChooseForTwoSandboxes(t *testing.T) {
	w := newWorld(t)
	w.open()
	seen := map[uint16]bool{}
	for _, id := range []sandbox.ID{"a", "b"} {
		g := w.run(id)
		numbers, release := w.choose(id, Wish{Protocol: "tcp", ContainerPort: 80}, Wish{Protocol: "udp", ContainerPort: 53},
			Wish{Protocol: "tcp", HostIP: "127.0.0.1", ContainerPort: 80})
		for i, n := range numbers {
			if n == 0 || i != 1 && seen[n] {
				t.Errorf("%s has the numbers %v", id, numbers)
			}
			seen[n] = true
		}
		// The container is started, and told of by the guest.
		g.tcp[numbers[0]] = w.echo(string(id))
		started, err := w.table.Reserve(t.Context(), id, "c", "web", []Binding{{Protocol: "tcp", HostPort: numbers[0], ContainerPort: 80}})
		if err != nil {
			t.Fatal(err)
		}
		defer started()
		speaks(t, numbers[0], string(id))
		release() // is without effect then
		w.tell(g, changed("c", Binding{Protocol: "tcp", HostIP: "0.0.0.0", HostPort: numbers[0], ContainerPort: 80}), Event{Kind: Synced})
		speaks(t, numbers[0], string(id))
		closed(t, numbers[2]) // it went with its reservation
	}
}

func TestChooseOfARange(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.run("sb")
	first := consecutive(t, 4)
	taken, err := net.Listen("tcp", at(first))
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	wish := Wish{Protocol: "tcp", First: first, Last: first + 2, ContainerPort: 80}
	other := wish
	other.ContainerPort = 81
	numbers, release := w.choose("sb", wish, other)
	if numbers[0] != first+1 || numbers[1] != first+2 {
		t.Errorf("of %d to %d, the first taken: %v", wish.First, wish.Last, numbers)
	}
	var full *TakenError
	if _, _, err := w.table.Choose(t.Context(), "other", "web", []Wish{{Protocol: "tcp", First: first + 3, Last: first + 3}, wish}); !errors.As(err, &full) || !fault.Is(err, fault.Exists) {
		t.Errorf("choose of what is taken: %v", err)
	}
	closed(t, first+3)
	release()
	closed(t, first+1)
	closed(t, first+2)
	if l := w.table.List(""); len(l) != 0 {
		t.Errorf("left: %+v", l)
	}
}

// consecutive returns the first of some free numbers in a row.
func consecutive(t *testing.T, n int) uint16 {
	t.Helper()
	for range 100 {
		first := free(t)
		good := int(first)+n <= 1<<16
		for i := 1; i < n && good; i++ {
			l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(first)+i)))
			if good = err == nil; good {
				_ = l.Close()
			}
		}
		if good {
			return first
		}
	}
	t.Fatal("no free numbers in a row")
	return 0
}

// TestChooseWithinPolicy leaves to docker what the host does not open anyway.
func TestChooseWithinPolicy(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.run("sb")
	first := consecutive(t, 1)
	for _, c := range []struct {
		wish Wish
		want uint16
	}{
		{Wish{Protocol: "tcp", HostIP: "10.1.2.3"}, 0},
		{Wish{Protocol: "tcp", First: 80, Last: 90}, 0},
		{Wish{Protocol: "tcp", First: first, Last: first}, first},
	} {
		numbers, release, err := w.table.Choose(t.Context(), "sb", "web", []Wish{c.wish})
		if err != nil || numbers[0] != c.want {
			t.Errorf("%+v: %v, %v; want %d", c.wish, numbers, err, c.want)
		}
		release()
	}
	w.close()
	w.p.Policy.Bind = None
	w.open()
	if numbers, _, err := w.table.Choose(context.Background(), "sb", "web", []Wish{{Protocol: "tcp"}}); err != nil || numbers[0] != 0 {
		t.Errorf("without leave: %v, %v", numbers, err)
	}
}

// TestChooseTooMany leaves nothing.
func TestChooseTooMany(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.run("sb")
	wishes := make([]Wish, MaxBindings+1)
	for i := range wishes {
		wishes[i] = Wish{Protocol: "udp", HostIP: "127.0.0.1", ContainerPort: uint16(i + 1)}
	}
	if _, _, err := w.table.Choose(t.Context(), "sb", "web", wishes); !fault.Is(err, fault.Exhausted) {
		t.Errorf("choose %d: %v", len(wishes), err)
	}
	if len(w.table.held) != 0 {
		t.Errorf("%d are open", len(w.table.held))
	}
}
