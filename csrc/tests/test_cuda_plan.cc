// Plans: that what is promised fits, that what does not fit is refused with its reason, and that packed weights hold each
// weight once, where the kernels look for it.
#include "../cuda/core/backward.cuh"
#include "../cuda/core/forward.cuh"
#include "../cuda/core/layernorm.cuh"
#include "../cuda/core/pack.cuh"
#include "../cuda/core/projected.cuh"
#include "../cuda/plan.h"
#include "../cuda/steps/product.cuh"
#include "check.h"

using namespace fastrnn::cuda;

// Plans of persistent kernels: a layer of these cells can always be run step by step.
static std::vector<Plan> persistent(const PlanProblem& q, const Device& device) {
  std::vector<Plan> all;
  for (const Plan& p : candidates(q, device))
    if (p.exchange != ExchangeKind::steps) all.push_back(p);
  return all;
}

static const Device kH100{}, kA100{108, 166912, 65536, 80, 0}, kSmall{24, 101376, 65536, 86, 0};

// A format whose packed words are the weights themselves, in TF32's order.
struct Plain : Format32 {
  static constexpr Format kFormat = Format::tf32;
  template <class Weight>
  static uint32_t weight_word(Weight weight, int q, int s, int high) {
    return prim::float_bits(weight(4 * q + 2 * s + high));
  }
};

template <class Visit>
static void each_problem(Visit visit) {
  for (int cell = 0; cell < 8; cell++)
    for (int format = 0; format < 4; format++)
      for (int backward = 0; backward < 2; backward++)
        for (int directions = 1; directions <= 2; directions++)
          for (int H : {1,   7,   8,   33,   64,   65,   127,  200,  256,  257,
                        500, 512, 700, 1000, 1024, 1025, 1536, 2000, 2048, 2049})
            for (int N : {1, 8, 9, 30, 64, 257, 1000}) {
              PlanProblem q;
              q.cell = static_cast<CellKind>(cell), q.format = static_cast<Format>(format);
              q.backward = backward, q.directions = directions, q.H = H, q.N = N;
              visit(q);
            }
}

TEST(plans_fit_the_device_and_the_problem) {
  for (const Device& device : {kH100, kA100, kSmall})
    each_problem([&](const PlanProblem& q) {
      bool possible_before = true;
      double before = 0;
      for (const Plan& p : candidates(q, device)) {
        CHECK(possible_before || !p.possible());
        possible_before = p.possible();
        if (!p.possible()) continue;
        CHECK(p.step_us >= before);
        before = p.step_us;
        CHECK(p.shared_bytes <= device.shared_bytes);
        if (p.exchange == ExchangeKind::steps) {
          CHECK(p.groups * p.tile.rows() >= q.N && (p.groups - 1) * p.tile.rows() < q.N);
          CHECK_EQ(p.launches, 1);
          continue;
        }
        CHECK(q.directions * p.groups * p.ctas <= device.sms);
        CHECK(p.groups >= 1 && p.launches * p.groups * p.rows >= q.N);
        CHECK((p.launches * p.groups - p.launches) * p.rows < q.N);  // no launch more than needed
        CHECK(p.ctas * p.tile.units >= q.H);
        CHECK((p.ctas - 1) * p.tile.units < round_up(q.H, vector_elements(q.format)));
        CHECK(p.tile.warps * p.tile.chunks * chunk_elements(q.format) >= q.H);
        if (p.exchange == ExchangeKind::cluster) CHECK(p.ctas <= 8 && device.compute_capability >= 90);
        if (p.exchange == ExchangeKind::local) CHECK_EQ(p.ctas, 1);
      }
    });
}

