package storage

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
)

func (c *Controller) volume(ctx context.Context, name cache.ObjectName) error {
	v, err := c.volumes.Get(name.Name)
	if err != nil {
		return gone(err)
	}
	if v.Annotations[noteProvisionedBy] != c.Provisioner {
		return nil
	}
	switch {
	case v.Spec.PersistentVolumeReclaimPolicy != core.PersistentVolumeReclaimDelete:
		if v.DeletionTimestamp != nil {
			return c.letGo(ctx, v) // its data are the user's
		}
		return nil
	case v.Status.Phase != core.VolumeReleased:
		return nil
	}
	if err := c.removeData(v); err != nil {
		return c.fail(v, "VolumeFailedDelete", err)
	}
	if err := c.letGo(ctx, v); err != nil {
		return err
	}
	uid := v.UID
	return gone(c.API.CoreV1().PersistentVolumes().Delete(ctx, v.Name, meta.DeleteOptions{Preconditions: &meta.Preconditions{UID: &uid}}))
}

// removeData removes the directory, which must be the one that this package gave to the volume: whoever may write volumes may not
// remove the node's files.
func (c *Controller) removeData(v *core.PersistentVolume) error {
	path := filepath.Join(c.Dir, v.Name)
	if v.Spec.HostPath == nil || v.Spec.HostPath.Path != path || filepath.Base(path) != v.Name {
		return fmt.Errorf("remove its data: they aren't in %s", path)
	}
	if err := os.RemoveAll(path); err != nil {
		return fmt.Errorf("remove its data: %w", err)
	}
	return nil
}

// letGo takes our finalizer from the volume.
func (c *Controller) letGo(ctx context.Context, v *core.PersistentVolume) error {
	i := slices.Index(v.Finalizers, finalizer)
	if i < 0 {
		return nil
	}
	v = v.DeepCopy()
	v.Finalizers = slices.Delete(v.Finalizers, i, i+1)
	_, err := c.API.CoreV1().PersistentVolumes().Update(ctx, v, meta.UpdateOptions{})
	return gone(err)
}
