// Layer-normalised LSTM and GRU (Ba et al., arXiv 1607.06450, in the form of haste's layers), torch gate orders:
//   LSTM  z = gamma_h a^ + gamma_x b^ + bias;  c_t = f * c_{t-1} + i * g;  h_t = o * tanh(gamma_c c^ + beta_c)
//   GRU   r, z likewise;  n = tanh(gamma_x b^ + b_in + r * (gamma_h a^ + b_hn))
// with u^ = (u - mean) / sqrt(var + eps) over the features of one row: all gates of a = h_{t-1} W_h^T together,
// all of b = x_t W_x^T, and c_t. The pointwise part is that of the batch-normalised LSTM, and so is the gradient
// of u^, with means over a row's features where that one has them over a column's rows.
#pragma once
#include "bnlstm.h"

namespace fastrnn {

constexpr double kLayerNormEps = 1e-5;

// A normalised term of its own, as GRU's candidate needs them.
template <class A, class V>
FASTRNN_CELL V layer_norm_term(V hat, V gamma, V bias) {
  return A::fma(gamma, hat, bias);
}

}  // namespace fastrnn
