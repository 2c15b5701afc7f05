package runtime

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
)

// healthAPI asks grpc.health.v1.Health/Check of containerd. The call is made by
// hand: its messages are two bytes at most, and a gRPC library is larger than
// all of this agent.
type healthAPI struct {
	socket string
	client *http.Client
}

func newHealthAPI(socket string) *healthAPI {
	t := &http.Transport{DialContext: dialer(socket), DisableKeepAlives: true, Protocols: new(http.Protocols)}
	t.Protocols.SetUnencryptedHTTP2(true)
	return &healthAPI{socket, &http.Client{Transport: t}}
}

// check returns nil when containerd serves.
func (h *healthAPI) check(ctx context.Context) error {
	// A message that is not compressed and has no bytes.
	request := bytes.NewReader(make([]byte, 5))
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://containerd/grpc.health.v1.Health/Check", request)
	if err != nil {
		return err
	}
	req.Header = http.Header{"Content-Type": {"application/grpc"}, "Te": {"trailers"}}
	res, err := h.client.Do(req)
	if err != nil {
		return plain(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 64))
	if err != nil {
		return fmt.Errorf("read containerd's health: %w", err)
	}
	status := res.Trailer.Get("Grpc-Status") + res.Header.Get("Grpc-Status") // in the header of an answer without a message
	if res.StatusCode != http.StatusOK || status != "0" {
		return fmt.Errorf("containerd answers %s, gRPC status %.20q", res.Status, status)
	}
	// Five bytes before the message; field 1 (status) is 1 (SERVING).
	if !bytes.Equal(body, []byte{0, 0, 0, 0, 2, 8, 1}) {
		return errors.New("containerd says that it does not serve yet")
	}
	return nil
}
