package sandbox

import (
	"strings"
	"testing"
)

// TestDecide walks every cell: a state or request that is added without a
// verdict fails here.
func TestDecide(t *testing.T) {
	want := map[Request]string{
		// pending running paused hibernated stopped error broken destroying
		Use:       "wait accept deny deny deny deny deny deny",
		Pause:     "wait accept already deny deny deny deny deny",
		Resume:    "wait already accept accept accept accept deny deny",
		Hibernate: "wait accept accept already deny deny deny deny",
		Snapshot:  "wait accept accept deny deny deny deny deny",
		Destroy:   "accept accept accept accept accept accept accept already",
	}
	for _, r := range Requests() {
		cells := strings.Fields(want[r])
		if len(cells) != len(States()) {
			t.Fatalf("request %s: the test knows %d cells, there are %d states", r, len(cells), len(States()))
		}
		for i, s := range States() {
			v, why := Decide(s, r)
			if v.String() != cells[i] {
				t.Errorf("%s while %s: got %s, want %s", r, s, v, cells[i])
			}
			if (v == Deny) != (why != "") {
				t.Errorf("%s while %s: %s with reason %q", r, s, v, why)
			}
			if v == Deny && !strings.Contains(why, string(s)) {
				t.Errorf("%s while %s: reason %q does not name the state", r, s, why)
			}
		}
	}
	if got := len(verdicts()); got != len(Requests()) {
		t.Errorf("table has %d rows, there are %d requests", got, len(Requests()))
	}
}

func TestDecideUnknown(t *testing.T) {
	if v, why := Decide("nonsense", Use); v != Deny || why == "" {
		t.Errorf("unknown state: %s %q", v, why)
	}
	if v, why := Decide(Running, "nonsense"); v != Deny || why == "" {
		t.Errorf("unknown request: %s %q", v, why)
	}
}

func TestID(t *testing.T) {
	if _, err := ParseID(string(NewID())); err != nil {
		t.Error(err)
	}
	for _, ok := range []string{"a", "sb-0123456789abcdef", "my-box-1"} {
		if _, err := ParseID(ok); err != nil {
			t.Errorf("%q refused: %v", ok, err)
		}
	}
	for _, bad := range []string{"", "-a", "a-", "A", "a.b", "../x", "a/b", "a b", strings.Repeat("a", MaxIDLen+1), "a\n"} {
		if _, err := ParseID(bad); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}
