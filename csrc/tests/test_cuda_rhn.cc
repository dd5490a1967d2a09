// Recurrent Highway kernels on the emulator: micro-steps, masks, both carries.
#include "cuda_rhn_trial.h"
#include "cuda_trial_base.h"

namespace trial {

// K of up to 128, all weights in shared memory, as the kernels have them.
template <class D, int Units = 16, int RowTiles = 1>
using SlabTile = Tile<Units, RowTiles, 128 / (2 * D::kChunk), 0, 2>;

inline std::vector<RhnOptions> rhn_problems(int most_units) {
  std::vector<RhnOptions> all(6);
  all[0].T = 3, all[0].N = 3, all[0].H = std::min(most_units, 72);
  all[1].T = 8, all[1].N = 11, all[1].H = 37, all[1].groups = 2, all[1].depth = 2;
  all[1].lengths = all[1].reset = true, all[1].wx_is_float = false;
  all[2] = all[1];
  all[2].T = 4, all[2].H = std::min(most_units, 48), all[2].reverse = true, all[2].groups = 3,
  all[2].masked = false;
  all[3].directions = 2, all[3].H = 40, all[3].lengths = all[3].separate_mail = true, all[3].bias = false;
  all[4].directions = 2, all[4].H = 33, all[4].reset = true, all[4].initial = false, all[4].depth = 1;
  all[5].T = all[5].N = all[5].H = 1, all[5].depth = 5;
  return all;
}

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf>
void rhn(int most_units) {
  run_problems<RhnTrial<Cell, D, T, ExchangeOf>, T>(rhn_problems(most_units));
}

// Planted errors that a micro-step could hide.
inline bool caught(Mutation m) {
  RhnOptions o;
  o.N = 11, o.groups = 2, o.H = 37, o.reset = true;
  return caught<RhnTrial<Rhn<true>, Bf16, SlabTile<Bf16>, Sentinel>>(o, m);
}

}  // namespace trial

using namespace trial;

TEST(coupled_bf16_sentinel) { rhn<Rhn<true>, Bf16, SlabTile<Bf16>, Sentinel>(128); }
TEST(coupled_bf16_two_row_tiles) { rhn<Rhn<true>, Bf16, SlabTile<Bf16, 16, 2>, Sentinel>(128); }
TEST(coupled_bf16_flags) { rhn<Rhn<true>, Bf16, SlabTile<Bf16>, Flags>(128); }
TEST(coupled_bf16x3_cluster) { rhn<Rhn<true>, Bf16x3, SlabTile<Bf16x3>, Cluster>(128); }
TEST(coupled_tf32_sentinel) { rhn<Rhn<true>, Tf32, SlabTile<Tf32>, Sentinel>(128); }
TEST(uncoupled_bf16x3_sentinel) { rhn<Rhn<false>, Bf16x3, SlabTile<Bf16x3>, Sentinel>(128); }
TEST(uncoupled_fp16_sentinel) { rhn<Rhn<false>, Fp16, SlabTile<Fp16>, Sentinel>(128); }
TEST(uncoupled_bf16_local) { rhn<Rhn<false>, Bf16, SlabTile<Bf16, 48>, Local>(48); }

TEST(mutations_are_caught) {
  CHECK(!caught(Mutation::none));
  CHECK(caught(Mutation::dropped_barrier));
  CHECK(caught(Mutation::single_reduction_tile));
  CHECK(caught(Mutation::reset_ignored));
  CHECK(caught(Mutation::masked_carry));
  CHECK(caught(Mutation::one_slab));
}

int main(int argc, char** argv) { return check::run(argc, argv); }
