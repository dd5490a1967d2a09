// The one inner loop of the library: out[r][0..C) = init[r][0..C) + sum_k a[r][k] * b[k][0..C),
// for up to kMaxRows rows and C = NV vectors of columns.
//
// Every output is one FMA chain in the order of k, whatever the row count, so results do not depend
// on how rows are grouped: not on the batch, the thread count or the partition.
// Rows come through pointers: the operand may be a strided view, an initial state or a zero row.
// b is a packed panel, streamed once. Tiles: 32 registers hold 6 x 4 or 8 x 3 accumulators plus the
// weights of one k; 16 registers hold 3 x 4, 4 x 3 or 6 x 2. The narrow ones take half as much of the panel per
// multiplication, so with 16 registers matrices of one gate, whose panels may have any width, come in panels of
// kNarrow vectors, and a panel of four lies as two strips of two, which up to three rows meet side by side
// and more rows one after the other.
#pragma once
#include <type_traits>

#include "simd.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// How a tensor type meets the arithmetic: T computes, IO is the tensors' type, A is the type of the
// matmul operands (activations row-major, weights packed with kPair consecutive k side by side).
template <class T_, class IO_, class A_>
struct Types {
  using T = T_;
  using IO = IO_;
  using A = A_;
  using V = Vec<T>;
  static constexpr int W = V::W;
  static constexpr int kPair = sizeof(A) == 2 ? 2 : 1;
};

constexpr int kMaxVectors = 4;
constexpr int kNarrow = kRegisters == 32 ? kMaxVectors : 2;
constexpr int kMaxRows = 8;
// Vectors of a panel that lie side by side.
constexpr int strip_vectors(int nv) { return nv == 4 ? kNarrow : nv; }
constexpr int max_rows(int nv) {
  return kRegisters == 32 ? (nv == 4 ? 6 : 8) : nv == 3 ? 4 : nv == 1 ? 8 : 6;
}
// Whether R rows meet the strips of a panel one after the other.
constexpr bool strip_by_strip(int rows, int nv) { return strip_vectors(nv) < nv && rows > 3; }
// Elements from a strip of K rows to the next.
template <class E>
constexpr int64_t strip_elements(int nv, int64_t K) {
  return (K + E::kPair - 1) / E::kPair * E::kPair * strip_vectors(nv) * E::W;
}

constexpr int kPrefetch = 512;  // elements ahead, 2 KiB

// Steps of k side by side. With 16 registers a step has few products for the loop's counting, which shows where the core's other
// hardware thread is busy. With 32 it was not measured.
constexpr int kUnrollK = kRegisters == 16 ? 4 : 1;
#define FASTRNN_UNROLL_K _Pragma("GCC unroll kUnrollK")

// acc += a[r][k + Odd] * b_{k + Odd}, of bfloat16 pairs.
template <class E, int S, bool Odd, int R, int NV>
FASTRNN_INLINE void multiply_half(Vec<typename E::T> (&acc)[R][NV], const typename E::A* const* a,
                                  const typename E::A* b, int64_t far, int64_t k) {
  using V = typename E::V;
  constexpr int W = E::W;
  if constexpr (R > NV) {
    V w[NV];
    FASTRNN_UNROLL for (int v = 0; v < NV; v++) w[v] =
        half_of_pairs<V, Odd, true>(b + v / S * far + v % S * 2 * W);
    FASTRNN_UNROLL for (int r = 0; r < R; r++) {
      const V x = half_of_pair<V, Odd, true>(a[r] + k);
      FASTRNN_UNROLL for (int v = 0; v < NV; v++) acc[r][v] = V::fma(x, w[v], acc[r][v]);
    }
  } else {
    V x[R];
    FASTRNN_UNROLL for (int r = 0; r < R; r++) x[r] = half_of_pair<V, Odd, true>(a[r] + k);
    FASTRNN_UNROLL for (int v = 0; v < NV; v++) {
      const V w = half_of_pairs<V, Odd, true>(b + v / S * far + v % S * 2 * W);
      FASTRNN_UNROLL for (int r = 0; r < R; r++) acc[r][v] = V::fma(x[r], w, acc[r][v]);
    }
  }
}

