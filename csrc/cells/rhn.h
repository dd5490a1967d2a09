// Recurrent Highway Network, gate order h, t[, c]. One micro-step of the state s:
//   h = tanh(.), t = sigmoid(.), c = sigmoid(.), or 1 - t where the carry is coupled;  s' = h * t + s * c
#pragma once
#include "cells.h"

namespace fastrnn {

template <class A, class V>
FASTRNN_CELL V rhn_state(V h, V t, V s) {
  return A::fma(t, h - s, s);
}
template <class A, class V>
FASTRNN_CELL V rhn_state(V h, V t, V c, V s) {
  return A::fma(h, t, s * c);
}

template <class V>
struct RhnGrad {
  V h, t, c, s;  // pre-activations, and what s receives beside the matmul
};

// ds: gradient of s'.
template <class A, class V>
FASTRNN_CELL RhnGrad<V> rhn_backward(V h, V t, V s, V ds) {
  RhnGrad<V> g;
  g.h = ds * t * A::dtanh(h);
  g.t = ds * (h - s) * A::dsigmoid(t);
  g.c = g.t;
  g.s = ds * (A::one() - t);
  return g;
}
template <class A, class V>
FASTRNN_CELL RhnGrad<V> rhn_backward(V h, V t, V c, V s, V ds) {
  RhnGrad<V> g;
  g.h = ds * t * A::dtanh(h);
  g.t = ds * h * A::dsigmoid(t);
  g.c = ds * s * A::dsigmoid(c);
  g.s = ds * c;
  return g;
}

}  // namespace fastrnn
