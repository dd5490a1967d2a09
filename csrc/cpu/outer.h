// Weight gradients: C[m][c] += sum_k A[k][m] * B[k][c] over the rows k of a chunk, for several B that
// share one A (the gate gradients meet the inputs and the previous states).
//
// A is repacked into panels of kOuterRows columns ([k][6]), which yields its column sums (the bias
// gradients) on the way, kOuterRun panels at a time; B into panels of up to kOuterVectors vectors. Every output is one
// FMA chain per kOuterK rows and the chains are added in the order of the rows, whatever the thread count.
#pragma once
#include "claims.h"
#include "team.h"

namespace fastrnn {
namespace FASTRNN_ISA {

constexpr int kOuterVectors = kNarrow;
constexpr int kOuterRows = max_rows(kOuterVectors);
constexpr int64_t kOuterK = 512;
// Panels of A that stay in L2 while all of B passes, and that threads take over from one another; with 32 registers half of them was
// not measured.
constexpr int64_t kOuterRun = kRegisters == 16 ? 8 : 16;
constexpr int64_t kOuterStays = 512 << 10;  // bytes of packed operands that stay in L2

template <class E>
struct OuterJob {
  using T = typename E::T;
  int64_t column = 0, columns = 0;  // of A
  const T* a = nullptr;
  int64_t lda = 0;
  T* sums = nullptr;  // column sums of A, or null
  struct {
    int operand = -1;  // which B, or none
    T* c = nullptr;
    int64_t ldc = 0;
  } to[2];
  int64_t panels() const { return ceil_div(columns, kOuterRows); }
};

template <class E>
struct OuterOperand {
  using IO = typename E::IO;
  using T = typename E::T;
  int64_t width = 0;
  const IO** rows = nullptr;  // one pointer per row of the chunk ...
  const T* block = nullptr;   // ... or a dense block of them
  T* packed = nullptr;
};

template <class E, int NV>
static void outer_tile(const typename E::T* a, const typename E::T* b, int64_t K, typename E::T* c,
                       int64_t ldc, int rows, int width, bool add) {
  using V = typename E::V;
  constexpr int R = kOuterRows, W = E::W;
  V acc[R][NV];
  FASTRNN_UNROLL for (int r = 0; r < R; r++) FASTRNN_UNROLL for (int v = 0; v < NV; v++) acc[r][v] =
      V::zero();
  const auto multiply = [&](int64_t steps) {
    FASTRNN_UNROLL_K for (int64_t k = 0; k < steps; k++) {
      V w[NV];
      FASTRNN_UNROLL for (int v = 0; v < NV; v++) w[v] = V::load(b + v * W);
      FASTRNN_UNROLL for (int r = 0; r < R; r++) {
        V x = V::set1(a[r]);
        FASTRNN_UNROLL for (int v = 0; v < NV; v++) acc[r][v] = V::fma(x, w[v], acc[r][v]);
      }
      a += R;
      b += NV * W;
    }
  };
  // C is met once a chunk, and lies far away by then: its lines, one more a row than vectors, are asked for at an even pace.
  constexpr int kLines = NV + 1;
  const int64_t pace = K / (R * kLines), asked = pace ? rows * kLines : 0;
  for (int64_t i = 0; i < asked; i++) {
    const int64_t r = i / kLines, v = i % kLines;
    __builtin_prefetch(c + r * ldc + imin(v * W, width - 1), 1);
    multiply(pace);
  }
  multiply(K - asked * pace);
  const int tail = width - (NV - 1) * W;
  FASTRNN_UNROLL for (int r = 0; r < R; r++) {
    if (r >= rows) break;
    FASTRNN_UNROLL for (int v = 0; v < NV; v++) {
      const int n = v == NV - 1 ? tail : W;
      typename E::T* p = c + r * ldc + v * W;
      store_as<V>(p, add ? load_as<V>(p, n) + acc[r][v] : acc[r][v], n);
    }
  }
}

template <class E>
static void outer_any(int nv, const typename E::T* a, const typename E::T* b, int64_t K, typename E::T* c,
                      int64_t ldc, int rows, int width, bool add) {
  using M = Arithmetic<typename E::T, typename E::T>;
  if constexpr (kOuterVectors == 4) {
    if (nv == 4) return outer_tile<M, 4>(a, b, K, c, ldc, rows, width, add);
    if (nv == 3) return outer_tile<M, 3>(a, b, K, c, ldc, rows, width, add);
  }
  if (nv == 2) return outer_tile<M, 2>(a, b, K, c, ldc, rows, width, add);
  return outer_tile<M, 1>(a, b, K, c, ldc, rows, width, add);
}

// Panels [p, p + G) of a job: kOuterRows columns of A each over K rows, short panels padded with zeros. Several at a time, so that
// a cache line of A is met once: its rows are often 4 KiB apart and share a set of L1. Eight columns are moved for six, whatever the
// vectors are: wider ones overlap more and cross a line at every row.
template <class E, int G>
static void pack_outer(const OuterJob<E>& job, int64_t p, int64_t k0, int64_t K, typename E::T* dst,
                       bool add) {
  using T = typename E::T;
  constexpr int kSpan = 8;
  static_assert(kOuterRows <= kSpan, "a panel's row is one load");
  typedef T Span __attribute__((vector_size(kSpan * sizeof(T))));
  const int64_t m = p * kOuterRows, lda = job.lda;
  const int64_t first = job.column + m, columns = imin(G * kOuterRows, job.columns - m);
  const T* src = job.a + k0 * lda + first;
  Span total[G] = {};
  // Whole spans while what they read is the row's and what they write beyond a panel's row is its next one's.
  const bool whole = columns == G * kOuterRows && first + (G - 1) * kOuterRows + kSpan <= lda;
  int64_t k = 0;
  for (; whole && k * kOuterRows + kSpan <= K * kOuterRows; k++) FASTRNN_UNROLL for (int g = 0; g < G; g++) {
      Span v;
      std::memcpy(&v, src + k * lda + g * kOuterRows, sizeof(v));
      std::memcpy(dst + (g * K + k) * kOuterRows, &v, sizeof(v));
      total[g] += v;
    }
  for (; k < K; k++)
    for (int g = 0; g < G; g++)
      for (int r = 0; r < kOuterRows; r++) {
        const int column = g * kOuterRows + r;
        const T x = column < columns ? src[k * lda + column] : T(0);
        dst[(g * K + k) * kOuterRows + r] = x;
        total[g][r] += x;
      }
  if (!job.sums) return;
  for (int g = 0; g < G; g++) {
    T* out = job.sums + first + g * kOuterRows;
    for (int r = 0; r < imin(kOuterRows, columns - g * kOuterRows); r++)
      out[r] = (add ? out[r] : T(0)) + total[g][r];
  }
}

// Blocks [b, b + G) of kOuterVectors vectors of an operand's rows [k0, k0 + K), zero-padded to whole vectors.
template <class E, int G>
static void pack_operand(const OuterOperand<E>& o, int64_t b, int64_t k0, int64_t K) {
  using V = typename E::V;
  constexpr int kWide = kOuterVectors * E::W;
  const int64_t c = b * kWide, n = imin(G * kWide, o.width - c);
  typename E::T* dst = o.packed + c * K;
  for (int64_t k = 0; k < K; k++)
    for (int g = 0; g < G; g++) {
      // A last block has as many vectors as it needs.
      const int64_t left = imin(kWide, n - g * kWide), cols = ceil_div(left, E::W) * E::W;
      for (int64_t j = 0; j < cols; j += E::W) {
        const int w = static_cast<int>(imin(E::W, left - j));
        const int64_t at = c + g * kWide + j;
        V::store(dst + g * kWide * K + k * cols + j, o.rows
                                                         ? load_as<V>(o.rows[k0 + k] + at, w)
                                                         : load_as<V>(o.block + (k0 + k) * o.width + at, w));
      }
    }
}

// Elements of the panels of A that `threads` threads have at a time, in a chunk of `rows`.
FASTRNN_INLINE int64_t outer_elements(int threads, int64_t rows) {
  return threads * kOuterRun * kOuterRows * imin(kOuterK, rows);
}

// Who multiplies which panels of the jobs: threads get equal shares of the products (a panel of one job may meet one operand, of
// another two), in pieces of kOuterRun panels.
template <class E>
class OuterShares {
 public:
  OuterShares(const OuterJob<E>* jobs, int job_count, const OuterOperand<E>* operands, int count)
      : jobs_(jobs), job_count_(job_count), operands_(operands), count_(count) {
    for (int j = 0; j < job_count; j++) total_ += jobs[j].panels() * cost(jobs[j]);
  }
  int64_t pieces(int id) const {
    int64_t sum = 0;
    each_job(id, [&](const OuterJob<E>&, int64_t first, int64_t last) {
      sum += ceil_div(last - first, kOuterRun);
    });
    return sum;
  }
  // f(job, first panel, one after the last, end of the thread's panels of the job) for a piece of thread id's.
  template <class F>
  void at(int id, int64_t piece, F&& f) const {
    each_job(id, [&](const OuterJob<E>& job, int64_t first, int64_t last) {
      const int64_t runs = ceil_div(last - first, kOuterRun), p = first + piece * kOuterRun;
      if (piece >= 0 && piece < runs) f(job, p, imin(last, p + kOuterRun), last);
      piece -= runs;
    });
  }

