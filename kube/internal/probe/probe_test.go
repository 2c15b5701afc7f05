package probe

import (
	"context"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

func TestReadyOnceThePodRan(t *testing.T) {
	api := fake.NewClientset()
	ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	p := New(api, "pause")
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	pods := api.CoreV1().Pods(meta.NamespaceSystem)
	run := func(phase core.PodPhase) {
		t.Helper()
		for ctx.Err() == nil {
			pod, err := pods.Get(ctx, Name, meta.GetOptions{})
			if apierrors.IsNotFound(err) || err == nil && pod.Status.Phase != "" {
				time.Sleep(time.Millisecond)
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			pod.Status.Phase = phase
			if _, err := pods.UpdateStatus(ctx, pod, meta.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			return
		}
		t.Fatal("no pod was made")
	}
	run(core.PodFailed)
	if p.Ready(ctx) == nil {
		t.Error("ready by a pod that failed")
	}
	run(core.PodRunning)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := p.Ready(ctx); err != nil {
		t.Error(err)
	}
	if _, err := pods.Get(ctx, Name, meta.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the pod stays: %v", err)
	}
}
