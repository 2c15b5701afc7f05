package pause

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"

	content "github.com/containerd/containerd/api/services/content/v1"
	images "github.com/containerd/containerd/api/services/images/v1"
	leases "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// store is a fake containerd.
type store struct {
	content.UnimplementedContentServer

	mu     sync.Mutex
	blobs  map[string][]byte
	labels map[string]map[string]string
	images map[string]*images.Image
	leases map[string]bool
	asked  map[string]int
}

func (s *store) seen(ctx context.Context, what string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked[what]++
	md, _ := metadata.FromIncomingContext(ctx)
	if ns := md.Get("containerd-namespace"); len(ns) != 1 || ns[0] != "k8s.io" {
		return status.Error(codes.InvalidArgument, "no namespace")
	}
	return nil
}

func (s *store) Write(stream content.Content_WriteServer) error {
	if err := s.seen(stream.Context(), "write"); err != nil {
		return err
	}
	md, _ := metadata.FromIncomingContext(stream.Context())
	if l := md.Get("containerd-lease"); len(l) != 1 || !s.leases[l[0]] {
		return status.Error(codes.FailedPrecondition, "no lease")
	}
	var data []byte
	for {
		req, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		s.mu.Lock()
		_, have := s.blobs[req.Expected]
		s.mu.Unlock()
		if have {
			return status.Error(codes.AlreadyExists, "there")
		}
		if req.Offset != int64(len(data)) {
			return status.Errorf(codes.OutOfRange, "offset %d, have %d", req.Offset, len(data))
		}
		data = append(data, req.Data...)
		if req.Action == content.WriteAction_COMMIT {
			if digest.FromBytes(data).String() != req.Expected || int64(len(data)) != req.Total {
				return status.Error(codes.FailedPrecondition, "not what was expected")
			}
			s.mu.Lock()
			s.blobs[req.Expected], s.labels[req.Expected] = data, req.Labels
			s.mu.Unlock()
		}
		if err := stream.Send(&content.WriteContentResponse{Action: req.Action}); err != nil {
			return err
		}
	}
}

type imageStore struct {
	images.UnimplementedImagesServer
	s *store
}

func (i imageStore) Get(ctx context.Context, r *images.GetImageRequest) (*images.GetImageResponse, error) {
	if err := i.s.seen(ctx, "get"); err != nil {
		return nil, err
	}
	if img := i.s.images[r.Name]; img != nil {
		return &images.GetImageResponse{Image: img}, nil
	}
	return nil, status.Error(codes.NotFound, "none")
}

func (i imageStore) Create(ctx context.Context, r *images.CreateImageRequest) (*images.CreateImageResponse, error) {
	i.s.images[r.Image.Name] = r.Image
	return &images.CreateImageResponse{Image: r.Image}, i.s.seen(ctx, "create")
}

func (i imageStore) Update(ctx context.Context, r *images.UpdateImageRequest) (*images.UpdateImageResponse, error) {
	i.s.images[r.Image.Name] = r.Image
	return &images.UpdateImageResponse{Image: r.Image}, i.s.seen(ctx, "update")
}

type leaseStore struct {
	leases.UnimplementedLeasesServer
	s *store
}

func (l leaseStore) Create(ctx context.Context, r *leases.CreateRequest) (*leases.CreateResponse, error) {
	if l.s.leases[r.ID] {
		return nil, status.Error(codes.AlreadyExists, "there")
	}
	l.s.leases[r.ID] = true
	return &leases.CreateResponse{}, l.s.seen(ctx, "lease")
}

func (l leaseStore) Delete(ctx context.Context, r *leases.DeleteRequest) (*emptypb.Empty, error) {
	delete(l.s.leases, r.ID)
	return &emptypb.Empty{}, l.s.seen(ctx, "release")
}

func connect(t *testing.T) (*store, *grpc.ClientConn) {
	t.Helper()
	s := &store{blobs: map[string][]byte{}, labels: map[string]map[string]string{}, images: map[string]*images.Image{}, leases: map[string]bool{}, asked: map[string]int{}}
	srv := grpc.NewServer()
	content.RegisterContentServer(srv, s)
	images.RegisterImagesServer(srv, imageStore{s: s})
	leases.RegisterLeasesServer(srv, leaseStore{s: s})
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(); srv.Stop(); <-done })
	return s, conn
}

func program() []byte { return bytes.Repeat([]byte("pause"), 500_000) } // more than one message

func into(t *testing.T, conn *grpc.ClientConn, program []byte) bool {
	t.Helper()
	blobs, err := imageOf(program)
	if err != nil {
		t.Fatal(err)
	}
	imported, err := importInto(metadata.AppendToOutgoingContext(t.Context(), "containerd-namespace", namespace), conn, blobs)
	if err != nil {
		t.Fatal(err)
	}
	return imported
}

func TestImportOnceAndAgainWhenItChanges(t *testing.T) {
	s, conn := connect(t)
	s.leases[leaseName] = true // of an import that was cut off
	if !into(t, conn, program()) {
		t.Fatal("nothing was imported")
	}
	manifest := s.images[Reference].Target.Digest
	if len(s.labels[manifest]) != 2 || len(s.blobs) != 3 || len(s.leases) != 0 {
		t.Errorf("labels %v, %d blobs, leases %v", s.labels[manifest], len(s.blobs), s.leases)
	}
	if into(t, conn, program()) || s.asked["write"] != 3 {
		t.Error("an image that is there was imported again")
	}
	delete(s.images, Reference) // somebody removed the image; its blobs are still there
	if !into(t, conn, program()) || s.images[Reference].Target.Digest != manifest {
		t.Error("it was not named again")
	}
	if !into(t, conn, []byte("another")) || s.asked["update"] != 1 || s.images[Reference].Target.Digest == manifest {
		t.Error("another program made no other image")
	}
}

func TestImageHoldsTheProgram(t *testing.T) {
	blobs, err := imageOf([]byte("program"))
	if err != nil {
		t.Fatal(err)
	}
	again, err := imageOf([]byte("program"))
	if err != nil || again[2].desc.Digest != blobs[2].desc.Digest {
		t.Errorf("its digest changes: %v", err)
	}
	var c ocispec.Image
	if err := json.Unmarshal(blobs[1].data, &c); err != nil {
		t.Fatal(err)
	}
	if c.RootFS.DiffIDs[0] != digest.FromBytes(blobs[0].data) || c.Config.Entrypoint[0] != "/pause" {
		t.Errorf("%+v", c)
	}
	r := tar.NewReader(bytes.NewReader(blobs[0].data))
	h, err := r.Next()
	if err != nil || h.Name != "pause" || h.Mode != 0o755 {
		t.Fatalf("%+v, %v", h, err)
	}
	if data, err := io.ReadAll(r); err != nil || string(data) != "program" {
		t.Errorf("%q, %v", data, err)
	}
}
