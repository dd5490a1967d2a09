// Highway layers that run step by step, forward and backward, against the double-precision layer.
#include "../cuda/steps/rhn.cuh"
// The cells come first: others have lists of the same names as their functions.
#include "cuda_rhn_reference.h"
#include "emu/steps.h"

namespace trial {

template <class Cell, class D, class Tile>
class RhnStepsTrial : public RhnProblem<Cell, D> {
  using Base = RhnProblem<Cell, D>;
  using Base::G, Base::kTape, Base::o_, Base::layers_, Base::lengths_, Base::reset_, Base::tape_;
  using Base::tensor, Base::rows, Base::check_outputs, Base::check_gradients;

 public:
  using Base::failure;

  explicit RhnStepsTrial(const RhnOptions& o) : Base(o) {
    emu::machine().mutation = static_cast<int>(o.mutation);
    run_forward();
    if (failure.empty()) run_backward();
    emu::machine().mutation = 0;
  }

 private:
  template <class Params>
  bool run(bool backward, Params& p) {
    StepsKernels k;
    steps_product_functions<D, Tile>(k);
    steps_rhn_functions<Cell, D>(k, backward);
    p.T = o_.T;
    p.lengths = o_.lengths ? lengths_.data() : nullptr;
    p.reset = o_.reset ? reset_.data() : nullptr;
    StepsProblem q;
    q.cell = Cell::kKind, q.format = D::kFormat, q.backward = backward;
    q.N = o_.N, q.H = o_.H, q.directions = o_.directions;
    q.depth = o_.depth, q.gate_masks = o_.gate_masks;
    const void* weights[2][2] = {};
    for (int d = 0; d < o_.directions; d++) weights[d][0] = tensor(layers_[d].w_hh).data();
    std::vector<Vec4> workspace(steps_bind(q, k.tile, nullptr, nullptr) / sizeof(Vec4),
                                Vec4{~0u, ~0u, ~0u, ~0u});
    const std::string went = emu::run_steps(q, k, p, weights, workspace.data(), o_.seed * 1000);
    if (!went.empty()) failure = std::string(backward ? "backward: " : "forward: ") + went;
    return failure.empty();
  }

  void run_forward() {
    const int H = o_.H, TN = o_.T * o_.N, ND = o_.directions;
    StepsForwardParams p;
    p.wx_is_float = o_.wx_is_float || D::kPerWord == 1;
    Tensor<D>& y = tensor(size_t(TN) * H * ND);
    std::vector<std::vector<float>> wx(ND), bias(ND);
    std::vector<Tensor<D>*> h_n;
    for (int d = 0; d < ND; d++) {
      const RhnReference& r = layers_[d];
      StepsForwardDirection& f = p.dir[d];
      const Doubles input = r.input_terms();
      wx[d].assign(input.begin(), input.end());
      f.wx = rows(p.wx_is_float ? static_cast<void*>(wx[d].data()) : tensor(input).data(), G * H);
      bias[d].assign(r.bias.begin(), r.bias.end());
      f.bias = o_.bias ? bias[d].data() : nullptr;
      f.mask = o_.masked ? tensor(r.s_mask).data() : nullptr;
      f.h0 = o_.initial ? tensor(r.h0).data() : nullptr;
      h_n.push_back(&tensor(size_t(o_.N) * H));
      f.h_n = h_n[d]->data();
      f.y = rows(y.data() + d * H, H, ND);
      tape_.push_back(&tensor(size_t(TN) * o_.depth * kTape * H));
      f.tape = rows(tape_[d]->data(), kTape * H);
      f.reverse = r.reverse;
    }
    if (run(false, p)) check_outputs(y, h_n);
  }