// acc += a[r][k] * b_k + a[r][k + 1] * b_{k+1} in bfloat16.
template <class E, int S, int R, int NV>
FASTRNN_INLINE void multiply_pair(Vec<typename E::T> (&acc)[R][NV], const typename E::A* const* a,
                                  const typename E::A* b, int64_t far, int64_t k) {
  constexpr int W = E::W;
#if defined(__AVX512BF16__)
  __m512bh w[NV];
  FASTRNN_UNROLL for (int v = 0; v < NV; v++) w[v] =
      (__m512bh)_mm512_loadu_si512(b + v / S * far + v % S * 2 * W);
  if constexpr (R > 1) FASTRNN_UNROLL for (int v = 0; v < NV; v++) FASTRNN_HOLD(w[v]);
  FASTRNN_UNROLL for (int r = 0; r < R; r++) {
    int pair;
    std::memcpy(&pair, a[r] + k, 4);
    const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
    FASTRNN_UNROLL for (int v = 0; v < NV; v++) acc[r][v].v = _mm512_dpbf16_ps(acc[r][v].v, x, w[v]);
  }
#else
  using V = typename E::V;
  if constexpr (R * NV + 2 * R + 3 <= kRegisters) {  // both halves of a vector of weights side by side
    V even[R], odd[R];
    FASTRNN_UNROLL for (int r = 0; r < R; r++) {
      even[r] = half_of_pair<V, false, false>(a[r] + k);
      odd[r] = half_of_pair<V, true, false>(a[r] + k);
    }
    FASTRNN_UNROLL for (int v = 0; v < NV; v++) {
      const typename E::A* p = b + v / S * far + v % S * 2 * W;
      const V lo = half_of_pairs<V, false, false>(p), hi = half_of_pairs<V, true, false>(p);
      FASTRNN_UNROLL for (int r = 0; r < R; r++) acc[r][v] =
          V::fma(odd[r], hi, V::fma(even[r], lo, acc[r][v]));
    }
  } else {
    multiply_half<E, S, false>(acc, a, b, far, k);
    // Or the compiler keeps every pair for the other half, and spills sums for it.
    asm volatile("" ::: "memory");
    multiply_half<E, S, true>(acc, a, b, far, k);
  }
#endif
}

// `far`: elements from a strip of b, of S vectors, to the next.
template <class E, int S, int R, int NV>
FASTRNN_INLINE void multiply(Vec<typename E::T> (&acc)[R][NV], const typename E::A* const* a,
                             const typename E::A* b, int64_t far, int64_t K) {
  using V = typename E::V;
  constexpr int W = E::W;
  if constexpr (E::kPair == 1) {
    FASTRNN_UNROLL_K for (int64_t k = 0; k < K; k++) {
      // Whichever of the two operands is smaller is held, the other passes through one register.
      if constexpr (kRegisters == 32 || R > NV) {
        V w[NV];
        FASTRNN_UNROLL for (int v = 0; v < NV; v++) w[v] = V::load(b + v / S * far + v % S * W);
        // With 16 registers there is none to spare for it.
        if constexpr (kRegisters == 32 && R > 1)
          FASTRNN_UNROLL for (int v = 0; v < NV; v++) w[v] = held(w[v]);
        // Weights beyond L2: with 2 to 4 rows the loop outruns the hardware's prefetch; with one it never does.
        if constexpr (kRegisters == 32 && R >= 2 && R <= 4)
          FASTRNN_UNROLL for (int v = 0; v < NV; v++) __builtin_prefetch(b + kPrefetch + v * W);
        FASTRNN_UNROLL for (int r = 0; r < R; r++) {
          V x = V::set1(a[r][k]);
          FASTRNN_UNROLL for (int v = 0; v < NV; v++) acc[r][v] = V::fma(x, w[v], acc[r][v]);
        }
      } else {
        V x[R];
        FASTRNN_UNROLL for (int r = 0; r < R; r++) x[r] = V::set1(a[r][k]);
        FASTRNN_UNROLL for (int v = 0; v < NV; v++) {
          V w = V::load(b + v / S * far + v % S * W);
          FASTRNN_UNROLL for (int r = 0; r < R; r++) acc[r][v] = V::fma(x[r], w, acc[r][v]);
        }
      }
      b += S * W;
    }
  } else {
    // bfloat16 pairs: lane j of a vector holds (k, k+1) of column j. An odd K ends in a zero weight, and here in a
    // zero activation.
    int64_t k = 0;
    for (; k + 1 < K; k += 2, b += S * W * 2) multiply_pair<E, S>(acc, a, b, far, k);
    if (k < K) {
      typename E::A last[R][2] = {};
      const typename E::A* ends[R];
      FASTRNN_UNROLL for (int r = 0; r < R; r++) last[r][0] = a[r][k], ends[r] = last[r];
      multiply_pair<E, S>(acc, ends, b, far, 0);
    }
  }
}

