// Recurrent dropout and zoneout inside the kernels. Masks are drawn chunk by chunk, into a few bits a unit that stay in
// cache and that all threads of a group read, and again in the backward; nothing is stored between calls.
//
// A cell's `finish` takes its factors from a MaskRows, or a Quiet, with which it compiles to the plain cell.
// Where expectations take the place of masks every bit is set, and the value of a set bit is 1 - p.
#pragma once
#include "pack.h"
#include "random.h"
#include "sequence.h"

namespace fastrnn {
namespace FASTRNN_ISA {

struct Quiet {
  static constexpr bool on = false;
};

// Bits that a row of a step needs. For "state" the forward writes, and the backward reads, the operand of the next step:
// drop is that step's mask, drop_now this one's, which reset_before needs.
enum MaskSlot { kDrop, kZoneoutH, kZoneoutC, kDropNow, kMaskSlots };

// What to draw for a layer, and how a row's bits lie: those of kDrop first.
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
    const bool used[] = {noise.mode != Drop::none, zones_h(), zones_c()};
    for (int s = 0; s < 3; s++) {
      threshold[s] = drop_threshold(probability[s]);
      value[s] = noise.training ? T(1) : T(1 - probability[s]);
      if (used[s]) add(s, s == kZoneoutH || (s == kDrop && state()) ? O : H);
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
  // Whether a batch row has a mask of its own beside those of its steps: that of its whole sequence, or of its first step's operand.
  bool keeps_first() const { return draws() && noise.mode != Drop::none && (noise.per_sequence || state()); }
  int64_t first_words() const { return ceil_div(state() ? O : H, kUnitsPerDraw); }

  void draw(uint64_t* row, int slot, int d, int64_t t, int64_t n) const {
    const int kind = slot == kDropNow ? kDrop : slot;
    const uint32_t stream = random_stream(noise.layer, d, static_cast<Mask>(kind));
    const bool wide = slot == kZoneoutC || (slot != kZoneoutH && !state());
    keep_bits({*noise.seed, stream, t, n}, threshold[kind], 0, ceil_div(wide ? H : O, kUnitsPerDraw),
              row + offset[slot]);
  }
  // Bits of row n at step t; `next` is the step whose mask "state" needs now, `first` the row's mask of its own.
  void draw_step(uint64_t* row, int d, int64_t t, int64_t next, int64_t n, const uint64_t* first) const {
    if (noise.mode != Drop::none && noise.per_sequence) {
      std::memcpy(row + offset[kDrop], first, first_words() * sizeof(uint64_t));
    } else if (noise.mode != Drop::none) {
      draw(row, kDrop, d, state() ? next : t, n);
      if (state() && two_stage) draw(row, kDropNow, d, t, n);
    }
    if (zones_h()) draw(row, kZoneoutH, d, t, n);
    if (zones_c()) draw(row, kZoneoutC, d, t, n);
  }

 private:
  void add(int slot, int64_t width) {
    offset[slot] = words;
    words += ceil_div(width, kUnitsPerDraw);
  }
};

// Where the bits of a direction lie: of a chunk's rows, and of each batch row's own mask.
struct MaskRoom {
  uint64_t *chunk = nullptr, *first = nullptr;

  MaskRoom() = default;
  template <class T>
  MaskRoom(Arena& a, const MaskPlan<T>& p, int64_t rows, int64_t batch) {
    if (p.draws()) chunk = a.take<uint64_t>(rows * p.words);
    if (p.keeps_first()) first = a.take<uint64_t>(batch * p.first_words());
  }
};

// What a thread sees of them.
template <class E>
struct MaskBits {
  using T = typename E::T;
  using V = typename E::V;
  const MaskPlan<T>* plan;
  uint64_t* own;          // all set where nothing is drawn, else room for a mask
  const uint64_t** rows;  // one per row of the step
  MaskRoom room;

  MaskBits(Arena& a, const MaskPlan<T>& p, int64_t batch)
      : plan(&p), own(a.take<uint64_t>(p.words)), rows(a.take<const uint64_t*>(p.on ? batch : 0)) {}

  // Before any other use; a chunk's rows lie from the room's row `at` on. Own masks of batch rows [n0, n1) are drawn, for
  // others to read after a barrier.
  template <class Time>
  void begin(const MaskRoom& common, int64_t at, int d, int64_t n0, int64_t n1, Time&& first_time) {
    room = common;
    if (room.chunk) room.chunk += at * plan->words;
    if (!plan->draws()) std::fill(own, own + plan->words, ~uint64_t(0));
    if (!plan->keeps_first()) return;
    for (int64_t n = n0; n < n1; n++)
      plan->draw(room.first + n * plan->first_words(), kDrop, d, plan->noise.per_sequence ? 0 : first_time(n),
                 n);
  }
  // Bits of rows [m0, m1) of a chunk whose step i is at time(i).
  template <class Time>
  void draw(const RowList& list, int64_t steps, int64_t m0, int64_t m1, int d, Time&& time) const {
    if (!plan->draws()) return;
    for (int64_t i = 0; i < steps; i++)
      for (int64_t m = imax(m0, list.start[i]); m < imin(m1, list.start[i + 1]); m++)
        plan->draw_step(room.chunk + m * plan->words, d, time(i), time(i + 1), list.n[m], first(list.n[m]));
  }
  // Row i of a step is row m of the chunk.
  void step(int64_t i, int64_t m) { rows[i] = plan->draws() ? room.chunk + m * plan->words : own; }
  const uint64_t* first(int64_t n) const {
    return room.first ? room.first + n * plan->first_words() : nullptr;
  }
  // The recurrent-dropout mask of row n at step t.
  const uint64_t* drop(int d, int64_t t, int64_t n) const {
    if (plan->noise.per_sequence) return first(n);
    plan->draw(own, kDrop, d, t, n);
    return own;
  }
  // dst = the O values of a state as a matmul takes them under "state".
  template <class Dst, class Src>
  void mask_state(Dst* dst, const Src* src, const uint64_t* bits) const {
    for (int64_t u = 0; u < plan->O; u += V::W) {
      const int w = static_cast<int>(imin(V::W, plan->O - u));
      const V m = where_set(bits[u >> 6] >> (u & 63), V::set1(plan->value[kDrop]));
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
