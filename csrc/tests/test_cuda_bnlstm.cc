// Batch-normalised LSTM kernels on the emulator, against a scalar double layer that starts, as they do, at the normalised
// input term.
#include "../cuda/core/bnlstm_backward.cuh"
#include "../cuda/core/bnlstm_forward.cuh"
#include "cuda_bnlstm_reference.h"
#include "cuda_trial.h"

namespace trial {

struct BnOptions : Options {
  bool batch = true;
};

// F, B: the tiles of forward and backward.
template <class D, class F, class B, template <class, class, int> class ExchangeOf>
class BnTrial {
  using ForwardLayer = BnLstmForward<D, F, ExchangeOf>;
  using BackwardLayer = BnLstmBackward<D, B, ExchangeOf>;
  static constexpr int kBuffers = ExchangeOf<D, F, 1>::kBuffers;
  static constexpr int kGivenRows = 2;

 public:
  std::string failure;
  double worst = 0;
  std::vector<Tensor<D>> results;

  explicit BnTrial(const BnOptions& o) : o_(o), random_(o.N * 1000 + o.H) {
    hp_ = round_up(o.H, D::kVec);
    make_problem();
    emu::machine().mutation = static_cast<int>(o.mutation);
    run_forward();
    if (failure.empty()) run_backward();
    emu::machine().mutation = 0;
  }

 private:
  Doubles draw(size_t n, double scale, double middle = 0) {
    Doubles v(n);
    for (double& x : v) x = middle + scale * std::normal_distribution<double>()(random_);
    return v;
  }

  void make_problem() {
    const int H = o_.H, TN = o_.T * o_.N;
    lengths_.assign(o_.N, o_.T);
    for (int n = 0; o_.lengths && n < o_.N; n++) lengths_[n] = 1 + (n * 5 + o_.T - 1) % o_.T;
    for (int i = 0; o_.reset && i < TN; i++) reset_.push_back(random_() % 4 == 0);
    for (int d = 0; d < o_.directions; d++) {
      BnReference r{};
      r.T = o_.T, r.N = o_.N, r.H = H, r.batch = o_.batch, r.eps = 1e-3, r.given_rows = kGivenRows;
      r.reverse = o_.directions == 2 ? d == 1 : o_.reverse;
      r.lengths = lengths_, r.reset = reset_;
      r.wx = draw(size_t(TN) * 4 * H, 0.6);
      r.w_hh = draw(size_t(4) * H * H, 1 / std::sqrt(double(H)));
      r.gamma_h = draw(4 * H, 0.05, 0.15), r.gamma_c = draw(H, 0.1, 0.3), r.beta_c = draw(H, 0.2);
      r.h0 = draw(o_.N * H, 0.7), r.c0 = draw(o_.N * H, 0.7);
      r.dy = draw(TN * H, 1), r.dcells = draw(TN * H, 1);
      r.dh_n = draw(o_.N * H, 1), r.dc_n = draw(o_.N * H, 1);
      for (int n = 0; n < o_.N; n++)  // nothing arrives past a row's end
        for (int i = lengths_[n] * o_.N + n; i < TN; i += o_.N) std::fill_n(r.dcells.begin() + i * H, H, 0.0);
      for (int term = 0; term < 2; term++) {
        r.mean[term] = draw(kGivenRows * (term ? H : 4 * H), 0.2);
        r.var[term] = draw(kGivenRows * (term ? H : 4 * H), 0.05, 0.5);
      }
      for (Doubles* v : {&r.wx, &r.w_hh, &r.h0, &r.c0, &r.dy, &r.dh_n, &r.dc_n}) round_all<D>(*v);
      r.run();
      layers_.push_back(std::move(r));
    }
    for (int s = 0; s < o_.T; s++) alive_.push_back(layers_[0].alive(s));
  }

  // As plan.h: a cluster's size is a power of two.
  int ctas(const TileShape& t) const {
    int n = ceil_div(hp_, t.units);
    while (kBuffers == 2 && n & (n - 1)) n++;
    return n;
  }
  template <class P>
  void fill(P& p, const TileShape& t) {
    p.T = o_.T, p.N = o_.N, p.H = o_.H, p.H_padded = hp_;
    p.directions = o_.directions, p.ctas = ctas(t);
    p.lengths = o_.lengths ? lengths_.data() : nullptr;
    p.alive = o_.lengths ? alive_.data() : nullptr;
    p.reset = o_.reset ? reset_.data() : nullptr;
    flags_.assign(size_t(o_.directions) * p.ctas * kFlagStride, 0);
    p.flags = flags_.data();
    p.batch = o_.batch, p.eps = 1e-3f;
  }