TEST(refusals_say_why) {
  const auto refused = [](const PlanProblem& q, const Device& device, ExchangeKind e, const char* why) {
    for (const Plan& p : candidates(q, device))
      if (p.exchange == e && p.refused == why) return true;
    return false;
  };
  PlanProblem q;
  q.H = 2049;
  for (const Plan& p : persistent(q, kH100)) CHECK(!p.possible());
  CHECK(refused(q, kH100, ExchangeKind::sentinel, "its warps reduce over up to 2048 units"));
  q.H = 65;
  CHECK(refused(q, kH100, ExchangeKind::local, "its warps reduce over up to 64 units"));
  CHECK(refused(q, kA100, ExchangeKind::cluster, "the device has no clusters"));
  q.H = 1024;
  CHECK(refused(q, kSmall, ExchangeKind::sentinel, "a CTA has 99 KiB of shared memory"));
  CHECK(refused(q, kSmall, ExchangeKind::flags, "64 CTAs wait for each other, the device holds 24"));
  q.H = 2048, q.directions = 2;
  CHECK(refused(q, kH100, ExchangeKind::sentinel, "256 CTAs wait for each other, the device holds 132"));
}

TEST(regularised_layers_have_tiles_of_their_own) {
  PlanProblem q;
  q.regularised = true;
  for (const Format format : {Format::bf16, Format::fp16, Format::tf32, Format::bf16x3}) {
    q.format = format;
    q.H = element_bytes(format) == 2 ? 1024 : 512;
    CHECK(persistent(q, kH100).front().possible());
    CHECK(persistent(q, kA100).front().possible());
    q.H++;
    for (const Plan& p : persistent(q, kH100)) CHECK(!p.possible());
  }
}

TEST(highway_layers_are_as_deep_as_shared_memory_allows) {
  PlanProblem q;
  q.cell = CellKind::rhn;
  q.H = 512, q.depth = 6;
  const Plan six = candidates(q, kH100).front();
  CHECK(six.possible());
  CHECK(six.shared_bytes > 6 * 32 * 1024);  // of a CTA: two gates of 16 units, 512 columns, 16 bits
  q.depth = 3;
  CHECK(candidates(q, kH100).front().step_us < six.step_us);
  q.depth = 7;
  for (const Plan& p : persistent(q, kH100)) CHECK(!p.possible());
  q.cell = CellKind::rhn_uncoupled, q.depth = 6;
  for (const Plan& p : persistent(q, kH100)) CHECK(!p.possible());
  q.depth = 4;
  CHECK(persistent(q, kH100).front().possible());
  for (const Plan& p : persistent(q, kSmall)) CHECK(!p.possible());
}

TEST(batch_statistics_need_the_whole_batch_in_a_cta) {
  PlanProblem q;
  q.cell = CellKind::bnlstm;
  const auto most_rows = [&q](const Device& device) {
    int most = 0;
    for (q.N = 1; q.N <= 300; q.N++) {
      const Plan p = persistent(q, device).front();
      if (!p.possible()) continue;
      most = q.N;
      CHECK_EQ(p.groups * p.launches, 1);
      CHECK_EQ(p.rows, q.N);
      CHECK(p.shared_bytes <= device.shared_bytes);
      CHECK_EQ(p.shared_bytes, shared_bytes(q.cell, p.tile, q.backward, q.format, p.exchange, q.N));
    }
    return most;
  };
  for (const bool backward : {false, true})
    for (const Format format : {Format::bf16, Format::tf32})
      for (const int H : {1, 100, 128, 129, 512}) {
        q.backward = backward, q.format = format, q.H = H, q.directions = H > 128 ? 1 : 2;
        CHECK(most_rows(kH100) >= 256);
        CHECK(most_rows(kA100) >= 128);
        q.directions = 1;
        if (H <= 128) CHECK(most_rows(kSmall) >= 64);
      }
  q.N = 300;
  for (const Plan& p : persistent(q, kH100)) {
    const bool wide = p.refused.find("its warps reduce") != std::string::npos;
    CHECK(wide || p.refused.find("statistics are over the whole batch, and with 300 rows") == 0);
  }
  q.N = 64, q.H = 100, q.format = Format::bf16;
  CHECK_EQ(candidates(q, kH100).front().tile.rows(), 64);
  q.H = 513;
  for (const Plan& p : persistent(q, kH100)) CHECK(!p.possible());
}
TEST(batch_statistics_of_more_rows_are_made_step_by_step) {
  PlanProblem q;
  q.cell = CellKind::bnlstm;
  for (const bool backward : {false, true})
    for (const Device& device : {kH100, kA100, kSmall})
      for (const auto& [N, H] : {std::pair<int, int>{1, 513}, {1000, 100}, {5000, 33}, {64, 4096}}) {
        q.backward = backward, q.N = N, q.H = H;
        const Plan p = candidates(q, device).front();
        CHECK(p.possible() && p.exchange == ExchangeKind::steps);
        CHECK_EQ(p.of_a_step, 2);
      }
  q.N = 64, q.H = 100;
  const Plan persistent_one = candidates(q, kH100).front();
  CHECK(persistent_one.exchange == ExchangeKind::sentinel);
  // More rows and more units take longer, and there is a pass over the rows for each kind of sum.
  const auto step_us = [&q](int N, int H) {
    q.N = N, q.H = H;
    return steps_plan(q, kH100, false).step_us;
  };
  CHECK(step_us(300, 512) < step_us(3000, 512) && step_us(300, 512) < step_us(300, 4096));
  q.N = 1 << 20, q.H = 4096;
  for (const Plan& p : candidates(q, kH100)) CHECK(!p.possible());
}

