// The batch-normalised LSTM's weight gradients, C[m][c] += sum_k A[k][m] * B[k][c], from gate gradients where they lie.
//
// No sums are made of them, and their rows are padded, so panels of them need not be packed. C shares no memory with what
// others still read, and B is known before the steps, so nobody waits. Every output is outer.h's chain of kOuterK rows, in
// the same order.
#pragma once
#include "bnlstm_ahead.h"
#include "outer.h"

namespace fastrnn {
namespace FASTRNN_ISA {

constexpr int64_t kOuterAhead = 16;  // rows by which a tile asks for gate gradients

// Gate gradients of the run after this one, which come from a cache further off: a tile asks for its share.
template <class T>
struct OuterComing {
  const T* at = nullptr;
  int64_t lines = 0;  // of each row
  int64_t row = 0, rows = 0;
};

// As outer_tile(), of A's rows `lda` apart; `next`: A of the tile after this one.
template <class E, int NV>
static void outer_tile_rows(const typename E::T* a, int64_t lda, const typename E::T* next,
                            OuterComing<typename E::T> coming, const typename E::T* b, int64_t K,
                            typename E::T* c, int64_t ldc, int rows, int width, bool add) {
  using T = typename E::T;
  using V = typename E::V;
  constexpr int R = kOuterRows, W = E::W;
  constexpr int64_t kLine = 64 / sizeof(T);
  V acc[R][NV];
  FASTRNN_UNROLL for (int r = 0; r < R; r++) FASTRNN_UNROLL for (int v = 0; v < NV; v++) acc[r][v] =
      V::zero();
  const auto multiply = [&](int64_t k, int64_t end) {
    // The last rows of a tile ask for the first ones of the next.
    const bool here = end + kOuterAhead <= K;
    const T* far = (here ? a + (k + kOuterAhead) * lda : next + imax(0, k + kOuterAhead - K) * lda) + R - 1;
    const T* x_row = a + k * lda;
    FASTRNN_UNROLL_K for (; k < end; k++) {
      __builtin_prefetch(far);
      V w[NV];
      FASTRNN_UNROLL for (int v = 0; v < NV; v++) w[v] = V::load(b + v * W);
      FASTRNN_UNROLL for (int r = 0; r < R; r++) {
        V x = V::set1(x_row[r]);
        FASTRNN_UNROLL for (int v = 0; v < NV; v++) acc[r][v] = V::fma(x, w[v], acc[r][v]);
      }
      x_row += lda;
      far += lda;
      b += NV * W;
    }
  };
  // C is met once a chunk as well (see outer_tile).
  constexpr int kLines = NV + 1;
  const int64_t pace = K / (R * kLines), asked = pace ? rows * kLines : 0;
  int64_t k = 0, row = coming.row, line = 0;
  const int64_t each = asked ? ceil_div(coming.rows * coming.lines, asked) : 0;
  for (int64_t i = 0; i < asked; i++, k += pace) {
    __builtin_prefetch(c + i / kLines * ldc + imin(i % kLines * W, width - 1), 1);
    for (int64_t j = 0; j < each && row < coming.row + coming.rows; j++) {
      __builtin_prefetch(coming.at + row * lda + line * kLine, 0, 2);
      if (++line == coming.lines) line = 0, row++;
    }
    multiply(k, k + pace);
  }
  multiply(k, K);
  const int tail = width - (NV - 1) * W;
  FASTRNN_UNROLL for (int r = 0; r < R; r++) {
    if (r >= rows) break;
    FASTRNN_UNROLL for (int v = 0; v < NV; v++) {
      const int n = v == NV - 1 ? tail : W;
      T* p = c + r * ldc + v * W;
      store_as<V>(p, add ? load_as<V>(p, n) + acc[r][v] : acc[r][v], n);
    }
  }
}

template <class E>
static void outer_rows_any(int nv, const typename E::T* a, int64_t lda, const typename E::T* next,
                           const OuterComing<typename E::T>& coming, const typename E::T* b, int64_t K,
                           typename E::T* c, int64_t ldc, int rows, int width, bool add) {
  if constexpr (kOuterVectors == 4) {
    if (nv == 4) return outer_tile_rows<E, 4>(a, lda, next, coming, b, K, c, ldc, rows, width, add);
    if (nv == 3) return outer_tile_rows<E, 3>(a, lda, next, coming, b, K, c, ldc, rows, width, add);
  }
  if (nv == 2) return outer_tile_rows<E, 2>(a, lda, next, coming, b, K, c, ldc, rows, width, add);
  outer_tile_rows<E, 1>(a, lda, next, coming, b, K, c, ldc, rows, width, add);
}

// Rows [k0, k0 + K) of an operand lie here in its packed form of all rows.
template <class E>
static typename E::T* outer_packed(const OuterOperand<E>& o, int64_t k0) {
  return o.packed + ceil_div(o.width, E::W) * E::W * k0;
}

// Block b of kOuterVectors vectors of an operand's rows [k0, k0 + K), as pack_operand(): rows are asked for ahead, and the lines
// written, which a thread that multiplies with them may hold.
template <class E>
static void pack_outer_block(const OuterOperand<E>& o, int64_t b, int64_t k0, int64_t K) {
  using V = typename E::V;
  constexpr int64_t kWide = kOuterVectors * E::W, kLine = 64 / sizeof(typename E::T);
  const int64_t c = b * kWide, n = imin(kWide, o.width - c), cols = ceil_div(n, E::W) * E::W;
  typename E::T* dst = outer_packed(o, k0) + c * K;
  const auto* const* rows = o.rows + k0;
  for (int64_t k = 0; k < K; k++, dst += cols) {
    const auto* far = rows[imin(k + kOuterAhead, K - 1)] + c;
    for (int64_t j = 0; j < cols; j += kLine) {
      __builtin_prefetch(far + j);
      prefetch_write(dst + kOuterAhead * cols + j);
    }
    for (int64_t j = 0; j < cols; j += E::W)
      V::store(dst + j, load_as<V>(rows[k] + c + j, static_cast<int>(imin(E::W, n - j))));
  }
}

// Thread id's share of packing operands of `rows` rows: as far as it can be those that it will multiply with.
template <class E>
static void pack_outer_operands(const OuterOperand<E>* operands, int operand_count, int64_t rows, int id,
                                int count) {
  const auto blocks = [&](int i) { return ceil_div(operands[i].width, kOuterVectors * E::W); };
  int64_t total = 0, before = 0;
  for (int i = 0; i < operand_count; i++) total += blocks(i);
  for (int i = 0; i < operand_count; before += blocks(i), i++)
    for (int64_t k0 = 0; k0 < rows; k0 += kOuterK)
      for (int64_t b = imax(0, total * id / count - before);
           b < imin(blocks(i), total * (id + 1) / count - before); b++)
        pack_outer_block<E>(operands[i], b, k0, imin(kOuterK, rows - k0));
}

// The chunk's share of all jobs, each with one operand, by a group of `count` threads; `add` is false on the first chunk.
template <class E>
static void outer_products_rows(const OuterJob<E>* jobs, int job_count, const OuterOperand<E>* operands,
                                int64_t rows, bool add, Division& division) {
  using T = typename E::T;
  constexpr int kWide = kOuterVectors * E::W;
  const OuterShares<E> shares(jobs, job_count, operands, division.count);
  division.run(
      true, [&](int of) { return shares.pieces(of); },
      [&](int of, int64_t piece) {
        shares.at(of, piece, [&](const OuterJob<E>& job, int64_t p0, int64_t p1, int64_t end) {
          const auto& to = job.to[0];
          const int64_t width = operands[to.operand].width, blocks = ceil_div(width, kWide);
          const int64_t p2 = imin(end, p1 + kOuterRun);
          bool more = add;
          for (int64_t k0 = 0; k0 < rows; k0 += kOuterK, more = true) {
            const int64_t K = imin(kOuterK, rows - k0);
            const T* packed = outer_packed(operands[to.operand], k0);
            const auto at = [&](int64_t q) { return job.a + k0 * job.lda + q * kOuterRows; };
            // All blocks of B but the first meet a run that has come near; theirs is the time to ask for the next.
            const int64_t tiles = (blocks - 1) * (p1 - p0);
            for (int64_t b = 0; b < blocks; b++)
              for (int64_t q = p0; q < p1; q++) {
                OuterComing<T> coming;
                if (p1 < p2 && b > 0) {
                  const int64_t i = (b - 1) * (p1 - p0) + q - p0, first = K * i / tiles;
                  coming = {at(p1), ((p2 - p1) * kOuterRows * int64_t(sizeof(T)) + 127) / 64, first,
                            K * (i + 1) / tiles - first};
                }
                const int n = static_cast<int>(imin(kWide, width - b * kWide));
                outer_rows_any<E>(static_cast<int>(ceil_div(n, E::W)), at(q), job.lda,
                                  at(q + 1 < p1 ? q + 1 : p0), coming, packed + b * kWide * K, K,
                                  to.c + q * kOuterRows * to.ldc + b * kWide, to.ldc,
                                  static_cast<int>(imin(kOuterRows, job.columns - q * kOuterRows)), n, more);
              }
          }
        });
      });
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
