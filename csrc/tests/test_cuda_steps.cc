// Layers that run step by step, forward and backward, against the double-precision layer.
#include "cuda_steps_trial.h"

namespace trial {

// The shape of the narrow tile, of the wide one, and one with more of each than a warp has.
using NarrowTile = ProductTile<1, 1, 1, 1, 2, 2, 3>;
using BroadTile = ProductTile<4, 2, 2, 1, 1, 1, 2>;

inline std::vector<StepsOptions> problems() {
  std::vector<StepsOptions> all(6);
  all[0].T = 3, all[0].N = 3, all[0].H = 72;
  all[1].T = 5, all[1].N = 11, all[1].H = 37, all[1].lengths = all[1].reset = true,
  all[1].wx_is_float = false;
  all[2] = all[1];
  all[2].H = 48, all[2].reverse = true;
  all[3].directions = 2, all[3].H = 40, all[3].lengths = true, all[3].N = 6;
  all[4].directions = 2, all[4].H = 33, all[4].reset = true, all[4].initial = false;
  all[5].T = 1, all[5].N = 1, all[5].H = 1;
  return all;
}

template <class Cell, class D, class Tile, bool kLinear = false>
void run_all(std::vector<StepsOptions> all, int schedules = 2) {
  double worst = 0;
  for (StepsOptions o : all) {
    std::vector<Tensor<D>> first;
    for (o.seed = 1; o.seed <= static_cast<uint64_t>(schedules); o.seed++) {
      StepsTrial<Cell, D, Tile, kLinear> trial(o);
      if (!trial.failure.empty()) check::fail(__FILE__, __LINE__, o.text() + ": " + trial.failure);
      worst = std::max(worst, trial.worst);
      if (o.seed == 1) first = trial.results;
      // Whatever the schedule, the same bits.
      if (trial.failure.empty()) CHECK(first == trial.results);
    }
  }
  std::printf("  worst error: %.2f of what is allowed\n", worst);
}

inline std::vector<StepsOptions> with(std::vector<StepsOptions> all, int O, bool normed) {
  all.pop_back();  // one unit has no variance
  for (StepsOptions& o : all) {
    o.O = O && o.H == 37 ? o.H + 6 : O;
    o.normed = normed;
  }
  return all;
}

// Each mode a cell has, in training for each step and for the sequence, and in evaluation; zoneout beside it.
inline std::vector<StepsOptions> noisy(bool has_cell, bool has_update, int O, bool normed) {
  using fastrnn::Drop;
  std::vector<Drop> modes = {Drop::none, Drop::state};
  if (has_update) modes.push_back(Drop::update);
  if (has_cell) modes.push_back(Drop::cell);
  std::vector<StepsOptions> all;
  for (const Drop mode : modes)
    for (const bool training : {true, false}) {
      StepsOptions o;
      fastrnn::Noise& n = o.noise;
      n.mode = mode, n.training = training, n.layer = 3, n.per_sequence = mode == Drop::update;
      if (mode != Drop::none) n.drop = 0.4;
      n.zoneout_h = 0.3;
      if (has_cell) n.zoneout_c = 0.25;
      o.T = 5, o.N = 5, o.H = training ? 37 : 40, o.directions = 2, o.lengths = o.reset = true;
      o.O = O, o.normed = normed;
      all.push_back(o);
    }
  return all;
}

}  // namespace trial

using namespace trial;

#define FASTRNN_STEPS(name, cell)                                                           \
  TEST(name##_bf16) { run_all<cell, Bf16, NarrowTile>(problems()); }                        \
  TEST(name##_bf16x3_broad_tile) { run_all<cell, Bf16x3, BroadTile>(problems()); }          \
  TEST(name##_tf32_linear) { run_all<cell, Tf32, BroadTile, true>({problems()[1]}); }       \
  TEST(name##_fp16) { run_all<cell, Fp16, NarrowTile>({problems()[2]}, 1); }                \
  TEST(name##_regularised) {                                                                \
    run_all<cell, Bf16x3, NarrowTile>(noisy(cell::kHasCell, cell::kTape > 0, 0, false), 1); \
  }

FASTRNN_STEPS(lstm, Lstm)
FASTRNN_STEPS(gru, Gru<true>)
FASTRNN_STEPS(gru_reset_before, Gru<false>)
FASTRNN_STEPS(rnn_tanh, Rnn<false>)
FASTRNN_STEPS(rnn_relu, Rnn<true>)

TEST(lstm_projection) {
  run_all<Lstm, Bf16, NarrowTile>(with(problems(), 20, false));
  run_all<Lstm, Bf16x3, BroadTile>(noisy(true, true, 19, false), 1);
}
TEST(lstm_layer_norm) {
  run_all<Lstm, Bf16, NarrowTile>(with(problems(), 0, true));
  run_all<Lstm, Bf16x3, BroadTile>(noisy(true, true, 0, true), 1);
}
TEST(lstm_layer_norm_projection) {
  run_all<Lstm, Bf16x3, NarrowTile>(with(problems(), 20, true), 1);
  run_all<Lstm, Bf16x3, BroadTile>(noisy(true, true, 19, true), 1);
}
TEST(gru_layer_norm) {
  run_all<Gru<true>, Bf16, NarrowTile>(with(problems(), 0, true));
  run_all<Gru<true>, Bf16x3, BroadTile>(noisy(false, true, 0, true), 1);
}

// The tests are tested: each planted error makes one of two schedules fail.
template <class Cell, class D>
static bool caught(StepsOptions o, Mutation m) {
  o.mutation = m;
  for (o.seed = 1; o.seed <= 2; o.seed++) {
    const StepsTrial<Cell, D, NarrowTile> trial(o);
    if (trial.failure.empty()) continue;
    std::printf("  mutation %d: %s\n", static_cast<int>(m), trial.failure.c_str());
    return true;
  }
  return false;
}
TEST(mutations_are_caught) {
  const StepsOptions plain = problems()[1];
  CHECK(!(caught<Lstm, Bf16>(plain, Mutation::none)));
  for (const Mutation m : {Mutation::dropped_barrier, Mutation::reduction_tail, Mutation::k_permutation,
                           Mutation::reset_ignored})
    CHECK((caught<Lstm, Bf16>(plain, m)));
  const StepsOptions normed = with({plain, plain}, 0, true).front();
  CHECK(!(caught<Lstm, Bf16>(normed, Mutation::none)));
  CHECK((caught<Lstm, Bf16>(normed, Mutation::statistics_barrier)));
  StepsOptions masked = plain;
  masked.noise.mode = fastrnn::Drop::state, masked.noise.training = true, masked.noise.drop = 0.3;
  CHECK(!(caught<Gru<true>, Bf16>(masked, Mutation::none)));
  CHECK((caught<Gru<true>, Bf16>(masked, Mutation::other_step_mask)));
}

int main(int argc, char** argv) { return check::run(argc, argv); }
