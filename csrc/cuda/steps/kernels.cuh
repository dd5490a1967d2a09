// The launches of a call beside its products: the parameter block, initial states, the pointwise part of each step, gradients of
// the initial states.
#pragma once
#include "rows.cuh"

namespace fastrnn::cuda {

// The first node of a graph: its argument is what a replay changes, everything else reads the block.
template <class Params>
FASTRNN_KERNEL(256)
steps_block_kernel(const FASTRNN_GRID_CONSTANT Params value, Params* block) {
  static_assert(sizeof(Params) % 4 == 0, "words");
  const uint32_t* from = reinterpret_cast<const uint32_t*>(&value);
  uint32_t* to = reinterpret_cast<uint32_t*>(block);
  for (int i = prim::thread_index(); i < static_cast<int>(sizeof(Params) / 4); i += 256) to[i] = from[i];
}

// Calls f(direction, n, j) for each of `width` columns of all rows. In 32 bits, since there are divisions: plan.h refuses more.
template <class F>
FASTRNN_DEVICE void each_element(const StepsParams& p, int width, const F& f) {
  const unsigned of_direction = static_cast<unsigned>(p.N) * width, count = p.directions * of_direction;
  for (unsigned i = prim::block_index() * 256u + prim::thread_index(); i < count; i += prim::grid_threads()) {
    const unsigned rest = i % of_direction;
    f(static_cast<int>(i / of_direction), static_cast<int>(rest / width), static_cast<int>(rest % width));
  }
}

// Both operands of a row hold its first state, whichever step it begins at.
template <class D>
FASTRNN_KERNEL(256)
steps_begin_forward_kernel(const StepsForwardParams* __restrict__ block, int) {
  using Elem = typename D::Elem;
  const StepsForwardParams& p = *block;
  each_element(p, p.product[0].inner, [&](int direction, int n, int j) {
    const StepsForwardDirection& d = p.dir[direction];
    const StepsWork& w = p.work[direction];
    float h = 0.f;
    if (j < p.O && d.h0) h = D::load(static_cast<const Elem*>(d.h0) + static_cast<int64_t>(n) * p.O + j);
    if (j < p.O) w.h[static_cast<int64_t>(n) * p.O + j] = h;
    const int first = d.reverse ? row_length(p, n) - 1 : 0;
    const Draw draw(p.noise, d.reverse);
    if (draw.is(DropKind::state)) h *= draw.drop(first, n, j);
    if (reset_at(p, first, n)) h = 0.f;
    for (int part = 0; part < p.parts; part++) {
      const int64_t row = static_cast<int64_t>(part) * p.N + n;
      float v = h;
      if (d.mask && j < p.O) v *= D::load(static_cast<const Elem*>(d.mask) + row * p.O + j);
      for (void* operand : w.operand) D::store(static_cast<Elem*>(operand) + row * p.product[0].inner + j, v);
    }
  });
  each_element(p, p.product[1].inner, [&](int direction, int n, int j) {
    D::store(static_cast<Elem*>(p.work[direction].middle) + static_cast<int64_t>(n) * p.product[1].inner + j,
             0.f);
  });
  if (!p.work[0].c) return;
  each_element(p, p.H, [&](int direction, int n, int j) {
    const int64_t at = static_cast<int64_t>(n) * p.H + j;
    const Elem* c0 = static_cast<const Elem*>(p.dir[direction].c0);
    p.work[direction].c[at] = c0 ? D::load(c0 + at) : 0.f;
  });
}

// Nothing is sent to the first step that is walked but what the caller has.
template <class D>
FASTRNN_KERNEL(256)
steps_begin_backward_kernel(const StepsBackwardParams* __restrict__ block, int) {
  using Elem = typename D::Elem;
  const StepsBackwardParams& p = *block;
  for (int which = 0; which < 2; which++) {
    const int width = p.product[which].inner * p.parts;
    each_element(p, width, [&](int direction, int n, int j) {
      const StepsWork& w = p.work[direction];
      const int64_t at = static_cast<int64_t>(n) * width + j;
      if (which) return D::store(static_cast<Elem*>(w.middle) + at, 0.f);
      for (void* operand : w.operand) D::store(static_cast<Elem*>(operand) + at, 0.f);
    });
  }
  const auto state = [](const void* from, float* to, int64_t at) {
    to[at] = from ? D::load(static_cast<const Elem*>(from) + at) : 0.f;
  };
  each_element(p, p.O, [&](int direction, int n, int j) {
    state(p.dir[direction].dh_n, p.work[direction].h, static_cast<int64_t>(n) * p.O + j);
  });
  if (!p.work[0].c) return;
  each_element(p, p.H, [&](int direction, int n, int j) {
    state(p.dir[direction].dc_n, p.work[direction].c, static_cast<int64_t>(n) * p.H + j);
  });
}

template <class D>
FASTRNN_KERNEL(256)
steps_end_backward_kernel(const StepsBackwardParams* __restrict__ block, int) {
  using Elem = typename D::Elem;
  const StepsBackwardParams& p = *block;
  const auto state = [](void* to, const float* from, int64_t at) {
    if (to) D::store(static_cast<Elem*>(to) + at, from[at]);
  };
  each_element(p, p.O, [&](int direction, int n, int j) {
    state(p.dir[direction].dh0, p.work[direction].h, static_cast<int64_t>(n) * p.O + j);
  });
  if (!p.work[0].c) return;
  each_element(p, p.H, [&](int direction, int n, int j) {
    state(p.dir[direction].dc0, p.work[direction].c, static_cast<int64_t>(n) * p.H + j);
  });
}

template <class Cell, class D, int Phase, bool kLinear = false>
FASTRNN_KERNEL(256)
steps_forward_kernel(const StepsForwardParams* __restrict__ block, int step) {
  const StepsForwardParams& p = *block;
  const int s = p.first + step;
  constexpr int kCount = Cell::kShape.sums[Phase].count;
  each_element(p, p.H, [&](int direction, int n, int j) {
    const float* sums = p.work[direction].sums + static_cast<int64_t>(n) * kCount * p.H + j;
    ForwardUnits<D, kLinear>(p, direction, s).template cell<Cell, Phase>(n, j, [&](int g) {
      return sums[g * p.H];
    });
  });
}
template <class D, bool kLinear = false>
FASTRNN_KERNEL(256)
steps_forward_projection_kernel(const StepsForwardParams* __restrict__ block, int step) {
  const StepsForwardParams& p = *block;
  const int s = p.first + step;
  each_element(p, p.O, [&](int direction, int n, int j) {
    ForwardUnits<D, kLinear>(p, direction, s)
        .projection(n, j, p.work[direction].sums[static_cast<int64_t>(n) * p.O + j]);
  });
}

// Before the projection's product backward; with s = T, what reaches the initial state.
template <class D, bool kLinear = false>
FASTRNN_KERNEL(256)
steps_backward_projection_kernel(const StepsBackwardParams* __restrict__ block, int step) {
  const StepsBackwardParams& p = *block;
  const int s = p.first + step;
  each_element(p, p.O, [&](int direction, int n, int j) {
    BackwardUnits<D, kLinear>(p, direction, s)
        .projection(n, j, p.work[direction].sums[static_cast<int64_t>(n) * p.O + j]);
  });
}
template <class Cell, class D, int Phase, bool kLinear = false>
FASTRNN_KERNEL(256)
steps_backward_kernel(const StepsBackwardParams* __restrict__ block, int step) {
  const StepsBackwardParams& p = *block;
  const int s = p.first + step;
  each_element(p, p.H, [&](int direction, int n, int j) {
    BackwardUnits<D, kLinear>(p, direction, s)
        .template cell<Cell, Phase>(n, j, p.work[direction].sums[static_cast<int64_t>(n) * p.H + j]);
  });
}

// A CTA for each row of each direction.
template <class Cell, class D, int Threads, bool kLinear = false>
FASTRNN_KERNEL(Threads)
steps_forward_row_kernel(const StepsForwardParams* __restrict__ block, int step) {
  const StepsForwardParams& p = *block;
  const int s = p.first + step;
  const int row = prim::block_index();
  ForwardRow<Cell, D, Threads, kLinear>(p, row / p.N, s, row % p.N).run();
}
template <class Cell, class D, int Threads, bool kLinear = false>
FASTRNN_KERNEL(Threads)
steps_backward_row_kernel(const StepsBackwardParams* __restrict__ block, int step) {
  const StepsBackwardParams& p = *block;
  const int s = p.first + step;
  const int row = prim::block_index();
  BackwardRow<Cell, D, Threads, kLinear>(p, row / p.N, s, row % p.N).run();
}

}  // namespace fastrnn::cuda
