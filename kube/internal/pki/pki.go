package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const (
	authorityLife = 10 * 365 * 24 * time.Hour
	leafLife      = 365 * 24 * time.Hour
	// backdate forgives a clock that is set back a little after a start.
	backdate = time.Hour
)

// Leaf says what a certificate is for.
type Leaf struct {
	File   string   // the name of its files, without .crt and .key
	User   string   // common name: the user's name for the API
	Groups []string // organisations: the user's groups
	IPs    []net.IP // a server's addresses
	Names  []string // a server's names
	Proxy  bool     // signed by the front proxy's authority
}

// Dir is a directory of keys and certificates.
type Dir struct {
	path  string
	now   func() time.Time
	ca    *authority
	front *authority
}

type authority struct {
	cert *x509.Certificate
	pem  []byte
	key  crypto.Signer
}

// Open reads the authorities in path, or makes them. Every leaf is issued by Ensure.
func Open(path string, now func() time.Time) (*Dir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of keys: %w", err)
	}
	d := &Dir{path: path, now: now}
	var err error
	if d.ca, err = d.openAuthority("ca", "hutch-kube"); err != nil {
		return nil, err
	}
	if d.front, err = d.openAuthority("front-proxy-ca", "hutch-kube front proxy"); err != nil {
		return nil, err
	}
	return d, d.ensureSigner()
}

// Cert, Key: the files of a leaf or an authority.
func (d *Dir) Cert(file string) string { return filepath.Join(d.path, file+".crt") }
func (d *Dir) Key(file string) string  { return filepath.Join(d.path, file+".key") }

// Authority is the cluster's authority in PEM.
func (d *Dir) Authority() []byte { return d.ca.pem }

// Ensure issues the leaf if it isn't there or must be renewed, and says whether it did.
func (d *Dir) Ensure(l Leaf) (issued bool, err error) {
	if d.good(l) {
		return false, nil
	}
	if err := d.issue(l); err != nil {
		return false, fmt.Errorf("issue certificate %s: %w", l.File, err)
	}
	return true, nil
}

func (d *Dir) by(l Leaf) *authority {
	if l.Proxy {
		return d.front
	}
	return d.ca
}

// good tells whether the leaf's files hold what is asked for and will for a third of a leaf's life.
func (d *Dir) good(l Leaf) bool {
	pair, err := tls.LoadX509KeyPair(d.Cert(l.File), d.Key(l.File))
	if err != nil {
		return false
	}
	c := pair.Leaf
	roots := x509.NewCertPool()
	roots.AddCert(d.by(l).cert)
	_, err = c.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: d.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err == nil && d.now().Add(leafLife/3).Before(c.NotAfter) &&
		c.Subject.CommonName == l.User && slices.Equal(c.Subject.Organization, l.Groups) &&
		slices.Equal(c.DNSNames, l.Names) && slices.EqualFunc(c.IPAddresses, l.IPs, net.IP.Equal)
}

func (d *Dir) issue(l Leaf) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	t, err := d.template(l.User, leafLife)
	if err != nil {
		return err
	}
	by := d.by(l)
	t.Subject.Organization = l.Groups
	t.IPAddresses, t.DNSNames = l.IPs, l.Names
	t.KeyUsage = x509.KeyUsageDigitalSignature
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if len(l.IPs)+len(l.Names) > 0 {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	if t.NotAfter.After(by.cert.NotAfter) {
		t.NotAfter = by.cert.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, t, by.cert, &key.PublicKey, by.key)
	if err != nil {
		return err
	}
	return d.writePair(l.File, key, append(encode("CERTIFICATE", der), by.pem...))
}

func (d *Dir) template(name string, life time.Duration) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	now := d.now()
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, BasicConstraintsValid: true,
		NotBefore: now.Add(-backdate), NotAfter: now.Add(life),
	}, nil
}

// openAuthority reads an authority. One that is there but can't be read is an error: a new one would quietly lock everybody out.
func (d *Dir) openAuthority(file, name string) (*authority, error) {
	pair, err := tls.LoadX509KeyPair(d.Cert(file), d.Key(file))
	if errors.Is(err, fs.ErrNotExist) {
		return d.makeAuthority(file, name)
	}
	if err != nil {
		return nil, fmt.Errorf("read authority %s: %w", file, err)
	}
	if !d.now().Before(pair.Leaf.NotAfter) {
		return nil, fmt.Errorf("authority %s ended at %s: renew it", file, pair.Leaf.NotAfter.Format(time.RFC3339))
	}
	key, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("read authority %s: its key can't sign", file)
	}
	return &authority{cert: pair.Leaf, pem: encode("CERTIFICATE", pair.Leaf.Raw), key: key}, nil
}

func (d *Dir) makeAuthority(file, name string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make authority %s: %w", file, err)
	}
	t, err := d.template(name, authorityLife)
	if err != nil {
		return nil, fmt.Errorf("make authority %s: %w", file, err)
	}
	// Two authorities of one name must be told apart: a client with the old one has to fail, not to guess.
	t.Subject.SerialNumber = t.SerialNumber.Text(36)
	t.IsCA, t.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("make authority %s: %w", file, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("make authority %s: %w", file, err)
	}
	a := &authority{cert: cert, pem: encode("CERTIFICATE", der), key: key}
	if err := d.writePair(file, key, a.pem); err != nil {
		return nil, fmt.Errorf("make authority %s: %w", file, err)
	}
	return a, nil
}

// SignerKey is the file of the key that signs service account tokens.
func (d *Dir) SignerKey() string { return d.Key("sa") }

func (d *Dir) ensureSigner() error {
	data, err := os.ReadFile(d.SignerKey())
	if err == nil {
		b, _ := pem.Decode(data)
		if b == nil {
			return errors.New("read the key of service accounts: no PEM")
		}
		if _, err := x509.ParseECPrivateKey(b.Bytes); err != nil {
			return fmt.Errorf("read the key of service accounts: %w", err)
		}
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read the key of service accounts: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make the key of service accounts: %w", err)
	}
	return d.writeKey("sa", key)
}
