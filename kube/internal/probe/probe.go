// Package probe runs one pod and removes it: proof that a node can run pods.
//
// It owns the pod kube-system/hutch-probe, whose only process is pause. It says ready when that ran once, and stays so. Tests use a fake API.
package probe

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
)

// Name is the pod's.
const Name = "hutch-probe"

// again is how long it waits after a try that failed.
const again = time.Second

// Probe runs the pod.
type Probe struct {
	api   kubernetes.Interface
	image string
	ran   atomic.Bool
	last  atomic.Pointer[string]
}

// New makes a probe that uses a program which waits, in an image that is there.
func New(api kubernetes.Interface, image string) *Probe { return &Probe{api: api, image: image} }

// Ready tells whether the pod ran.
func (p *Probe) Ready(context.Context) error {
	if p.ran.Load() {
		return nil
	}
	if s := p.last.Load(); s != nil {
		return errors.New(*s)
	}
	return errors.New("no pod ran yet")
}

// Run tries until the pod ran, or ctx ends.
func (p *Probe) Run(ctx context.Context) error {
	for {
		err := p.try(ctx)
		if err == nil {
			p.ran.Store(true)
			return nil
		}
		s := err.Error()
		p.last.Store(&s)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(again):
		}
	}
}

func (p *Probe) try(ctx context.Context) error {
	pods := p.api.CoreV1().Pods(meta.NamespaceSystem)
	now := int64(0)
	remove := func(ctx context.Context) error {
		err := pods.Delete(ctx, Name, meta.DeleteOptions{GracePeriodSeconds: &now})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return err
	}
	if err := remove(ctx); err != nil {
		return fmt.Errorf("remove the pod of an earlier try: %w", err)
	}
	// Watched from before it is there, so that nothing of it is missed.
	w, err := pods.Watch(ctx, meta.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", Name).String()})
	if err != nil {
		return fmt.Errorf("watch the pod: %w", err)
	}
	defer w.Stop()
	if _, err := pods.Create(ctx, p.pod(), meta.CreateOptions{}); err != nil {
		return fmt.Errorf("make the pod: %w", err)
	}
	for e := range w.ResultChan() {
		pod, ok := e.Object.(*core.Pod)
		if !ok {
			return fmt.Errorf("watch the pod: %v", e.Object)
		}
		switch pod.Status.Phase {
		case core.PodRunning:
			return remove(ctx)
		case core.PodFailed, core.PodSucceeded:
			return fmt.Errorf("the pod ended: %s %s", pod.Status.Reason, pod.Status.Message)
		}
		s := describe(pod)
		p.last.Store(&s)
	}
	return errors.New("watch the pod: the watch ended")
}

// describe says what the pod waits for.
func describe(pod *core.Pod) string {
	for _, c := range pod.Status.ContainerStatuses {
		if w := c.State.Waiting; w != nil {
			return fmt.Sprintf("the pod waits: %s %s", w.Reason, w.Message)
		}
	}
	for _, c := range pod.Status.Conditions {
		if c.Status == core.ConditionFalse {
			return fmt.Sprintf("the pod waits: %s %s", c.Reason, c.Message)
		}
	}
	return "the pod has no node yet"
}

func (p *Probe) pod() *core.Pod {
	no, grace := false, int64(0)
	return &core.Pod{
		ObjectMeta: meta.ObjectMeta{Name: Name, Namespace: meta.NamespaceSystem, Labels: map[string]string{"app.kubernetes.io/managed-by": "hutch-kube"}},
		Spec: core.PodSpec{
			AutomountServiceAccountToken: &no, EnableServiceLinks: &no, TerminationGracePeriodSeconds: &grace,
			RestartPolicy: core.RestartPolicyNever,
			Containers:    []core.Container{{Name: "pause", Image: p.image, ImagePullPolicy: core.PullNever}},
		},
	}
}
