package cli

import (
	"fmt"
	"io"
	"slices"
	"sync"
)

// complaints says on standard error what goes wrong beside a program that
// runs on. What the program writes there goes through it too. While the
// program has the terminal they are kept, each once, until the session ends.
type complaints struct {
	keep bool

	mu   sync.Mutex
	w    io.Writer // guarded by mu
	kept []string  // guarded by mu
	over bool      // guarded by mu
}

// Write writes what the program says.
func (c *complaints) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.w.Write(b)
}

// complain says text, now or at the end. After the end nothing is said.
func (c *complaints) complain(text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.over || slices.Contains(c.kept, text):
	case c.keep:
		c.kept = append(c.kept, text)
	default:
		fmt.Fprintln(c.w, "hutch:", text)
	}
}

// end says what was kept. The terminal must be as it was before.
func (c *complaints) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
	for _, text := range c.kept {
		fmt.Fprintln(c.w, "hutch:", text)
	}
}
