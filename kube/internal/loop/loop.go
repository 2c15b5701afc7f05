// Package loop is the queue that the cluster's small controllers have in common: names come in, each is worked on by one goroutine at a time, what
// failed comes again later.
//
// It knows nothing of what is worked on. Tests use no API.
package loop

import (
	"context"
	"fmt"

	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
)

// Queue holds names of objects that have to be looked at.
type Queue struct {
	names workqueue.TypedRateLimitingInterface[cache.ObjectName]
}

// NewQueue makes an empty queue.
func NewQueue() *Queue {
	return &Queue{names: workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[cache.ObjectName]())}
}

// Add puts an object's name into the queue.
func (q *Queue) Add(obj meta.Object) { q.names.Add(cache.MetaObjectToName(obj)) }

// Run works on names until ctx ends. An error is told and the name tried again later.
func (q *Queue) Run(ctx context.Context, work func(context.Context, cache.ObjectName) error, tell func(error)) {
	stop := context.AfterFunc(ctx, q.names.ShutDown)
	defer stop()
	for q.next(ctx, work, tell) {
	}
}

func (q *Queue) next(ctx context.Context, work func(context.Context, cache.ObjectName) error, tell func(error)) bool {
	name, shutdown := q.names.Get()
	if shutdown {
		return false
	}
	defer q.names.Done(name)
	if err := work(ctx, name); err != nil && ctx.Err() == nil {
		tell(fmt.Errorf("%s: %w", name, err))
		q.names.AddRateLimited(name)
		return true
	}
	q.names.Forget(name)
	return true
}

// Watch gives every object of a kind to add, now and when it changes. It returns what tells whether it gave all of now.
func Watch[T meta.Object](i cache.SharedIndexInformer, add func(T)) (cache.InformerSynced, error) {
	give := func(obj any) {
		if o, ok := obj.(T); ok {
			add(o)
		}
	}
	reg, err := i.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: give, UpdateFunc: func(_, obj any) { give(obj) }})
	if err != nil {
		return nil, err
	}
	return reg.HasSynced, nil
}
