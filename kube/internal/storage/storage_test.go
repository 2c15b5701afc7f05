package storage

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	class "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
)

const maker = "hutch.run/local"

type bench struct {
	*testing.T
	ctx context.Context
	api *fake.Clientset
	dir string
}

func start(t *testing.T) *bench {
	late := class.VolumeBindingWaitForFirstConsumer
	b := &bench{T: t, dir: filepath.Join(t.TempDir(), "volumes"), api: fake.NewClientset(
		&class.StorageClass{ObjectMeta: meta.ObjectMeta{Name: "local"}, Provisioner: maker, VolumeBindingMode: &late},
		&class.StorageClass{ObjectMeta: meta.ObjectMeta{Name: "other"}, Provisioner: "other"},
	)}
	ctx, stop := context.WithTimeout(t.Context(), 60*time.Second)
	b.ctx = ctx
	c := New(Params{API: b.api, Provisioner: maker, Node: "node", Dir: b.dir, Tell: func(err error) { t.Log(err) }})
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	b.until("synced", func() bool { return c.Ready(ctx) == nil })
	return b
}

func (b *bench) until(what string, ok func() bool) {
	b.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-b.ctx.Done():
			b.Fatalf("never: %s", what)
		case <-tick.C:
		}
	}
}

func (b *bench) claim(name, cls string, notes map[string]string) *core.PersistentVolumeClaim {
	b.Helper()
	p, err := b.api.CoreV1().PersistentVolumeClaims("default").Create(b.ctx, &core.PersistentVolumeClaim{
		ObjectMeta: meta.ObjectMeta{Name: name, Namespace: "default", UID: types.UID("uid-" + name), Annotations: notes},
		Spec: core.PersistentVolumeClaimSpec{
			StorageClassName: &cls, AccessModes: []core.PersistentVolumeAccessMode{core.ReadWriteOnce},
			Resources: core.VolumeResourceRequirements{Requests: core.ResourceList{core.ResourceStorage: resource.MustParse("1Gi")}},
		},
	}, meta.CreateOptions{})
	if err != nil {
		b.Fatal(err)
	}
	return p
}

func ready() map[string]string {
	return map[string]string{noteProvisioner: maker, noteSelectedNode: "node"}
}

func (b *bench) volume(name string) *core.PersistentVolume {
	v, err := b.api.CoreV1().PersistentVolumes().Get(b.ctx, "pvc-uid-"+name, meta.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		b.Fatal(err)
	}
	return v
}

func (b *bench) set(v *core.PersistentVolume) {
	b.Helper()
	if _, err := b.api.CoreV1().PersistentVolumes().Update(b.ctx, v, meta.UpdateOptions{}); err != nil {
		b.Fatal(err)
	}
}

func TestVolumeIsMadeForAClaimThatHasItsNode(t *testing.T) {
	b := start(t)
	waiting := b.claim("waiting", "local", map[string]string{noteProvisioner: maker})
	b.claim("other", "other", map[string]string{noteProvisioner: "other", noteSelectedNode: "node"})
	b.claim("a", "local", ready())
	b.until("volume a", func() bool { return b.volume("a") != nil })
	v := b.volume("a")
	if v.Spec.ClaimRef.UID != "uid-a" || v.Spec.Capacity.Storage().String() != "1Gi" || v.Spec.PersistentVolumeReclaimPolicy != core.PersistentVolumeReclaimDelete {
		t.Errorf("%+v", v.Spec)
	}
	st, err := os.Stat(filepath.Join(b.dir, "pvc-uid-a"))
	if err != nil || st.Mode().Perm() != 0o777 {
		t.Errorf("directory: %v, %v", st, err)
	}
	if b.volume("waiting") != nil || b.volume("other") != nil {
		t.Error("a claim that isn't ours or waits for its node got a volume")
	}
	waiting.Annotations = ready()
	if _, err := b.api.CoreV1().PersistentVolumeClaims("default").Update(b.ctx, waiting, meta.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	b.until("volume waiting", func() bool { return b.volume("waiting") != nil })
}

func TestReleasedVolumeGoesWithItsData(t *testing.T) {
	b := start(t)
	b.claim("a", "local", ready())
	b.until("volume", func() bool { return b.volume("a") != nil })
	file := filepath.Join(b.dir, "pvc-uid-a", "sub", "file")
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	v := b.volume("a")
	v.Status.Phase = core.VolumeBound
	b.set(v)
	v.Status.Phase = core.VolumeReleased
	b.set(v)
	b.until("gone", func() bool { return b.volume("a") == nil })
	if _, err := os.Stat(filepath.Join(b.dir, "pvc-uid-a")); !os.IsNotExist(err) {
		t.Errorf("its data stay: %v", err)
	}
}

func TestRetainedDataStay(t *testing.T) {
	b := start(t)
	b.claim("a", "local", ready())
	b.until("volume", func() bool { return b.volume("a") != nil })
	v, now := b.volume("a"), meta.Now()
	v.Spec.PersistentVolumeReclaimPolicy = core.PersistentVolumeReclaimRetain
	v.Status.Phase, v.DeletionTimestamp = core.VolumeReleased, &now
	b.set(v)
	b.until("let go", func() bool { v := b.volume("a"); return v == nil || len(v.Finalizers) == 0 })
	if _, err := os.Stat(filepath.Join(b.dir, "pvc-uid-a")); err != nil {
		t.Errorf("its data went: %v", err)
	}
}

func TestVolumeThatPointsElsewhereRemovesNothing(t *testing.T) {
	b := start(t)
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.Mkdir(victim, 0o700); err != nil {
		t.Fatal(err)
	}
	c := &Controller{Params: Params{Dir: b.dir}}
	for _, path := range []string{victim, b.dir, b.dir + "/../" + filepath.Base(victim)} {
		v := &core.PersistentVolume{ObjectMeta: meta.ObjectMeta{Name: "pvc-x"}}
		v.Spec.HostPath = &core.HostPathVolumeSource{Path: path}
		if err := c.removeData(v); err == nil {
			t.Errorf("removed %s", path)
		}
	}
	if _, err := os.Stat(victim); err != nil {
		t.Error(err)
	}
}

func TestUnsupportedClaimIsTold(t *testing.T) {
	b := start(t)
	p := b.claim("a", "local", nil)
	block := core.PersistentVolumeBlock
	p.Annotations, p.Spec.VolumeMode = ready(), &block
	if _, err := b.api.CoreV1().PersistentVolumeClaims("default").Update(b.ctx, p, meta.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	b.until("an event", func() bool {
		l, err := b.api.CoreV1().Events("default").List(b.ctx, meta.ListOptions{})
		return err == nil && len(l.Items) == 1 && l.Items[0].Reason == "ProvisioningFailed"
	})
	if b.volume("a") != nil {
		t.Error("a volume was made")
	}
}
