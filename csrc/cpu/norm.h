// Layer norm inside a step: the entry points of kernels_norm.cc, and what forward and backward share.
//
// A row's terms lie in the order of the packed weights: block after block, gates side by side in each. The
// elements of a row are dense there, so its statistics are sums over one run of memory. Everything about a row is
// computed by one thread, in one order: results depend neither on the threads nor on the other rows.
#pragma once
#include "../cells/layernorm.h"
#include "sequence.h"

namespace fastrnn {
namespace FASTRNN_ISA {

size_t norm_forward_workspace(const ForwardArgs&);
void norm_forward(const ForwardArgs&);
size_t norm_backward_workspace(const BackwardArgs&);
void norm_backward(const BackwardArgs&);

// Whether a cell's drivers see whole rows of a step at a time instead of tiles.
template <class C>
constexpr bool kWholeRows = false;

// Mean of n elements, and 1 / sqrt(biased variance + eps), in two passes.
template <class V>
struct Moments {
  using T = typename V::T;
  static constexpr int kChains = 4;
  V mean, factor;

  Moments(const T* p, int64_t n) {
    mean = V::set1(sum(p, n, [](V v) { return v; }) / T(n));
    const V m = mean;
    const T squares = sum(p, n, [m](V v) { return (v - m) * (v - m); });
    factor = V::set1(T(1 / __builtin_sqrt(double(squares) / double(n) + kLayerNormEps)));
  }
  V hat(V v) const { return (v - mean) * factor; }

 private:
  template <class F>
  static T sum(const T* p, int64_t n, F&& f) {
    constexpr int W = V::W;
    V chain[kChains];
    FASTRNN_UNROLL for (int i = 0; i < kChains; i++) chain[i] = V::zero();
    int64_t at = 0;
    for (; at + kChains * W <= n; at += kChains * W)
      FASTRNN_UNROLL for (int i = 0; i < kChains; i++) chain[i] = chain[i] + f(V::load(p + at + i * W));
    for (; at + W <= n; at += W) chain[0] = chain[0] + f(V::load(p + at));
    T total = lanes_sum((chain[0] + chain[1]) + (chain[2] + chain[3]));
    if (at < n) {
      T rest[W];
      V::store(rest, f(load_n(p + at, static_cast<int>(n - at))));
      for (int i = 0; i < n - at; i++) total += rest[i];
    }
    return total;
  }
};

// Calls f(blocks side by side, first block) over a row's blocks, each as wide as one vector of units.
template <class E, class F>
FASTRNN_INLINE void each_block(const Panels<E>& p, F&& f) {
  constexpr int kPair = kRegisters == 32 ? 2 : 1;
  int64_t b = 0;
  for (; b + kPair <= p.blocks; b += kPair) f(std::integral_constant<int, kPair>{}, b);
  for (; b < p.blocks; b++) f(std::integral_constant<int, 1>{}, b);
}

// One direction's parameters beside the matrices, in torch's order.
template <class E>
struct NormParams {
  using T = typename E::T;
  const T *ih, *hh, *c, *beta;  // gains of the two terms; gain and bias of the cell
  const T* bias;                // of what C::kBiases pre-activations, H each

  // The biases of one direction in the form above; GRU keeps n's two apart.
  template <class C>
  static void fill_bias(const Weights& w, int64_t H, T* out) {
    const T *bi = static_cast<const T*>(w.b_ih), *bh = static_cast<const T*>(w.b_hh);
    for (int s = 0; s < C::kBiases; s++)
      for (int64_t u = 0; u < H; u++) {
        T v = T(0);
        if (bi && C::x_gate(s) >= 0) v += bi[C::x_gate(s) * H + u];
        if (bh && C::h_gate(s) >= 0) v += bh[C::h_gate(s) * H + u];
        out[s * H + u] = v;
      }
  }
  NormParams(const Weights& w, const T* b)
      : ih(static_cast<const T*>(w.ln_ih)),
        hh(static_cast<const T*>(w.ln_hh)),
        c(static_cast<const T*>(w.ln_c)),
        beta(static_cast<const T*>(w.ln_bias_c)),
        bias(b) {}
  NormParams() = default;
};

// How pre-activations relate to gates: LSTM's i, f, g, o and GRU's r, z, n, un, the last being the recurrent part of n.
struct LstmBiases {
  static constexpr int kGates = 4, kBiases = 4;
  static constexpr int x_gate(int s) { return s; }
  static constexpr int h_gate(int s) { return s; }
  static constexpr int h_bias(int gate) { return gate; }
};
struct GruBiases {
  static constexpr int kGates = 3, kBiases = 4;
  static constexpr int x_gate(int s) { return s < 3 ? s : -1; }
  static constexpr int h_gate(int s) { return s < 2 ? s : s == 3 ? 2 : -1; }
  static constexpr int h_bias(int gate) { return gate < 2 ? gate : 3; }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