  template <class Kernel>
  bool launch(const char* what, const Geometry& g, Kernel kernel) {
    emu::Launch l;
    l.grid = o_.directions * ctas(g.tile), l.block = g.tile.threads();
    l.cluster = kBuffers ? ctas(g.tile) : 1;
    l.shared_bytes = batch_layout(g, D::kFormat, kBuffers, o_.N).bytes;
    l.seed = o_.seed;
    const emu::Report r = emu::launch(l, kernel);
    if (!r.ok()) failure = std::string(what) + ": " + r.error;
    return r.ok();
  }
  const Vec4* pack(const Doubles& w, const Geometry& g) {
    packed_.emplace_back(size_t(ctas(g.tile)) * g.cta_vectors());
    const PackParams p{tensor(w).data(), packed_.back().data(), g, o_.H, hp_, ctas(g.tile)};
    emu::Launch l;
    l.grid = 2, l.block = 256;
    const emu::Report r = emu::launch(l, [&] { pack_kernel<D>(p); });
    if (!r.ok()) failure = r.error;
    return p.packed;
  }
  Tensor<D>& tensor(const Doubles& v) { return *kept_.emplace_back(new Tensor<D>(v)); }
  Tensor<D>& tensor(size_t n) { return *kept_.emplace_back(new Tensor<D>(n)); }
  float* floats(const Doubles& v) { return floats_.emplace_back(v.begin(), v.end()).data(); }
  Rows rows(void* data, int64_t width) const { return {data, o_.N * width, width}; }
  Mail mail(int64_t width) { return {tensor(size_t(o_.T) * o_.N * width).data(), o_.N * width, width}; }
  void expect(const char* name, const Doubles& got, const Doubles& expected) {
    const std::string s = compare<D>(name, got, expected, &worst);
    if (failure.empty()) failure = s;
  }

  void run_forward() {
    const int H = o_.H, TN = o_.T * o_.N, ND = o_.directions;
    BnLstmForwardParams p;
    fill(p, F::kShape);
    p.wx_is_float = o_.wx_is_float || D::kPerWord == 1;
    std::vector<Tensor<D>*> out[3];
    for (int d = 0; d < ND; d++) {
      const BnReference& r = layers_[d];
      BnLstmForwardDirection& f = p.dir[d];
      f.weights = pack(r.w_hh, ForwardLayer::kGeometry);
      f.wx = rows(p.wx_is_float ? static_cast<void*>(floats(r.wx)) : tensor(r.wx).data(), 4 * H);
      f.gamma_h = floats(r.gamma_h), f.gamma_c = floats(r.gamma_c), f.beta_c = floats(r.beta_c);
      for (int term = 0; term < 2; term++) {
        f.given[term] = {floats(r.mean[term]), floats(r.var[term]), kGivenRows};
        used_.push_back(floats(Doubles(r.used[term].size(), NAN)));
        f.used[term] = used_.back();
      }
      f.h0 = tensor(r.h0).data(), f.c0 = tensor(r.c0).data();
      out[0].push_back(&tensor(size_t(TN) * H));
      for (int i : {1, 2}) out[i].push_back(&tensor(size_t(o_.N) * H));
      f.y = rows(out[0][d]->data(), H);
      f.h_n = out[1][d]->data(), f.c_n = out[2][d]->data();
      tape_.push_back(&tensor(size_t(TN) * 8 * H));
      f.tape = rows(tape_[d]->data(), 8 * H);
      cells_.push_back(floats(Doubles(TN * H, NAN)));
      f.cells = rows(cells_[d], H);
      f.mail = mail(hp_);
      f.reverse = r.reverse;
    }
    if (!failure.empty() ||
        !launch("forward", ForwardLayer::kGeometry, [&] { bnlstm_forward_kernel<D, F, ExchangeOf>(p); }))
      return;
    for (int d = 0; d < ND; d++) {
      const BnReference& r = layers_[d];
      expect("y", out[0][d]->doubles(), r.y);
      expect("h_n", out[1][d]->doubles(), r.h_n);
      expect("c_n", out[2][d]->doubles(), r.c_n);
      expect("cells", Doubles(cells_[d], cells_[d] + TN * H), r.cells);
      for (int term = 0; term < 2; term++) {
        const float* got = used_[2 * d + term];
        expect(term ? "cell statistics" : "statistics", Doubles(got, got + r.used[term].size()),
               r.used[term]);
      }
      for (auto& o : out) results.push_back(*o[d]);
    }
  }

