// How many threads a layer gets and what they divide. One place, so that explain() and the drivers
// cannot disagree. The figures behind the thresholds are in docs/cpu-kernels.md.
#pragma once
#include "layer.h"
#include "pack.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Rows of input term computed at a time: enough to reuse a weight panel, few enough to stay in L2.
constexpr int64_t kChunkRows = 192;

struct Plan {
  int threads;
  bool units;  // threads own blocks of units (a barrier per stage), else rows of the batch
};

inline int gate_count(Cell c) {
  switch (c) {
    case Cell::lstm:
    case Cell::lstm_layer_norm:
      return 4;
    case Cell::gru:
    case Cell::gru_reset_before:
    case Cell::gru_layer_norm:
      return 3;
    default:
      return 1;
  }
}

// Rows read all recurrent weights on every core, units only their share. From four rows a core on a weight panel
// is reused enough, as long as the weights stay in L2 at all; then rows win by not meeting at barriers, but for
// a single step, which meets once. Threads that divide units, on the other hand, take over from one another (claims.h).
constexpr double kStaysInL2 = 2 << 20;
// Where vectors are short a step is long: so many bytes of weights, in blocks enough, are divided by units as well.
constexpr double kLongStep = 448 << 10, kEnoughUnits = 64;
inline double recurrent_bytes(const Problem& p) {
  const int size = p.type == Type::f64 ? 8 : p.type == Type::bf16 || p.type == Type::f32_bf16 ? 2 : 4;
  return double(size) * gate_count(p.cell) * p.H * p.O;
}

// per_step: operations of a time step; stages: matmuls after each other in it; `most` bytes of weights allow rows.
inline Plan choose_plan(const Problem& p, double per_step, double weight_bytes, int stages = 1,
                        double most = kStaysInL2) {
  const double total = per_step * p.T * p.directions;
  // A team costs about 2 us to start and a barrier 0.1-0.2 us per step.
  const bool side_by_side = p.directions == 2;
  int threads = p.threads < 1 ? 1 : p.threads;
  if (total < 4e5) threads = 1;
  if (!side_by_side && p.N < 2 * threads && per_step < 6e4 * stages) threads = 1;
  if (side_by_side && per_step < 6e4 * stages && threads > 2) threads = 2;
  const int group = p.directions == 2 ? imax(1, threads / 2) : threads;
  Plan plan{threads, false};
  if (p.partition != Partition::automatic)
    plan.units = p.partition == Partition::units;
  else
    plan.units =
        p.T == 1 || p.N < 4 * group || weight_bytes > (p.H < kEnoughUnits * group ? kStaysInL2 : most);
  return plan;
}

inline Plan choose_plan(const Problem& p) {
  const bool once =
      !p.projected && !normalises(p.cell) && p.cell != Cell::gru_reset_before;  // a step meets once
  return choose_plan(p, 2.0 * p.N * gate_count(p.cell) * p.H * (p.I + p.O), recurrent_bytes(p), 1,
                     kRegisters == 16 && once ? kLongStep : kStaysInL2);
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
