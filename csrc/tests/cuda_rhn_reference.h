// Recurrent Highway layers on the emulator: one problem, the comparison.
#pragma once
#include "../cuda/core/rhn.cuh"
#include "cuda_trial.h"
#include "naive_rhn.h"

namespace trial {

using RhnReference = naive::Rhn;

struct RhnOptions : Options {
  int depth = 3;
  bool masked = true, bias = true;
  bool gate_masks = false;  // of the state, one for each gate
  std::string text() const {
    return Options::text() + " depth=" + std::to_string(depth) + " masked=" + std::to_string(masked) +
           " gate_masks=" + std::to_string(gate_masks) + " bias=" + std::to_string(bias);
  }
};

// One problem, and the verdict on what kernels left of it.
template <class Cell, class D>
class RhnProblem {
 public:
  std::string failure;
  double worst = 0;
  std::vector<Tensor<D>> results;  // for comparison to the bit

 protected:
  static constexpr int G = Cell::kG, kTape = Cell::kTape;

  explicit RhnProblem(const RhnOptions& o) : o_(o), random_(o.N * 1000 + o.H) { make_problem(); }

  Doubles draw(size_t n, double scale) {
    Doubles v(n);
    for (double& x : v) x = scale * std::normal_distribution<double>()(random_);
    return v;
  }
  // Inverted dropout masks, or ones.
  Doubles mask(size_t n) {
    Doubles v(n, 1.0);
    for (double& x : v)
      if (o_.masked) x = random_() % 4 ? 1.25 : 0;
    return v;
  }

  void make_problem() {
    const int H = o_.H, L = o_.depth;
    lengths_.assign(o_.N, o_.T);
    for (int n = 0; o_.lengths && n < o_.N; n++) lengths_[n] = 1 + (n * 5 + o_.T - 1) % o_.T;
    if (o_.reset)
      for (int i = 0; i < o_.T * o_.N; i++) reset_.push_back(random_() % 4 == 0);
    for (int d = 0; d < o_.directions; d++) {
      RhnReference r{};
      r.T = o_.T, r.N = o_.N, r.H = H, r.I = 3, r.G = G, r.depth = L;
      r.reverse = o_.directions == 2 ? d == 1 : o_.reverse;
      r.lengths = lengths_, r.reset = reset_;
      r.w_ih = draw(G * H * 3, 0.5);
      r.w_hh = draw(size_t(L) * G * H * H, 0.7 / std::sqrt(double(H)));
      r.bias = o_.bias ? draw(L * G * H, 0.3) : Doubles(L * G * H, 0.0);
      r.x = draw(o_.T * o_.N * 3, 0.7);
      r.h0 = o_.initial ? draw(o_.N * H, 0.5) : Doubles(o_.N * H, 0.0);
      r.x_mask = mask(o_.N * 3), r.s_mask = mask((o_.gate_masks ? G : 1) * o_.N * H);
      r.dy = draw(o_.T * o_.N * H, 1);
      r.dh_n = draw(o_.N * H, 1);
      for (Doubles* v : {&r.w_hh, &r.h0, &r.dy, &r.dh_n}) round_all<D>(*v);
      r.run();
      layers_.push_back(std::move(r));
    }
  }

  Tensor<D>& tensor(const Doubles& v) { return *kept_.emplace_back(new Tensor<D>(v)); }
  Tensor<D>& tensor(size_t n) { return *kept_.emplace_back(new Tensor<D>(n)); }
  Rows rows(void* data, int64_t width, int parts = 1) const {
    return {data, o_.N * width * parts, width * parts};
  }
  void expect(const char* name, const Doubles& got, const Doubles& expected) {
    const std::string s = compare<D>(name, got, expected, &worst);
    if (failure.empty()) failure = s;
  }
  // y: of all directions side by side.
  void check_outputs(const Tensor<D>& y, const std::vector<Tensor<D>*>& h_n) {
    const int H = o_.H, ND = o_.directions;
    for (int d = 0; d < ND; d++) {
      Doubles got(size_t(o_.T) * o_.N * H);
      for (size_t i = 0; i < got.size(); i++) got[i] = y[(i / H * ND + d) * H + i % H];
      expect("y", got, layers_[d].y);
      expect("h_n", h_n[d]->doubles(), layers_[d].h_n);
      results.push_back(*h_n[d]);
    }
    results.push_back(y);
  }
  void check_gradients(const std::vector<Tensor<D>*>& dh0, const std::vector<Tensor<D>*>& dgates) {
    for (int d = 0; d < o_.directions; d++) {
      expect("dh0", dh0[d]->doubles(), layers_[d].dh0);
      check_products(d, *dgates[d]);
      for (Tensor<D>* r : {dh0[d], dgates[d]}) results.push_back(*r);
    }
  }

 private:
  // The host's GEMMs, from what the kernels stored alone.
  void check_products(int d, const Tensor<D>& dz) {
    const RhnReference& r = layers_[d];
    const int H = o_.H, GH = G * H, N = o_.N, L = o_.depth;
    Doubles dx(r.dx.size(), 0.0), dw_ih(r.dw_ih.size(), 0.0), dw_hh(r.dw_hh.size(), 0.0),
        dbias(r.dbias.size(), 0.0);
    for (int t = 0; t < o_.T; t++)
      for (int l = 0; l < L; l++)
        for (int n = 0; n < N; n++) {
          const size_t at = size_t(t * L + l) * N + n;
          const int row = t * N + n;
          for (int g = 0; g < GH; g++) {
            const double v = dz[at * GH + g];
            dbias[l * GH + g] += v;
            for (int k = 0; l == 0 && k < 3; k++) {
              dx[row * 3 + k] += v * r.w_ih[g * 3 + k] * r.x_mask[n * 3 + k];
              dw_ih[g * 3 + k] += v * r.x[row * 3 + k] * r.x_mask[n * 3 + k];
            }
            if (t >= lengths_[n]) continue;
            for (int j = 0; j < H; j++)
              dw_hh[(size_t(l) * GH + g) * H + j] +=
                  v * (*tape_[d])[(at * kTape + G) * H + j] * r.state_mask(g, n, j);
          }
        }
    expect("dx", dx, r.dx);
    expect("dw_ih", dw_ih, r.dw_ih);
    expect("dw_hh", dw_hh, r.dw_hh);
    expect("dbias", dbias, r.dbias);
  }

 protected:
  const RhnOptions o_;
  std::mt19937_64 random_;
  std::vector<int> lengths_;
  std::vector<uint8_t> reset_;
  std::vector<RhnReference> layers_;
  std::vector<std::unique_ptr<Tensor<D>>> kept_;
  std::vector<Tensor<D>*> tape_;
};

}  // namespace trial