 private:
  int64_t cost(const OuterJob<E>& job) const {
    int64_t sum = 1;  // packing it
    for (const auto& to : job.to) sum += to.operand < 0 ? 0 : operands_[to.operand].width;
    return sum;
  }
  template <class F>
  void each_job(int id, F&& f) const {
    int64_t before = 0;
    for (int j = 0; j < job_count_; j++) {
      const auto panel_of = [&](int thread) {
        return imin(jobs_[j].panels(), imax(0, ceil_div(total_ * thread / count_ - before, cost(jobs_[j]))));
      };
      f(jobs_[j], panel_of(id), panel_of(id + 1));
      before += jobs_[j].panels() * cost(jobs_[j]);
    }
  }
  const OuterJob<E>* jobs_;
  int job_count_;
  const OuterOperand<E>* operands_;
  int count_;
  int64_t total_ = 0;
};

// The chunk's share of all jobs, by this thread of a group; `add` is false on the first chunk. Nothing is written to
// the results before all threads have come here.
template <class E>
static void outer_products(const OuterJob<E>* jobs, int job_count, const OuterOperand<E>* operands,
                           int operand_count, int64_t rows, typename E::T* panels, bool add,
                           Division& division, Barrier& barrier) {
  constexpr int kWide = kOuterVectors * E::W;
  const int id = division.id, count = division.count;
  int64_t widths = 0;
  for (int o = 0; o < operand_count; o++) widths += operands[o].width;
  const OuterShares<E> shares(jobs, job_count, operands, count);
  for (int64_t k0 = 0; k0 < rows; k0 += kOuterK) {
    const int64_t K = imin(kOuterK, rows - k0), size = K * kOuterRows;
    typename E::T* own = panels + id * kOuterRun * size;
    // Each thread packs a share of every B, and panels of A as it comes to them.
    for (int o = 0; o < operand_count; o++) {
      const int64_t blocks = ceil_div(operands[o].width, kWide);
      in_groups(blocks * id / count, blocks * (id + 1) / count, [&](auto group, int64_t b) {
        pack_operand<E, decltype(group)::value>(operands[o], b, k0, K);
      });
    }
    barrier.wait(count);
    const bool stays = widths * K * static_cast<int64_t>(sizeof(typename E::T)) <= kOuterStays;
    division.run(
        true, [&](int of) { return shares.pieces(of); },
        [&](int of, int64_t piece) {
          shares.at(of, piece, [&](const OuterJob<E>& job, int64_t p0, int64_t p1, int64_t) {
            in_groups(p0, p1, [&](auto group, int64_t p) {
              pack_outer<E, decltype(group)::value>(job, p, k0, K, own + (p - p0) * size, add);
            });
            // C is met row after row where B stays in L2; else a block of B stays in L1 while the run's panels pass.
            const int64_t step = stays ? 1 : p1 - p0;
            for (int64_t p = p0; p < p1; p += step)
              for (const auto& to : job.to) {
                const int64_t width = to.operand < 0 ? 0 : operands[to.operand].width;
                for (int64_t c = 0; c < width; c += kWide) {
                  const int n = static_cast<int>(imin(kWide, width - c));
                  for (int64_t q = p; q < p + step; q++)
                    outer_any<E>(static_cast<int>(ceil_div(n, E::W)), own + (q - p0) * size,
                                 operands[to.operand].packed + c * K, K, to.c + q * kOuterRows * to.ldc + c,
                                 to.ldc, static_cast<int>(imin(kOuterRows, job.columns - q * kOuterRows)), n,
                                 add);
                }
              }
          });
        });
    barrier.wait(count);
    add = true;
  }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