  void run_backward() {
    const int H = o_.H;
    StepsBackwardParams p;
    std::vector<Tensor<D>*> dh0, dgates;
    for (int d = 0; d < o_.directions; d++) {
      const RhnReference& r = layers_[d];
      StepsBackwardDirection& b = p.dir[d];
      b.dy = rows(tensor(r.dy).data(), H);
      b.dh_n = tensor(r.dh_n).data();
      dh0.push_back(&tensor(size_t(o_.N) * H));
      b.dh0 = dh0[d]->data();
      b.mask = o_.masked ? tensor(r.s_mask).data() : nullptr;
      b.tape = rows(tape_[d]->data(), kTape * H);
      dgates.push_back(&tensor(size_t(o_.T) * o_.N * o_.depth * G * H));
      b.dgates = rows(dgates[d]->data(), G * H);
      b.reverse = r.reverse;
    }
    if (run(true, p)) check_gradients(dh0, dgates);
  }
};

// The shape of the narrow tile, of the wide one, and one with more of each than a warp has.
using NarrowTile = ProductTile<1, 1, 1, 1, 2, 2, 3>;
using BroadTile = ProductTile<4, 2, 2, 1, 1, 1, 2>;

// Depths 1, 2 and 5, tails of units and rows, every kind of sequence; tied: one mask for all gates.
inline std::vector<RhnOptions> problems(bool tied) {
  std::vector<RhnOptions> all(6);
  all[0].T = 2, all[0].N = 3, all[0].H = 72, all[0].depth = 2;
  all[1].T = 4, all[1].N = 11, all[1].H = 37, all[1].depth = 2, all[1].lengths = all[1].reset = true,
  all[1].wx_is_float = false;
  all[2].T = 3, all[2].N = 9, all[2].H = 21, all[2].depth = 5, all[2].lengths = all[2].reset = true,
  all[2].reverse = true, all[2].masked = !tied;
  all[3].T = 3, all[3].N = 6, all[3].H = 40, all[3].directions = 2, all[3].depth = 1, all[3].lengths = true,
  all[3].bias = false;
  all[4].T = 3, all[4].N = 5, all[4].H = 33, all[4].directions = 2, all[4].depth = 2, all[4].reset = true,
  all[4].initial = false;
  all[5].T = all[5].N = all[5].H = 1, all[5].depth = 5;
  for (RhnOptions& o : all) o.gate_masks = !tied;
  return all;
}

template <class Cell, class D, class Tile>
void run_all(const std::vector<RhnOptions>& all) {
  double worst = 0;
  for (RhnOptions o : all) {
    std::vector<Tensor<D>> first;
    for (o.seed = 1; o.seed <= 3; o.seed++) {
      const RhnStepsTrial<Cell, D, Tile> trial(o);
      if (!trial.failure.empty()) check::fail(__FILE__, __LINE__, o.text() + ": " + trial.failure);
      worst = std::max(worst, trial.worst);
      if (o.seed == 1) first = trial.results;
      // Whatever the schedule, the same bits.
      if (trial.failure.empty()) CHECK(first == trial.results);
    }
  }
  std::printf("  worst error: %.2f of what is allowed\n", worst);
}

// Planted errors that a micro-step could hide.
inline bool caught(Mutation m) {
  RhnOptions o = problems(true)[1];
  o.mutation = m;
  for (o.seed = 1; o.seed <= 2; o.seed++) {
    const RhnStepsTrial<Rhn<true>, Bf16, NarrowTile> trial(o);
    if (trial.failure.empty()) continue;
    std::printf("  mutation %d: %s\n", static_cast<int>(m), trial.failure.c_str());
    return true;
  }
  return false;
}

}  // namespace trial

using namespace trial;

TEST(coupled_bf16) { run_all<Rhn<true>, Bf16, NarrowTile>(problems(true)); }
TEST(coupled_tf32_broad_tile) { run_all<Rhn<true>, Tf32, BroadTile>(problems(true)); }
TEST(coupled_bf16x3_mask_of_each_gate) { run_all<Rhn<true>, Bf16x3, BroadTile>(problems(false)); }
TEST(uncoupled_fp16) { run_all<Rhn<false>, Fp16, NarrowTile>(problems(true)); }
TEST(uncoupled_bf16x3) { run_all<Rhn<false>, Bf16x3, NarrowTile>(problems(true)); }
TEST(uncoupled_bf16_mask_of_each_gate) { run_all<Rhn<false>, Bf16, NarrowTile>(problems(false)); }

// The tests are tested: each planted error makes one of two schedules fail.
TEST(mutations_are_caught) {
  CHECK(!caught(Mutation::none));
  for (const Mutation m : {Mutation::one_slab, Mutation::masked_carry, Mutation::reset_ignored,
                           Mutation::reduction_tail, Mutation::dropped_barrier})
    CHECK(caught(m));
}

int main(int argc, char** argv) { return check::run(argc, argv); }
