package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
)

// contest is one thing that several sides do in turn, round after round.
type contest struct {
	Name  string   `json:"name"`
	Sides []string `json:"sides"`
	// Rounds has the microseconds of each side that took part.
	Rounds []map[string]int64 `json:"rounds"`
}

// side is one that takes part. It holds the clock itself, since what comes
// before and after is not measured.
type side struct {
	name string
	// every: it takes part in one of so many rounds. 0: in all.
	every int
	// do returns a time for each of the contests that are held together.
	do func(context.Context) ([]time.Duration, error)
}

// compete has the sides take part in a number of rounds, after some that are
// not counted. Who is first moves on with every round. Contests that follow from
// one another, such as going to sleep and waking up, are held together: a side
// does one after the other in its turn.
func compete(ctx context.Context, names []string, rounds, warm int, sides []side) ([]contest, error) {
	var all []contest
	for _, name := range names {
		c := contest{Name: name}
		for _, s := range sides {
			c.Sides = append(c.Sides, s.name)
		}
		all = append(all, c)
	}
	for i := range rounds + warm {
		times := make([]map[string]int64, len(names))
		for k := range times {
			times[k] = map[string]int64{}
		}
		for j := range sides {
			s := sides[(i+j)%len(sides)]
			if s.every > 1 && (i-warm)%s.every != 0 {
				continue
			}
			took, err := s.do(ctx)
			if err != nil {
				return nil, fmt.Errorf("%s, %s: %w", strings.Join(names, " and "), s.name, err)
			}
			for k := range names {
				times[k][s.name] = micros(took[k])
			}
		}
		if i < warm {
			continue
		}
		for k := range all {
			all[k].Rounds = append(all[k].Rounds, times[k])
			say("  %s %d:%s", all[k].Name, i+1-warm, all[k].describe(times[k]))
		}
	}
	return all, nil
}

func (c contest) describe(round map[string]int64) string {
	var text strings.Builder
	for _, s := range c.Sides {
		if t, ok := round[s]; ok {
			fmt.Fprintf(&text, " %s %.1f ms,", s, float64(t)/1e3)
		}
	}
	return strings.TrimSuffix(text.String(), ",")
}

// times are those of a side.
func (c contest) times(side string) []int64 {
	var out []int64
	for _, r := range c.Rounds {
		if t, ok := r[side]; ok {
			out = append(out, t)
		}
	}
	return out
}

// pairs are the rounds in which both took part.
func (c contest) pairs(floor, hutch string) []sample {
	var out []sample
	for _, r := range c.Rounds {
		a, ok := r[floor]
		b, ok2 := r[hutch]
		if ok && ok2 {
			out = append(out, sample{a, b})
		}
	}
	return out
}

// contest returns the one of a name, without rounds when it was not held.
func (r *report) contest(name string) contest {
	i := slices.IndexFunc(r.Contests, func(c contest) bool { return c.Name == name })
	if i < 0 {
		return contest{Name: name}
	}
	return r.Contests[i]
}

// clocked runs f and tells how long it took.
func clocked(f func() error) (time.Duration, error) {
	began := time.Now()
	err := f()
	return time.Since(began), err
}
