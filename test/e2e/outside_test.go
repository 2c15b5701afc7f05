package e2e

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/hutch-run/hutch/test/harness"
)

// TestGuestReachesTheInternet runs hutchd on a host of the test's own, with an
// internet of the test's own behind it, and looks at both from guests: what
// the policy opens must answer, and what it closes must be refused although
// it is there and the host itself can reach it.
func TestGuestReachesTheInternet(t *testing.T) {
	w := newWorld(t)
	d := harness.Start(t, harness.Options{Netns: w.host.path(), Config: "[slots]\ndns = [\"" + resolverIP + "\"]\n"})
	program := buildInside(t)
	create := func(args ...string) (id string) {
		id = d.Create(append([]string{"-m", "128"}, args...)...)
		putInside(t, d, id, program)
		return id
	}
	other := create()
	d.Hutch("exec", other, "--", "sh", "-c", "inside serve >/dev/null 2>&1 &")
	otherIP := inspect(t, d, other).Info.HostIP
	closed := map[string]string{
		"the host's public address": hostPublic + ":" + worldPort, "the host's private address": hostPrivate + ":" + worldPort,
		"a slot's veth": "198.18.0.9:" + worldPort, "another sandbox": otherIP + ":9001",
		"10/8": privateIP + ":" + worldPort, "192.168/16": lanIP + ":" + worldPort, "172.16/12": dockerIP + ":" + worldPort,
		"100.64/10": carrierIP + ":" + worldPort, "the metadata address": metadataIP + ":" + worldPort,
	}
	for name, address := range closed {
		if name != "a slot's veth" {
			w.fromHost(t, address)
		}
	}

	id := create()
	t.Run("internet", func(t *testing.T) {
		seen := "you are " + hostPublic
		for _, c := range []struct{ line, want string }{
			{"inside lookup web.example", webIP},
			{"inside lookup large.example", farIP + " " + webIP},
			{"inside ask tcp web.example:80", seen},
			{"inside ask tcp " + webIP + ":80", seen},
			{"inside ask tcp " + farIP + ":80", seen},
			{"inside ask udp web.example:80", seen},
			{"inside ask udp " + farIP + ":80", seen},
			// By the image's C library, not Go's resolver.
			{"echo ? | nc -w 10 web.example 80", seen},
		} {
			if r := d.Try("exec", "--timeout", "30s", id, "--", "sh", "-c", c.line); r.Code != 0 || strings.TrimSpace(r.Stdout) != c.want {
				t.Errorf("%s: %+v, want %q", c.line, r, c.want)
			}
		}
		refused(t, d, id, "lookup", "no-such.example")
		for name, address := range closed {
			t.Run(name, func(t *testing.T) {
				refused(t, d, id, "ask", "tcp", address)
				refused(t, d, id, "ask", "udp", address)
			})
		}
	})
	d.Hutch("rm", id)
	t.Run("allow", func(t *testing.T) {
		id := create("--network", "allow", "--allow", farIP+"/32", "--allow", privateIP)
		for _, args := range [][]string{{"ask", "tcp", farIP + ":80"}, {"ask", "udp", farIP + ":80"}, {"ask", "tcp", privateIP + ":80"}, {"lookup", "web.example"}} {
			if r := d.Try(append([]string{"exec", id, "--", "inside"}, args...)...); r.Code != 0 {
				t.Errorf("%s: %+v", args, r)
			}
		}
		refused(t, d, id, "ask", "tcp", webIP+":80")
		refused(t, d, id, "ask", "udp", webIP+":80")
		refused(t, d, id, "ask", "tcp", lanIP+":80")
	})
	t.Run("none", func(t *testing.T) {
		id := create("--network", "none")
		refused(t, d, id, "lookup", "web.example")
		refused(t, d, id, "ask", "tcp", webIP+":80")
		refused(t, d, id, "ask", "udp", farIP+":80")
		refused(t, d, id, "ask", "tcp", metadataIP+":80")
	})
}

// refused runs inside with args, which must be refused at once: neither an
// answer nor silence.
func refused(t *testing.T, d *harness.Daemon, id string, args ...string) {
	t.Helper()
	r := d.Try(append([]string{"exec", id, "--", "inside"}, args...)...)
	if r.Code != 1 {
		t.Errorf("inside %s: exit %d, want a refusal (%s%s)", strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
	}
}

// fromHost fails the test unless the host itself gets an answer there: a
// refusal would tell nothing otherwise.
func (w world) fromHost(t *testing.T, address string) {
	t.Helper()
	for _, network := range []string{"tcp", "udp"} {
		harness.Eventually(t, 30*time.Second, func() error {
			return w.host.do(func() error { return askOnce(network, address) })
		})
	}
}

func askOnce(network, address string) error {
	c, err := net.DialTimeout(network, address, 5*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(c, "?"); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1))
	return err
}
