package cli

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// progress shows how far something is: a bar that is drawn again in place on a
// terminal, a line for each new step elsewhere.
type progress struct {
	w        io.Writer
	terminal bool
	step     string
	drawn    time.Time
	width    int
}

func newProgress(w io.Writer) *progress {
	return &progress{w: w, terminal: isTerminal(w)}
}

// update tells the step and how far it is, in bytes; total 0 is not known.
func (p *progress) update(step string, done, total int64) {
	if !p.terminal {
		if step != p.step {
			fmt.Fprintln(p.w, step)
		}
		p.step = step
		return
	}
	if step != p.step {
		p.end()
	}
	finished := total > 0 && done >= total
	if step == p.step && !finished && time.Since(p.drawn) < 80*time.Millisecond {
		return
	}
	p.step, p.drawn = step, time.Now()
	p.draw(bar(step, done, total))
}

func (p *progress) draw(line string) {
	pad := max(0, p.width-len(line))
	fmt.Fprintf(p.w, "\r%s%s", line, strings.Repeat(" ", pad))
	p.width = len(line)
}

// end finishes the line being drawn.
func (p *progress) end() {
	if p.terminal && p.width > 0 {
		fmt.Fprintln(p.w)
		p.width = 0
	}
}

// bar draws one line: the step, a bar when the total is known, the sizes.
func bar(step string, done, total int64) string {
	const cells = 24
	switch {
	case total > 0:
		full := int(min(done, total) * cells / total)
		return fmt.Sprintf("%-32.32s [%s%s] %s / %s", step, strings.Repeat("=", full), strings.Repeat(" ", cells-full), size(done), size(total))
	case done > 0:
		return fmt.Sprintf("%-32.32s %s", step, size(done))
	}
	return step
}