  void run_backward() {
    const int H = o_.H, TN = o_.T * o_.N, ND = o_.directions;
    BnLstmBackwardParams p;
    fill(p, B::kShape);
    std::vector<Tensor<D>*> dh0, dc0, dz, da, dm;
    for (int d = 0; d < ND; d++) {
      const BnReference& r = layers_[d];
      BnLstmBackwardDirection& b = p.dir[d];
      b.weights = pack(r.w_hh, BackwardLayer::kGeometry);
      b.dy = rows(tensor(r.dy).data(), H), b.dcells = rows(floats(r.dcells), H);
      b.dh_n = tensor(r.dh_n).data(), b.dc_n = tensor(r.dc_n).data();
      b.gamma_h = floats(r.gamma_h), b.gamma_c = floats(r.gamma_c), b.beta_c = floats(r.beta_c);
      b.used[0] = used_[2 * d], b.used[1] = used_[2 * d + 1];
      b.c0 = tensor(r.c0).data();
      b.tape = rows(tape_[d]->data(), 8 * H), b.cells = rows(cells_[d], H);
      dh0.push_back(&tensor(size_t(o_.N) * H)), dc0.push_back(&tensor(size_t(o_.N) * H));
      b.dh0 = dh0[d]->data(), b.dc0 = dc0[d]->data();
      dz.push_back(&tensor(size_t(TN) * 4 * H)), da.push_back(&tensor(size_t(TN) * 4 * H));
      dm.push_back(&tensor(size_t(TN) * H));
      b.dgates = rows(dz[d]->data(), 4 * H), b.dgates_h = rows(da[d]->data(), 4 * H);
      b.dm = rows(dm[d]->data(), H);
      b.mail = mail(4 * hp_);
      b.reverse = r.reverse;
    }
    if (!failure.empty() ||
        !launch("backward", BackwardLayer::kGeometry, [&] { bnlstm_backward_kernel<D, B, ExchangeOf>(p); }))
      return;
    for (int d = 0; d < ND; d++) {
      const BnReference& r = layers_[d];
      expect("dh0", dh0[d]->doubles(), r.dh0);
      expect("dc0", dc0[d]->doubles(), r.dc0);
      expect("dwx", dz[d]->doubles(), r.dz);
      check_products(d, *dz[d], *da[d], *dm[d]);
      for (Tensor<D>* t : {dh0[d], dc0[d], dz[d], da[d], dm[d]}) results.push_back(*t);
    }
  }

  // The host's products, from what the kernels stored.
  void check_products(int d, const Tensor<D>& dz, const Tensor<D>& da, const Tensor<D>& dm) {
    const BnReference& r = layers_[d];
    const int H = o_.H;
    const float* used = used_[2 * d + 1];
    Doubles dw_hh(r.dw_hh.size(), 0.0), dgamma_h(4 * H, 0.0), dgamma_c(H, 0.0), dbeta_c(H, 0.0);
    for (int n = 0; n < o_.N; n++)
      for (int s = 0; s < lengths_[n]; s++) {
        const size_t at = r.at(s, n);
        for (int g = 0; g < 4 * H; g++) {
          dgamma_h[g] += dz[at * 4 * H + g] * (*tape_[d])[at * 8 * H + 4 * H + g];
          for (int j = 0; j < H && !r.resets(s, n); j++)
            dw_hh[size_t(g) * H + j] +=
                da[at * 4 * H + g] * (s ? r.y[r.at(s - 1, n) * H + j] : r.h0[n * H + j]);
        }
        for (int j = 0; j < H; j++) {
          const double c_hat =
              (cells_[d][at * H + j] - used[s * H + j]) / std::sqrt(used[(o_.T + s) * H + j] + r.eps);
          dgamma_c[j] += dm[at * H + j] * c_hat;
          dbeta_c[j] += dm[at * H + j];
        }
      }
    expect("dw_hh", dw_hh, r.dw_hh);
    expect("dgamma_h", dgamma_h, r.dgamma_h);
    expect("dgamma_c", dgamma_c, r.dgamma_c);
    expect("dbeta_c", dbeta_c, r.dbeta_c);
  }

