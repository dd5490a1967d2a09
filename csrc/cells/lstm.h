// LSTM, torch gate order i, f, g, o:
//   c_t = f * c_{t-1} + i * g,  h_t = o * tanh(c_t);  i, f, o = sigmoid(.), g = tanh(.)
// Pointwise part only; the matmuls are the caller's. V is a vector or a scalar, A its activations
// (sigmoid, tanh, their derivatives from the output, fma, one), so CPU and GPU share these lines.
#pragma once
#include "cells.h"

namespace fastrnn {

// c_t from the activated gates; the output is o * tanh(c_t).
template <class A, class V>
FASTRNN_CELL V lstm_cell(V i, V f, V g, V c_prev) {
  return A::fma(f, c_prev, i * g);
}

// With recurrent dropout: `update` multiplies i * g, `cell` the whole of c_t.
template <class A, class V>
FASTRNN_CELL V lstm_cell(V i, V f, V g, V c_prev, V update, V cell) {
  return A::fma(f, c_prev, i * g * update) * cell;
}

template <class V>
struct LstmGrad {
  V i, f, g, o, c_prev;
};

// dh, dc: gradients that reach h_t and c_t (dc without h_t's share); tanh(c) is recomputed.
template <class A, class V>
FASTRNN_CELL LstmGrad<V> lstm_backward(V i, V f, V g, V o, V c, V c_prev, V dh, V dc) {
  LstmGrad<V> r;
  V tc = A::tanh(c);
  dc = A::fma(dh * o, A::dtanh(tc), dc);
  r.o = dh * tc * A::dsigmoid(o);
  r.i = dc * g * A::dsigmoid(i);
  r.g = dc * i * A::dtanh(g);
  r.f = dc * c_prev * A::dsigmoid(f);
  r.c_prev = dc * f;
  return r;
}

template <class A, class V>
FASTRNN_CELL LstmGrad<V> lstm_backward(V i, V f, V g, V o, V c, V c_prev, V dh, V dc, V update, V cell) {
  LstmGrad<V> r;
  V tc = A::tanh(c);
  dc = A::fma(dh * o, A::dtanh(tc), dc) * cell;
  r.o = dh * tc * A::dsigmoid(o);
  r.f = dc * c_prev * A::dsigmoid(f);
  r.c_prev = dc * f;
  dc = dc * update;
  r.i = dc * g * A::dsigmoid(i);
  r.g = dc * i * A::dtanh(g);
  return r;
}

}  // namespace fastrnn
