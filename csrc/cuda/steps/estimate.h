// What a step costs when its products and its pointwise parts are launches: a model for plan.h, its constants estimates from
// published numbers of an H200-class device. Nothing here has been timed.
#pragma once
#include <algorithm>

#include "../tiles.h"
#include "program.h"

namespace fastrnn::cuda {

FASTRNN_CONSTEXPR StepsTile steps_tile(bool wide) {
  return wide ? StepsTile{FASTRNN_STEPS_WIDE} : StepsTile{FASTRNN_STEPS_NARROW};
}
FASTRNN_CONSTEXPR StepsColumns steps_columns() { return {FASTRNN_STEPS_COLUMNS}; }

struct StepsModel {
  double launch_us = 1.3;  // from node to node of a graph, both ends of the kernels included
  double fill_us = 0.7;    // of a kernel's pipeline, or a pointwise part's chain of loads
  double l2_bytes_us = 5.5e6, hbm_bytes_us = 4.3e6, sm_bytes_us = 0.11e6;
  double l2_size = 30e6;  // weights beyond it come from HBM in every step
  double sm_flops_us_16bit = 5.0e6, sm_flops_us_tf32 = 2.5e6;
};

// Microseconds of a batch-normalised step's pointwise part: a chain of passes over the rows, each with a barrier or two behind it
// where it adds up, and what an element has in L2 and HBM. Passes that read the same again find it in L1.
inline double columns_time(const StepsProblem& q, int sms, const StepsModel& m = {}) {
  const double ctas = double(q.directions) * ceil_div(q.H, steps_columns().units);
  const double waves = double(int((ctas + sms - 1) / sms));
  // Words of fp32: forward four sums, one of them once more there and back, four input terms, c and cells; backward the sums and
  // terms there and back, cells, dc and dcells. In the tensors' type: the tape, and y and the operand, or dy and four gradients.
  const double words = q.backward ? 18 : 13, elements = q.backward ? 22 : 10;
  const double element = 4 * words + element_bytes(q.format) * elements;
  const double bytes = element * steps_columns().units * q.N;  // of a CTA
  return m.launch_us + 5 * m.fill_us + std::max(ctas * bytes / m.l2_bytes_us, waves * bytes / m.sm_bytes_us);
}

// Microseconds of a step, all micro-steps of a highway layer: each product streams its weights, and every CTA its tile of both
// operands, from L2.
inline double steps_time(const StepsProblem& q, const StepsTile& tile, int sms, const StepsModel& m = {}) {
  const double element = element_bytes(q.format), passes = q.format == Format::bf16x3 ? 3 : 1;
  const int chains = q.directions * q.parts();  // products beside each other in a launch
  double weights = 0, us = 0;
  for (int i = 0; i < q.products(); i++) {
    const StepsMatrix w = q.matrix(i);
    weights += double(chains) * q.depth * element * w.outputs * w.inner();
  }
  for (int i = 0; i < q.products(); i++) {
    const StepsMatrix w = q.matrix(i);
    const double ctas = double(chains) * ceil_div(q.N, tile.rows()) * ceil_div(w.outputs, tile.outputs());
    const double waves = std::max(1.0, double(int((ctas + sms - 1) / sms)));
    const double bytes = element * w.inner() * (tile.outputs() + std::min(tile.rows(), q.N));  // of a CTA
    const double flops = 2.0 * passes * tile.outputs() * tile.rows() * w.inner();
    const double rate = q.format == Format::tf32 ? m.sm_flops_us_tf32 : m.sm_flops_us_16bit;
    double read = std::max(ctas * bytes / m.l2_bytes_us, waves * bytes / m.sm_bytes_us);
    if (weights > m.l2_size) read = std::max(read, chains * element * w.outputs * w.inner() / m.hbm_bytes_us);
    us += m.launch_us + m.fill_us + std::max(read, waves * flops / rate);
    if (q.cell == CellKind::bnlstm) {
      us += columns_time(q, sms, m);
      continue;
    }
    // The sums, there and back, and about as much for everything else of an element.
    const double pointwise = 4.0 * 4 * chains * q.N * w.outputs;
    us += m.launch_us + m.fill_us * (q.normed ? 3 : 1) + pointwise / m.l2_bytes_us;
  }
  return q.depth * us;
}

}  // namespace fastrnn::cuda
