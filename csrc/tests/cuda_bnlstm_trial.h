// One problem for the kernels of a batch-normalised LSTM on the emulator, of either family: the double-precision layer's answer, which
// starts, as they do, at the normalised input term, and the comparison.
#pragma once
#include "../cuda/core/bnlstm.h"
#include "cuda_trial.h"
#include "naive_bnlstm.h"

namespace trial {

using BnReference = naive::BnLstm;

struct BnOptions : Options {
  bool batch = true;
};

// Machine: the kernels, run(options, parameters, W_hh of each direction), which returns what went wrong.
template <class D, class Machine>
class BnTrial {
  static constexpr int kGivenRows = 2;

 public:
  std::string failure;
  double worst = 0;
  std::vector<Tensor<D>> results;

  explicit BnTrial(const BnOptions& o) : o_(o), random_(o.N * 1000 + o.H) {
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

  template <class P>
  bool run(const char* what, P& p) {
    p.T = o_.T, p.N = o_.N, p.H = o_.H, p.directions = o_.directions;
    p.lengths = o_.lengths ? lengths_.data() : nullptr;
    p.alive = o_.lengths ? alive_.data() : nullptr;
    p.reset = o_.reset ? reset_.data() : nullptr;
    p.batch = o_.batch, p.eps = 1e-3f;
    std::vector<const void*> weights;
    for (const BnReference& r : layers_) weights.push_back(tensor(r.w_hh).data());
    const std::string went = machine_.run(o_, p, weights);
    if (!went.empty()) failure = std::string(what) + ": " + went;
    return failure.empty();
  }
  Tensor<D>& tensor(const Doubles& v) { return *kept_.emplace_back(new Tensor<D>(v)); }
  Tensor<D>& tensor(size_t n) { return *kept_.emplace_back(new Tensor<D>(n)); }
  float* floats(const Doubles& v) { return floats_.emplace_back(v.begin(), v.end()).data(); }
  Rows rows(void* data, int64_t width) const { return {data, o_.N * width, width}; }
  void expect(const char* name, const Doubles& got, const Doubles& expected) {
    const std::string s = compare<D>(name, got, expected, &worst);
    if (failure.empty()) failure = s;
  }

  void run_forward() {
    const int H = o_.H, TN = o_.T * o_.N, ND = o_.directions;
    typename Machine::Forward p;
    p.wx_is_float = o_.wx_is_float || D::kPerWord == 1;
    std::vector<Tensor<D>*> out[3];
    for (int d = 0; d < ND; d++) {
      const BnReference& r = layers_[d];
      BnLstmForwardDirection& f = p.dir[d];
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
      f.reverse = r.reverse;
    }
    if (!run("forward", p)) return;
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
    typename Machine::Backward p;
    std::vector<Tensor<D>*> dh0, dc0, dz, da, dm;
    for (int d = 0; d < ND; d++) {
      const BnReference& r = layers_[d];
      BnLstmBackwardDirection& b = p.dir[d];
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
      b.reverse = r.reverse;
    }
    if (!run("backward", p)) return;
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
  Machine machine_;
  std::mt19937_64 random_;
  std::vector<int> lengths_, alive_;
  std::vector<uint8_t> reset_;
  std::vector<BnReference> layers_;
  std::vector<std::unique_ptr<Tensor<D>>> kept_;
  std::vector<std::vector<float>> floats_;
  std::vector<float*> used_, cells_;
  std::vector<Tensor<D>*> tape_;
};

// Statistics of the batch and given ones, tails, lengths, resets, both ways through a sequence, batches of one row and of several
// passes, under three schedules.
template <class Trial>
void run_bn_problems(int a_pass, int most_rows, int most_units) {
  std::vector<BnOptions> all(6);
  all[0].T = 3, all[0].N = 11, all[0].H = 72;
  all[1].T = 5, all[1].N = a_pass, all[1].H = 37, all[1].lengths = all[1].reset = true;
  all[1].wx_is_float = false;
  all[2].T = 3, all[2].directions = 2, all[2].N = 21, all[2].H = 24, all[2].lengths = true;
  all[3] = all[1];
  all[3].N = 18, all[3].batch = false, all[3].reverse = true;
  all[4].T = 2, all[4].N = 1, all[4].H = 33;  // one row: given statistics
  all[5].T = 2, all[5].N = most_rows, all[5].H = 18, all[5].lengths = all[5].reset = true;
  double worst = 0;
  for (BnOptions o : all) {
    o.H = std::min(o.H, most_units);
    decltype(Trial::results) first;
    for (o.seed = 1; o.seed <= 3; o.seed++) {
      const Trial trial(o);
      report(__FILE__, __LINE__, o, trial.failure);
      worst = std::max(worst, trial.worst);
      if (o.seed == 1) first = trial.results;
      if (trial.failure.empty()) CHECK(first == trial.results);
    }
  }
  std::printf("  worst error: %.2f of what is allowed\n", worst);
}

template <class Trial>
bool bn_caught(Mutation m) {
  BnOptions o;
  o.N = 37, o.H = 20, o.lengths = o.reset = true, o.mutation = m;
  const Trial trial(o);
  if (!trial.failure.empty()) std::printf("  mutation %d: %s\n", static_cast<int>(m), trial.failure.c_str());
  return !trial.failure.empty();
}

}  // namespace trial
