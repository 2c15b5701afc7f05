package processrpc

import (
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/hutch-run/hutch/gen/process/processpbconnect"
)

// Headers of the two protocols that carry a request's deadline.
const (
	connectTimeout = "Connect-Timeout-Ms"
	grpcTimeout    = "Grpc-Timeout"
)

type limitKey struct{}

// liftDeadline takes the deadline of Start out of the request and hands it on
// as the time limit of the program. Malformed ones stay for connect to refuse.
func liftDeadline(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != processpbconnect.ProcessStartProcedure {
			next.ServeHTTP(w, r)
			return
		}
		d, ok := requestDeadline(r.Header)
		if ok {
			var end time.Time // none
			if d > 0 {
				end = time.Now().Add(early(d))
			}
			r = r.Clone(context.WithValue(r.Context(), limitKey{}, end))
			r.Header.Del(connectTimeout)
			r.Header.Del(grpcTimeout)
		}
		next.ServeHTTP(w, r)
	})
}

// limitFrom returns what is left of the lifted limit; 0: none.
func limitFrom(ctx context.Context) time.Duration {
	end, _ := ctx.Value(limitKey{}).(time.Time)
	if end.IsZero() {
		return 0
	}
	return max(time.Until(end), 1)
}

// early leaves the End time to reach the client before it gives up.
func early(d time.Duration) time.Duration {
	return d - min(d/10, 500*time.Millisecond)
}

// requestDeadline reads either header. A deadline of 0 means none, as clients
// of E2B expect.
func requestDeadline(h http.Header) (time.Duration, bool) {
	if v := h.Get(connectTimeout); v != "" {
		return scaled(v, 10, time.Millisecond)
	}
	v := h.Get(grpcTimeout)
	if v == "" {
		return 0, false
	}
	unit, ok := map[byte]time.Duration{
		'H': time.Hour, 'M': time.Minute, 'S': time.Second,
		'm': time.Millisecond, 'u': time.Microsecond, 'n': time.Nanosecond,
	}[v[len(v)-1]]
	if !ok {
		return 0, false
	}
	return scaled(v[:len(v)-1], 8, unit)
}

// scaled refuses what the protocols do: more digits than given. A time beyond
// what a Duration holds becomes the longest one.
func scaled(digits string, most int, unit time.Duration) (time.Duration, bool) {
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || len(digits) > most {
		return 0, false
	}
	const longest = 100 * 365 * 24 * time.Hour
	if n > uint64(longest/unit) {
		return longest, true
	}
	return time.Duration(n) * unit, true
}
