package status

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// Address is where the board is served. It is loopback of the guest.
const Address = "127.0.0.1:10270"

// Handler serves the board.
func (b *Board) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(b.Report(r.Context())) // the reader has gone
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		report := b.Report(r.Context())
		answer(w, report.Ready, report.Components)
	})
	mux.HandleFunc("GET /healthz/{name}", func(w http.ResponseWriter, r *http.Request) {
		for _, c := range b.Report(r.Context()).Components {
			if c.Name == r.PathValue("name") {
				answer(w, c.Ready, []Component{c})
				return
			}
		}
		http.Error(w, "no such component", http.StatusNotFound)
	})
	return mux
}

func answer(w http.ResponseWriter, ready bool, list []Component) {
	var bad []string
	for _, c := range list {
		if !c.Ready {
			bad = append(bad, c.Name+": "+c.Error)
		}
	}
	if !ready && len(bad) == 0 {
		bad = []string{"not all parts are started"}
	}
	if len(bad) > 0 {
		http.Error(w, strings.Join(bad, "\n"), http.StatusServiceUnavailable)
		return
	}
	_, _ = io.WriteString(w, "ok\n") // the reader has gone
}

// Get asks the server at address.
func Get(ctx context.Context, address string) (Report, error) {
	ctx, cancel := context.WithTimeout(ctx, bound+2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/status", nil)
	if err != nil {
		return Report{}, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return Report{}, fmt.Errorf("ask the server: %w", err)
	}
	defer resp.Body.Close()
	var r Report
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&r); err != nil {
		return Report{}, fmt.Errorf("read the server's answer: %w", err)
	}
	return r, nil
}
