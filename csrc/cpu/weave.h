// The micro-kernel with two things woven in at an even pace: the pointwise part of the tile before, and prefetches.
//
// A pointwise part by itself is chains of dependent operations: they fill the core's window, and the multipliers idle a third of
// its time. Between the products of the next tile, which need nothing of it, it costs little more than its own multiplications.
#pragma once
#include "ahead.h"
#include "team.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Whether sums and what a part works on fit in the registers.
template <class E>
constexpr bool kWeaves = kRegisters == 32 && E::kPair == 1 && sizeof(typename E::T) == 4;
// Tiles of fewer rows are not woven, nor those with fewer steps of k between two parts.
constexpr int kWovenRows = 4, kWovenSteps = 2;

// Consecutive cache lines that are asked for.
struct Lines {
  const char* at = nullptr;
  int64_t count = 0;
};

// What is asked for beside a tile: at every step of k lines of a coming panel, which are for L2, and by each part a line of what is
// `near`, the next tile's, and of `inputs`, the next chunk's.
struct Asks {
  Lines panel, near, inputs;
  void part(int64_t n) const {
    if (n < near.count) __builtin_prefetch(near.at + n * 64);
    if (n < inputs.count) __builtin_prefetch(inputs.at + n * 64, 0, 2);
  }
};

// The share of rows [m, m + r) in what is coming.
template <class E>
FASTRNN_INLINE Lines share_of(const Coming<E>& coming, int64_t m, int r) {
  if (!coming.panel) return {};
  const int64_t lines = coming.elements * sizeof(typename E::A) / 64;
  const int64_t first = lines * m / coming.count, last = lines * (m + r) / coming.count;
  return {reinterpret_cast<const char*>(coming.panel) + first * 64, last - first};
}

// As tile(); besides, work.part<J>(piece) for J in [0, Work::kParts) and each of work.pieces(), and `Ahead` lines of the panel a step.
template <class E, int R, int NV, int Ahead, class Work>
static void tile_woven(const typename E::A* const* rows, const typename E::A* b, int64_t K,
                       const typename E::T* init, int64_t init_stride, typename E::T* out, int64_t out_stride,
                       const Work& work) {
  using V = typename E::V;
  V acc[R][NV];
  const typename E::A* a[R];
  FASTRNN_UNROLL for (int r = 0; r < R; r++) {
    a[r] = rows[r];
    FASTRNN_UNROLL for (int v = 0; v < NV; v++) acc[r][v] =
        init ? V::load(init + r * init_stride + v * E::W) : V::zero();
  }
  int64_t k = 0;
  const char* ahead = work.asks.panel.at;
  const int64_t stride = 64 * work.asks.panel.count / imax(1, Ahead * K);  // bytes: a line may be met twice
  const auto advance = [&](int64_t end) __attribute__((always_inline)) {
    for (; k < end; k++) {
      V w[NV];
      FASTRNN_UNROLL for (int v = 0; v < NV; v++) w[v] = held(V::load(b + v * E::W));
      // As in multiply(): few rows outrun the hardware's prefetch.
      if constexpr (R <= 4)
        FASTRNN_UNROLL for (int v = 0; v < NV; v++) __builtin_prefetch(b + kPrefetch + v * E::W);
      FASTRNN_UNROLL for (int r = 0; r < R; r++) {
        const V x = V::set1(a[r][k]);
        FASTRNN_UNROLL for (int v = 0; v < NV; v++) acc[r][v] = V::fma(x, w[v], acc[r][v]);
      }
      b += NV * E::W;
      FASTRNN_UNROLL for (int i = 0; i < Ahead; i++, ahead += stride) __builtin_prefetch(ahead, 0, 2);
    }
  };
  const int64_t pieces = work.pieces(), pace = K / (pieces * Work::kParts);
  for (int64_t i = 0; i < pieces; i++) {
    const auto one = [&](auto part) __attribute__((always_inline)) {
      constexpr int J = decltype(part)::value;
      if constexpr (J < Work::kParts) {
        advance(k + pace);
        // Read anew in each part: what is kept of it between them would be spilled, and the spills fill the queue of stores.
        const Work* now = &work;
        asm volatile("" : "+r"(now));
        now->asks.part(i * Work::kParts + J);
        now->template part<J>(i);
      }
    };
    one(std::integral_constant<int, 0>{});
    one(std::integral_constant<int, 1>{});
    one(std::integral_constant<int, 2>{});
    one(std::integral_constant<int, 3>{});
    one(std::integral_constant<int, 4>{});
  }
  advance(K);
  FASTRNN_UNROLL for (int r = 0; r < R; r++) FASTRNN_UNROLL for (int v = 0; v < NV; v++)
      V::store(out + r * out_stride + v * E::W, acc[r][v]);
}

// tile_woven() for r rows; false, and nothing is done, where there is none.
template <class E, class Work>
FASTRNN_INLINE bool multiply_woven(const typename E::A* const* rows, int r, const typename E::A* b, int64_t K,
                                   int nv, const typename E::T* init, int64_t init_stride, typename E::T* out,
                                   int64_t out_stride, const Work& work) {
  if (r < kWovenRows || K < kWovenSteps * work.pieces() * Work::kParts) return false;
  bool done = false;
  const auto run = [&](auto rows_of, auto vectors) {
    constexpr int R = decltype(rows_of)::value, NV = decltype(vectors)::value;
    if constexpr (R <= max_rows(NV) && Work::weaves(NV)) {
      if (r != R || nv != NV) return;
      // A tile that is a quarter of the rows has a line a step to ask for.
      const int64_t lines = work.asks.panel.count;
      const auto tile = lines > K ? tile_woven<E, R, NV, 2, Work>
                        : lines   ? tile_woven<E, R, NV, 1, Work>
                                  : tile_woven<E, R, NV, 0, Work>;
      tile(rows, b, K, init, init_stride, out, out_stride, work);
      done = true;
    }
  };
  const auto each = [&](auto vectors) {
    run(std::integral_constant<int, 4>{}, vectors);
    run(std::integral_constant<int, 5>{}, vectors);
    run(std::integral_constant<int, 6>{}, vectors);
    run(std::integral_constant<int, 7>{}, vectors);
    run(std::integral_constant<int, 8>{}, vectors);
  };
  each(std::integral_constant<int, 3>{});
  each(std::integral_constant<int, 4>{});
  return done;
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