// What the inner loop depends on: tensor types of one pair share it.
template <class T_, class A_>
using Arithmetic = Types<T_, T_, A_>;

template <class E, int R, int NV>
static void tile(const typename E::A* const* rows, const typename E::A* b, int64_t K,
                 const typename E::T* init, int64_t init_stride, typename E::T* out, int64_t out_stride) {
  using V = typename E::V;
  const int64_t far = strip_elements<E>(NV, K);
  if constexpr (strip_by_strip(R, NV)) {
    constexpr int S = strip_vectors(NV);
    for (int v = 0; v < NV; v += S, b += far)
      tile<E, R, S>(rows, b, K, init ? init + v * E::W : nullptr, init_stride, out + v * E::W, out_stride);
    return;
  }
  V acc[R][NV];
  const typename E::A* a[R];
  FASTRNN_UNROLL for (int r = 0; r < R; r++) {
    a[r] = rows[r];
    FASTRNN_UNROLL for (int v = 0; v < NV; v++) acc[r][v] =
        init ? V::load(init + r * init_stride + v * E::W) : V::zero();
  }
  multiply<E, strip_vectors(NV)>(acc, a, b, far, K);
  FASTRNN_UNROLL for (int r = 0; r < R; r++) FASTRNN_UNROLL for (int v = 0; v < NV; v++)
      V::store(out + r * out_stride + v * E::W, acc[r][v]);
}

template <class E>
using TileFn = void (*)(const typename E::A* const*, const typename E::A*, int64_t, const typename E::T*,
                        int64_t, typename E::T*, int64_t);

template <class E, int R, int NV>
constexpr TileFn<E> tile_or_null() {
  if constexpr (R <= max_rows(NV))
    return &tile<E, R, NV>;
  else
    return nullptr;
}

template <class E, int NV>
struct TileRow {
  static constexpr TileFn<E> fn[8] = {
      tile_or_null<E, 1, NV>(), tile_or_null<E, 2, NV>(), tile_or_null<E, 3, NV>(), tile_or_null<E, 4, NV>(),
      tile_or_null<E, 5, NV>(), tile_or_null<E, 6, NV>(), tile_or_null<E, 7, NV>(), tile_or_null<E, 8, NV>()};
};

template <class E>
FASTRNN_INLINE TileFn<E> tile_for(int rows, int nv) {
  using M = Arithmetic<typename E::T, typename E::A>;
  switch (nv) {
    case 1:
      return TileRow<M, 1>::fn[rows - 1];
    case 2:
      return TileRow<M, 2>::fn[rows - 1];
    case 3:
      return TileRow<M, 3>::fn[rows - 1];
    default:
      return TileRow<M, 4>::fn[rows - 1];
  }
}

// Calls f(first, count) over [0, n) in near-equal blocks of at most max_rows(nv) rows.
template <class F>
FASTRNN_INLINE void row_blocks(int64_t n, int nv, F&& f) {
  if (n <= 0) return;
  int64_t blocks = (n + max_rows(nv) - 1) / max_rows(nv);
  for (int64_t b = 0; b < blocks; b++) {
    int64_t lo = n * b / blocks, hi = n * (b + 1) / blocks;
    f(lo, static_cast<int>(hi - lo));
  }
}

// One row, or two, keep too few chains in flight to hide the latency of an FMA: they meet so many full panels at once, which lie one
// after the other. With 32 registers a panel of one row has four chains of 16, as much as L2 delivers, and three where there are
// three gates: two panels gain where weights lie in L1 or a panel is narrow, and lose from L3 where a matrix has one gate.
constexpr int panels_at_once(int64_t rows, int nv, int gates = 4) {
  if (kRegisters == 32) return rows == 1 && nv > 2 && gates > 1 ? 2 : 1;
  if (rows > 2) return 1;
  if (nv == 2) return rows == 1 ? 4 : 2;
  return rows == 1 && nv > 2 ? 2 : 1;
}

