package pki

import (
	"bytes"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func open(t *testing.T, path string, now time.Time) *Dir {
	t.Helper()
	d, err := Open(path, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func ensure(t *testing.T, d *Dir, l Leaf, want bool) {
	t.Helper()
	issued, err := d.Ensure(l)
	if err != nil {
		t.Fatal(err)
	}
	if issued != want {
		t.Fatalf("issued %v, want %v", issued, want)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func server() Leaf {
	return Leaf{File: "api", User: "kube-apiserver", Groups: []string{"g"}, IPs: []net.IP{net.ParseIP("10.43.0.1")}, Names: []string{"kubernetes"}}
}

func TestLeafIsKeptAndRenewedBeforeItsEnd(t *testing.T) {
	path, now := filepath.Join(t.TempDir(), "pki"), time.Now()
	ensure(t, open(t, path, now), server(), true)
	first := read(t, filepath.Join(path, "api.crt"))
	ensure(t, open(t, path, now.Add(200*24*time.Hour)), server(), false)
	ensure(t, open(t, path, now.Add(300*24*time.Hour)), server(), true)
	if bytes.Equal(first, read(t, filepath.Join(path, "api.crt"))) {
		t.Fatal("a renewed certificate is the old one")
	}
}

func TestLeafForOtherNamesIsMadeAnew(t *testing.T) {
	d := open(t, t.TempDir(), time.Now())
	ensure(t, d, server(), true)
	for _, change := range []func(*Leaf){
		func(l *Leaf) { l.IPs = append(l.IPs, net.ParseIP("198.18.0.2")) },
		func(l *Leaf) { l.Names = nil },
		func(l *Leaf) { l.User = "other" },
		func(l *Leaf) { l.Groups = nil },
		func(l *Leaf) { l.Proxy = true },
	} {
		l := server()
		change(&l)
		ensure(t, d, l, true)
		ensure(t, d, l, false)
		ensure(t, d, server(), true)
	}
}

func TestDamagedLeafIsMadeAnew(t *testing.T) {
	d := open(t, t.TempDir(), time.Now())
	ensure(t, d, server(), true)
	if err := os.WriteFile(d.Cert("api"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	ensure(t, d, server(), true)
	if err := os.Remove(d.Key("api")); err != nil {
		t.Fatal(err)
	}
	ensure(t, d, server(), true)
	ensure(t, d, server(), false)
}

func TestWipedDirectoryHasAnotherAuthority(t *testing.T) {
	path, now := t.TempDir(), time.Now()
	old := open(t, path, now)
	ensure(t, old, server(), true)
	leaf := read(t, old.Cert("api"))
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	d := open(t, path, now)
	if bytes.Equal(old.Authority(), d.Authority()) {
		t.Fatal("the authority outlived its directory")
	}
	if bytes.Equal(old.ca.cert.RawSubject, d.ca.cert.RawSubject) {
		t.Fatal("two authorities have one name")
	}
	// Somebody kept the old leaf: it isn't good for the new authority.
	ensure(t, d, server(), true)
	if err := os.WriteFile(d.Cert("api"), leaf, 0o600); err != nil {
		t.Fatal(err)
	}
	ensure(t, d, server(), true)
}

func TestDamagedAuthorityIsAnError(t *testing.T) {
	path := t.TempDir()
	open(t, path, time.Now())
	if err := os.WriteFile(filepath.Join(path, "ca.key"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, time.Now); err == nil {
		t.Fatal("opened a directory with a damaged authority")
	}
}

func TestLeafLivesNoLongerThanItsAuthority(t *testing.T) {
	path, now := t.TempDir(), time.Now()
	open(t, path, now)
	d := open(t, path, now.Add(authorityLife-30*24*time.Hour))
	if _, err := d.Ensure(server()); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, func() time.Time { return now.Add(authorityLife + time.Hour) }); err == nil {
		t.Fatal("opened an authority that has ended")
	}
}

func TestServerLeafServes(t *testing.T) {
	d := open(t, t.TempDir(), time.Now())
	ensure(t, d, server(), true)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(d.Authority())
	pair := loadLeaf(t, d, "api")
	for _, name := range []string{"kubernetes", "10.43.0.1"} {
		if _, err := pair.Verify(x509.VerifyOptions{Roots: pool, DNSName: name}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	ensure(t, d, Leaf{File: "user", User: "u"}, true)
	if _, err := loadLeaf(t, d, "user").Verify(x509.VerifyOptions{Roots: pool}); err == nil {
		t.Error("a user's certificate is good for a server")
	}
}

func TestFilesOfKeysArePrivate(t *testing.T) {
	d := open(t, t.TempDir(), time.Now())
	ensure(t, d, server(), true)
	c := Config{Path: filepath.Join(d.path, "x.kubeconfig"), Server: "https://127.0.0.1:6443", Leaf: "api", Name: "hutch"}
	if err := d.ExportConfig(c); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{d.Key("ca"), d.Key("api"), d.SignerKey(), c.Path} {
		st, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", p, st.Mode())
		}
	}
	if s := string(read(t, c.Path)); strings.Contains(s, d.path) {
		t.Errorf("an exported kubeconfig names files: %s", s)
	}
	if left, _ := filepath.Glob(filepath.Join(d.path, ".*")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestSignerIsKept(t *testing.T) {
	path := t.TempDir()
	d := open(t, path, time.Now())
	k := read(t, d.SignerKey())
	open(t, path, time.Now())
	if !bytes.Equal(k, read(t, d.SignerKey())) {
		t.Fatal("the key of service accounts changed")
	}
}
