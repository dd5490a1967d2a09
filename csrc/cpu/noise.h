// Recurrent dropout and zoneout inside the kernels. Masks are drawn when a step needs them, into a few bits a unit that stay
// in L1, and again in the backward; nothing is stored between calls.
//
// A cell's `finish` takes its factors from a MaskRows, or a Quiet, with which it compiles to the plain cell.
// Where expectations take the place of masks every bit is set, and the value of a set bit is 1 - p.
#pragma once
#include "pack.h"
#include "random.h"

namespace fastrnn {
namespace FASTRNN_ISA {

struct Quiet {
  static constexpr bool on = false;
};

// Bits that a row of a step needs. For "state" the forward writes, and the backward reads, the operand of the next step:
// drop is that step's mask, drop_now this one's, which reset_before needs.
enum MaskSlot { kDrop, kZoneoutH, kZoneoutC, kDropNow, kMaskSlots };

// Which units of a row a thread needs bits of: [first, last) of H-wide and of O-wide values.
struct UnitRange {
  int64_t h_first = 0, h_last = 0, o_first = 0, o_last = 0;
};

// What to draw for a layer, and how a row's bits lie.
template <class T>
struct MaskPlan {
  Noise noise;
  bool on, two_stage;
  int64_t H, O, words = 0;  // words: of a row, 64 bits each
  int64_t offset[kMaskSlots] = {};
  T value[kMaskSlots] = {};
  uint64_t threshold[3] = {};

  MaskPlan(const Problem& p, bool two_stages)
      : noise(p.noise), on(p.noise.any()), two_stage(two_stages), H(p.H), O(p.O) {
    if (!on) return;
    const double probability[] = {noise.drop, noise.zoneout_h, noise.zoneout_c};
    for (int s = 0; s < 3; s++) {
      threshold[s] = drop_threshold(probability[s]);
      value[s] = noise.training ? T(1) : T(1 - probability[s]);
      add(s, s == kZoneoutH || (s == kDrop && state()) ? O : H);
    }
    if (state()) value[kDrop] = noise.drop < 1 ? T(1 / (1 - noise.drop)) : T(0);
    value[kDropNow] = value[kDrop];
    offset[kDropNow] = offset[kDrop];
    if (state() && two_stage && !noise.per_sequence) add(kDropNow, O);
  }
  bool state() const { return noise.mode == Drop::state; }
  bool draws() const { return on && noise.training; }
  bool zones_h() const { return noise.zoneout_h > 0; }
  bool zones_c() const { return noise.zoneout_c > 0; }
  size_t bits(int64_t rows) const { return !on ? 0 : words * (draws() ? rows : 1); }

  void draw(uint64_t* row, int slot, int d, int64_t t, int64_t n, int64_t first, int64_t last) const {
    const int kind = slot == kDropNow ? kDrop : slot;
    const uint32_t stream = random_stream(noise.layer, d, static_cast<Mask>(kind));
    const int64_t from = first / kUnitsPerDraw;
    keep_bits({*noise.seed, stream, t, n}, threshold[kind], from, ceil_div(last, kUnitsPerDraw),
              row + offset[slot] + from);
  }
  // The recurrent-dropout mask of step t.
  void draw_drop(uint64_t* row, int slot, int d, int64_t t, int64_t n, const UnitRange& u) const {
    draw(row, slot, d, noise.per_sequence ? 0 : t, n, state() ? u.o_first : u.h_first,
         state() ? u.o_last : u.h_last);
  }
  // Bits of row n at step t; `next` is the step whose mask "state" needs now.
  void draw_step(uint64_t* row, int d, int64_t t, int64_t next, int64_t n, const UnitRange& u) const {
    if (noise.mode != Drop::none && !noise.per_sequence) {
      draw_drop(row, kDrop, d, state() ? next : t, n, u);
      if (state() && two_stage) draw_drop(row, kDropNow, d, t, n, u);
    }
    if (zones_h()) draw(row, kZoneoutH, d, t, n, u.o_first, u.o_last);
    if (zones_c()) draw(row, kZoneoutC, d, t, n, u.h_first, u.h_last);
  }

