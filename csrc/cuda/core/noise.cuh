// Recurrent dropout and zoneout inside the kernels: factors of each element of the epilogue, drawn from Philox a step ahead,
// while the exchange is under way, and again in backward. Nothing is stored but the seed.
//
// They are kernels of their own (a template flag): with the flag off all of this is empty, so plain kernels are the same
// machine code as without it.
#pragma once
#include <type_traits>

#include "../../cells/zoneout.h"
#include "noise.h"
#include "source.cuh"

namespace fastrnn::cuda {

// The factors that a cell meets in one step; state: of h_{t-1} as the matmul takes it.
struct Whole {
  static constexpr bool kOn = false;
};
struct Factors {
  static constexpr bool kOn = true;
  float update, cell, state, zone_h, zone_c;
  bool zones_h, zones_c;
};

// What zoneout sends straight to the state before; dh becomes the gradient of the new value.
template <class A, class F>
FASTRNN_DEVICE float zoned_h(const F& f, float& dh) {
  if constexpr (F::kOn)
    if (f.zones_h) return zoneout_backward<A>(f.zone_h, dh);
  return 0.f;
}

// Draws for one direction of a launch.
class Draw {
 public:
  FASTRNN_DEVICE Draw(const Noise& p, bool reverse)
      : p_(p), stream_(random_stream(p.layer, reverse, Mask::recurrent)), seed_(0) {
    if (p.seed) seed_ = prim::load_constant(p.seed);
  }
  FASTRNN_DEVICE bool is(DropKind mode) const { return p_.mode == mode; }
  FASTRNN_DEVICE bool zones(Mask kind) const {
    return p_.value[index(kind)] != 1.f || p_.threshold[index(kind)];
  }
  FASTRNN_DEVICE bool every_step() const { return p_.mode != DropKind::none && !p_.per_sequence; }
  FASTRNN_DEVICE float factor(Mask kind, int t, int n, int j) const {
    const float value = p_.value[index(kind)];
    const uint64_t threshold = p_.threshold[index(kind)];
    if (!threshold) return value;
    const uint32_t word = random_word(seed_, stream_ | static_cast<uint32_t>(kind), t, n + p_.first_row, j);
    return word >= threshold ? value : 0.f;
  }
  FASTRNN_DEVICE float drop(int t, int n, int j) const {
    return factor(Mask::recurrent, p_.per_sequence ? 0 : t, n, j);
  }

 private:
  FASTRNN_DEVICE static int index(Mask kind) { return static_cast<int>(kind); }
  const Noise& p_;
  const uint32_t stream_;
  uint64_t seed_;
};

// Masks of a thread's elements. Under "state" two steps' are at hand: forward publishes h_t for the step after, backward
// gets the gradient of what the step after read.
template <int PerThread, bool Backward, bool On>
class Masks {
 public:
  template <class Params>
  FASTRNN_DEVICE Masks(const Params&, bool) {}
  FASTRNN_DEVICE void begin(int, const Element&, int, int) {}
  FASTRNN_DEVICE void advance(int, const Element&, int, int) {}
  FASTRNN_DEVICE Whole of(int) const { return {}; }
  FASTRNN_DEVICE bool masks_state() const { return false; }
  FASTRNN_DEVICE float later(int) const { return 1.f; }
};

template <int PerThread, bool Backward>
class Masks<PerThread, Backward, true> {
 public:
  template <class Params>
  FASTRNN_DEVICE Masks(const Params& p, bool reverse) : draw_(p.noise, reverse) {}
  // t: the first step that is walked, after: the one walked next.
  FASTRNN_DEVICE void begin(int i, const Element& x, int t, int after) {
    now_[i] = later_[i] = draw_.drop(t, x.n, x.j);
    if (!Backward && draw_.is(DropKind::state)) later_[i] = draw_.drop(after, x.n, x.j);
    zones(i, x, t);
  }
  FASTRNN_DEVICE void advance(int i, const Element& x, int t, int after) {
    if (draw_.every_step()) {
      const bool ahead = !Backward && draw_.is(DropKind::state);
      const float drawn = draw_.drop(ahead ? after : t, x.n, x.j);
      const float kept = Backward ? now_[i] : later_[i];
      now_[i] = ahead ? kept : drawn;
      later_[i] = ahead ? drawn : kept;
    }
    zones(i, x, t);
  }
  FASTRNN_DEVICE Factors of(int i) const {
    const float one = 1.f;
    return {draw_.is(DropKind::update) ? now_[i] : one,
            draw_.is(DropKind::cell) ? now_[i] : one,
            draw_.is(DropKind::state) ? now_[i] : one,
            zone_h_[i],
            zone_c_[i],
            draw_.zones(Mask::zoneout_h),
            draw_.zones(Mask::zoneout_c)};
  }
  FASTRNN_DEVICE bool masks_state() const { return draw_.is(DropKind::state); }
  // Of the state that leaves this step.
  FASTRNN_DEVICE float later(int i) const {
    if (!draw_.is(DropKind::state)) return 1.f;
    return mutated(Mutation::other_step_mask) ? now_[i] : later_[i];
  }

 private:
  FASTRNN_DEVICE void zones(int i, const Element& x, int t) {
    zone_h_[i] = draw_.factor(Mask::zoneout_h, t, x.n, x.j);
    zone_c_[i] = draw_.factor(Mask::zoneout_c, t, x.n, x.j);
  }
  const Draw draw_;
  float now_[PerThread], later_[PerThread], zone_h_[PerThread], zone_c_[PerThread];
};

template <bool On>
using ForwardParamsOf = std::conditional_t<On, RegularisedForwardParams, ForwardParams>;
template <bool On>
using BackwardParamsOf = std::conditional_t<On, RegularisedBackwardParams, BackwardParams>;

template <class D>
FASTRNN_KERNEL(256)
mask_state_kernel(const FASTRNN_GRID_CONSTANT MaskStateParams p) {
  using Elem = typename D::Elem;
  const Draw draw(p.noise, p.reverse);
  const bool all_steps = p.stride_n != 0;
  const int64_t count = static_cast<int64_t>(all_steps ? p.T : 1) * p.N * p.H;
  for (int64_t i = prim::block_index() * 256 + prim::thread_index(); i < count; i += prim::grid_threads()) {
    const int64_t row = i / p.H;
    const int j = static_cast<int>(i % p.H), n = static_cast<int>(row % p.N), s = static_cast<int>(row / p.N);
    const int length = p.lengths ? prim::load_constant(p.lengths + n) : p.T;
    const int t = all_steps ? s : p.reverse ? length - 1 : 0;
    const int64_t at = all_steps ? s * p.stride_t + n * p.stride_n + j : i;
    D::store(static_cast<Elem*>(p.out) + at,
             D::load(static_cast<const Elem*>(p.h) + at) * draw.drop(t, n, j));
  }
}

}  // namespace fastrnn::cuda
