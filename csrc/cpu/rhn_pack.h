// Packed weights of a Recurrent Highway Network, and how its work is divided.
#pragma once
#include "plan.h"
#include "rhn.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Blocks may be narrower than the registers allow where `count` threads would else get uneven shares of them.
template <class E>
static Panels<E> even_panels(int gates, int64_t width, int count) {
  Panels<E> best;
  double least = 0;
  for (int vectors = gates == 1 ? kNarrow : kMaxVectors; vectors >= imax(2, gates); vectors--) {
    const Panels<E> p(gates, width, vectors);
    int64_t largest = 0;
    for (int id = 0; id < count; id++) {
      int64_t share = 0;
      for (int64_t b = p.blocks * id / count; b < p.blocks * (id + 1) / count; b++) share += p.columns(b);
      largest = imax(largest, share);
    }
    const double load = double(largest) * count / (gates * width);
    // Narrow tiles load more per multiplication: a few percent of imbalance are the lesser evil.
    if (best.blocks && load > least - 0.03) continue;
    best = p;
    least = load;
  }
  return best;
}

// Where one direction's packed weights lie. With a mask per gate each gate has an operand of its own and is a
// part packed apart; else one part holds all gates. Depends on nothing that may change between calls.
template <class E>
struct RhnLayout {
  int parts, depth;
  int64_t I, H;
  Panels<E> panels;
  size_t bytes = 0;

  explicit RhnLayout(const RhnProblem& p)
      : parts(p.x_groups > 1 || p.s_groups > 1 ? p.gates : 1),
        depth(p.depth),
        I(p.I),
        H(p.H),
        panels(even_panels<E>(p.gates / parts, p.H, 2)),
        x_(size(I)),
        h_(size(H)),
        bias_(align64(panels.total() * sizeof(typename E::T))) {
    bytes = parts * (x_ + depth * (h_ + bias_));
  }
  size_t x(int part) const { return part * x_; }
  size_t h(int l, int part) const { return parts * x_ + (l * parts + part) * h_; }
  size_t bias(int l, int part) const { return parts * (x_ + depth * h_) + (l * parts + part) * bias_; }

 private:
  size_t x_, h_, bias_;
  size_t size(int64_t K) const { return align64(panels.elements(K) * sizeof(typename E::A)); }
};

// Thread tid's share of packing one direction.
template <class E>
static void pack_rhn(const RhnLayout<E>& layout, const RhnWeights& w, char* dst, int tid, int nt) {
  using T = typename E::T;
  const Panels<E>& p = layout.panels;
  const int64_t first = p.blocks * tid / nt, last = p.blocks * (tid + 1) / nt;
  const int64_t rows = p.gates * p.width;  // of one part
  const auto* w_ih = static_cast<const T*>(w.w_ih);
  const auto* w_hh = static_cast<const T*>(w.w_hh);
  for (int part = 0; part < layout.parts; part++)
    pack_gates<E, T>(p, w_ih + part * rows * layout.I, layout.I, reinterpret_cast<T*>(dst + layout.x(part)),
                     first, last);
  for (int l = 0; l < layout.depth; l++)
    for (int part = 0; part < layout.parts; part++) {
      const int64_t row = (l * layout.parts + part) * rows;
      pack_gates<E, T>(p, w_hh + row * layout.H, layout.H, reinterpret_cast<T*>(dst + layout.h(l, part)),
                       first, last);
      T* out = reinterpret_cast<T*>(dst + layout.bias(l, part));
      const T* bias = w.bias ? static_cast<const T*>(w.bias) + row : nullptr;
      for (int64_t b = first; b < last; b++) {
        const int64_t at = p.offset(b);
        const int units = p.units(b);
        for (int64_t c = 0; c < p.columns(b); c++) out[at + c] = T(0);
        for (int g = 0; bias && g < p.gates; g++)
          std::memcpy(out + at + g * units, bias + g * p.width + p.first(b), units * sizeof(T));
      }
    }
}

inline Plan rhn_plan(const RhnProblem& p) {
  const double recurrent = double(p.depth) * p.gates * p.H * p.H;
  return choose_plan(p, 2.0 * p.N * (recurrent + double(p.gates) * p.H * p.I),
                     recurrent * (p.type == Type::f64 ? 8 : 4), p.depth);
}

constexpr int64_t kRhnGradRows = 512;
constexpr int64_t kStreamedWeights = 24 << 20;  // bytes of which caches keep little until they are used

// Steps of a chunk of the backward. Chunks are of equal length: a short last one would read all weight gradients for
// little. All steps are one where that takes no more memory: the packed weights then lie where their gradients will be.
inline int64_t rhn_chunk_steps(const RhnProblem& p, bool want_weights) {
  const int64_t most = imin(p.T, imax(1, kRhnGradRows / p.N));
  const int64_t steps = ceil_div(p.T, ceil_div(p.T, most));
  const int64_t row = p.gates + 1 + p.s_groups;  // gate gradients, state, masked states
  const int64_t more = (p.T - steps) * p.N * row;
  return want_weights && more <= p.gates * p.H ? p.T : steps;
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
