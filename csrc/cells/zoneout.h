// Zoneout (Krueger et al., arXiv:1606.01305): the state after a step is w * new + (1 - w) * old; w is the mask, 1 for the
// new value, in training and 1 - p in evaluation.
#pragma once
#include "cells.h"

namespace fastrnn {

template <class A, class V>
FASTRNN_CELL V zoneout(V w, V fresh, V old) {
  return A::fma(w, fresh, (A::one() - w) * old);
}

// Splits the gradient of the state: what goes to the old value is returned, d becomes that of the new one.
template <class A, class V>
FASTRNN_CELL V zoneout_backward(V w, V& d) {
  const V old = d * (A::one() - w);
  d = d * w;
  return old;
}

}  // namespace fastrnn
