// The micro-kernel with a prefetch stream woven in, for weights that no L2 can hold: while a tile works on one
// panel, lines of a coming one are asked for at an even pace. In a burst between tiles they fill the line buffers, and the
// arithmetic waits for memory that it could have overlapped.
#pragma once
#include "pack.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Rows of k between two groups of prefetches. With 16 registers a row has too few products to hide the counting of eight.
constexpr int64_t kAheadStep = kRegisters == 32 ? 8 : 64;

// As tile(); besides, `lines` cache lines from `ahead` on are prefetched to L2.
template <class E, int R, int NV>
static void tile_ahead(const typename E::A* const* rows, const typename E::A* b, int64_t K,
                       const typename E::T* init, int64_t init_stride, typename E::T* out, int64_t out_stride,
                       const char* ahead, int64_t lines) {
  using V = typename E::V;
  const int64_t far = strip_elements<E>(NV, K);
  if constexpr (strip_by_strip(R, NV)) {
    constexpr int S = strip_vectors(NV);
    for (int v = 0; v < NV; v += S, b += far) {
      const int64_t first = lines * v / NV, last = lines * (v + S) / NV;
      tile_ahead<E, R, S>(rows, b, K, init ? init + v * E::W : nullptr, init_stride, out + v * E::W,
                          out_stride, ahead + first * 64, last - first);
    }
    return;
  }
  V acc[R][NV];
  const typename E::A* a[R];
  FASTRNN_UNROLL for (int r = 0; r < R; r++) {
    a[r] = rows[r];
    FASTRNN_UNROLL for (int v = 0; v < NV; v++) acc[r][v] =
        init ? V::load(init + r * init_stride + v * E::W) : V::zero();
  }
  const int64_t groups = ceil_div(K, kAheadStep), most = ceil_div(lines, groups);
  const char* end = ahead + lines * 64;
  for (int64_t k = 0; k < K; k += kAheadStep) {
    for (int64_t i = 0; i < most && ahead < end; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    multiply<E, strip_vectors(NV)>(acc, a, b, far, imin(kAheadStep, K - k));
    b += kAheadStep * strip_vectors(NV) * E::W;
    FASTRNN_UNROLL for (int r = 0; r < R; r++) a[r] += kAheadStep;
  }
  FASTRNN_UNROLL for (int r = 0; r < R; r++) FASTRNN_UNROLL for (int v = 0; v < NV; v++)
      V::store(out + r * out_stride + v * E::W, acc[r][v]);
}

template <class E>
using AheadFn = void (*)(const typename E::A* const*, const typename E::A*, int64_t, const typename E::T*,
                         int64_t, typename E::T*, int64_t, const char*, int64_t);

// row_blocks() of at least kAheadRows rows are never smaller than kLeastRows. Fewer than 16 rows outrun memory with the hardware's own
// prefetches as well, but for those of 16 registers that meet kAheadBytesOfFew.
constexpr int64_t kAheadRows = kRegisters == 32 ? 16 : 8;
constexpr int64_t kAheadBytes = 1 << 20, kAheadBytesOfFew = 4 << 20;
constexpr int kLeastRows = kRegisters == 32 ? 4 : 2;

template <class E, int R, int NV>
constexpr AheadFn<E> ahead_or_null() {
  if constexpr (R >= kLeastRows && R <= max_rows(NV))
    return &tile_ahead<E, R, NV>;
  else
    return nullptr;
}

template <class E, int NV>
struct AheadRow {
  static constexpr AheadFn<E> fn[8] = {ahead_or_null<E, 1, NV>(), ahead_or_null<E, 2, NV>(),
                                       ahead_or_null<E, 3, NV>(), ahead_or_null<E, 4, NV>(),
                                       ahead_or_null<E, 5, NV>(), ahead_or_null<E, 6, NV>(),
                                       ahead_or_null<E, 7, NV>(), ahead_or_null<E, 8, NV>()};
};

template <class E>
FASTRNN_INLINE AheadFn<E> ahead_for(int rows, int nv) {
  using M = Arithmetic<typename E::T, typename E::A>;
  switch (nv) {
    case 1:
      return AheadRow<M, 1>::fn[rows - 1];
    case 2:
      return AheadRow<M, 2>::fn[rows - 1];
    case 3:
      return AheadRow<M, 3>::fn[rows - 1];
    default:
      return AheadRow<M, 4>::fn[rows - 1];
  }
}

// Rows [m, m + r) of `count` times one panel, fetching their share of a coming panel of `elements`.
template <class E>
FASTRNN_INLINE void multiply_ahead(const typename E::A* const* rows, int r, const typename E::A* b, int64_t K,
                                   int nv, const typename E::T* init, int64_t init_stride, typename E::T* out,
                                   int64_t out_stride, const typename E::A* coming, int64_t elements,
                                   int64_t m, int64_t count) {
  const int64_t lines = elements * sizeof(typename E::A) / 64;
  const int64_t first = lines * m / count, last = lines * (m + r) / count;
  ahead_for<E>(r, nv)(rows, b, K, init, init_stride, out, out_stride,
                      reinterpret_cast<const char*>(coming) + first * 64, last - first);
}

// What a sweep over panels will need next, if it is worth asking for: a panel that `count` rows share the fetching of.
template <class E>
struct Coming {
  const typename E::A* panel = nullptr;
  int64_t elements = 0, count = 0;
};

// Whether `count` rows that meet so many bytes of panels ask for each before its turn: where a panel serves several tiles and they
// cannot all stay in L2.
FASTRNN_INLINE bool asks_ahead(int64_t bytes, int64_t count) {
  return count >= kAheadRows && bytes >= (count < 16 ? kAheadBytesOfFew : kAheadBytes);
}
// Panels [b0, b1) of a matrix of K rows.
template <class E>
FASTRNN_INLINE bool asks_ahead(const Panels<E>& p, int64_t b0, int64_t b1, int64_t K, int64_t count) {
  return b1 > b0 && asks_ahead((p.offset(b1 - 1) - p.offset(b0)) * K * int64_t(sizeof(typename E::A)), count);
}

// The same where many rows meet a panel in one long run, an input term's or a dx's. With 32 registers an RHN gained nothing by it.
template <class E>
FASTRNN_INLINE bool runs_ahead(const Panels<E>& p, int64_t b0, int64_t b1, int64_t K, int64_t count) {
  return kRegisters == 16 && asks_ahead(p, b0, b1, K, count);
}

// Rows [m, m + r) times one panel, as tile(), with what is coming; `rows`: from m on.
template <class E>
FASTRNN_INLINE void multiply_tile(const Coming<E>& coming, int64_t m, const typename E::A* const* rows, int r,
                                  const typename E::A* b, int64_t K, int nv, const typename E::T* init,
                                  int64_t init_stride, typename E::T* out, int64_t out_stride) {
  if (coming.panel)
    multiply_ahead<E>(rows, r, b, K, nv, init, init_stride, out, out_stride, coming.panel, coming.elements, m,
                      coming.count);
  else
    tile_for<E>(r, nv)(rows, b, K, init, init_stride, out, out_stride);
}

// As panel(), asking for the `elements` of the panel that comes next, or null.
template <class E>
static void panel_ahead(const typename E::A* const* a, int64_t M, const typename E::A* b, int64_t K, int nv,
                        const typename E::T* init, typename E::T* out, int64_t out_stride,
                        const typename E::A* next, int64_t elements) {
  const Coming<E> coming{next, elements, M};
  row_blocks(M, nv, [&](int64_t m, int r) {
    multiply_tile<E>(coming, m, a + m, r, b, K, nv, init, 0, out + m * out_stride, out_stride);
  });
}

// r rows, from m on, times rows [k0, k0 + k) of n blocks from b on, packed with K rows: densely into `out`, a block after the other.
template <class E>
FASTRNN_INLINE void multiply_blocks(const Panels<E>& p, const typename E::A* w, int64_t K, int64_t b, int n,
                                    const typename E::A* const* rows, int r, int64_t k0, int64_t k,
                                    const typename E::T* init, typename E::T* out, const Coming<E>& coming,
                                    int64_t m) {
  const int64_t cols = p.columns(b);
  const auto* at = w + p.stream(b, K, k0);
  if (n == 1)
    multiply_tile<E>(coming, m, rows, r, at, k, p.vectors(b), init, cols, out, cols);
  else
    multiply_panels<E>(n, rows, r, at, k, K, p.vectors(b), init, cols, r * cols, out, cols, r * cols);
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
