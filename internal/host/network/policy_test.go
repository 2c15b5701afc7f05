package network

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"

	"github.com/hutch-run/hutch/internal/sandbox"
)

func TestSpansAreSortedAndJoined(t *testing.T) {
	for _, c := range []struct {
		name string
		in   []string
		want []span
	}{
		{"none", nil, nil},
		{"one address", []string{"1.2.3.4/32"}, []span{{0x01020304, 0x01020304}}},
		{"bits behind the prefix", []string{"10.1.2.3/8"}, []span{{0x0a000000, 0x0affffff}}},
		{"twice the same", []string{"10.0.0.0/8", "10.0.0.0/8"}, []span{{0x0a000000, 0x0affffff}}},
		{"one in the other", []string{"10.1.0.0/16", "10.0.0.0/8", "10.2.0.0/16"}, []span{{0x0a000000, 0x0affffff}}},
		{"side by side", []string{"10.0.1.0/24", "10.0.0.0/24"}, []span{{0x0a000000, 0x0a0001ff}}},
		{"apart", []string{"10.0.2.0/24", "10.0.0.0/24"}, []span{{0x0a000000, 0x0a0000ff}, {0x0a000200, 0x0a0002ff}}},
		{"up to the last address", []string{"255.255.255.255/32", "255.0.0.0/8", "0.0.0.0/32"}, []span{{0, 0}, {0xff000000, 0xffffffff}}},
		{"everything", []string{"0.0.0.0/0", "1.1.1.1/32"}, []span{{0, 0xffffffff}}},
		{"everything in halves", []string{"128.0.0.0/1", "0.0.0.0/1"}, []span{{0, 0xffffffff}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := parsePolicy(sandbox.Policy{Mode: sandbox.ModeAllow, Allow: c.in})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, p.open, cmp.AllowUnexported(span{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestASpanUpToTheLastAddressHasNoEndElement(t *testing.T) {
	got := spanElements([]span{{0, 1}, {0xff000000, 0xffffffff}})
	want := []nftables.SetElement{
		{Key: []byte{0, 0, 0, 0}},
		{Key: []byte{0, 0, 0, 2}, IntervalEnd: true},
		{Key: []byte{255, 0, 0, 0}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestAnEmptyPolicyIsTheInternet(t *testing.T) {
	p, err := parsePolicy(sandbox.Policy{})
	if err != nil || !p.plain() {
		t.Errorf("got %+v, %v", p, err)
	}
}

func TestWhatTheTableMarksIsReadBack(t *testing.T) {
	w := newWorld(t)
	h := hostRules{names: names{"abcdef"}, owner: "me", policies: map[int]policy{
		1:        {mode: sandbox.ModeNone},
		2:        {mode: sandbox.ModeAllow, open: spansOf("10.0.0.0/8", "255.255.255.0/24")},
		3:        {mode: sandbox.ModeInternet, open: spansOf("0.0.0.0/0")},
		MaxSlots: {mode: sandbox.ModeNone, open: spansOf("192.168.0.0/32")},
	}}
	// More slots than the kernel's answers would fit an ordinary buffer.
	for i := range 3000 {
		h.policies[1000+i] = policy{mode: sandbox.ModeNone, open: spansOf("10.0.0.0/8")}
	}
	// More than fits one message.
	many := policy{mode: sandbox.ModeAllow}
	for i := range uint32(MaxAllow) {
		many.open = append(many.open, span{i * 4, i*4 + 1})
	}
	for i := range 5 {
		h.policies[100+i] = many
	}
	must(t, w.host.do(func() error { return withNft(h.load) }))
	must(t, w.host.do(func() error {
		return withNft(func(c *nftables.Conn) error {
			got, err := h.read(c)
			if diff := cmp.Diff(h.policies, got, cmp.AllowUnexported(policy{}, span{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			return err
		})
	}))
}
