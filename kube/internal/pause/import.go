package pause

import (
	"context"
	"fmt"
	"strconv"
	"time"

	content "github.com/containerd/containerd/api/services/content/v1"
	images "github.com/containerd/containerd/api/services/images/v1"
	leases "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/containerd/api/types"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	namespace = "k8s.io" // where containerd's CRI looks
	leaseName = "hutch-kube-pause"
	// leaseEnd is the label with the time at which containerd drops a lease that nobody deleted.
	leaseEnd = "containerd.io/gc.expire"
)

// Import puts the image into the containerd at a unix:// address, unless it is there, and tells whether it did.
func Import(ctx context.Context, address string) (imported bool, err error) {
	blobs, err := image()
	if err != nil {
		return false, err
	}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return false, fmt.Errorf("import the pause image: %w", err)
	}
	defer conn.Close()
	imported, err = importInto(metadata.AppendToOutgoingContext(ctx, "containerd-namespace", namespace), conn, blobs)
	if err != nil {
		return false, fmt.Errorf("import the pause image: %w", err)
	}
	return imported, nil
}

func importInto(ctx context.Context, conn grpc.ClientConnInterface, blobs []blob) (bool, error) {
	manifest := blobs[len(blobs)-1]
	store := images.NewImagesClient(conn)
	have, err := store.Get(ctx, &images.GetImageRequest{Name: Reference})
	if err == nil && have.GetImage().GetTarget().GetDigest() == manifest.desc.Digest.String() {
		return false, nil
	}
	if err != nil && status.Code(err) != codes.NotFound {
		return false, err
	}
	found := err == nil
	leased, release, err := lease(ctx, conn)
	if err != nil {
		return false, err
	}
	defer release()
	for _, b := range blobs {
		if err := write(leased, conn, b); err != nil {
			return false, fmt.Errorf("write %s: %w", b.desc.MediaType, err)
		}
	}
	return true, name(leased, store, manifest.desc, found)
}

func name(ctx context.Context, store images.ImagesClient, d ocispec.Descriptor, found bool) error {
	img := &images.Image{
		Name:   Reference,
		Labels: map[string]string{"io.cri-containerd.image": "managed", "io.cri-containerd.pinned": "pinned"},
		Target: &types.Descriptor{MediaType: d.MediaType, Digest: d.Digest.String(), Size: d.Size},
	}
	var err error
	if found {
		_, err = store.Update(ctx, &images.UpdateImageRequest{Image: img})
	} else {
		_, err = store.Create(ctx, &images.CreateImageRequest{Image: img})
	}
	return err
}

// lease keeps containerd from collecting blobs before an image names them. One of an earlier try is taken over.
func lease(ctx context.Context, conn grpc.ClientConnInterface) (context.Context, func(), error) {
	client := leases.NewLeasesClient(conn)
	_, err := client.Create(ctx, &leases.CreateRequest{ID: leaseName, Labels: map[string]string{leaseEnd: time.Now().Add(time.Hour).Format(time.RFC3339)}})
	if err != nil && status.Code(err) != codes.AlreadyExists {
		return nil, nil, fmt.Errorf("lease: %w", err)
	}
	release := func() {
		// The next import takes it over.
		_, _ = client.Delete(context.WithoutCancel(ctx), &leases.DeleteRequest{ID: leaseName})
	}
	return metadata.AppendToOutgoingContext(ctx, "containerd-lease", leaseName), release, nil
}

// write puts one blob into containerd. It is there already when an earlier import got that far.
func write(ctx context.Context, conn grpc.ClientConnInterface, b blob) error {
	stream, err := content.NewContentClient(conn).Write(ctx)
	if err != nil {
		return err
	}
	for off := 0; ; {
		end := min(off+1<<20, len(b.data))
		req := &content.WriteContentRequest{
			Action: content.WriteAction_WRITE, Ref: "hutch-kube-" + b.desc.Digest.Encoded(),
			Total: b.desc.Size, Expected: b.desc.Digest.String(), Offset: int64(off), Data: b.data[off:end],
		}
		if end == len(b.data) {
			req.Action, req.Labels = content.WriteAction_COMMIT, labels(b)
		}
		if err := stream.Send(req); err != nil {
			return there(recvError(stream, err))
		}
		if _, err := stream.Recv(); err != nil {
			return there(err)
		}
		if off = end; off == len(b.data) {
			return stream.CloseSend()
		}
	}
}

// recvError is the stream's own error, which Send hides behind EOF.
func recvError(stream content.Content_WriteClient, err error) error {
	if _, rerr := stream.Recv(); rerr != nil {
		return rerr
	}
	return err
}

func there(err error) error {
	if status.Code(err) == codes.AlreadyExists {
		return nil
	}
	return err
}

// labels tell containerd's collector what the blob needs.
func labels(b blob) map[string]string {
	out := map[string]string{}
	for i, d := range b.refs {
		out["containerd.io/gc.ref.content."+strconv.Itoa(i)] = d.Digest.String()
	}
	return out
}
