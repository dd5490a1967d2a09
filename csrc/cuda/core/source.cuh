// Where a lane gets the vectors of its batch rows from: another CTA's results of the step before, the initial state, or
// nowhere (a state that was reset, a row that has ended or does not exist).
#pragma once
#include "exchange.cuh"

namespace fastrnn::cuda {

enum class From : int { zero, initial, mail };

// Order of the steps: `backwards` walks t from T - 1 down.
struct Walk {
  int T;
  bool backwards;
  FASTRNN_DEVICE int at(int s) const { return backwards ? T - 1 - s : s; }
  FASTRNN_DEVICE int before(int t) const { return backwards ? t + 1 : t - 1; }
};

// Forward: the state before step t of a row.
FASTRNN_DEVICE From state_before(const Shape& p, const Walk& walk, int n, int length, int t) {
  if (t >= length) return From::zero;
  if (reset_at(p, t, n) && !mutated(Mutation::reset_ignored)) return From::zero;
  return t == (walk.backwards ? length - 1 : 0) ? From::initial : From::mail;
}

// Backward: the gradient that step `done`, walked just before, sends on through the matmul. No step: none.
FASTRNN_DEVICE From gradient_after(const Shape& p, int n, int length, int done) {
  if (done < 0 || done >= length) return From::zero;
  return reset_at(p, done, n) ? From::zero : From::mail;
}

// The batch rows whose vectors this lane loads.
template <class T>
struct LaneRows {
  int first;  // row of the CTA
  int n[T::kRowTiles], length[T::kRowTiles];
  FASTRNN_DEVICE LaneRows(const Shape& p, const Place& place, int first_of_warp = 0)
      : first(first_of_warp + prim::thread_index() % 32 / 4) {
    FASTRNN_UNROLL
    for (int x = 0; x < T::kRowTiles; x++) {
      n[x] = row_of(p, place.group, local(x));
      length[x] = row_length(p, n[x]);
    }
  }
  FASTRNN_DEVICE int local(int x) const { return first + x * 8; }
};

// The operand of one matmul, as weights.cuh's multiply() asks for it.
template <class D, class T, class M, class Exchange>
struct Source {
  using Elem = typename D::Elem;
  Exchange& exchange;
  const Mail& mail;
  const Elem* initial;  // (N, H), or null: zeros
  int e, t;             // the exchange that is read, and its step
  int H, K;             // units, and length of an exchanged row
  int k0;               // this lane's first element
  const LaneRows<T>& rows;
  From from[T::kRowTiles];

  FASTRNN_DEVICE bool reads(int k) const {
    return mutated(Mutation::reduction_tail) ? k + D::kVec < K : k < K;
  }
  FASTRNN_DEVICE Vec4 issue(int c, int x) const {
    const int k = k0 + c * D::kChunk;
    if (reads(k)) {
      if (from[x] == From::mail) return exchange.load(mail, e, t, rows.n[x], rows.local(x), k);
      if (from[x] == From::initial && initial)
        return gather(initial + static_cast<int64_t>(rows.n[x]) * H, k);
    }
    return {0, 0, 0, 0};
  }
  FASTRNN_DEVICE void settle(Vec4& v, int c, int x) {
    const int k = k0 + c * D::kChunk;
    if (from[x] == From::mail && reads(k)) exchange.retry(v, mail, t, rows.n[x], k);
  }
  // An initial state has rows of any length and alignment; a row meets it once.
  FASTRNN_DEVICE Vec4 gather(const Elem* row, int k) const {
    uint32_t word[4];
    FASTRNN_UNROLL
    for (int i = 0; i < 4; i++) {
      if constexpr (D::kPerWord == 1) {
        word[i] = k + i < H ? prim::float_bits(prim::load_constant(row + k + i)) : 0;
      } else {
        const uint32_t low = k + 2 * i < H ? prim::load_constant(row + k + 2 * i) : 0;
        const uint32_t high = k + 2 * i + 1 < H ? prim::load_constant(row + k + 2 * i + 1) : 0;
        word[i] = low | high << 16;
      }
    }
    return {word[0], word[1], word[2], word[3]};
  }
};

// One (unit, row) pair of a thread's epilogue.
struct Element {
  int local, unit;  // row and unit inside the CTA
  int n, j;         // of the whole
  int length;       // steps of the row, 0 for a row or unit that is padding
  bool mine;        // the thread has this element at all
};
template <class T>
FASTRNN_DEVICE Element element_of(const Shape& p, const Place& place, int i, int length) {
  const int e = prim::thread_index() + i * T::kThreads;
  Element x;
  x.mine = e < T::kElements;
  x.unit = e % T::kUnits;
  x.local = e / T::kUnits;
  x.j = place.cta * T::kUnits + x.unit;
  x.n = row_of(p, place.group, x.local);
  x.length = length;
  return x;
}
template <class T>
FASTRNN_DEVICE int length_of(const Shape& p, const Place& place, int i) {
  const Element x = element_of<T>(p, place, i, 0);
  const int units = mutated(Mutation::unit_tail) ? p.H - 1 : p.H;
  return x.mine && x.j < units ? row_length(p, x.n) : 0;
}

// Publishes one value per unit, of `width` units; the even unit of a 16-bit pair stores the word of both. The width by
// reference: nvcc then makes of the plain kernels what it makes of p.H_padded spelt out, to the instruction.
template <class D, class Exchange>
FASTRNN_DEVICE void publish(const Shape& p, Exchange& exchange, const Mail& mail, int e, int t,
                            const Element& x, int value, float v, const int& width) {
  const uint32_t word = D::word(v);
  const bool exists = Exchange::kInShared || x.n < p.N;  // a cluster counts padding rows too
  if (x.mine && exists && x.j < width && x.j % D::kPerWord == 0)
    exchange.publish(mail, e, t, x.n, x.local, value * width + x.j, word);
}
template <class D, class Exchange>
FASTRNN_DEVICE void publish(const Shape& p, Exchange& exchange, const Mail& mail, int e, int t,
                            const Element& x, int value, float v) {
  publish<D>(p, exchange, mail, e, t, x, value, v, p.H_padded);
}

}  // namespace fastrnn::cuda
