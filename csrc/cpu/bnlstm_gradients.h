// The pointwise backward of one of the tape's blocks: W units, their four gate columns, all rows of a step.
//
// Three passes over a tile that stays in L1, because a batch norm's gradient needs two sums over the batch before
// its first value: gates and output again and the sums of the cell's norm; the gates' gradients and their sums;
// the gradients of the recurrent and of the input term.
#pragma once
#include "../cells/bnlstm.h"
#include "bnlstm_columns.h"
#include "team.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class T>
struct BnGradRow {
  const T *dy, *dcells;  // gradients of the output rows, or null
  const T *dh, *dc_in;   // what reaches h_t and c_t beside those and the matmul; dh may be null
  const T *c, *c_prev;
  T *dc_out, *da, *db;
};

// Sums over all rows of all steps: dz, dz a^, dz b^ (4H); dm, dm c^ (H).
template <class T>
struct BnSums {
  T *z, *a, *x, *m, *c;
};

template <class E, bool Linear>
class BnGradients {
  using T = typename E::T;
  using V = typename E::V;
  using Math = Act<V, Linear>;
  static constexpr int W = E::W;

 public:
  const BnLstmBackwardArgs& args;
  const BnSteps& steps;
  const Panels<E> blocks;
  const int64_t rows;   // of the tape
  const bool deferred;  // the input term's gradient waits for the sums of all steps: db holds dz
  const T* zero;        // 4H zeros

  struct Scratch {  // of one thread
    T *gates, *m, *hat;
    Scratch(Arena& a, int64_t N)
        : gates(a.take<T>(N * kBlockColumns<E>)), m(a.take<T>(N * W)), hat(a.take<T>(N * W)) {}
  };

  const T* tape(int d, int64_t b, int64_t first) const {
    return static_cast<const T*>(args.tape) + d * rows * bnlstm_tape_width(args.H) + rows * blocks.offset(b) +
           first * blocks.columns(b);
  }

  // All rows of one of the tape's blocks at step s, from the gradient dh of their outputs.
  void block(int d, const Scratch& lane, const BnGradRow<T>* row_of, const BnSums<T>& sums, int64_t s,
             int64_t count, int64_t first, int64_t b, const T* dh, int64_t dh_stride) const {
    const int n = blocks.units(b);
    if (n == W)
      units(d, lane, row_of, sums, s, count, first, b, dh, dh_stride, std::integral_constant<int, W>{});
    else
      units(d, lane, row_of, sums, s, count, first, b, dh, dh_stride, n);
  }

  // Shared statistics: dz of all rows, one `stride` apart, becomes the gradient of block b's input term.
  void share(int d, const BnSums<T>& sums, int64_t b, T* db, int64_t stride) const {
    const int64_t H = args.H, M = steps.start[args.T], u0 = blocks.first(b), cols = blocks.columns(b);
    const int n = blocks.units(b);
    const T* x_hat = tape(d, b, 0);
    V mean[4], scale[4];
    used(d, 0, 0, 4, u0, n, mean, scale);
    for (int g = 0; g < 4; g++) {
      const int64_t at = g * H + u0;
      scale[g] = scale[g] * load_as<V>(static_cast<const T*>(args.weights[d].gamma_ih) + at, n);
      const V inverse = V::set1(steps.input_measured(M) ? T(1) / T(M) : T(0));
      const V z_mean = load_as<V>(sums.z + at, n) * inverse, x_mean = load_as<V>(sums.x + at, n) * inverse;
      for (int64_t m = 0; m < M; m++) {
        const V hat = load_as<V>(x_hat + m * cols + g * n, n);
        T* p = db + m * stride + at;
        store_as<V>(p, batch_norm_backward<Math>(load_as<V>(p, n), hat, scale[g], z_mean, x_mean), n);
      }
    }
  }