TEST(projected_layers_have_tiles_of_their_own) {
  PlanProblem q;
  q.cell = CellKind::lstm_projected;
  for (const bool backward : {false, true})
    for (const Format format : {Format::bf16, Format::fp16, Format::tf32, Format::bf16x3}) {
      q.backward = backward, q.format = format;
      q.H = element_bytes(format) == 2 ? 1024 : 512;
      CHECK(candidates(q, kH100).front().possible());
      CHECK(candidates(q, kA100).front().possible());
      q.H++;
      for (const Plan& p : candidates(q, kH100)) CHECK(!p.possible());
    }
  const TileShape tile{16, 1, 4, 3, 8};
  for (const bool backward : {false, true})
    CHECK_EQ(shared_bytes(CellKind::lstm_projected, tile, backward, Format::bf16, ExchangeKind::sentinel, 1),
             (backward ? ProjectedBackward<Bf16, Tile<16, 1, 4, 3, 8>, Sentinel>::kLayout.bytes
                       : ProjectedForward<Bf16, Tile<16, 1, 4, 3, 8>, Sentinel>::kLayout.bytes));
}

template <class Layer>
static void agrees_with_layer_norm(const TileShape& tile, bool backward, ExchangeKind exchange) {
  const bool lstm = Layer::kGeometry.phase[0].gates.count == 4;
  const CellKind cell = lstm ? CellKind::lstm_layer_norm : CellKind::gru_layer_norm;
  CHECK_EQ(shared_bytes(cell, tile, backward, Format::bf16, exchange, 1), Layer::kSharedBytes);
}
TEST(layer_norm_has_tiles_of_its_own) {
  PlanProblem q;
  for (const CellKind cell : {CellKind::lstm_layer_norm, CellKind::gru_layer_norm})
    for (const Format format : {Format::bf16, Format::fp16, Format::tf32, Format::bf16x3}) {
      q.format = format;
      q.H = element_bytes(format) == 2 ? 1024 : 512;
      for (const bool backward : {false, true}) {
        q.backward = backward, q.cell = cell;
        const Plan normed = candidates(q, kH100).front();
        CHECK(normed.possible());
        CHECK(candidates(q, kA100).front().possible());
        q.cell = cell == CellKind::lstm_layer_norm ? CellKind::lstm : CellKind::gru;
        CHECK(candidates(q, kH100).front().step_us < normed.step_us);
      }
      q.cell = cell, q.H++;
      for (const Plan& p : candidates(q, kH100)) CHECK(!p.possible());
    }
  agrees_with_layer_norm<LayerNormForward<LayerNormLstm, Bf16, Tile<64, 1, 1, 0, 4>, Local>>(
      {64, 1, 1, 0, 4}, false, ExchangeKind::local);
  agrees_with_layer_norm<LayerNormBackward<LayerNormGru, Bf16, Tile<16, 2, 2, 2, 8>, Sentinel>>(
      {16, 2, 2, 2, 8}, true, ExchangeKind::sentinel);
}

