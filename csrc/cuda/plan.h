// Which kernel a problem gets, and why not the others. Plain C++; the device is described by numbers, nothing is asked.
//
// The CTAs of a persistent kernel must be resident at once, since they wait for each other: its plan never has more CTAs than the
// device takes, and where no tile allows that it is refused, with the reason, instead of hanging. A batch too large for one
// launch runs as several, one after another. Plans of the kind "steps" launch every step anew, and take any size.
//
// The order among the possible plans comes from a cost model of a step (docs/cuda-kernels.md), whose constants are
// cost_model.h.
#pragma once
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "core/geometry.h"
#include "cost_model.h"
#include "steps/estimate.h"
#include "tiles.h"

namespace fastrnn::cuda {

struct Device {
  int sms = 132;
  int shared_bytes = 232448;  // that a CTA may opt in to
  int registers = 65536;      // of an SM
  int compute_capability = 90;
  int most_clusters = 15;  // of eight CTAs, resident at once; 0 where there are none
};

struct PlanProblem {
  CellKind cell = CellKind::lstm;
  Format format = Format::bf16;
  bool backward = false;
  int N = 1, H = 1, directions = 1;
  int depth = 1;             // micro-steps of a highway layer
  bool regularised = false;  // recurrent dropout or zoneout inside the kernel
  int O = 0;                 // outputs of a projection; 0: none
  bool normed = false;       // layer norm
  bool gate_masks = false;   // a highway layer's gates have a mask of the state each
};

// Layer norm and a projection are options there, not cells.
inline bool takes_steps(const PlanProblem& q) {
  return !is_layer_norm(q.cell) && q.cell != CellKind::lstm_projected;
}
inline StepsProblem steps_problem(const PlanProblem& q) {
  return {q.cell, q.format, q.backward, q.normed, q.N, q.H, q.O, q.directions, q.depth, q.gate_masks};
}

struct Plan {
  ExchangeKind exchange = ExchangeKind::sentinel;
  TileShape tile;
  int rows = 0;              // of the batch, that a CTA has
  int groups = 0, ctas = 0;  // of a launch, for each direction
  int launches = 0;          // one after another, each with its part of the batch
  int shared_bytes = 0;
  int of_a_step = 0;    // steps: launches of each step; the tile is its products'
  double step_us = 0;   // the model's, all launches together
  std::string refused;  // why this kernel cannot run; empty: it can
  bool possible() const { return refused.empty(); }
  std::string text() const;
};

inline const char* name_of(ExchangeKind e) {
  static const char* const names[] = {"local", "cluster", "sentinel", "flags", "steps"};
  return names[static_cast<int>(e)];
}

inline std::string Plan::text() const {
  char s[240];
  if (exchange == ExchangeKind::steps)
    std::snprintf(s, sizeof s,
                  "steps, %d launches a step in CUDA graphs, products of %d outputs x %d rows in %d x %d "
                  "CTAs, %d KiB of "
                  "shared memory",
                  of_a_step, tile.units, tile.rows(), groups, ctas, shared_bytes / 1024);
  else
    std::snprintf(s, sizeof s,
                  "%s, %d units x %d rows a CTA, %d groups x %d CTAs, %d launch%s, %d KiB of shared memory",
                  name_of(exchange), tile.units, rows, groups, ctas, launches, launches == 1 ? "" : "es",
                  shared_bytes / 1024);
  return possible() ? s : std::string(s) + ": " + refused;
}

// Microseconds of one step of one launch: wait for the exchange, read and multiply (overlapping by three quarters of the
// shorter), reduce, epilogue. Batch-normalised layers walk the batch in passes, each with a barrier and a latency of its own.
inline double step_time(const PlanProblem& q, const Plan& p, const Device& device, const CostModel& m = {}) {
  const Geometry g = geometry_of(cell_shape(q.cell), p.tile, q.backward);
  const double passes = q.format == Format::bf16x3 ? 3 : 1;
  const double rate = (q.format == Format::tf32 ? m.flops_tf32 : m.flops_16bit) / passes;
  const bool whole_batch = q.cell == CellKind::bnlstm;
  const int passes_of_rows = whole_batch ? ceil_div(q.N, p.tile.rows()) : 1;
  const int rows = whole_batch ? round_up(q.N, 8 * p.tile.row_tiles) : p.tile.rows(),
            padded = round_up(q.H, vector_elements(q.format));
  const int loading = std::min(device.sms, q.directions * p.groups * p.ctas);
  double cycles = 0;
  for (int i = 0; i < g.phases; i++) {
    const PhaseShape& ph = g.phase[i];
    const double k = double(p.tile.warps) * ph.chunks * chunk_elements(q.format);
    const double multiply = std::max(2.0 * ph.tiles * 16 * k * rows / rate,
                                     double(p.tile.warps) * ph.shared_vectors() * 16 / m.shared);
    const double bytes = double(ph.in) * rows * padded * element_bytes(q.format);
    double read = std::max(bytes / m.l2_of_sm, loading * bytes / m.l2_total);
    if (p.exchange == ExchangeKind::local) read = bytes / m.shared;
    if (p.exchange == ExchangeKind::cluster) read = bytes / m.dsmem;
    const double sums = m.reduction + 2.0 * p.tile.warps * ph.out * p.tile.units * rows * 4 / m.shared;
    if (whole_batch)
      cycles += (passes_of_rows - 1) * m.pass + 2 * m.statistics + m.statistics_element * p.tile.units * rows;
    cycles += m.hop[static_cast<int>(p.exchange)] + std::max(read, multiply) +
              0.25 * std::min(read, multiply) + sums + m.epilogue + m.epilogue_element * p.tile.units * rows;
  }
  // Each norm inside the step is one more exchange, of little data.
  const int norms = q.cell == CellKind::lstm_layer_norm ? 2 : q.cell == CellKind::gru_layer_norm ? 1 : 0;
  cycles += norms * (m.hop[static_cast<int>(p.exchange)] + m.epilogue);
  return q.depth * cycles / m.mhz;
}

struct Compiled {
  ExchangeKind exchange;
  TileShape tile;
};

inline std::vector<Compiled> compiled_tiles(const PlanProblem& q) {
#define FASTRNN_LISTED(exchange, ...) {kind_##exchange, {__VA_ARGS__}},
  constexpr ExchangeKind kind_Sentinel = ExchangeKind::sentinel, kind_Cluster = ExchangeKind::cluster;
  constexpr ExchangeKind kind_Local = ExchangeKind::local, kind_Flags = ExchangeKind::flags;
  std::vector<Compiled> all;
  const bool narrow = element_bytes(q.format) == 2;
  if (q.cell == CellKind::bnlstm) {
    if (narrow && q.backward) return {FASTRNN_TILES_16BIT_BNLSTM_BACKWARD(FASTRNN_LISTED)};
    if (narrow) return {FASTRNN_TILES_16BIT_BNLSTM_FORWARD(FASTRNN_LISTED)};
    if (q.backward) return {FASTRNN_TILES_32BIT_BNLSTM_BACKWARD(FASTRNN_LISTED)};
    return {FASTRNN_TILES_32BIT_BNLSTM_FORWARD(FASTRNN_LISTED)};
  }
  if (is_layer_norm(q.cell)) {
    if (narrow) return {FASTRNN_TILES_16BIT_LAYER_NORM(FASTRNN_LISTED)};
    return {FASTRNN_TILES_32BIT_LAYER_NORM(FASTRNN_LISTED)};
  }
  if (q.cell == CellKind::lstm_projected) {
    if (narrow) return {FASTRNN_TILES_16BIT_PROJECTED(FASTRNN_LISTED)};
    return {FASTRNN_TILES_32BIT_PROJECTED(FASTRNN_LISTED)};
  }
  if (is_rhn(q.cell)) {
    if (narrow) return {FASTRNN_TILES_16BIT_RHN(FASTRNN_LISTED)};
    return {FASTRNN_TILES_32BIT_RHN(FASTRNN_LISTED)};
  }
  if (q.regularised) {
    if (narrow) return {FASTRNN_TILES_16BIT_REGULARISED(FASTRNN_LISTED)};
    return {FASTRNN_TILES_32BIT_REGULARISED(FASTRNN_LISTED)};
  }
  if (q.cell == CellKind::gru_reset_before) {
    if (narrow) return {FASTRNN_TILES_16BIT_TWO_MATMULS(FASTRNN_LISTED)};
    return {FASTRNN_TILES_32BIT_TWO_MATMULS(FASTRNN_LISTED)};
  }
  if (narrow)
    all = {FASTRNN_TILES_16BIT(FASTRNN_LISTED)};
  else
    all = {FASTRNN_TILES_32BIT(FASTRNN_LISTED)};
  if (q.format == Format::bf16 && q.cell == CellKind::lstm)
    for (const Compiled& c : std::vector<Compiled>{FASTRNN_TILES_FLAGS(FASTRNN_LISTED)}) all.push_back(c);
#undef FASTRNN_LISTED
  return all;
}

// One kernel's plan for a problem.
inline Plan plan_with(const PlanProblem& q, const Device& device, const Compiled& kernel) {
  Plan p;
  p.exchange = kernel.exchange;
  p.tile = kernel.tile;
  const auto refuse = [&p](const std::string& why) {
    p.refused = why;
    return p;
  };
  const int padded = round_up(q.H, vector_elements(q.format));
  const int most = p.tile.warps * p.tile.chunks * chunk_elements(q.format);
  // Never more: in a cluster a CTA without units would publish nothing, so its peers would not wait for it.
  p.ctas = ceil_div(padded, p.tile.units);
  const bool whole_batch = q.cell == CellKind::bnlstm;
  p.rows = whole_batch ? q.N : p.tile.rows();
  p.shared_bytes =
      shared_bytes(q.cell, p.tile, q.backward, q.format, p.exchange, whole_batch ? q.N : q.depth);
  if (q.O) return refuse("it has no projection");
  if (q.normed) return refuse("it has no layer norm");
  if (q.gate_masks) return refuse("it has one mask of the state for all gates");
  if (padded > most) return refuse("its warps reduce over up to " + std::to_string(most) + " units");
  if (p.shared_bytes > device.shared_bytes)
    return refuse((whole_batch ? "statistics are over the whole batch, and with " + std::to_string(q.N) +
                                     " rows a CTA needs " + std::to_string(ceil_div(p.shared_bytes, 1024)) +
                                     " KiB of shared memory: "
                               : std::string()) +
                  "a CTA has " + std::to_string(device.shared_bytes / 1024) + " KiB of shared memory");
  if (p.exchange == ExchangeKind::local && p.ctas > 1) return refuse("more units than one CTA has");
  // A kernel may use 255 registers a thread.
  if (device.registers / (256 * p.tile.threads()) < 1)
    return refuse("an SM has " + std::to_string(device.registers) + " registers");
  int room = device.sms;
  if (p.exchange == ExchangeKind::cluster) {
    if (device.compute_capability < 90 || !device.most_clusters) return refuse("the device has no clusters");
    if (p.ctas > 8) return refuse("a cluster has up to 8 CTAs");
    room = std::min(room, device.most_clusters * p.ctas);
  }
  const int most_groups = room / (p.ctas * q.directions);
  if (most_groups < 1)
    return refuse(std::to_string(p.ctas * q.directions) + " CTAs wait for each other, the device holds " +
                  std::to_string(room));
  const int wanted = ceil_div(q.N, p.rows);
  p.launches = ceil_div(wanted, most_groups);
  p.groups = ceil_div(wanted, p.launches);
  p.step_us = p.launches * step_time(q, p, device);
  return p;
}

// A layer that runs step by step: nothing waits, so nothing has to be resident.
inline Plan steps_plan(const PlanProblem& q, const Device& device, bool wide) {
  const StepsTile tile = steps_tile(wide);
  const StepsProblem problem = steps_problem(q);
  Plan p;
  p.exchange = ExchangeKind::steps;
  p.tile = {tile.outputs(), tile.n_tiles, tile.chunks, 0, tile.threads() / 32};
  p.groups = ceil_div(q.N, tile.rows());
  p.ctas = ceil_div(problem.matrix(0).outputs, tile.outputs());
  p.launches = 1;
  p.of_a_step = 2 * problem.products() * q.depth;
  p.shared_bytes = tile.shared_bytes();
  if (p.shared_bytes > device.shared_bytes)
    p.refused = "a CTA has " + std::to_string(device.shared_bytes / 1024) + " KiB of shared memory";
  for (int i = 0; i < problem.products(); i++) {
    const StepsMatrix m = problem.matrix(i);
    if (int64_t{q.directions} * problem.parts() * q.N * std::max(m.outputs, m.inner()) > INT32_MAX)
      p.refused = "a step has more elements than 2^31";
  }
  p.step_us = steps_time(problem, tile, device.sms);
  return p;
}

// All kernels, the possible ones first, fastest first; the others carry the reason.
inline std::vector<Plan> candidates(const PlanProblem& q, const Device& device) {
  std::vector<Plan> all;
  for (const Compiled& c : compiled_tiles(q)) all.push_back(plan_with(q, device, c));
  for (const bool wide : {false, true})
    if (takes_steps(q)) all.push_back(steps_plan(q, device, wide));
  std::stable_sort(all.begin(), all.end(), [](const Plan& a, const Plan& b) {
    if (a.possible() != b.possible()) return a.possible();
    return a.possible() && a.step_us < b.step_us;
  });
  return all;
}

}  // namespace fastrnn::cuda
