// Elman RNN: h_t = tanh(z) or relu(z), z = W_ih x + b_ih + W_hh h_{t-1} + b_hh. Both derivatives are
// functions of h_t, so nothing but the output is stored.
#pragma once
#include "cells.h"

namespace fastrnn {

// Gradient of z from that of h_t.
template <class A, bool Relu, class V>
FASTRNN_CELL V rnn_backward(V h, V dh) {
  if constexpr (Relu)
    return A::drelu(h, dh);
  else
    return dh * A::dtanh(h);
}

}  // namespace fastrnn
