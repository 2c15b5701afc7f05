package filesrpc

import (
	"context"
	"net/http"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	filesystempb "github.com/hutch-run/hutch/gen/filesystem"
	"github.com/hutch-run/hutch/gen/filesystem/filesystempbconnect"
	"github.com/hutch-run/hutch/internal/guest/account"
	"github.com/hutch-run/hutch/internal/guest/files"
)

// Keep-alives: how often a silent watch says that it lives, and the bounds of
// what a client may ask for with the header.
const (
	keepaliveHeader  = "Keepalive-Ping-Interval" // whole seconds
	defaultKeepalive = 25 * time.Second
	maxKeepalive     = time.Hour
)

// Handler implements filesystempbconnect.FilesystemHandler.
type Handler struct {
	store     *files.Store
	keepalive time.Duration
}

var _ filesystempbconnect.FilesystemHandler = (*Handler)(nil)

// New returns the handler for the files of store. The caller closes store.
func New(store *files.Store) *Handler { return &Handler{store: store, keepalive: defaultKeepalive} }

// Mount returns the path prefix of the service and what serves it.
func (h *Handler) Mount(opts ...connect.HandlerOption) (string, http.Handler) {
	return filesystempbconnect.NewFilesystemHandler(h, opts...)
}

func (h *Handler) view(header http.Header) (files.View, error) {
	return h.store.As(account.Choice{Header: account.HeaderUser(header)})
}

// Stat describes one file.
func (h *Handler) Stat(_ context.Context, req *connect.Request[filesystempb.StatRequest]) (*connect.Response[filesystempb.StatResponse], error) {
	v, err := h.view(req.Header())
	if err != nil {
		return nil, err
	}
	e, err := v.Stat(req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&filesystempb.StatResponse{Entry: entryMessage(e)}), nil
}

// MakeDir makes a directory and its parents.
func (h *Handler) MakeDir(_ context.Context, req *connect.Request[filesystempb.MakeDirRequest]) (*connect.Response[filesystempb.MakeDirResponse], error) {
	v, err := h.view(req.Header())
	if err != nil {
		return nil, err
	}
	e, err := v.MakeDir(req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&filesystempb.MakeDirResponse{Entry: entryMessage(e)}), nil
}

// Move renames a file or directory.
func (h *Handler) Move(_ context.Context, req *connect.Request[filesystempb.MoveRequest]) (*connect.Response[filesystempb.MoveResponse], error) {
	v, err := h.view(req.Header())
	if err != nil {
		return nil, err
	}
	e, err := v.Move(req.Msg.GetSource(), req.Msg.GetDestination())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&filesystempb.MoveResponse{Entry: entryMessage(e)}), nil
}

// ListDir describes what is in a directory.
func (h *Handler) ListDir(_ context.Context, req *connect.Request[filesystempb.ListDirRequest]) (*connect.Response[filesystempb.ListDirResponse], error) {
	v, err := h.view(req.Header())
	if err != nil {
		return nil, err
	}
	entries, err := v.List(req.Msg.GetPath(), int(min(req.Msg.GetDepth(), 1<<20)))
	if err != nil {
		return nil, err
	}
	res := &filesystempb.ListDirResponse{}
	for _, e := range entries {
		res.Entries = append(res.Entries, entryMessage(e))
	}
	return connect.NewResponse(res), nil
}

// Remove deletes a file, or a directory with all in it.
func (h *Handler) Remove(_ context.Context, req *connect.Request[filesystempb.RemoveRequest]) (*connect.Response[filesystempb.RemoveResponse], error) {
	v, err := h.view(req.Header())
	if err != nil {
		return nil, err
	}
	if err := v.Remove(req.Msg.GetPath()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&filesystempb.RemoveResponse{}), nil
}

// WatchDir streams the changes in a directory.
func (h *Handler) WatchDir(ctx context.Context, req *connect.Request[filesystempb.WatchDirRequest], stream *connect.ServerStream[filesystempb.WatchDirResponse]) error {
	v, err := h.view(req.Header())
	if err != nil {
		return err
	}
	w, err := v.Watch(files.WatchSpec{
		Path: req.Msg.GetPath(), Recursive: req.Msg.GetRecursive(),
		Entries: req.Msg.GetIncludeEntry(), NetworkMounts: req.Msg.GetAllowNetworkMounts(),
	})
	if err != nil {
		return err
	}
	defer w.Close()
	started := &filesystempb.WatchDirResponse_Start{Start: &filesystempb.WatchDirResponse_StartEvent{}}
	if err := stream.Send(&filesystempb.WatchDirResponse{Event: started}); err != nil {
		return err
	}
	idle := interval(req.Header(), h.keepalive)
	for {
		change, ok, err := w.Next(ctx, idle)
		if err != nil {
			return err
		}
		res := &filesystempb.WatchDirResponse{Event: &filesystempb.WatchDirResponse_Keepalive{Keepalive: &filesystempb.WatchDirResponse_KeepAlive{}}}
		if ok {
			res.Event = &filesystempb.WatchDirResponse_Filesystem{Filesystem: changeMessage(change)}
		}
		if err := stream.Send(res); err != nil {
			return err
		}
	}
}