TEST(beyond_capacity_every_step_is_launched) {
  PlanProblem q;
  for (const bool backward : {false, true})
    for (const Device& device : {kH100, kA100, kSmall})
      for (const int N : {1, 30, 1000}) {
        q.backward = backward, q.N = N, q.H = 4096;
        const Plan p = candidates(q, device).front();
        CHECK(p.possible() && p.exchange == ExchangeKind::steps);
        CHECK_EQ(p.of_a_step, 2);
      }
  CHECK(candidates(q, kH100).front().tile.rows() > 32);  // arithmetic decides
  q.N = 8;
  CHECK_EQ(candidates(q, kH100).front().tile.rows(), 32);  // the weights do
  q.H = 512;
  CHECK(candidates(q, kH100).front().exchange != ExchangeKind::steps);
  for (const bool normed : {false, true}) {
    q.O = normed ? 0 : 256, q.normed = normed;
    const std::vector<Plan> all = candidates(q, kH100);
    CHECK(all.front().exchange == ExchangeKind::steps);
    CHECK_EQ(all.front().of_a_step, normed ? 2 : 4);
    CHECK(all.back().refused.find(normed ? "no layer norm" : "no projection") != std::string::npos);
  }
  q = PlanProblem{};
  q.N = 1 << 20, q.H = 4096;
  for (const Plan& p : candidates(q, kH100)) CHECK(!p.possible());
}

TEST(highway_layers_of_any_depth_and_size) {
  PlanProblem q;
  const struct {
    int N, H, depth;
  } beyond[] = {{20, 830, 10}, {20, 1024, 5}, {8, 4096, 3}, {1, 64, 40}};
  for (const CellKind cell : {CellKind::rhn, CellKind::rhn_uncoupled})
    for (const Format format : {Format::bf16, Format::fp16, Format::tf32, Format::bf16x3})
      for (const bool backward : {false, true})
        for (const auto& b : beyond) {
          q.cell = cell, q.format = format, q.backward = backward, q.N = b.N, q.H = b.H, q.depth = b.depth;
          const Plan p = candidates(q, kH100).front();
          CHECK(p.possible() && p.exchange == ExchangeKind::steps);
          CHECK_EQ(p.of_a_step, 2 * q.depth);
          const double us = p.step_us;
          q.depth *= 2;
          CHECK(candidates(q, kH100).front().step_us >= 2 * us);
        }
  // What stays on the chip is faster with few rows, and reading all rows in every CTA is slower with many.
  q = PlanProblem{};
  q.cell = CellKind::rhn, q.H = 512, q.depth = 3, q.N = 8;
  CHECK(candidates(q, kH100).front().exchange == ExchangeKind::sentinel);
  q.N = 1000;
  CHECK(candidates(q, kH100).front().exchange == ExchangeKind::steps);
  // A mask for each gate is for these alone.
  q.N = 8, q.gate_masks = true;
  CHECK(candidates(q, kH100).front().exchange == ExchangeKind::steps);
  for (const Plan& p : persistent(q, kH100)) CHECK(p.refused == "it has one mask of the state for all gates");
}

