// Batch-normalised LSTM (Cooijmans et al., arXiv 1603.09025), torch gate order i, f, g, o:
//   z = gamma_h a^ + gamma_x b^ + bias;  c_t = f * c_{t-1} + i * g;  h_t = o * tanh(gamma_c c^ + beta_c)
// with u^ = (u - mean) * r, r = 1 / sqrt(var + eps), of a = h_{t-1} W_h^T, b = x_t W_x^T and c_t itself.
// Pointwise part only: matmuls and the sums over a batch are the caller's.
#pragma once
#include "cells.h"

namespace fastrnn {

template <class A, class V>
FASTRNN_CELL V batch_norm_gate(V a_hat, V b_hat, V gamma_h, V gamma_x, V bias) {
  return A::fma(gamma_h, a_hat, A::fma(gamma_x, b_hat, bias));
}

// What reaches the normalised cell and the output gate, from dh. q = tanh(gamma_c c^ + beta_c).
template <class V>
struct BnOutputGrad {
  V o, m;  // dz_o; gradient of gamma_c c^ + beta_c
};
template <class A, class V>
FASTRNN_CELL BnOutputGrad<V> bnlstm_backward_output(V o, V q, V dh) {
  return {dh * q * A::dsigmoid(o), dh * o * A::dtanh(q)};
}

// Gradient of u from that of its normalised value times gamma: dy - mean(dy) - u^ mean(dy u^), times
// scale = gamma r. The means are zero where the statistics are constants.
template <class A, class V>
FASTRNN_CELL V batch_norm_backward(V dy, V hat, V scale, V mean, V mean_hat) {
  return scale * ((dy - mean) - hat * mean_hat);
}

template <class V>
struct BnCellGrad {
  V i, f, g, c_prev;
};
// dc: all that reaches c_t.
template <class A, class V>
FASTRNN_CELL BnCellGrad<V> bnlstm_backward_cell(V i, V f, V g, V c_prev, V dc) {
  return {dc * g * A::dsigmoid(i), dc * c_prev * A::dsigmoid(f), dc * i * A::dtanh(g), dc * f};
}

}  // namespace fastrnn
