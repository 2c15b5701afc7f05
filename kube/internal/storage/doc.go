// Package storage makes the volumes of the default storage class: directories of the node's data disk.
//
// It owns one directory. A claim of the class gets a volume when a pod that uses it has its node; the volume is a directory there that every user may write,
// its size isn't enforced. A volume that nobody claims any more is removed with its data, if its class says Delete.
// Claims are handed over by Kubernetes' own controller, volumes are bound by it. Nothing outside the directory is ever removed. Tests use a fake API and a
// real directory.
package storage