// Each weight of a product's matrix is where a lane of the tensor core looks for it, once.
static void steps_round_trip(CellKind cell, bool backward, int H, int O, int which) {
  const StepsTile tile{2, 1, 1, 1, 1, 2, 2};
  StepsPack p;
  p.tile = tile;
  p.matrix = steps_matrix(cell, backward, O > 0, Format::tf32, H, O ? O : H, which);
  const StepsMatrix& m = p.matrix;
  const int rows = cell_shape(cell).gates * H > O ? cell_shape(cell).gates * H : O;
  std::vector<float> w(size_t(rows) * m.columns);
  for (size_t i = 0; i < w.size(); i++) w[i] = float(i + 1);
  p.weights = w.data();
  std::vector<uint8_t> seen(w.size());
  size_t found = 0;
  for (int64_t v = 0; v < steps_packed_vectors(tile, m, Format::tf32); v++) {
    const Vec4 packed = steps_packed_vector<Plain>(p, v);
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
    const int stages = steps_stages(tile, m.inner(), Format::tf32), lane = v % 32, s = v / 32 % 2;
    const int m_tile = v / 64 % tile.m_tiles, chunk = v / 64 / tile.m_tiles % (tile.chunks * stages);
    const int cta = v / tile.weight_vectors() / stages;
    for (int r = 0; r < 4; r++) {
      const float number = prim::bits_float(words[r]);
      if (number == 0) continue;
      const int k = chunk * 16 + 4 * (lane % 4) + 2 * s + r / 2;
      const int o = cta * tile.outputs() + m_tile * 16 + lane / 4 + r % 2 * 8;
      const int inner = k / m.inner_padded * m.inner_units + k % m.inner_padded;
      const size_t expected = m.transposed ? size_t(m.first_row + inner) * m.columns + o
                                           : size_t(m.first_row + o) * m.columns + inner;
      CHECK_EQ(static_cast<size_t>(number) - 1, expected);
      seen[expected]++;
      found++;
    }
  }
  CHECK_EQ(found, size_t(m.outputs) * m.values * m.inner_units);
  CHECK(std::all_of(seen.begin(), seen.end(), [](uint8_t n) { return n <= 1; }));
}
TEST(packing_of_products_round_trips) {
  for (const bool backward : {false, true})
    for (int H = 1; H <= 70; H += 9) {
      for (int cell = 0; cell < 5; cell++) steps_round_trip(static_cast<CellKind>(cell), backward, H, 0, 0);
      steps_round_trip(CellKind::bnlstm, backward, H, 0, 0);
      steps_round_trip(CellKind::gru_reset_before, backward, H, 0, 1);
      for (const int which : {0, 1}) steps_round_trip(CellKind::lstm, backward, H, 21, which);
    }
}

TEST(small_layers_stay_in_one_cluster_or_cta) {
  PlanProblem q;
  q.H = 64, q.N = 8;
  CHECK(candidates(q, kH100).front().exchange == ExchangeKind::cluster);
  CHECK(candidates(q, kA100).front().exchange != ExchangeKind::cluster);
  q.N = 1000;
  CHECK(candidates(q, kH100).front().exchange == ExchangeKind::local);
  q.H = 1024;
  CHECK(candidates(q, kH100).front().exchange == ExchangeKind::steps);
  q.N = 16;
  CHECK(candidates(q, kH100).front().exchange == ExchangeKind::sentinel);
}

// The kernels' compile-time view of a tile is the plan's.
template <class Cell, class D, class T, template <class, class, int> class E>
static void agrees(ExchangeKind exchange) {
  const auto expected = [&](bool backward) {
    return shared_layout(geometry_of(cell_shape(Cell::kKind), T::kShape, backward), D::kFormat,
                         mail_buffers(exchange));
  };
  CHECK_EQ((Forward<Cell, D, T, E>::kLayout.bytes), expected(false).bytes);
  CHECK_EQ((Backward<Cell, D, T, E>::kLayout.bytes), expected(true).bytes);
}
// Weights of a whole batch's kernels: a team's warps have those of one warp without teams.
TEST(teams_share_packed_weights) {
  const TileShape one{16, 2, 2, 2, 2}, four{16, 2, 2, 2, 2, 4};
  CHECK_EQ(four.rows(), 4 * one.rows());
  CHECK_EQ(four.threads(), 4 * one.threads());
  for (const bool backward : {false, true}) {
    const CellShape cell = cell_shape(CellKind::bnlstm);
    CHECK_EQ(geometry_of(cell, four, backward).cta_vectors(), geometry_of(cell, one, backward).cta_vectors());
  }
}
TEST(shared_memory_is_what_the_plan_says) {
  agrees<Lstm, Bf16, Tile<16, 1, 8, 5, 8>, Sentinel>(ExchangeKind::sentinel);
  agrees<Gru<false>, Bf16, Tile<32, 1, 1, 1, 8>, Cluster>(ExchangeKind::cluster);
  agrees<Gru<true>, Tf32, Tile<64, 1, 1, 0, 2>, Local>(ExchangeKind::local);
  CHECK_EQ(static_cast<int>(Lstm::kTape), 4);
}

