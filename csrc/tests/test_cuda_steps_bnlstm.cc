// The batch-normalised LSTM step by step.
#include "cuda_bnlstm_trial.h"
#include "emu/steps.h"

namespace trial {

template <class D, class Tile, int Units, int Threads>
struct Stepped {
  using Forward = StepsBnForwardParams;
  using Backward = StepsBnBackwardParams;

  template <class P>
  std::string run(const BnOptions& o, P& p, const std::vector<const void*>& weights) {
    StepsProblem q;
    q.cell = CellKind::bnlstm, q.format = D::kFormat, q.backward = std::is_same<P, Backward>::value;
    q.N = o.N, q.H = o.H, q.directions = o.directions;
    StepsKernels k;
    steps_product_functions<D, Tile>(k);
    steps_columns_functions<D, Units, Threads>(k, q.backward);
    const void* matrices[2][2] = {};
    for (size_t d = 0; d < weights.size(); d++) matrices[d][0] = weights[d];
    std::vector<Vec4> workspace(steps_bind(q, k.tile, nullptr, nullptr) / sizeof(Vec4),
                                Vec4{~0u, ~0u, ~0u, ~0u});
    return emu::run_steps(q, k, p, matrices, workspace.data(), o.seed * 1000);
  }
};

using NarrowTile = ProductTile<1, 1, 1, 1, 2, 2, 3>;
using BroadTile = ProductTile<4, 2, 2, 1, 1, 1, 2>;

// several: whole passes over the batch, of Threads / Units rows each.
template <class D, class Tile, int Units, int Threads>
void stepped(int several, int most_rows) {
  run_bn_problems<BnTrial<D, Stepped<D, Tile, Units, Threads>>>(several * Threads / Units, most_rows,
                                                                1 << 10);
}

}  // namespace trial

using namespace trial;

TEST(bf16) { stepped<Bf16, NarrowTile, 8, 128>(1, 100); }
TEST(fp16_one_warp) { stepped<Fp16, NarrowTile, 16, 32>(9, 33); }
TEST(tf32_wide_columns) { stepped<Tf32, BroadTile, 32, 64>(8, 31); }
TEST(bf16x3_few_units) { stepped<Bf16x3, BroadTile, 4, 64>(1, 65); }

using Caught = BnTrial<Bf16, Stepped<Bf16, NarrowTile, 8, 64>>;
TEST(mutations_are_caught) {
  CHECK(!bn_caught<Caught>(Mutation::none));
  for (const Mutation m : {Mutation::dead_rows_counted, Mutation::statistics_barrier,
                           Mutation::dropped_barrier, Mutation::rows_missing, Mutation::reset_ignored,
                           Mutation::unit_tail, Mutation::reduction_tail, Mutation::k_permutation})
    CHECK(bn_caught<Caught>(m));
}

int main(int argc, char** argv) { return check::run(argc, argv); }
