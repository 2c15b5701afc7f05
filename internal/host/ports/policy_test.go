package ports

import (
	"fmt"
	"testing"
)

func TestPolicy(t *testing.T) {
	for _, c := range []struct {
		bind Bind
		ip   string
		want string // addresses, and ! where there is a note
	}{
		{Loopback, "", "[127.0.0.1 ::1]!"},
		{Loopback, "0.0.0.0", "[127.0.0.1]!"},
		{Loopback, "::", "[::1]!"},
		{Loopback, "127.0.0.1", "[127.0.0.1]"},
		{Loopback, "127.3.2.1", "[127.3.2.1]"},
		{Loopback, "::1", "[::1]"},
		{Loopback, "::ffff:127.0.0.1", "[127.0.0.1]"},
		{Loopback, "192.0.2.1", "[]!"},
		{Loopback, "2001:db8::1", "[]!"},
		{Loopback, "nonsense", "[]!"},
		{Any, "", "[0.0.0.0 ::]"},
		{Any, "0.0.0.0", "[0.0.0.0]"},
		{Any, "::", "[::]"},
		{Any, "192.0.2.1", "[192.0.2.1]"},
		{Any, "127.0.0.1", "[127.0.0.1]"},
		{Any, "224.0.0.1", "[]!"},
		{None, "127.0.0.1", "[]!"},
	} {
		p := Policy{Bind: c.bind}.plan(Binding{Protocol: "tcp", HostIP: c.ip, HostPort: 8080, ContainerPort: 80})
		got := fmt.Sprint(p.addrs)
		if p.note != "" {
			got += "!"
		}
		if got != c.want {
			t.Errorf("%s, %q: %s, want %s (%s)", c.bind, c.ip, got, c.want, p.note)
		}
	}
	low := Binding{Protocol: "tcp", HostIP: "127.0.0.1", HostPort: 80, ContainerPort: 80}
	if p := (Policy{Bind: Loopback}).plan(low); p.addrs != nil || p.note == "" {
		t.Errorf("port 80: %v", p)
	}
	if p := (Policy{Bind: Loopback, Privileged: true}).plan(low); len(p.addrs) != 1 {
		t.Errorf("port 80, privileged: %v", p)
	}
}

func TestGuestPort(t *testing.T) {
	b := Binding{HostPort: 80, ContainerPort: 30080}
	for owner, want := range map[string]uint16{"3f2a": 80, "service/default/web": 30080, "kubernetes": 30080} {
		if got := b.guestPort(owner); got != want {
			t.Errorf("of %s: port %d, want %d", owner, got, want)
		}
	}
	if got := (Binding{ContainerPort: 6443}).guestPort("kubernetes"); got != 6443 {
		t.Errorf("the API: port %d", got)
	}
}
