package sandbox

import "fmt"

// State is where a sandbox is in its life.
type State string

// The states. Their text is what the API shows and what records hold.
const (
	Pending    State = "pending"    // being made, or booting again
	Running    State = "running"    // its guest agent answers
	Paused     State = "paused"     // vCPUs stopped, memory kept in RAM
	Hibernated State = "hibernated" // memory on disk, no VM
	Stopped    State = "stopped"    // its guest powered off; the disk is kept
	Failed     State = "error"      // its VMM or kernel died; the disk is kept
	Broken     State = "broken"     // something of it could not be taken back
	Destroying State = "destroying" // on its way out; nothing can stop that
	// Gone is no state of a record: it is what events tell after a destroy.
	Gone State = "gone"
)

// States lists the states that a record can be in.
func States() []State {
	return []State{Pending, Running, Paused, Hibernated, Stopped, Failed, Broken, Destroying}
}

// HasVM reports whether a sandbox in state s has, or may have, a VMM process.
func (s State) HasVM() bool {
	switch s {
	case Pending, Running, Paused, Broken, Destroying:
		return true
	case Hibernated, Stopped, Failed, Gone:
		return false
	}
	return false
}

// Request is something a caller asks of a sandbox that exists.
type Request string

// The requests.
const (
	Use       Request = "use"       // exec, files, terminals, proxied connections
	Pause     Request = "pause"     // stop the vCPUs
	Resume    Request = "resume"    // make it run again from whatever was kept
	Hibernate Request = "hibernate" // write memory to disk and free it
	Snapshot  Request = "snapshot"  // write down what it is
	Destroy   Request = "destroy"   // end it and free everything
)

// Requests lists the requests.
func Requests() []Request { return []Request{Use, Pause, Resume, Hibernate, Snapshot, Destroy} }

// Verdict is what to do with a request.
type Verdict uint8

// The verdicts.
const (
	Deny    Verdict = iota // refuse, with a reason
	Accept                 // do it
	Already                // nothing to do, answer success
	Wait                   // wait for the state to settle, then decide again
)

// String names v.
func (v Verdict) String() string {
	return [...]string{"deny", "accept", "already", "wait"}[v]
}

// Decide says what to do with request r for a sandbox in state s. For Deny,
// why says what state forbids it and what would help, for people.
func Decide(s State, r Request) (v Verdict, why string) {
	row, ok := verdicts()[r]
	if !ok {
		return Deny, fmt.Sprintf("unknown request %q", r)
	}
	v, ok = row[s]
	if !ok {
		return Deny, fmt.Sprintf("unknown state %q", s)
	}
	if v == Deny {
		why = fmt.Sprintf("sandbox is %s%s", s, advice(s))
	}
	return v, why
}

func verdicts() map[Request]map[State]Verdict {
	return map[Request]map[State]Verdict{
		Use: {
			Pending: Wait, Running: Accept, Paused: Deny, Hibernated: Deny,
			Stopped: Deny, Failed: Deny, Broken: Deny, Destroying: Deny,
		},
		Pause: {
			Pending: Wait, Running: Accept, Paused: Already, Hibernated: Deny,
			Stopped: Deny, Failed: Deny, Broken: Deny, Destroying: Deny,
		},
		Resume: {
			Pending: Wait, Running: Already, Paused: Accept, Hibernated: Accept,
			Stopped: Accept, Failed: Accept, Broken: Deny, Destroying: Deny,
		},
		Hibernate: {
			Pending: Wait, Running: Accept, Paused: Accept, Hibernated: Already,
			Stopped: Deny, Failed: Deny, Broken: Deny, Destroying: Deny,
		},
		Snapshot: {
			Pending: Wait, Running: Accept, Paused: Accept, Hibernated: Deny,
			Stopped: Deny, Failed: Deny, Broken: Deny, Destroying: Deny,
		},
		Destroy: {
			Pending: Accept, Running: Accept, Paused: Accept, Hibernated: Accept,
			Stopped: Accept, Failed: Accept, Broken: Accept, Destroying: Already,
		},
	}
}

func advice(s State) string {
	switch s {
	case Paused, Hibernated, Stopped, Failed:
		return "; resume it first"
	case Broken:
		return "; destroy it, which tries the failed clean-up again"
	case Pending, Running, Destroying, Gone:
		return ""
	}
	return ""
}
