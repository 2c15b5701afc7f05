package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	core "k8s.io/api/core/v1"
	class "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
)

const (
	noteProvisioner   = "volume.kubernetes.io/storage-provisioner"
	noteSelectedNode  = "volume.kubernetes.io/selected-node"
	noteProvisionedBy = "pv.kubernetes.io/provisioned-by"
	// finalizer keeps a volume's object until its data are gone, in the way of all makers of volumes.
	finalizer = "external-provisioner.volume.kubernetes.io/finalizer"
)

func (c *Controller) claim(ctx context.Context, name cache.ObjectName) error {
	claim, err := c.claims.PersistentVolumeClaims(name.Namespace).Get(name.Name)
	if err != nil {
		return gone(err)
	}
	cls, err := c.wanted(claim)
	if err != nil || cls == nil {
		return err
	}
	if err := supported(claim); err != nil {
		_ = c.fail(claim, "ProvisioningFailed", err) // told to the claim's owner; nothing to try again
		return nil
	}
	v := c.volumeOf(claim, cls)
	if err := os.MkdirAll(v.Spec.HostPath.Path, 0o777); err != nil {
		return c.fail(claim, "ProvisioningFailed", fmt.Errorf("make its directory: %w", err))
	}
	// Pods run as any user, and Kubernetes changes no owner on such volumes.
	if err := os.Chmod(v.Spec.HostPath.Path, 0o777); err != nil {
		return c.fail(claim, "ProvisioningFailed", fmt.Errorf("open its directory: %w", err))
	}
	_, err = c.API.CoreV1().PersistentVolumes().Create(ctx, v, meta.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return c.fail(claim, "ProvisioningFailed", err)
	}
	c.events.Eventf(claim, core.EventTypeNormal, "ProvisioningSucceeded", "made volume %s", v.Name)
	return nil
}

// wanted gives the claim's class if the claim waits for a volume of ours.
func (c *Controller) wanted(claim *core.PersistentVolumeClaim) (*class.StorageClass, error) {
	if claim.Spec.VolumeName != "" || claim.DeletionTimestamp != nil || claim.Annotations[noteProvisioner] != c.Provisioner || claim.Spec.StorageClassName == nil {
		return nil, nil
	}
	cls, err := c.classes.Get(*claim.Spec.StorageClassName)
	if err != nil {
		return nil, gone(err)
	}
	late := cls.VolumeBindingMode != nil && *cls.VolumeBindingMode == class.VolumeBindingWaitForFirstConsumer
	if cls.Provisioner != c.Provisioner || late && claim.Annotations[noteSelectedNode] == "" {
		return nil, nil
	}
	return cls, nil
}

func supported(claim *core.PersistentVolumeClaim) error {
	switch {
	case claim.Spec.VolumeMode != nil && *claim.Spec.VolumeMode == core.PersistentVolumeBlock:
		return errors.New("block volumes aren't supported")
	case claim.Spec.Selector != nil:
		return errors.New("a selector isn't supported")
	case claim.Spec.DataSource != nil || claim.Spec.DataSourceRef != nil:
		return errors.New("a data source isn't supported")
	}
	return nil
}

func (c *Controller) volumeOf(claim *core.PersistentVolumeClaim, cls *class.StorageClass) *core.PersistentVolume {
	name := "pvc-" + string(claim.UID)
	reclaim, kind := core.PersistentVolumeReclaimDelete, core.HostPathDirectory
	if cls.ReclaimPolicy != nil {
		reclaim = *cls.ReclaimPolicy
	}
	return &core.PersistentVolume{
		ObjectMeta: meta.ObjectMeta{
			Name: name, Finalizers: []string{finalizer}, Annotations: map[string]string{noteProvisionedBy: c.Provisioner},
		},
		Spec: core.PersistentVolumeSpec{
			Capacity:                      core.ResourceList{core.ResourceStorage: claim.Spec.Resources.Requests[core.ResourceStorage]},
			AccessModes:                   claim.Spec.AccessModes,
			PersistentVolumeReclaimPolicy: reclaim,
			StorageClassName:              cls.Name,
			PersistentVolumeSource: core.PersistentVolumeSource{
				HostPath: &core.HostPathVolumeSource{Path: filepath.Join(c.Dir, name), Type: &kind},
			},
			ClaimRef: &core.ObjectReference{
				APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID,
			},
			NodeAffinity: &core.VolumeNodeAffinity{Required: &core.NodeSelector{NodeSelectorTerms: []core.NodeSelectorTerm{{
				MatchExpressions: []core.NodeSelectorRequirement{{
					Key: core.LabelHostname, Operator: core.NodeSelectorOpIn, Values: []string{c.Node},
				}},
			}}}},
		},
	}
}
