package auth

import (
	"bufio"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// tokenFileHeader is the first line of a token file: what it is, and the
	// version of its format.
	tokenFileHeader = "hutch-tokens 1"
	// MinTokenLen is the shortest token accepted, in bytes: a token is all that
	// keeps the network out.
	MinTokenLen = 24
	// maxTokenLen keeps tokens far below the header limit.
	maxTokenLen = 512
	// maxTokenFile bounds a token file, in bytes.
	maxTokenFile = 1 << 20
)

// Token is one credential. Only its digest is kept.
type Token struct {
	name string
	role Role
	sum  [sha256.Size]byte
}

// NewToken makes the Token called name that secret opens. Its role must be
// Read or Admin, its secret MinTokenLen to 512 printable ASCII bytes.
func NewToken(name string, role Role, secret string) (Token, error) {
	if !regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$`).MatchString(name) {
		return Token{}, errors.New("token name must be 1 to 64 letters, digits and . _ @ -")
	}
	if role != Read && role != Admin {
		return Token{}, fmt.Errorf("token %s has role %s; use read or admin", name, role)
	}
	if len(secret) < MinTokenLen || len(secret) > maxTokenLen || strings.ContainsFunc(secret, notToken) {
		return Token{}, fmt.Errorf("token %s must be %d to %d printable ASCII characters without blanks; `openssl rand -hex 32` makes a good one",
			name, MinTokenLen, maxTokenLen)
	}
	return Token{name: name, role: role, sum: sha256.Sum256([]byte(secret))}, nil
}

// String shows the name and the role, never anything of the secret.
func (t Token) String() string { return t.name + " (" + t.role.String() + ")" }

func notToken(r rune) bool { return r <= ' ' || r > '~' }

// NewSecret returns a fresh secret of 256 random bits.
func NewSecret() string {
	var b [32]byte
	rand.Read(b[:]) // never fails, see crypto/rand
	return "hutch_" + base64.RawURLEncoding.EncodeToString(b[:])
}

// WriteTokenFile makes a token file that holds one token, readable by its
// owner only. It never overwrites: an existing file is an error that
// errors.Is fs.ErrExist knows.
func WriteTokenFile(path, name string, role Role, secret string) error {
	if _, err := NewToken(name, role, secret); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("write token file: %w", err)
	}
	_, err = fmt.Fprintf(f, "%s\n# role name token\n%s %s %s\n", tokenFileHeader, role, name, secret)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(fmt.Errorf("write token file: %w", err), os.Remove(path))
	}
	return nil
}

// ReadTokenFile reads the tokens in the file at path:
//
//	hutch-tokens 1
//	# role name token
//	admin alice 5f0c…
//	read prometheus 77aa…
//
// The file must be a regular one that only its owner can read. Errors name
// lines, never what is in them.
func ReadTokenFile(path string) ([]Token, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("read token file: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read token file: %w", err)
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("token file %s is not a regular file", path)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("token file %s can be read by others (mode %04o); run: chmod 600 %s", path, st.Mode().Perm(), path)
	}
	tokens, err := parseTokens(io.LimitReader(f, maxTokenFile+1))
	if err != nil {
		return nil, fmt.Errorf("token file %s: %w", path, err)
	}
	return tokens, nil
}

func parseTokens(r io.Reader) ([]Token, error) {
	lines := bufio.NewScanner(r)
	if !lines.Scan() || strings.TrimSpace(lines.Text()) != tokenFileHeader {
		if err := lines.Err(); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("line 1: want %q, the format that this version reads", tokenFileHeader)
	}
	var tokens []Token
	size := len(lines.Bytes()) + 1
	for n := 2; lines.Scan(); n++ {
		if size += len(lines.Bytes()) + 1; size > maxTokenFile {
			return nil, fmt.Errorf("larger than %d bytes", maxTokenFile)
		}
		fields := strings.Fields(lines.Text())
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		t, err := parseToken(fields)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		for _, other := range tokens {
			if other.name == t.name || other.sum == t.sum {
				return nil, fmt.Errorf("line %d: the name or the token of %s is there twice", n, t.name)
			}
		}
		tokens = append(tokens, t)
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if len(tokens) == 0 {
		return nil, errors.New("holds no token; add a line: admin NAME TOKEN")
	}
	return tokens, nil
}

func parseToken(fields []string) (Token, error) {
	if len(fields) != 3 {
		return Token{}, fmt.Errorf("%d words, want 3: role name token", len(fields))
	}
	switch fields[0] {
	case Admin.String():
		return NewToken(fields[1], Admin, fields[2])
	case Read.String():
		return NewToken(fields[1], Read, fields[2])
	}
	return Token{}, errors.New("the first word must be admin or read")
}

// match returns the token that secret opens. It compares digests with all
// tokens, in time that tells nothing about them.
func match(tokens []Token, secret string) (Token, bool) {
	sum := sha256.Sum256([]byte(secret))
	found := -1
	for i := range tokens {
		same := subtle.ConstantTimeCompare(sum[:], tokens[i].sum[:])
		found = subtle.ConstantTimeSelect(same, i, found)
	}
	if found < 0 {
		return Token{}, false
	}
	return tokens[found], true
}
