package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

// TestPorts reaches a web server in a guest in every way there is.
func TestPorts(t *testing.T) {
	d := harness.Start(t, harness.Options{TCP: true})
	id := d.Create("-m", "128")
	ip := inspect(t, d, id).Info.HostIP
	// One server on the guest's loopback only, one on all its addresses.
	d.Hutch("exec", id, "--", "sh", "-c", `mkdir -p /srv && echo "from the guest" > /srv/page
		httpd -p 127.0.0.1:8001 -h /srv && httpd -p 8002 -h /srv`)
	page := func(t *testing.T, url, host string) (int, string, http.Header) {
		t.Helper()
		req, err := http.NewRequestWithContext(testenv.Context(t), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if host != "" {
			req.Host = host
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(b), res.Header
	}
	base := "http://" + d.TCP
	for name, c := range map[string]struct{ url, host string }{
		"path to loopback":   {base + "/sandboxes/" + id + "/ports/8001/page", ""},
		"path to any":        {base + "/sandboxes/" + id + "/ports/8002/page", ""},
		"host name":          {base + "/page", "8001-" + id + ".localhost"},
		"host_ip, no hutchd": {"http://" + ip + ":8002/page", ""},
	} {
		t.Run(name, func(t *testing.T) {
			if code, body, _ := page(t, c.url, c.host); code != 200 || body != "from the guest\n" {
				t.Errorf("%d %q", code, body)
			}
		})
	}
	t.Run("closed port", func(t *testing.T) {
		code, _, h := page(t, base+"/sandboxes/"+id+"/ports/9/", "")
		if code != http.StatusServiceUnavailable || h.Get("Hutch-Error") != "port_closed" {
			t.Errorf("%d, %s", code, h.Get("Hutch-Error"))
		}
	})
	t.Run("unknown sandbox", func(t *testing.T) {
		code, _, h := page(t, base+"/sandboxes/sb-nonexist/ports/80/", "")
		if code != http.StatusNotFound || h.Get("Hutch-Error") != "sandbox_not_found" {
			t.Errorf("%d, %s", code, h.Get("Hutch-Error"))
		}
	})
	t.Run("CONNECT", func(t *testing.T) {
		conn, err := net.Dial("tcp", d.TCP)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "CONNECT %s:8001 HTTP/1.1\r\nHost: %s:8001\r\n\r\n", id, id)
		r := bufio.NewReader(conn)
		if res, err := http.ReadResponse(r, nil); err != nil || res.StatusCode != 200 {
			t.Fatalf("%v, %v", res, err)
		}
		fmt.Fprint(conn, "GET /page HTTP/1.0\r\n\r\n")
		conn.(*net.TCPConn).CloseWrite()
		if b, err := io.ReadAll(r); err != nil || !strings.HasSuffix(string(b), "from the guest\n") {
			t.Errorf("%q, %v", b, err)
		}
	})
	t.Run("hutch port", func(t *testing.T) {
		c := d.Command(testenv.Context(t), "port", id, "0:8001")
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { c.Process.Kill(); c.Wait() }()
		line, err := bufio.NewReader(out).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		local, _, _ := strings.Cut(line, " ")
		if code, body, _ := page(t, "http://"+local+"/page", ""); code != 200 || body != "from the guest\n" {
			t.Errorf("%d %q", code, body)
		}
	})
}

// TestGuestIsShutIn tries, from inside a guest, what the default policy
// forbids. Everything it connects to is on this machine: addresses of the host
// and of another sandbox, and ranges that its own namespace refuses.
func TestGuestIsShutIn(t *testing.T) {
	d := harness.Start(t, harness.Options{TCP: true})
	id := d.Create("-m", "128")
	other := d.Create("-m", "128")
	d.Hutch("exec", other, "--", "sh", "-c", "mkdir -p /srv && httpd -p 8002 -h /srv")
	_, port, err := net.SplitHostPort(d.TCP)
	if err != nil {
		t.Fatal(err)
	}
	for name, address := range map[string]string{
		"another sandbox":          inspect(t, d, other).Info.HostIP + " 8002",
		"the host by its gateway":  "198.18.0.1 " + port,
		"a private range":          "10.0.0.1 80",
		"another private range":    "192.168.0.1 80",
		"the metadata address":     "169.254.169.254 80",
		"the slots' own addresses": "198.18.0.9 " + port,
	} {
		t.Run(name, func(t *testing.T) {
			r := d.Try("exec", "--timeout", "20s", id, "--", "nc", "-w", "10", strings.Fields(address)[0], strings.Fields(address)[1])
			if r.Code == 0 || r.Code == 124 {
				t.Errorf("%s: exit %d, want a refusal at once (%s)", address, r.Code, r.Stderr)
			}
		})
	}
}

// TestClock looks at the guest's clock after a pause.
func TestClock(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	id := d.Create("-m", "128")
	check := func() error {
		before := time.Now()
		var guest int64
		if _, err := fmt.Sscan(d.Hutch("exec", id, "--", "date", "+%s"), &guest); err != nil {
			return err
		}
		if guest < before.Unix()-1 || guest > time.Now().Unix()+1 {
			return fmt.Errorf("the guest says %d, the host %d", guest, before.Unix())
		}
		return nil
	}
	harness.Eventually(t, 20*time.Second, check)
	d.Hutch("pause", id)
	d.Hutch("resume", id)
	harness.Eventually(t, 20*time.Second, check)
}
