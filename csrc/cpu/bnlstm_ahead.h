// Products that ask for what their thread meets after them, at an even pace: what it will read, and the lines it will write,
// which another thread may hold. That one's core may share no L3 with this one, a line from there then takes five times as long.
#pragma once
#include "ahead.h"
#include "team.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Whether panels of any width lie as these tiles read them, in one strip.
constexpr bool kWanting = kNarrow == kMaxVectors;

// Lines of a piece of memory that is asked for at once: as wide as a block of a matrix of one gate.
template <class E>
constexpr int kPieceLines =
    kNarrow * E::W * sizeof(typename E::T) >= 64 ? int(kNarrow * E::W * sizeof(typename E::T) / 64) : 1;

template <class E>
constexpr int64_t kPieceBytes = 64 * kPieceLines<E>;
// Pieces that hold n elements.
template <class E>
FASTRNN_INLINE int64_t pieces_of(int64_t n) {
  return ceil_div(n * int64_t(sizeof(typename E::T)), kPieceBytes<E>);
}

// Pieces to read, then pieces to write; a tile asks for [first, last) of them.
struct Wanted {
  const char* const* at = nullptr;
  int64_t reads = 0, first = 0, last = 0;
  int lines = 0;  // of a piece to write, at most kPieceLines: those beside it may be another thread's
  // The share of rows [m, m + r) of `count`.
  Wanted part(int64_t m, int64_t r, int64_t count) const {
    return {at, reads, last * m / count, last * (m + r) / count, lines};
  }
};
// Appends the pieces of n elements.
template <class E>
FASTRNN_INLINE void want(const char**& at, const typename E::T* p, int64_t n) {
  for (int64_t i = 0; i < pieces_of<E>(n); i++) *at++ = reinterpret_cast<const char*>(p) + i * kPieceBytes<E>;
}

// As tile().
template <class E, int R, int NV>
static void tile_wanting(const typename E::A* const* rows, const typename E::A* b, int64_t K,
                         typename E::T* out, int64_t out_stride, const Wanted& wanted) {
  using V = typename E::V;
  constexpr int64_t kStep = 8;
  V acc[R][NV];
  const typename E::A* a[R];
  FASTRNN_UNROLL for (int r = 0; r < R; r++) {
    a[r] = rows[r];
    FASTRNN_UNROLL for (int v = 0; v < NV; v++) acc[r][v] = V::zero();
  }
  const int64_t each = ceil_div(wanted.last - wanted.first, imax(1, K / kStep));
  const int64_t reads = imin(wanted.reads, wanted.last);
  int64_t next = wanted.first;
  const auto due = [&](int64_t end) { return imin(each, end - next); };
  for (int64_t k = 0; k < K; k += kStep) {
    if (next < reads)
      for (int64_t i = due(reads); i > 0; i--, next++)
        FASTRNN_UNROLL for (int l = 0; l < kPieceLines<E>; l++)
            __builtin_prefetch(wanted.at[next] + 64 * l, 0, 2);
    else
      for (int64_t i = due(wanted.last); i > 0; i--, next++)
        for (int l = 0; l < wanted.lines; l++) prefetch_write(wanted.at[next] + 64 * l);
    multiply<E, strip_vectors(NV)>(acc, a, b, 0, imin(kStep, K - k));
    b += kStep * NV * E::W;
    FASTRNN_UNROLL for (int r = 0; r < R; r++) a[r] += kStep;
  }
  FASTRNN_UNROLL for (int r = 0; r < R; r++) FASTRNN_UNROLL for (int v = 0; v < NV; v++)
      V::store(out + r * out_stride + v * E::W, acc[r][v]);
}

template <class E>
using WantingFn = void (*)(const typename E::A* const*, const typename E::A*, int64_t, typename E::T*,
                           int64_t, const Wanted&);

template <class E, int R, int NV>
constexpr WantingFn<E> wanting_or_null() {
  if constexpr (R <= max_rows(NV) && NV <= kNarrow)
    return &tile_wanting<E, R, NV>;
  else
    return nullptr;
}

template <class E, int NV>
struct WantingRow {
  static constexpr WantingFn<E> fn[8] = {wanting_or_null<E, 1, NV>(), wanting_or_null<E, 2, NV>(),
                                         wanting_or_null<E, 3, NV>(), wanting_or_null<E, 4, NV>(),
                                         wanting_or_null<E, 5, NV>(), wanting_or_null<E, 6, NV>(),
                                         wanting_or_null<E, 7, NV>(), wanting_or_null<E, 8, NV>()};
};

// r rows times a panel of at most kNarrow vectors.
template <class E>
FASTRNN_INLINE void multiply_wanting(const typename E::A* const* rows, int r, const typename E::A* b,
                                     int64_t K, int nv, typename E::T* out, int64_t out_stride,
                                     const Wanted& wanted) {
  const auto fn = nv == 1   ? WantingRow<E, 1>::fn
                  : nv == 2 ? WantingRow<E, 2>::fn
                  : nv == 3 ? WantingRow<E, 3>::fn
                            : WantingRow<E, 4>::fn;
  fn[r - 1](rows, b, K, out, out_stride, wanted);
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
