package boot

import "sync/atomic"

// atomicPID is the pid of the server, 0 while there is none.
type atomicPID struct{ v atomic.Int64 }

func (p *atomicPID) set(pid int) { p.v.Store(int64(pid)) }
func (p *atomicPID) get() int    { return int(p.v.Load()) }
