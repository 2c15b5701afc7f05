package e2e

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

const (
	// crowd is how many copies of one snapshot run at once.
	crowd = 40
	// clockError is how far a copy's clock may be from the host's.
	clockError = 100 * time.Millisecond
	// clockRound is the longest round trip that says anything about a clock.
	clockRound = 80 * time.Millisecond
)

// TestACrowdOfCopies runs many copies of one snapshot at once, and asks each
// for what it must have of its own: randomness, ids, a name, and the time.
func TestACrowdOfCopies(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	base := d.Create("-m", "128", "--id", "base")
	putInside(t, d, base, buildInside(t))
	d.Hutch("snapshot", "create", base, "one")
	certificate := newCertificate(t)
	forEach(crowd, func(i int) { d.Create("--id", fmt.Sprintf("copy-%d", i), "one") })
	var mu sync.Mutex
	seen := map[string]string{}
	forEach(crowd, func(i int) {
		box := fmt.Sprintf("copy-%d", i)
		q := newQuestions(t, d, box)
		defer q.end()
		facts := map[string]string{}
		if err := json.Unmarshal([]byte(q.ask("facts")), &facts); err != nil {
			t.Errorf("%s: %v", box, err)
			return
		}
		if r := inspect(t, d, box); facts["host name"] != box || facts["boot id"] != r.BootID || len(facts) != 6 {
			t.Errorf("%s says %v, its record %s", box, facts, r.BootID)
		}
		mu.Lock()
		for name, value := range facts {
			if other := seen[value]; other != "" {
				t.Errorf("%s of %s: %s has the same", name, box, other)
			}
			seen[value] = box
		}
		mu.Unlock()
		if said := q.ask("tls " + certificate); said != "shook hands" {
			t.Errorf("%s: a certificate issued after the snapshot: %s", box, said)
		}
	})
	// One at a time: what is measured is a clock, and not the load.
	for i := range crowd {
		if off, err := clockOff(t, d, fmt.Sprintf("copy-%d", i)); err != nil || off.Abs() > clockError {
			t.Errorf("the clock of copy-%d is off by %v: %v", i, off, err)
		}
	}
	d.Hutch("snapshot", "verify", "one")
}

// forEach calls do with 0 to n-1, four at a time.
func forEach(n int, do func(int)) {
	var wg sync.WaitGroup
	next := make(chan int)
	for range 4 {
		wg.Go(func() {
			for i := range next {
				do(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}

// questions is a program in a sandbox that answers line by line.
type questions struct {
	t   *testing.T
	in  io.WriteCloser
	out *bufio.Reader
	end func()
}

func newQuestions(t *testing.T, d *harness.Daemon, box string) *questions {
	t.Helper()
	c := d.Command(testenv.Context(t), "exec", "-i", box, "--", "/bin/inside", "answer")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	return &questions{t: t, in: in, out: bufio.NewReader(out), end: func() {
		in.Close()
		if err := c.Wait(); err != nil {
			t.Errorf("questions to %s: %v", box, err)
		}
	}}
}

func (q *questions) ask(line string) string {
	q.t.Helper()
	if _, err := fmt.Fprintln(q.in, line); err != nil {
		q.t.Error(err)
		return ""
	}
	said, err := q.out.ReadString('\n')
	if err != nil {
		q.t.Error(err)
	}
	return strings.TrimSpace(said)
}

// clockOff returns how far a sandbox's clock is from the host's, by the
// shortest of some round trips.
func clockOff(t *testing.T, d *harness.Daemon, box string) (off time.Duration, err error) {
	t.Helper()
	q := newQuestions(t, d, box)
	defer q.end()
	shortest := time.Hour
	for range 20 {
		before := time.Now()
		said := q.ask("clock")
		round := time.Since(before)
		var nanos int64
		if _, err := fmt.Sscan(said, &nanos); err != nil {
			return 0, fmt.Errorf("it says %q: %w", said, err)
		}
		if round < shortest {
			shortest, off = round, time.Unix(0, nanos).Sub(before.Add(round/2))
		}
	}
	if shortest > clockRound {
		return off, fmt.Errorf("no answer came within %v, the first after %v", clockRound, shortest)
	}
	return off, nil
}

// newCertificate returns a certificate that is valid from now on, with its key,
// as base64 of PEM.
func newCertificate(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	what := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"copy.test"}, NotBefore: now.Add(-time.Second), NotAfter: now.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, what, what, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	both := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: secret})...)
	return base64.StdEncoding.EncodeToString(both)
}
