// Which kernel a problem gets, and why not the others. Plain C++; the device is described by numbers, nothing is asked.
//
// The CTAs of a persistent kernel must be resident at once, since they wait for each other: its plan never has more CTAs than the
// device takes, and where no tile allows that it is refused, with the reason, instead of hanging. A batch too large for one
// launch runs as several, one after another. Plans of the kind "steps" launch every step anew, and take any size.
//
// The order among the possible plans comes from a cost model of a step (docs/cuda-kernels.md). Its constants are
// estimates: nothing here has been timed on a GPU.
#pragma once
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "core/geometry.h"
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
};

inline bool takes_steps(const PlanProblem& q) { return !is_rhn(q.cell) && q.cell != CellKind::bnlstm; }
inline StepsProblem steps_problem(const PlanProblem& q) {
  return {q.cell, q.format, q.backward, q.normed, q.N, q.H, q.O, q.directions};
}

struct Plan {
  ExchangeKind exchange = ExchangeKind::sentinel;
  TileShape tile;
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
                  name_of(exchange), tile.units, tile.rows(), groups, ctas, launches,
                  launches == 1 ? "" : "es", shared_bytes / 1024);
  return possible() ? s : std::string(s) + ": " + refused;
}

// Cycles and bytes per cycle of an H200-class device; estimates from published microbenchmarks.
struct CostModel {
  double mhz = 1850;
  double flops_16bit = 2680, flops_tf32 = 1340;  // mma.sync, an SM
  double l2_total = 4000, l2_of_sm = 64, dsmem = 16, shared = 128;
  double hop[4] = {60, 250, 700, 1350};  // by ExchangeKind
  double reduction = 100, epilogue = 200, epilogue_element = 1.6;
};

// Microseconds of one step of one launch: wait for the exchange, read and multiply (overlapping by three quarters of the
// shorter), reduce, epilogue.
inline double step_time(const PlanProblem& q, const Plan& p, const Device& device, const CostModel& m = {}) {
  const Geometry g = geometry_of(cell_shape(q.cell), p.tile, q.backward);
  const double passes = q.format == Format::bf16x3 ? 3 : 1;
  const double rate = (q.format == Format::tf32 ? m.flops_tf32 : m.flops_16bit) / passes;
  const int rows = p.tile.rows(), padded = round_up(q.H, vector_elements(q.format));
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
    cycles += m.hop[static_cast<int>(p.exchange)] + std::max(read, multiply) +
              0.25 * std::min(read, multiply) + sums + m.epilogue + m.epilogue_element * p.tile.units * rows;
  }
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
    if (narrow) return {FASTRNN_TILES_16BIT_BNLSTM(FASTRNN_LISTED)};
    return {FASTRNN_TILES_32BIT_BNLSTM(FASTRNN_LISTED)};
  }
  if (is_rhn(q.cell)) {
    if (narrow) return {FASTRNN_TILES_16BIT_RHN(FASTRNN_LISTED)};
    return {FASTRNN_TILES_32BIT_RHN(FASTRNN_LISTED)};
  }
  if (q.regularised) {
    if (narrow) return {FASTRNN_TILES_16BIT_REGULARISED(FASTRNN_LISTED)};
    return {FASTRNN_TILES_32BIT_REGULARISED(FASTRNN_LISTED)};
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
  p.ctas = ceil_div(padded, p.tile.units);
  // Cluster sizes that are powers of two are the ones in common use; a CTA may have no unit at all.
  if (p.exchange == ExchangeKind::cluster) {
    int size = 1;
    while (size < p.ctas) size *= 2;
    p.ctas = size;
  }
  p.shared_bytes = shared_bytes(q.cell, p.tile, q.backward, q.format, p.exchange, q.depth);
  if (q.O) return refuse("it has no projection");
  if (q.normed) return refuse("it has no layer norm");
  if (padded > most) return refuse("its warps reduce over up to " + std::to_string(most) + " units");
  if (p.shared_bytes > device.shared_bytes)
    return refuse("a CTA has " + std::to_string(device.shared_bytes / 1024) + " KiB of shared memory");
  if (p.exchange == ExchangeKind::local && p.ctas > 1) return refuse("more units than one CTA has");
  // A kernel may use 255 registers a thread.
  const int resident = device.registers / (256 * 32 * p.tile.warps) > 0 ? 1 : 0;
  if (!resident) return refuse("an SM has " + std::to_string(device.registers) + " registers");
  if (q.cell == CellKind::bnlstm && q.N > p.tile.rows())
    return refuse("statistics are over the whole batch, of which a CTA has " + std::to_string(p.tile.rows()) +
                  " rows");
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
  const int wanted = ceil_div(q.N, p.tile.rows());
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
  p.of_a_step = 2 * problem.products();
  p.shared_bytes = tile.shared_bytes();
  if (p.shared_bytes > device.shared_bytes)
    p.refused = "a CTA has " + std::to_string(device.shared_bytes / 1024) + " KiB of shared memory";
  for (int i = 0; i < problem.products(); i++) {
    const StepsMatrix m = problem.matrix(i);
    if (int64_t{q.directions} * q.N * std::max(m.outputs, m.inner()) > INT32_MAX)
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