 private:
  // block() with n units, a constant where the vectors are whole.
  template <class N>
  void units(int d, const Scratch& lane, const BnGradRow<T>* row_of, const BnSums<T>& sums, int64_t s,
             int64_t count, int64_t first, int64_t b, const T* dh, int64_t dh_stride, N n) const {
    const BnLstmWeights& w = args.weights[d];
    const int64_t H = args.H, u0 = blocks.first(b), cols = blocks.columns(b);
    const T* x_hat = tape(d, b, first);
    const T* a_hat = x_hat + rows * (bnlstm_tape_width(H) / 2);

    V scale_a[4], scale_x[4], gamma_h[4], gamma_x[4], bias[4], mean[4], c_mean, c_factor;
    used(d, 2, s, 1, u0, n, &c_mean, &c_factor);
    used(d, 1, s, 4, u0, n, mean, scale_a);
    used(d, 0, s, 4, u0, n, mean, scale_x);
    FASTRNN_UNROLL for (int g = 0; g < 4; g++) {
      gamma_h[g] = load_as<V>(static_cast<const T*>(w.gamma_hh) + g * H + u0, n);
      gamma_x[g] = load_as<V>(static_cast<const T*>(w.gamma_ih) + g * H + u0, n);
      bias[g] = load_as<V>((w.bias ? static_cast<const T*>(w.bias) : zero) + g * H + u0, n);
      scale_a[g] = scale_a[g] * gamma_h[g];
      scale_x[g] = scale_x[g] * gamma_x[g];
    }
    const V gamma = load_as<V>(static_cast<const T*>(w.gamma_c) + u0, n);
    const V beta = load_as<V>(static_cast<const T*>(w.beta_c) + u0, n);
    const V none = V::zero();

    V sum_m = none, sum_c = none;
    for (int64_t r = 0; r < count; r++) {  // a row's five activations fill the registers
      const BnGradRow<T>& row = row_of[r];
      V sig[3], act[2];
      FASTRNN_UNROLL for (int g = 0; g < 4; g++) {
        const int64_t at = r * cols + g * n;
        (g == 2 ? act[0] : sig[g == 3 ? 2 : g]) = batch_norm_gate<Math>(
            load_as<V>(a_hat + at, n), load_as<V>(x_hat + at, n), gamma_h[g], gamma_x[g], bias[g]);
      }
      const V hat = (load_as<V>(row.c + u0, n) - c_mean) * c_factor;
      act[1] = Math::fma(gamma, hat, beta);
      Math::both(sig, act);
      V g = load_as<V>(dh + r * dh_stride, n);
      if (row.dh) g = g + load_as<V>(row.dh + u0, n);
      if (row.dy) g = g + load_as<V>(row.dy + u0, n);
      const auto out = bnlstm_backward_output<Math>(sig[2], act[1], g);
      T* gates = lane.gates + r * 4 * W;
      V::store(gates, sig[0]);
      V::store(gates + W, sig[1]);
      V::store(gates + 2 * W, act[0]);
      V::store(gates + 3 * W, out.o);
      V::store(lane.m + r * W, out.m);
      V::store(lane.hat + r * W, hat);
      sum_m = sum_m + out.m;
      sum_c = Math::fma(out.m, hat, sum_c);
    }
    add_to(sums.m + u0, sum_m, n);
    add_to(sums.c + u0, sum_c, n);

    const bool batch = steps.measured(count);
    const V inverse = V::set1(T(1) / T(count));
    const V m_mean = batch ? sum_m * inverse : none, c_hat_mean = batch ? sum_c * inverse : none;
    const V c_scale = gamma * c_factor;
    V sum_z[4], sum_a[4], sum_x[4];
    FASTRNN_UNROLL for (int g = 0; g < 4; g++) sum_z[g] = sum_a[g] = sum_x[g] = none;
    for (int64_t r = 0; r < count; r++) {
      const BnGradRow<T>& row = row_of[r];
      T* gates = lane.gates + r * 4 * W;
      V dc = batch_norm_backward<Math>(V::load(lane.m + r * W), V::load(lane.hat + r * W), c_scale, m_mean,
                                       c_hat_mean) +
             load_as<V>(row.dc_in + u0, n);
      if (row.dcells) dc = dc + load_as<V>(row.dcells + u0, n);
      const auto back = bnlstm_backward_cell<Math>(V::load(gates), V::load(gates + W), V::load(gates + 2 * W),
                                                   load_as<V>(row.c_prev + u0, n), dc);
      store_as<V>(row.dc_out + u0, back.c_prev, n);
      const V dz[4] = {back.i, back.f, back.g, V::load(gates + 3 * W)};
      FASTRNN_UNROLL for (int g = 0; g < 4; g++) {
        if (g < 3) V::store(gates + g * W, dz[g]);
        sum_z[g] = sum_z[g] + dz[g];
        sum_a[g] = Math::fma(dz[g], load_as<V>(a_hat + r * cols + g * n, n), sum_a[g]);
        sum_x[g] = Math::fma(dz[g], load_as<V>(x_hat + r * cols + g * n, n), sum_x[g]);
      }
    }
    const bool batch_x = steps.input_measured(count) && !deferred;
    V z_mean[4], a_mean[4], zx_mean[4], x_mean[4];
    FASTRNN_UNROLL for (int g = 0; g < 4; g++) {
      add_to(sums.z + g * H + u0, sum_z[g], n);
      add_to(sums.a + g * H + u0, sum_a[g], n);
      add_to(sums.x + g * H + u0, sum_x[g], n);
      z_mean[g] = batch ? sum_z[g] * inverse : none;
      a_mean[g] = batch ? sum_a[g] * inverse : none;
      zx_mean[g] = batch_x ? sum_z[g] * inverse : none;
      x_mean[g] = batch_x ? sum_x[g] * inverse : none;
      if (deferred) scale_x[g] = V::set1(T(1));
    }
    for (int64_t r = 0; r < count; r++) {
      const BnGradRow<T>& row = row_of[r];
      FASTRNN_UNROLL for (int g = 0; g < 4; g++) {
        const int64_t at = r * cols + g * n;
        const V dz = V::load(lane.gates + r * 4 * W + g * W);
        store_as<V>(
            row.da + g * H + u0,
            batch_norm_backward<Math>(dz, load_as<V>(a_hat + at, n), scale_a[g], z_mean[g], a_mean[g]), n);
        store_as<V>(
            row.db + g * H + u0,
            batch_norm_backward<Math>(dz, load_as<V>(x_hat + at, n), scale_x[g], zx_mean[g], x_mean[g]), n);
      }
    }
  }

  // Statistics that step s used, as vectors of n units from u0 on.
  void used(int d, int term, int64_t s, int gates, int64_t u0, int n, V* mean, V* factor) const {
    const int64_t H = args.H, count = term == 0 && args.sequence ? 1 : args.T, size = count * gates * H;
    const T* at = static_cast<const T*>(args.used[term]) + 2 * d * size + imin(s, count - 1) * gates * H + u0;
    alignas(64) T f[W];
    for (int g = 0; g < gates; g++) {
      mean[g] = load_as<V>(at + g * H, n);
      V::store(f, load_as<V>(at + size + g * H, n));
      for (int j = 0; j < W; j++) f[j] = T(1) / std::sqrt(f[j] + T(args.eps));
      factor[g] = V::load(f);
    }
  }

  static void add_to(T* sum, V v, int n) { store_as<V>(sum, load_as<V>(sum, n) + v, n); }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