// As tile(), for P panels that were packed with Kp rows; `init_panel`, `out_panel`: elements from what belongs to a panel
// to what belongs to the next.
template <class E, int R, int NV, int P>
__attribute__((noinline)) static void tile_panels(const typename E::A* const* rows, const typename E::A* b,
                                                  int64_t K, int64_t Kp, const typename E::T* init,
                                                  int64_t init_stride, int64_t init_panel, typename E::T* out,
                                                  int64_t out_stride, int64_t out_panel) {
  using V = typename E::V;
  V acc[R][P * NV];
  const typename E::A* a[R];
  FASTRNN_UNROLL for (int r = 0; r < R; r++) {
    a[r] = rows[r];
    FASTRNN_UNROLL for (int p = 0; p < P; p++) FASTRNN_UNROLL for (int v = 0; v < NV; v++)
        acc[r][p * NV + v] = init ? V::load(init + r * init_stride + p * init_panel + v * E::W) : V::zero();
  }
  multiply<E, strip_vectors(NV)>(acc, a, b, strip_elements<E>(NV, Kp), K);
  FASTRNN_UNROLL for (int r = 0; r < R; r++) FASTRNN_UNROLL for (int p = 0; p < P; p++)
      FASTRNN_UNROLL for (int v = 0; v < NV; v++)
          V::store(out + r * out_stride + p * out_panel + v * E::W, acc[r][p * NV + v]);
}

// R rows (1 or 2) times `panels` panels: 1, or panels_at_once().
template <class E>
FASTRNN_INLINE void multiply_panels(int panels, const typename E::A* const* rows, int r,
                                    const typename E::A* b, int64_t K, int64_t Kp, int nv,
                                    const typename E::T* init, int64_t init_stride, int64_t init_panel,
                                    typename E::T* out, int64_t out_stride, int64_t out_panel) {
  using M = Arithmetic<typename E::T, typename E::A>;
  if (panels == 1) return tile_for<E>(r, nv)(rows, b, K, init, init_stride, out, out_stride);
  auto run = [&](auto rows_of, auto vectors) {
    constexpr int R = decltype(rows_of)::value, NV = decltype(vectors)::value;
    tile_panels<M, R, NV, panels_at_once(R, NV)>(rows, b, K, Kp, init, init_stride, init_panel, out,
                                                 out_stride, out_panel);
  };
  using std::integral_constant;
  if (r == 2) return run(integral_constant<int, 2>{}, integral_constant<int, 2>{});
  if (nv == 2) return run(integral_constant<int, 1>{}, integral_constant<int, 2>{});
  if (nv == 3) return run(integral_constant<int, 1>{}, integral_constant<int, 3>{});
  run(integral_constant<int, 1>{}, integral_constant<int, 4>{});
}

// Asks for the lines of n elements from p on, well before they are used: a tape, or another array of which a tile meets a few lines
// a row, is nothing a hardware prefetcher follows.
template <class S>
FASTRNN_INLINE void prefetch_lines(const S* p, int64_t n) {
  const char* at = reinterpret_cast<const char*>(p);
  for (int64_t i = 0; i < n * int64_t(sizeof(S)); i += 64) __builtin_prefetch(at + i);
}
// Asks for a line that will be written. Without a flag of its own g++ makes __builtin_prefetch(p, 1) one that only reads, and
// leaves the line to be taken from others when it is written. A processor that does not know prefetchw takes it for nothing.
FASTRNN_INLINE void prefetch_write(const void* p) {
#if defined(__AVX2__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 1);
#endif
}
// Whether an array with so many bytes a row is worth it: else it stays in L2.
FASTRNN_INLINE bool prefetches(int64_t row_bytes, int64_t N, int64_t T) {
  return row_bytes * N * T > 256 << 10;
}

// rows x panel for any number of rows: out[m][0..nv*W) = init[m] + a[m] . b
template <class E>
static void panel(const typename E::A* const* a, int64_t M, const typename E::A* b, int64_t K, int nv,
                  const typename E::T* init, int64_t init_stride, typename E::T* out, int64_t out_stride) {
  row_blocks(M, nv, [&](int64_t m, int r) {
    tile_for<E>(r, nv)(a + m, b, K, init ? init + m * init_stride : nullptr, init_stride,
                       out + m * out_stride, out_stride);
  });
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
