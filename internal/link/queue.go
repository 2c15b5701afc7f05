package link

import "sync"

const pieceLen = 32 << 10

// piece is a part of a queue.
type piece struct {
	r, w int
	b    [pieceLen]byte
}

// queue holds bytes in pieces that exist only while there is something in
// them, so that an idle stream holds none. However small the portions are that
// came in, it takes no more than two pieces beyond its content.
type queue struct {
	pieces []*piece
	n      int
}

// push appends p.
func (q *queue) push(pool *sync.Pool, p []byte) {
	q.n += len(p)
	for len(p) > 0 {
		if k := len(q.pieces); k == 0 || q.pieces[k-1].w == pieceLen {
			q.pieces = append(q.pieces, takePiece(pool))
		}
		last := q.pieces[len(q.pieces)-1]
		n := copy(last.b[last.w:], p)
		last.w += n
		p = p[n:]
	}
}

// pop moves bytes from the front into p.
func (q *queue) pop(pool *sync.Pool, p []byte) int {
	total := 0
	for len(p) > 0 && len(q.pieces) > 0 {
		first := q.pieces[0]
		n := copy(p, first.b[first.r:first.w])
		first.r += n
		p, total = p[n:], total+n
		if first.r == first.w {
			pool.Put(first)
			q.pieces[0] = nil
			q.pieces = q.pieces[1:]
		}
	}
	if len(q.pieces) == 0 {
		q.pieces = nil
	}
	q.n -= total
	return total
}

// clear drops everything.
func (q *queue) clear(pool *sync.Pool) {
	for _, p := range q.pieces {
		pool.Put(p)
	}
	q.pieces, q.n = nil, 0
}

func takePiece(pool *sync.Pool) *piece {
	p, ok := pool.Get().(*piece)
	if !ok {
		return new(piece)
	}
	p.r, p.w = 0, 0
	return p
}
