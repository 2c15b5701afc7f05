package loop

import (
	"context"
	"errors"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
)

func TestWhatFailedComesAgain(t *testing.T) {
	ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	q := NewQueue()
	q.Add(&core.Service{ObjectMeta: meta.ObjectMeta{Namespace: "a", Name: "b"}})
	var worked, told int
	q.Run(ctx, func(_ context.Context, name cache.ObjectName) error {
		if name.String() != "a/b" {
			t.Errorf("worked on %s", name)
		}
		if worked++; worked < 3 {
			return errors.New("no")
		}
		stop()
		return nil
	}, func(error) { told++ })
	if worked != 3 || told != 2 {
		t.Fatalf("worked %d times, told %d errors", worked, told)
	}
}
