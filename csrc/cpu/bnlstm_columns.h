// Sums and statistics down the columns of a block: rows of up to four vectors, all rows of a batch.
// Every column is summed by one thread in the order of the rows, so the bits do not depend on the threads.
#pragma once
#include <cmath>

#include "bnlstm.h"
#include "cells_cpu.h"
#include "sequence.h"
#include "team.h"

namespace fastrnn {
namespace FASTRNN_ISA {

constexpr int64_t kSumRows = 256;  // longer columns are summed in pieces, the pieces in double

// out[c] = sum over rows of x[c], or of (x[c] - centre[c])^2.
template <class E, int NV, bool Squares>
static void sum_columns(const typename E::T* x, int64_t rows, int64_t stride, const typename E::T* centre,
                        typename E::T* out) {
  using V = typename E::V;
  constexpr int kChains = NV == 1 ? 4 : 2;  // a single chain waits for its own additions
  V sum[kChains][NV], mid[NV];
  FASTRNN_UNROLL for (int v = 0; v < NV; v++) {
    mid[v] = Squares ? V::load(centre + v * E::W) : V::zero();
    FASTRNN_UNROLL for (int j = 0; j < kChains; j++) sum[j][v] = V::zero();
  }
  auto add = [&](const typename E::T* p, V(&to)[NV]) {
    FASTRNN_UNROLL for (int v = 0; v < NV; v++) {
      V a = V::load(p + v * E::W);
      if constexpr (Squares) {
        a = a - mid[v];
        to[v] = V::fma(a, a, to[v]);
      } else {
        to[v] = to[v] + a;
      }
    }
  };
  int64_t r = 0;
  for (; r + kChains <= rows; r += kChains)
    FASTRNN_UNROLL for (int j = 0; j < kChains; j++) add(x + (r + j) * stride, sum[j]);
  for (; r < rows; r++) add(x + r * stride, sum[0]);
  FASTRNN_UNROLL for (int v = 0; v < NV; v++) {
    V total = sum[0][v] + sum[1][v];
    if constexpr (kChains == 4) total = total + (sum[2][v] + sum[3][v]);
    V::store(out + v * E::W, total);
  }
}

template <class E, bool Squares>
static void sum_columns(int nv, const typename E::T* x, int64_t rows, int64_t stride,
                        const typename E::T* centre, typename E::T* out) {
  switch (nv) {
    case 1:
      return sum_columns<E, 1, Squares>(x, rows, stride, centre, out);
    case 2:
      return sum_columns<E, 2, Squares>(x, rows, stride, centre, out);
    case 3:
      return sum_columns<E, 3, Squares>(x, rows, stride, centre, out);
    default:
      return sum_columns<E, 4, Squares>(x, rows, stride, centre, out);
  }
}

template <class E>
constexpr int kBlockColumns = kMaxVectors * E::W;

// The statistics of one block's columns at one step, and the factor 1 / sqrt(var + eps).
template <class E>
struct Columns {
  using T = typename E::T;
  alignas(64) T mean[kBlockColumns<E>];
  alignas(64) T var[kBlockColumns<E>];
  alignas(64) T factor[kBlockColumns<E>];

  // Of the batch: two passes, because the squares of activations cancel.
  void measure(int nv, const T* x, int64_t rows, int64_t stride) {
    const int columns = nv * E::W;
    if (rows <= kSumRows) {
      sum_columns<E, false>(nv, x, rows, stride, nullptr, mean);
      divide(mean, columns, rows);
      sum_columns<E, true>(nv, x, rows, stride, mean, var);
      divide(var, columns, rows);
    } else {
      in_pieces<false>(nv, x, rows, stride, mean);
      in_pieces<true>(nv, x, rows, stride, var);
    }
  }
  // Of `gates` stretches of `units` elements, `width` apart in memory.
  void read(const T* mean_row, const T* var_row, int gates, int64_t width, int units) {
    for (int g = 0; g < gates; g++) {
      std::memcpy(mean + g * units, mean_row + g * width, units * sizeof(T));
      std::memcpy(var + g * units, var_row + g * width, units * sizeof(T));
    }
    for (int c = gates * units; c % E::W; c++) mean[c] = var[c] = T(0);
  }
  template <class N>
  FASTRNN_ALWAYS_INLINE void write(T* mean_row, T* var_row, int gates, int64_t width, N units) const {
    for (int g = 0; g < gates; g++) {
      std::memcpy(mean_row + g * width, mean + g * units, units * sizeof(T));
      std::memcpy(var_row + g * width, var + g * units, units * sizeof(T));
    }
  }
  void finish(int nv, T eps) {
    for (int c = 0; c < nv * E::W; c++) factor[c] = T(1) / std::sqrt(var[c] + eps);
  }
  // x = (x - mean) * factor, in place.
  void normalise(int nv, T* x, int64_t rows, int64_t stride) const {
    using V = typename E::V;
    for (int64_t r = 0; r < rows; r++)
      for (int v = 0; v < nv; v++) {
        T* p = x + r * stride + v * E::W;
        V::store(p, (V::load(p) - V::load(mean + v * E::W)) * V::load(factor + v * E::W));
      }
  }

 private:
  // By a power of two a product is the quotient, for a fraction of the time.
  static void divide(T* x, int columns, int64_t rows) {
    const T inverse = T(1) / T(rows);
    if (rows & (rows - 1))
      for (int c = 0; c < columns; c++) x[c] /= T(rows);
    else
      for (int c = 0; c < columns; c++) x[c] *= inverse;
  }
  template <bool Squares>
  void in_pieces(int nv, const T* x, int64_t rows, int64_t stride, T* out) {
    double total[kBlockColumns<E>] = {};
    alignas(64) T part[kBlockColumns<E>];
    for (int64_t r = 0; r < rows; r += kSumRows) {
      sum_columns<E, Squares>(nv, x + r * stride, imin(kSumRows, rows - r), stride, mean, part);
      for (int c = 0; c < nv * E::W; c++) total[c] += double(part[c]);
    }
    for (int c = 0; c < nv * E::W; c++) out[c] = T(total[c] / double(rows));
  }
};

// Where step s of row n lies in time, and the rows before each step: the same walk forward and backward.
struct BnSteps {
  const BnLstmProblem& p;
  const Sequence& seq;
  int64_t* start = nullptr;  // rows of the steps before each step, T + 1

  BnSteps(const BnLstmProblem& problem, const Sequence& sequence, Arena& arena)
      : p(problem), seq(sequence), start(arena.take<int64_t>(problem.T + 1)) {
    if (!arena.base) return;
    for (int64_t s = 0; s <= p.T; s++) start[s] = 0;
    for (int64_t n = 0; n < p.N; n++) start[seq.length(n)]++;  // ends, turned into running sums of rows alive
    int64_t alive = p.N, before = 0;
    for (int64_t s = 0; s <= p.T; s++) {
      alive -= start[s];
      start[s] = before;
      before += alive;
    }
  }
  int64_t time(int d, int64_t s, int64_t n) const { return d ? seq.length(n) - 1 - s : s; }
  int64_t before(int d, int64_t t) const { return d ? t + 1 : t - 1; }
  // Whether a step of so many rows has statistics of its own.
  bool measured(int64_t rows) const { return p.batch && rows >= 2; }
  bool input_measured(int64_t rows) const { return measured(p.sequence ? p.N : rows); }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