// Weight number i + 1 at W_hh[i]: every one is found exactly once, between the units and gates that its place says.
static void round_trip(CellKind cell, bool backward, const TileShape& tile, int H) {
  const CellShape shape = cell_shape(cell);
  const Geometry g = geometry_of(shape, tile, backward);
  PackParams p;
  p.geometry = g;
  p.H = H, p.H_padded = round_up(H, 4), p.ctas = ceil_div(p.H_padded, tile.units);
  std::vector<float> w(size_t(shape.gates) * H * H);
  for (size_t i = 0; i < w.size(); i++) w[i] = float(i + 1);
  p.weights = w.data();
  std::vector<uint8_t> seen(w.size());
  for (int64_t v = 0; v < int64_t{p.ctas} * g.cta_vectors(); v++) {
    const Vec4 packed = packed_vector<Plain>(p, v);
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
    const int cta = v / g.cta_vectors(), warp = v % g.cta_vectors() / g.warp_vectors();
    int at = v % g.warp_vectors();
    const int phase = at >= g.phase[0].vectors();
    const PhaseShape& ph = g.phase[phase];
    at -= phase * g.phase[0].vectors();
    const int lane = at % 32, s = at / 32 % 2, chunk = at / 64 % ph.chunks, m = at / 64 / ph.chunks;
    for (int r = 0; r < 4; r++) {
      const float number = prim::bits_float(words[r]);
      // What the tensor core multiplies this word with, and where the product goes.
      const int k = (((warp + cta) % tile.warps) * ph.chunks + chunk) * 16 + 4 * (lane % 4) + 2 * s + r / 2;
      const int tile_row = m * 16 + lane / 4 + r % 2 * 8;
      const int unit = cta * tile.units + tile_row % tile.units;
      const int gate = ph.gates.first + (backward ? k / p.H_padded : tile_row / tile.units);
      const int j = backward ? k % p.H_padded : k;
      const bool exists = unit < H && j < H && gate < ph.gates.first + ph.gates.count;
      if (number == 0) {
        CHECK(!exists);
        continue;
      }
      const size_t index = static_cast<size_t>(number) - 1;
      const size_t expected =
          backward ? (size_t(gate) * H + j) * H + unit : (size_t(gate) * H + unit) * H + j;
      CHECK(exists);
      CHECK_EQ(index, expected);
      seen[index]++;
    }
  }
  CHECK(std::all_of(seen.begin(), seen.end(), [](uint8_t n) { return n == 1; }));
}

TEST(packing_round_trips) {
  for (int cell = 0; cell < 8; cell++)
    for (bool backward : {false, true}) {
      for (int H = 1; H <= 64; H += 3) round_trip(static_cast<CellKind>(cell), backward, {16, 1, 2, 1, 2}, H);
      round_trip(static_cast<CellKind>(cell), backward, {16, 1, 4, 4, 8}, 300);
      round_trip(static_cast<CellKind>(cell), backward, {32, 1, 1, 0, 2}, 31);
    }
}

int main(int argc, char** argv) { return check::run(argc, argv); }
