package process

import (
	"os/exec"
	"testing"

	"github.com/hutch-run/hutch/internal/testenv"
)

// BenchmarkTrue is a whole start, end and clean-up; the floor beside it is the
// standard library's without a cgroup.
func BenchmarkTrue(b *testing.B) {
	tab := newTable(b, nil)
	b.Run("hutch", func(b *testing.B) {
		for b.Loop() {
			_, sub, err := tab.Start(testenv.Context(b), Spec{Cmd: "true", NoStdin: true})
			if err != nil {
				b.Fatal(err)
			}
			collect(b, sub)
			sub.Close()
		}
	})
	b.Run("hutch without cgroup", func(b *testing.B) {
		tab := newTable(b, func(p *Params) { p.CgroupRoot = "" })
		for b.Loop() {
			_, sub, err := tab.Start(testenv.Context(b), Spec{Cmd: "true", NoStdin: true})
			if err != nil {
				b.Fatal(err)
			}
			collect(b, sub)
			sub.Close()
		}
	})
	b.Run("os/exec", func(b *testing.B) {
		for b.Loop() {
			if err := exec.CommandContext(testenv.Context(b), "true").Run(); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkOutput reports how fast output comes through.
func BenchmarkOutput(b *testing.B) {
	tab := newTable(b, nil)
	_, sub, err := tab.Start(testenv.Context(b), Spec{Cmd: "cat", Args: []string{"/dev/zero"}, NoStdin: true})
	if err != nil {
		b.Fatal(err)
	}
	defer sub.Close()
	for b.Loop() {
		for n := 0; n < 1<<20; {
			ev, err := sub.Next(testenv.Context(b), 0)
			if err != nil {
				b.Fatal(err)
			}
			n += len(ev.Data)
		}
		b.SetBytes(1 << 20)
	}
}
