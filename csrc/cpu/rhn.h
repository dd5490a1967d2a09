// The C++ interface of the Recurrent Highway Network: one layer (one or two directions) over a whole
// sequence, `depth` micro-steps of the state in each time step. Conventions as in layer.h.
//
// G = 2 gates (h, t) with a coupled carry, else 3 (h, t, c). Masks are variational: (D, groups, N, I or H),
// groups 1 (all gates share one) or G, multiplied into the operand of the matmul; the carry sees the plain state.
#pragma once
#include "layer.h"

namespace fastrnn {

struct RhnProblem : Problem {
  int depth = 1, gates = 2;
  int x_groups = 0, s_groups = 0;  // 0: no mask
};

struct RhnWeights {  // w_ih (G H, I), w_hh (depth, G H, H), bias (depth, G H) or null; contiguous
  const void *w_ih = nullptr, *w_hh = nullptr, *bias = nullptr;
};

struct RhnForwardArgs : RhnProblem {
  Grid x, y;
  const void *x_mask = nullptr, *s_mask = nullptr;
  const void* h0 = nullptr;
  void* h_n = nullptr;
  RhnWeights weights[2];
  const void* packed = nullptr;  // from pack(), or null: packed inside the call; none with a mask per gate
  void* tape = nullptr;          // activated gates, D depth rows G H of them, or null
  void* workspace = nullptr;
};

struct RhnBackwardArgs : RhnProblem {
  Grid x, y, dx, dy;  // dx.data, dy.data may be null
  const void *x_mask = nullptr, *s_mask = nullptr;
  const void *h0 = nullptr, *dh_n = nullptr;
  void* dh0 = nullptr;  // null: not wanted
  RhnWeights weights[2];
  const void* tape = nullptr;  // null: gates are recomputed chunk by chunk from x and y
  struct {
    void *w_ih = nullptr, *w_hh = nullptr, *bias = nullptr;
  } grads[2];
  bool want_weights = false;
  void* workspace = nullptr;
};

// f32 and f64 only.
struct RhnKernels {
  Partition (*plan)(const RhnProblem&, int* threads);
  size_t (*packed_bytes)(const RhnProblem&);
  void (*pack)(const RhnProblem&, const RhnWeights* weights, void* packed);
  size_t (*forward_workspace)(const RhnForwardArgs&);
  void (*forward)(const RhnForwardArgs&);
  size_t (*backward_workspace)(const RhnBackwardArgs&);
  void (*backward)(const RhnBackwardArgs&);
};

}  // namespace fastrnn
