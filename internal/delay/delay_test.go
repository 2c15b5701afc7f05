package delay

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		began := time.Now()
		if err := For(ctx, time.Hour); err != nil || time.Since(began) != time.Hour {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		if err := For(ctx, -1); err != nil || time.Since(began) != time.Hour {
			t.Errorf("no time: %v after %v", err, time.Since(began))
		}
		enough := errors.New("enough")
		time.AfterFunc(time.Minute, func() { cancel(enough) })
		if err := For(ctx, time.Hour); !errors.Is(err, enough) || time.Since(began) != time.Hour+time.Minute {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		if err := For(ctx, 0); !errors.Is(err, enough) {
			t.Errorf("no time, and ended: %v", err)
		}
	})
}
