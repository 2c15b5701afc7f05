package undo

import (
	"context"
	"errors"
	"strings"
	"testing"
)

func TestRunTakesBackLastFirstAndTriesAll(t *testing.T) {
	var s Stack
	var ran []string
	broken := true
	add := func(name string, err func() error) {
		s.Add(name, func(context.Context) error { ran = append(ran, name); return err() })
	}
	ok := func() error { return nil }
	add("one", ok)
	add("two", func() error {
		if broken {
			return errors.New("stuck")
		}
		return nil
	})
	add("three", ok)
	err := s.Run(context.Background())
	if strings.Join(ran, " ") != "three two one" || err == nil || err.Error() != "undo two: stuck" {
		t.Errorf("ran %v, %v", ran, err)
	}
	// What failed is tried again, and only that.
	broken, ran = false, nil
	if err := s.Run(context.Background()); err != nil || strings.Join(ran, " ") != "two" || s.Len() != 0 {
		t.Errorf("second run %v, %v, %d left", ran, err, s.Len())
	}
}

func TestReleasedUndosDoNotRun(t *testing.T) {
	var s Stack
	s.Add("one", func(context.Context) error { t.Error("ran"); return nil })
	s.Release()
	if err := s.Run(context.Background()); err != nil {
		t.Error(err)
	}
}

type key struct{}

func TestCleanupRunsOnALiveContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.WithValue(context.Background(), key{}, "value"))
	cancel()
	var s Stack
	s.Add("one", func(ctx context.Context) error {
		if _, bounded := ctx.Deadline(); !bounded || ctx.Value(key{}) != "value" {
			t.Error("the context has no deadline or lost its values")
		}
		return ctx.Err()
	})
	if err := s.Run(ctx); err != nil {
		t.Error(err)
	}
}
