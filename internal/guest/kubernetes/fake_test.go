package kubernetes

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// fakeEnv says that this test binary is to be a distribution, with its data in
// the directory that it names.
const fakeEnv = "HUTCH_FAKE_CLUSTER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(fakeEnv); dir != "" {
		if err := fakeCluster(dir, os.Getenv("FAKE_ADDRESS"), os.Getenv("FAKE_WISHES")); err != nil {
			fmt.Fprintln(os.Stderr, "fake:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// Wishes are files in a directory, by which a test has the fake behave.
const (
	wishSlow    = "slow"    // answer nothing
	wishUnready = "unready" // the API is not ready
	wishNode    = "node"    // the node is not
	wishCrash   = "crash"   // end with exit status 3
	wishHang    = "hang"    // do not end when asked to
	wishLeave   = "leave"   // end badly
)

// fakeCluster keeps to what a distribution must do.
func fakeCluster(data, address, wishes string) error {
	wished := func(name string) bool {
		_, err := os.Stat(filepath.Join(wishes, name))
		return err == nil
	}
	if wished(wishCrash) {
		return errors.New("it crashes at once")
	}
	ca, err := fakePKI(data)
	if err != nil {
		return err
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(data, "server.crt"), filepath.Join(data, "server.key"))
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	answer := func(pattern string, wish, body string) {
		mux.HandleFunc("GET "+pattern, func(w http.ResponseWriter, r *http.Request) {
			for wished(wishSlow) {
				select {
				case <-r.Context().Done():
					return
				case <-time.After(10 * time.Millisecond):
				}
			}
			if wish != "" && wished(wish) {
				http.Error(w, "[+]ping ok\n[-]"+wish+" is not", http.StatusInternalServerError)
				return
			}
			_, _ = io.WriteString(w, body)
		})
	}
	answer("/readyz", wishUnready, "ok")
	answer("/livez", "", "ok")
	answer("/healthz/kubelet", "kubelet", "ok")
	answer("/api/v1/namespaces/default/serviceaccounts/default", "", "{}")
	answer("/apis/apps/v1/namespaces/kube-system/deployments/coredns", "", `{"status":{"availableReplicas":1}}`)
	mux.HandleFunc("GET /api/v1/nodes/node", func(w http.ResponseWriter, _ *http.Request) {
		ready := map[bool]string{true: "False", false: "True"}[wished(wishNode)]
		fmt.Fprintf(w, `{"spec":{"taints":[{"key":"k","effect":"PreferNoSchedule"}]},"status":{"conditions":[{"type":"Ready","status":%q,"message":"no network"}]}}`, ready)
	})
	server := &http.Server{Addr: address, Handler: mux, TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: ca, ClientAuth: tls.RequireAndVerifyClientCert}}
	go fakeDNS(address)
	go func() {
		for !wished("crash-now") {
			<-time.After(5 * time.Millisecond)
		}
		fmt.Fprintln(os.Stderr, "panic: the fake was told to")
		os.Exit(3)
	}()
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM)
	go func() {
		if err := server.ListenAndServeTLS("", ""); err != nil {
			fmt.Fprintln(os.Stderr, "fake:", err)
		}
	}()
	<-ended
	if wished(wishHang) {
		select {}
	}
	if wished(wishLeave) {
		return errors.New("left: everything")
	}
	return nil
}

// fakeDNS answers every question with an address.
func fakeDNS(address string) {
	c, err := net.ListenPacket("udp", address)
	if err != nil {
		return
	}
	buf := make([]byte, 1500)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
			continue
		}
		m.Response, m.Additionals = true, nil
		if q := m.Questions[0]; q.Type == dnsmessage.TypeA {
			m.Answers = []dnsmessage.Resource{{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1}, Body: &dnsmessage.AResource{A: [4]byte{10, 43, 0, 1}},
			}}
		}
		if b, err := m.Pack(); err == nil {
			_, _ = c.WriteTo(b, from)
		}
	}
}

// fakePKI makes certificates in an empty directory, and keeps those that are
// there.
func fakePKI(dir string) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	if old, err := os.ReadFile(filepath.Join(dir, "ca.crt")); err == nil {
		pool.AppendCertsFromPEM(old)
		return pool, nil
	}
	ca, caKey, err := issue(dir, "ca", nil, nil)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"server", "admin"} {
		if _, _, err := issue(dir, name, ca, caKey); err != nil {
			return nil, err
		}
	}
	pool.AddCert(ca)
	return pool, os.WriteFile(filepath.Join(dir, "admin.kubeconfig"), []byte("ca: "+ca.SerialNumber.String()+"\n"), 0o600)
}

func issue(dir, name string, ca *x509.Certificate, caKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: ca == nil, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if ca == nil {
		ca, caKey = template, key
		template.KeyUsage = x509.KeyUsageCertSign
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, &key.PublicKey, caKey)
	if err != nil {
		return nil, nil, err
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	return certificate, key, errors.Join(
		os.WriteFile(filepath.Join(dir, name+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(filepath.Join(dir, name+".key"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: private}), 0o600),
	)
}