func interval(header http.Header, def time.Duration) time.Duration {
	n, err := strconv.Atoi(header.Get(keepaliveHeader))
	if err != nil || n <= 0 {
		return def
	}
	return time.Duration(min(n, int(maxKeepalive/time.Second))) * time.Second
}

// CreateWatcher begins a watch for callers that poll.
func (h *Handler) CreateWatcher(_ context.Context, req *connect.Request[filesystempb.CreateWatcherRequest]) (*connect.Response[filesystempb.CreateWatcherResponse], error) {
	v, err := h.view(req.Header())
	if err != nil {
		return nil, err
	}
	id, err := v.CreateWatcher(files.WatchSpec{
		Path: req.Msg.GetPath(), Recursive: req.Msg.GetRecursive(),
		Entries: req.Msg.GetIncludeEntry(), NetworkMounts: req.Msg.GetAllowNetworkMounts(),
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&filesystempb.CreateWatcherResponse{WatcherId: id}), nil
}

// GetWatcherEvents returns the changes since the last call.
func (h *Handler) GetWatcherEvents(_ context.Context, req *connect.Request[filesystempb.GetWatcherEventsRequest]) (*connect.Response[filesystempb.GetWatcherEventsResponse], error) {
	v, err := h.view(req.Header())
	if err != nil {
		return nil, err
	}
	changes, err := v.WatcherEvents(req.Msg.GetWatcherId())
	if err != nil {
		return nil, err
	}
	res := &filesystempb.GetWatcherEventsResponse{}
	for _, c := range changes {
		res.Events = append(res.Events, changeMessage(c))
	}
	return connect.NewResponse(res), nil
}

// RemoveWatcher ends a polled watch.
func (h *Handler) RemoveWatcher(_ context.Context, req *connect.Request[filesystempb.RemoveWatcherRequest]) (*connect.Response[filesystempb.RemoveWatcherResponse], error) {
	v, err := h.view(req.Header())
	if err != nil {
		return nil, err
	}
	if err := v.RemoveWatcher(req.Msg.GetWatcherId()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&filesystempb.RemoveWatcherResponse{}), nil
}

func entryMessage(e files.Entry) *filesystempb.EntryInfo {
	m := &filesystempb.EntryInfo{
		Name: utf8(e.Name), Type: typeMessage(e.Type), Path: utf8(e.Path), Size: e.Size, Mode: e.Mode, Permissions: e.Permissions,
		Owner: utf8(e.Owner), Group: utf8(e.Group), ModifiedTime: timestamppb.New(e.Modified), Metadata: e.Metadata,
	}
	if e.Target != "" {
		target := utf8(e.Target)
		m.SymlinkTarget = &target
	}
	return m
}

func typeMessage(t files.Type) filesystempb.FileType {
	switch t {
	case files.File:
		return filesystempb.FileType_FILE_TYPE_FILE
	case files.Directory:
		return filesystempb.FileType_FILE_TYPE_DIRECTORY
	case files.Symlink:
		return filesystempb.FileType_FILE_TYPE_SYMLINK
	case files.Other:
	}
	return filesystempb.FileType_FILE_TYPE_UNSPECIFIED
}

func changeMessage(c files.Change) *filesystempb.FilesystemEvent {
	m := &filesystempb.FilesystemEvent{Name: utf8(c.Name), Type: kindMessage(c.Kind)}
	if c.Entry != nil {
		m.Entry = entryMessage(*c.Entry)
	}
	return m
}

func kindMessage(k files.ChangeKind) filesystempb.EventType {
	switch k {
	case files.Created:
		return filesystempb.EventType_EVENT_TYPE_CREATE
	case files.Written:
		return filesystempb.EventType_EVENT_TYPE_WRITE
	case files.Removed:
		return filesystempb.EventType_EVENT_TYPE_REMOVE
	case files.Renamed:
		return filesystempb.EventType_EVENT_TYPE_RENAME
	case files.Chmodded:
		return filesystempb.EventType_EVENT_TYPE_CHMOD
	}
	return filesystempb.EventType_EVENT_TYPE_UNSPECIFIED
}
