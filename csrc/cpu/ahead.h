// The micro-kernel with a prefetch stream woven in, for weights that no L2 can hold: while a tile works on one
// panel, lines of a coming one are asked for at an even pace. In a burst between tiles (prefetch_part) they fill the
// line buffers, and the arithmetic waits for memory that it could have overlapped.
#pragma once
#include "pack.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// As tile(); besides, `lines` cache lines from `ahead` on are prefetched to L2.
template <class E, int R, int NV>
static void tile_ahead(const typename E::A* const* rows, const typename E::A* b, int64_t K,
                       const typename E::T* init, int64_t init_stride, typename E::T* out, int64_t out_stride,
                       const char* ahead, int64_t lines) {
  using V = typename E::V;
  constexpr int64_t kStep = 8;  // rows of k between two groups of prefetches
  V acc[R][NV];
  const typename E::A* a[R];
  FASTRNN_UNROLL for (int r = 0; r < R; r++) {
    a[r] = rows[r];
    FASTRNN_UNROLL for (int v = 0; v < NV; v++) acc[r][v] =
        init ? V::load(init + r * init_stride + v * E::W) : V::zero();
  }
  const int64_t groups = ceil_div(K, kStep), most = ceil_div(lines, groups);
  const char* end = ahead + lines * 64;
  for (int64_t k = 0; k < K; k += kStep) {
    for (int64_t i = 0; i < most && ahead < end; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    multiply<E, R, NV>(acc, a, b, imin(kStep, K - k));
    b += kStep * NV * E::W;
    FASTRNN_UNROLL for (int r = 0; r < R; r++) a[r] += kStep;
  }
  FASTRNN_UNROLL for (int r = 0; r < R; r++) FASTRNN_UNROLL for (int v = 0; v < NV; v++)
      V::store(out + r * out_stride + v * E::W, acc[r][v]);
}

template <class E>
using AheadFn = void (*)(const typename E::A* const*, const typename E::A*, int64_t, const typename E::T*,
                         int64_t, typename E::T*, int64_t, const char*, int64_t);

// row_blocks() of at least this many rows are never smaller than kLeastRows.
constexpr int64_t kAheadRows = 8;
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
  switch (nv) {
    case 1:
      return AheadRow<E, 1>::fn[rows - 1];
    case 2:
      return AheadRow<E, 2>::fn[rows - 1];
    case 3:
      return AheadRow<E, 3>::fn[rows - 1];
    default:
      return AheadRow<E, 4>::fn[rows - 1];
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

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
