package main

import (
	"bufio"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

// answerLines answers questions about what a copy must have of its own, one a
// line.
func answerLines(in io.Reader, out io.Writer) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		word, rest, _ := strings.Cut(lines.Text(), " ")
		said, err := answerLine(word, rest)
		if err != nil {
			said = "error: " + err.Error()
		}
		if _, err := fmt.Fprintln(out, said); err != nil {
			return err
		}
	}
	return lines.Err()
}

func answerLine(word, rest string) (string, error) {
	switch word {
	case "clock":
		return fmt.Sprint(time.Now().UnixNano()), nil
	case "facts":
		return facts()
	case "tls":
		return "shook hands", shakeHands(rest)
	}
	return "", fmt.Errorf("%q is not understood", word)
}

// facts are what no two sandboxes share, as JSON.
func facts() (string, error) {
	all := map[string]string{}
	for name, path := range map[string]string{
		"boot id": "/proc/sys/kernel/random/boot_id", "uuid": "/proc/sys/kernel/random/uuid", "machine id": "/etc/machine-id",
	} {
		b, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		all[name] = strings.TrimSpace(string(b))
	}
	name, err := os.Hostname()
	if err != nil {
		return "", err
	}
	all["host name"] = name
	f, err := os.Open("/dev/urandom")
	if err != nil {
		return "", err
	}
	defer f.Close()
	own, asked := make([]byte, 32), make([]byte, 32)
	if _, err := io.ReadFull(f, own); err != nil {
		return "", err
	}
	rand.Read(asked) // getrandom(2); never fails
	all["urandom"], all["getrandom"] = hex.EncodeToString(own), hex.EncodeToString(asked)
	b, err := json.Marshal(all)
	return string(b), err
}

// shakeHands serves TLS with a certificate, and connects to that with the same
// as the only root.
func shakeHands(certificate string) error {
	pem, err := base64.StdEncoding.DecodeString(certificate)
	if err != nil {
		return err
	}
	pair, err := tls.X509KeyPair(pem, pem)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			err = tls.Server(c, &tls.Config{Certificates: []tls.Certificate{pair}}).Handshake()
		}
		served <- err
	}()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	c, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{RootCAs: roots, ServerName: "copy.test"})
	if err != nil {
		return err
	}
	defer c.Close()
	return <-served
}
