package storage

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typed "k8s.io/client-go/kubernetes/typed/core/v1"
	listers "k8s.io/client-go/listers/core/v1"
	classes "k8s.io/client-go/listers/storage/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"github.com/hutch-run/hutch/kube/internal/loop"
)

// Params are what a controller needs.
type Params struct {
	API         kubernetes.Interface
	Provisioner string // the classes' provisioner
	Node        string // name of the only node
	Dir         string // of volumes; made when it is missing
	Tell        func(error)
}

// Controller makes and removes volumes.
type Controller struct {
	Params
	events  record.EventRecorder
	claims  listers.PersistentVolumeClaimLister
	volumes listers.PersistentVolumeLister
	classes classes.StorageClassLister
	synced  atomic.Bool
}

// New makes a controller.
func New(p Params) *Controller { return &Controller{Params: p} }

// Ready tells whether every claim and volume was seen once.
func (c *Controller) Ready(context.Context) error {
	if !c.synced.Load() {
		return errors.New("not synced")
	}
	return nil
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	stopEvents := c.record(ctx)
	defer stopEvents()
	factory := informers.NewSharedInformerFactory(c.API, 0)
	c.claims = factory.Core().V1().PersistentVolumeClaims().Lister()
	c.volumes = factory.Core().V1().PersistentVolumes().Lister()
	c.classes = factory.Storage().V1().StorageClasses().Lister()
	claims, volumes := loop.NewQueue(), loop.NewQueue()
	sawClaims, err := loop.Watch(factory.Core().V1().PersistentVolumeClaims().Informer(), func(o *core.PersistentVolumeClaim) { claims.Add(o) })
	if err != nil {
		return fmt.Errorf("watch claims: %w", err)
	}
	sawVolumes, err := loop.Watch(factory.Core().V1().PersistentVolumes().Informer(), func(o *core.PersistentVolume) { volumes.Add(o) })
	if err != nil {
		return fmt.Errorf("watch volumes: %w", err)
	}
	factory.Start(ctx.Done())
	defer factory.Shutdown()
	classInformer := factory.Storage().V1().StorageClasses().Informer()
	if !cache.WaitForCacheSync(ctx.Done(), sawClaims, sawVolumes, classInformer.HasSynced) {
		return nil
	}
	c.synced.Store(true)
	done := make(chan struct{})
	go func() {
		defer close(done)
		volumes.Run(ctx, c.volume, func(err error) { c.Tell(fmt.Errorf("remove volume %w", err)) })
	}()
	claims.Run(ctx, c.claim, func(err error) { c.Tell(fmt.Errorf("make the volume of claim %w", err)) })
	<-done
	return nil
}

func (c *Controller) record(ctx context.Context) func() {
	b := record.NewBroadcaster(record.WithContext(ctx))
	b.StartRecordingToSink(&typed.EventSinkImpl{Interface: c.API.CoreV1().Events("")})
	c.events = b.NewRecorder(scheme.Scheme, core.EventSource{Component: c.Provisioner})
	return b.Shutdown
}

func (c *Controller) fail(obj runtime.Object, reason string, err error) error {
	c.events.Event(obj, core.EventTypeWarning, reason, err.Error())
	return err
}

func gone(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