  const BnOptions o_;
  std::mt19937_64 random_;
  int hp_;
  std::vector<int> lengths_, alive_;
  std::vector<uint8_t> reset_;
  std::vector<uint32_t> flags_;
  std::vector<BnReference> layers_;
  std::vector<std::unique_ptr<Tensor<D>>> kept_;
  std::vector<std::vector<float>> floats_;
  std::vector<std::vector<Vec4>> packed_;
  std::vector<float*> used_, cells_;
  std::vector<Tensor<D>*> tape_;
};

// Two slices of K up to 128 units, the last chunk in shared memory.
template <class D, int Units, int RowTiles, int Teams>
using BatchTile = Tile<Units, RowTiles, 64 / D::kChunk, 64 / D::kChunk - 1, 2, Teams>;

template <class D, class F, class B, template <class, class, int> class ExchangeOf>
void bnlstm(int most_rows = 33) {
  std::vector<BnOptions> all(6);
  all[0].T = 3, all[0].N = 11, all[0].H = 72;
  all[1].T = 5, all[1].N = F::kRows, all[1].H = 37, all[1].lengths = all[1].reset = true;
  all[1].wx_is_float = false;
  all[2].T = 3, all[2].directions = 2, all[2].N = 21, all[2].H = 24, all[2].lengths = true;
  all[3] = all[1];
  all[3].N = 18, all[3].batch = false, all[3].reverse = true;
  all[4].T = 2, all[4].N = 1, all[4].H = 33;  // one row: given statistics
  all[5].T = 2, all[5].N = most_rows, all[5].H = 18, all[5].lengths = all[5].reset = true;
  double worst = 0;
  for (BnOptions o : all) {
    if (F::kUnits > 16) o.H = std::min(o.H, F::kUnits);
    std::vector<Tensor<D>> first;
    for (o.seed = 1; o.seed <= 3; o.seed++) {
      const BnTrial<D, F, B, ExchangeOf> trial(o);
      report(__FILE__, __LINE__, o, trial.failure);
      worst = std::max(worst, trial.worst);
      if (o.seed == 1) first = trial.results;
      if (trial.failure.empty()) CHECK(first == trial.results);
    }
  }
  std::printf("  worst error: %.2f of what is allowed\n", worst);
}

inline bool caught(Mutation m) {
  BnOptions o;
  o.N = 37, o.H = 20, o.lengths = o.reset = true, o.mutation = m;
  const BnTrial<Bf16, BatchTile<Bf16, 8, 1, 2>, BatchTile<Bf16, 16, 1, 2>, Sentinel> trial(o);
  if (!trial.failure.empty()) std::printf("  mutation %d: %s\n", static_cast<int>(m), trial.failure.c_str());
  return !trial.failure.empty();
}

}  // namespace trial

using namespace trial;

TEST(bf16_sentinel) { bnlstm<Bf16, BatchTile<Bf16, 8, 1, 2>, BatchTile<Bf16, 16, 1, 2>, Sentinel>(128); }
TEST(fp16_flags) { bnlstm<Fp16, BatchTile<Fp16, 16, 2, 1>, BatchTile<Fp16, 16, 2, 1>, Flags>(); }
TEST(tf32_sentinel) { bnlstm<Tf32, BatchTile<Tf32, 16, 1, 1>, BatchTile<Tf32, 16, 2, 2>, Sentinel>(64); }
TEST(bf16x3_cluster) { bnlstm<Bf16x3, BatchTile<Bf16x3, 16, 2, 1>, BatchTile<Bf16x3, 16, 1, 2>, Cluster>(); }
TEST(bf16_local) { bnlstm<Bf16, BatchTile<Bf16, 64, 2, 1>, BatchTile<Bf16, 64, 1, 2>, Local>(); }

TEST(mutations_are_caught) {
  CHECK(!caught(Mutation::none));
  CHECK(caught(Mutation::dead_rows_counted));
  CHECK(caught(Mutation::statistics_barrier));
  CHECK(caught(Mutation::k_permutation));
  CHECK(caught(Mutation::dropped_barrier));
  CHECK(caught(Mutation::single_reduction_tile));
  CHECK(caught(Mutation::rows_missing));
}

int main(int argc, char** argv) { return check::run(argc, argv); }
