package process

import (
	"strconv"
	"time"
)

// strayDelay is when a program's tree is searched for strays.
const strayDelay = 200 * time.Millisecond

// equalizeOOM gives a process the out-of-memory score of an ordinary program:
// the agent's own keeps the kernel away from it, and is inherited.
func equalizeOOM(pid int) {
	_ = writeKernel("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", "0") // it may have ended
}

// equalizeStrays does the same for all of the tree: a program may have forked
// before its own score was set. It comes late, since to look takes a good part
// of a short program's time, and strays are rare.
func (gr *group) equalizeStrays() {
	for _, pid := range gr.pids() {
		equalizeOOM(pid)
	}
}