 private:
  void add(int slot, int64_t width) {
    offset[slot] = words;
    words += ceil_div(width, kUnitsPerDraw);
  }
};

// A thread's bits: of each batch row (one for all where nothing is drawn), and of the rows of the step.
template <class E>
struct MaskBits {
  using T = typename E::T;
  using V = typename E::V;
  const MaskPlan<T>* plan;
  uint64_t* bits;
  const uint64_t** rows;  // one per row of the step

  template <class Arena>
  MaskBits(Arena& a, const MaskPlan<T>& p, int64_t batch)
      : plan(&p),
        bits(a.template take<uint64_t>(p.bits(batch))),
        rows(a.template take<const uint64_t*>(p.on ? batch : 0)) {}

  uint64_t* row(int64_t n) const { return bits + (plan->draws() ? n * plan->words : 0); }
  // What does not change from step to step; before any other use.
  void begin(int d, int64_t n0, int64_t n1, const UnitRange& u) {
    if (!plan->on) return;
    if (!plan->draws()) {
      for (int64_t i = 0; i < plan->words; i++) bits[i] = ~uint64_t(0);
    } else if (plan->noise.mode != Drop::none && plan->noise.per_sequence) {
      const UnitRange all{0, plan->H, 0, plan->O};
      for (int64_t n = n0; n < n1; n++) plan->draw_drop(row(n), kDrop, d, 0, n, plan->state() ? all : u);
    }
  }
  void step(int64_t i, int d, int64_t t, int64_t next, int64_t n, const UnitRange& u) {
    uint64_t* r = row(n);
    if (plan->draws()) plan->draw_step(r, d, t, next, n, u);
    rows[i] = r;
  }
  // dst = the O values of row n's state as step t's matmul takes them under "state".
  template <class Dst, class Src>
  void mask_state(Dst* dst, const Src* src, int d, int64_t t, int64_t n) const {
    uint64_t* r = row(n);
    if (!plan->noise.per_sequence) plan->draw_drop(r, kDrop, d, t, n, {0, plan->H, 0, plan->O});
    const MaskPlan<T>& p = *plan;
    for (int64_t u = 0; u < p.O; u += V::W) {
      const int w = static_cast<int>(imin(V::W, p.O - u));
      const V m = where_set(r[p.offset[kDrop] + (u >> 6)] >> (u & 63), V::set1(p.value[kDrop]));
      store_as<V>(dst + u, load_as<V>(src + u, w) * m, w);
    }
  }
};

// The factors of the rows of a tile: r counts from its first row, `at` is a unit.
template <class E>
struct MaskRows {
  using V = typename E::V;
  static constexpr bool on = true;
  const MaskPlan<typename E::T>& plan;
  const uint64_t* const* rows;

  V factor(int slot, int r, int64_t at) const {
    return where_set(rows[r][plan.offset[slot] + (at >> 6)] >> (at & 63), V::set1(plan.value[slot]));
  }
  V drop_if(Drop mode, int slot, int r, int64_t at) const {
    return plan.noise.mode == mode ? factor(slot, r, at) : V::set1(1);
  }
  V update(int r, int64_t at) const { return drop_if(Drop::update, kDrop, r, at); }
  V cell(int r, int64_t at) const { return drop_if(Drop::cell, kDrop, r, at); }
  V state(int r, int64_t at) const { return drop_if(Drop::state, kDrop, r, at); }
  V state_now(int r, int64_t at) const { return drop_if(Drop::state, kDropNow, r, at); }
  V zoneout_h(int r, int64_t at) const { return factor(kZoneoutH, r, at); }
  V zoneout_c(int r, int64_t at) const { return factor(kZoneoutC, r, at); }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
