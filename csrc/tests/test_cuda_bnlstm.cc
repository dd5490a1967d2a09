// Persistent kernels of the batch-normalised LSTM.
#include "../cuda/core/bnlstm_backward.cuh"
#include "../cuda/core/bnlstm_forward.cuh"
#include "cuda_bnlstm_trial.h"

namespace trial {

// F, B: the tiles of forward and backward.
template <class D, class F, class B, template <class, class, int> class ExchangeOf>
class Persistent {
  static constexpr int kBuffers = ExchangeOf<D, F, 1>::kBuffers;

 public:
  using Forward = BnLstmForwardParams;
  using Backward = BnLstmBackwardParams;

  std::string run(const BnOptions& o, Forward& p, const std::vector<const void*>& weights) {
    return launch(o, p, weights, BnLstmForward<D, F, ExchangeOf>::kGeometry,
                  [&] { bnlstm_forward_kernel<D, F, ExchangeOf>(p); });
  }
  std::string run(const BnOptions& o, Backward& p, const std::vector<const void*>& weights) {
    return launch(o, p, weights, BnLstmBackward<D, B, ExchangeOf>::kGeometry,
                  [&] { bnlstm_backward_kernel<D, B, ExchangeOf>(p); });
  }

 private:
  template <class P, class Kernel>
  std::string launch(const BnOptions& o, P& p, const std::vector<const void*>& weights, const Geometry& g,
                     Kernel kernel) {
    p.H_padded = round_up(o.H, D::kVec), p.ctas = ceil_div(p.H_padded, g.tile.units);
    std::vector<uint32_t> flags(size_t(o.directions) * p.ctas * kFlagStride, 0);
    p.flags = flags.data();
    std::vector<std::vector<Vec4>> packed;
    std::vector<Tensor<D>> mail;
    const int width = g.values() * p.H_padded;
    for (const void* w : weights) {
      packed.emplace_back(size_t(p.ctas) * g.cta_vectors());
      const PackParams job{w, packed.back().data(), g, o.H, p.H_padded, p.ctas};
      emu::Launch l;
      l.grid = 2, l.block = 256;
      const emu::Report r = emu::launch(l, [&] { pack_kernel<D>(job); });
      if (!r.ok()) return r.error;
      mail.emplace_back(size_t(o.T) * o.N * width);
    }
    for (size_t d = 0; d < weights.size(); d++) {
      p.dir[d].weights = packed[d].data();
      p.dir[d].mail = {mail[d].data(), int64_t{o.N} * width, width};
    }
    emu::Launch l;
    l.grid = o.directions * p.ctas, l.block = g.tile.threads();
    l.cluster = kBuffers ? p.ctas : 1;
    l.shared_bytes = batch_layout(g, D::kFormat, kBuffers, o.N).bytes;
    l.seed = o.seed;
    return emu::launch(l, kernel).error;
  }
};

// Two slices of K up to 128 units, the last chunk in shared memory.
template <class D, int Units, int RowTiles, int Teams>
using BatchTile = Tile<Units, RowTiles, 64 / D::kChunk, 64 / D::kChunk - 1, 2, Teams>;

template <class D, class F, class B, template <class, class, int> class ExchangeOf>
void bnlstm(int most_rows = 33) {
  run_bn_problems<BnTrial<D, Persistent<D, F, B, ExchangeOf>>>(F::kRows, most_rows,
                                                               F::kUnits > 16 ? F::kUnits : 1 << 10);
}

}  // namespace trial

using namespace trial;

TEST(bf16_sentinel) { bnlstm<Bf16, BatchTile<Bf16, 8, 1, 2>, BatchTile<Bf16, 16, 1, 2>, Sentinel>(128); }
TEST(fp16_flags) { bnlstm<Fp16, BatchTile<Fp16, 16, 2, 1>, BatchTile<Fp16, 16, 2, 1>, Flags>(); }
TEST(tf32_sentinel) { bnlstm<Tf32, BatchTile<Tf32, 16, 1, 1>, BatchTile<Tf32, 16, 2, 2>, Sentinel>(64); }
TEST(bf16x3_cluster) { bnlstm<Bf16x3, BatchTile<Bf16x3, 16, 2, 1>, BatchTile<Bf16x3, 16, 1, 2>, Cluster>(); }
TEST(bf16_local) { bnlstm<Bf16, BatchTile<Bf16, 64, 2, 1>, BatchTile<Bf16, 64, 1, 2>, Local>(); }

using Caught = BnTrial<Bf16, Persistent<Bf16, BatchTile<Bf16, 8, 1, 2>, BatchTile<Bf16, 16, 1, 2>, Sentinel>>;
TEST(mutations_are_caught) {
  CHECK(!bn_caught<Caught>(Mutation::none));
  CHECK(bn_caught<Caught>(Mutation::dead_rows_counted));
  CHECK(bn_caught<Caught>(Mutation::statistics_barrier));
  CHECK(bn_caught<Caught>(Mutation::k_permutation));
  CHECK(bn_caught<Caught>(Mutation::dropped_barrier));
  CHECK(bn_caught<Caught>(Mutation::single_reduction_tile));
  CHECK(bn_caught<Caught>(Mutation::rows_missing));
}

int main(int argc, char** argv) { return check::run(argc, argv); }
