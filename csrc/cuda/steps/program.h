// The launches of a call, and its workspace. Plain C++: the host's side of steps/, the same for a GPU and the emulator.
#pragma once
#include <cstddef>
#include <cstdint>

#include "columns.h"
#include "params.h"
#include "tile.h"

namespace fastrnn::cuda {

struct StepsProblem {
  CellKind cell = CellKind::lstm;
  Format format = Format::bf16;
  bool backward = false, normed = false;
  int N = 1, H = 1, O = 0;  // O: outputs of a projection; 0: none
  int directions = 1;
  int depth = 1;            // micro-steps of a highway layer
  bool gate_masks = false;  // and a mask of its state for each gate
  int parts() const { return gate_masks ? cell_shape(cell).gates : 1; }
  bool projected() const { return O > 0; }
  int outputs() const { return O ? O : H; }
  int products() const { return steps_products(cell, projected()); }
  // level: of a highway layer's micro-steps, in the order in which a step's launches use their slabs: the product before a
  // micro-step of backward is that of the micro-step walked before it.
  StepsMatrix matrix(int which, int level = 0, int part = 0) const {
    StepsMatrix m = steps_matrix(cell, backward, projected(), format, H, outputs(), which);
    if (gate_masks) m.values = 1, m.outputs = H;
    const int slab = backward ? (depth - level) % depth : level;
    m.first_row += (slab * cell_shape(cell).gates + part) * H;
    return m;
  }
};

// Kernels of one problem: addresses of functions.
struct StepsKernels {
  StepsTile tile;
  int row_threads = 256;
  const void* product = nullptr;  // (const StepsParams*, int step, int which)
  const void* begin = nullptr;    // this and all below: (const Params*, int step)
  const void* phase[2] = {nullptr, nullptr};
  const void* projection = nullptr;
  const void* row = nullptr;      // in the place of phase 0, with layer norm
  const void* columns = nullptr;  // and with batch norm, of this shape
  StepsColumns columns_shape;
  const void* end = nullptr;    // backward
  const void* block = nullptr;  // (Params, Params*)
  const void* pack = nullptr;   // (StepsPack)
};

struct StepsLaunch {
  const void* function = nullptr;
  int grid = 0, block = 0, shared_bytes = 0;
  int which = -1;  // of a product
};
constexpr int kMostStepLaunches = 4;
struct StepsProgram {
  StepsLaunch begin, step[kMostStepLaunches], end;
  int count = 0;  // of a step
  int after = 0;  // launches of step T: what backward sends to the initial state
  bool has_end = false;
};

namespace detail {
constexpr int kElementThreads = 256;
inline StepsLaunch elements(const void* f, const StepsProblem& q, int width) {
  StepsLaunch l;
  l.function = f;
  l.block = kElementThreads;
  const int64_t count = int64_t{q.directions} * q.N * width, blocks = (count + l.block - 1) / l.block;
  l.grid = static_cast<int>(blocks < 65536 ? blocks : 65536);  // each takes several beyond that
  return l;
}
inline StepsLaunch product(const StepsKernels& k, const StepsProblem& q, int which) {
  StepsLaunch l;
  l.function = k.product;
  l.block = k.tile.threads();
  l.grid = q.directions * q.parts() * ceil_div(q.N, k.tile.rows()) *
           ceil_div(q.matrix(which).outputs, k.tile.outputs());
  l.shared_bytes = k.tile.shared_bytes();
  l.which = which;
  return l;
}
}  // namespace detail

inline StepsProgram steps_program(const StepsKernels& k, const StepsProblem& q) {
  using namespace detail;
  StepsProgram p;
  const auto add = [&p](const StepsLaunch& l) { p.step[p.count++] = l; };
  StepsLaunch cell = elements(k.phase[0], q, q.H);
  if (q.normed) {
    cell.function = k.row;
    cell.grid = q.directions * q.N;
    cell.block = k.row_threads;
    cell.shared_bytes = 6 * k.row_threads / 32 * 4;  // RowSums
  }
  if (q.cell == CellKind::bnlstm) {
    cell.function = k.columns;
    cell.grid = q.directions * ceil_div(q.H, k.columns_shape.units);
    cell.block = k.columns_shape.threads;
    cell.shared_bytes = k.columns_shape.shared_bytes();
  }
  p.begin = elements(k.begin, q, q.H);
  add(product(k, q, 0));
  if (q.projected() && q.backward) {
    add(elements(k.projection, q, q.O));
    add(product(k, q, 1));
    add(cell);
  } else {
    add(cell);
    if (q.products() == 2) {
      add(product(k, q, 1));
      add(q.projected() ? elements(k.projection, q, q.O) : elements(k.phase[1], q, q.H));
    }
  }
  if (q.backward) {
    p.after = 2;
    p.has_end = true;
    p.end = elements(k.end, q, q.H);
  }
  return p;
}

// Calls launch(StepsLaunch, step) for some steps, in their order; false ends it.
template <class Launch>
bool steps_range(const StepsProgram& p, int first, int end, const Launch& launch) {
  for (int s = first; s < end; s++)
    for (int i = 0; i < p.count; i++)
      if (!launch(p.step[i], s)) return false;
  return true;
}
// What comes behind the last step.
template <class Launch>
bool steps_after(const StepsProgram& p, int T, const Launch& launch) {
  for (int i = 0; i < p.after; i++)
    if (!launch(p.step[i], T)) return false;
  return !p.has_end || launch(p.end, T);
}

// Calls pack(direction, product, matrix, packed) for all weights, in a workspace that is bound; false ends it.
template <class Pack>
bool steps_matrices(const StepsProblem& q, const StepsParams& p, const Pack& pack) {
  for (int d = 0; d < q.directions; d++)
    for (int i = 0; i < q.products(); i++)
      for (int level = 0; level < q.depth; level++)
        for (int part = 0; part < q.parts(); part++) {
          const int64_t at = (int64_t{level} * q.parts() + part) * p.part_vectors;
          if (!pack(d, i, q.matrix(i, level, part), const_cast<Vec4*>(p.work[d].weights[i]) + at))
            return false;
        }
  return true;
}

// The workspace: the block, then what StepsWork lists. With a null workspace only counted.
inline size_t steps_bind(const StepsProblem& q, const StepsTile& tile, StepsParams* p, void* workspace) {
  char* const base = static_cast<char*>(workspace);
  size_t used = kStepsBlockBytes;
  const auto take = [&](size_t bytes) -> void* {
    void* at = base ? base + used : nullptr;
    used += (bytes + 255) / 256 * 256;
    return at;
  };
  StepsParams none;
  StepsParams& out = p ? *p : none;
  const CellShape cell = cell_shape(q.cell);
  const bool whole_batch = q.cell == CellKind::bnlstm;
  const size_t N = q.N, H = q.H, O = q.outputs(), element = element_bytes(q.format);
  out.N = q.N;
  out.H = q.H;
  out.H_padded = round_up(q.H, vector_elements(q.format));
  out.O = q.outputs();
  out.directions = q.directions;
  out.projected = q.projected();
  out.normed = q.normed;
  out.depth = q.depth;
  out.parts = q.parts();
  out.part_vectors = steps_packed_vectors(tile, q.matrix(0), q.format);
  const size_t parts = q.parts(), slabs = parts * q.depth;
  size_t widest = 0;
  for (int i = 0; i < q.products(); i++) {
    const StepsMatrix m = q.matrix(i);
    out.product[i] = {m.outputs, m.inner(), steps_stages(tile, m.inner(), q.format)};
    if (static_cast<size_t>(m.outputs) > widest) widest = m.outputs;
  }
  for (int d = 0; d < q.directions; d++) {
    StepsWork& w = out.work[d];
    for (int i = 0; i < q.products(); i++)
      w.weights[i] = static_cast<Vec4*>(take(slabs * steps_packed_vectors(tile, q.matrix(i), q.format) * 16));
    for (void*& operand : w.operand) operand = take(parts * N * out.product[0].inner * element);
    w.middle = take(N * out.product[1].inner * element);
    w.sums = static_cast<float*>(take(parts * N * widest * 4));
    w.h = static_cast<float*>(take(N * O * 4));
    w.c = q.cell == CellKind::lstm || whole_batch ? static_cast<float*>(take(N * H * 4)) : nullptr;
    w.held = static_cast<float*>(take(cell.phases == 2 ? N * H * 4 : 0));
    w.terms = static_cast<float*>(take((q.normed || whole_batch) && q.backward ? N * cell.gates * H * 4 : 0));
  }
  return used;
}

}  // namespace fastrnn::cuda
