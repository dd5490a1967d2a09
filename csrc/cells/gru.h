// GRU, torch gate order r, z, n and h_t = (1 - z) n + z h_{t-1}:
//   reset_after  (cuDNN, torch): n = tanh(W_in x + b_in + r * (W_hn h_{t-1} + b_hn))
//   reset_before (1406.1078v3):  n = tanh(W_in x + b_in + W_hn (r * h_{t-1}) + b_hn)
#pragma once
#include "cells.h"

namespace fastrnn {

// n before its tanh; reset_after: un = W_hn h_{t-1} + b_hn, gn = W_in x + b_in.
template <class A, class V>
FASTRNN_CELL V gru_candidate(V r, V un, V gn) {
  return A::fma(r, un, gn);
}

template <class A, class V>
FASTRNN_CELL V gru_output(V z, V n, V h_prev) {
  return A::fma(z, h_prev - n, n);
}

// With recurrent dropout, `update` multiplies the candidate.
template <class A, class V>
FASTRNN_CELL V gru_output(V z, V n, V h_prev, V update) {
  return gru_output<A>(z, n * update, h_prev);
}

template <class V>
struct GruGrad {
  V r, z, n, un, h_prev;  // n: pre-activation on the input side, un: on the recurrent side
};

template <class A, class V>
FASTRNN_CELL GruGrad<V> gru_backward(V r, V z, V n, V un, V h_prev, V dh) {
  GruGrad<V> g;
  g.z = dh * (h_prev - n) * A::dsigmoid(z);
  g.n = dh * (A::one() - z) * A::dtanh(n);
  g.r = g.n * un * A::dsigmoid(r);
  g.un = g.n * r;
  g.h_prev = dh * z;
  return g;
}

template <class A, class V>
FASTRNN_CELL GruGrad<V> gru_backward(V r, V z, V n, V un, V h_prev, V dh, V update) {
  GruGrad<V> g;
  g.z = dh * (h_prev - n * update) * A::dsigmoid(z);
  g.n = dh * (A::one() - z) * update * A::dtanh(n);
  g.r = g.n * un * A::dsigmoid(r);
  g.un = g.n * r;
  g.h_prev = dh * z;
  return g;
}

}  // namespace fastrnn
