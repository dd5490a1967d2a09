// Layer-normalised LSTM and GRU kernels on the emulator, forward and backward, against the scalar double layer, which starts,
// as they do, at the normalised input term.
#include "../cuda/core/layernorm.cuh"
#include "cuda_cases.h"
#include "cuda_layer_norm_reference.h"
#include "cuda_trial_base.h"

namespace trial {

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf>
class LayerNormTrial : public TrialBase<D, T, ExchangeOf> {
  using Base = TrialBase<D, T, ExchangeOf>;
  using ForwardLayer = LayerNormForward<Cell, D, T, ExchangeOf>;
  using BackwardLayer = LayerNormBackward<Cell, D, T, ExchangeOf>;
  using Base::o_, Base::hp_, Base::lengths_, Base::reset_;
  static constexpr int G = Cell::kGates;
  static constexpr bool kLstm = Cell::kHasCell;
  static constexpr double kEps = 1e-5;

 public:
  using Base::failure, Base::results;
  explicit LayerNormTrial(const Options& o) : Base(o), line_(pair_line(o.H)) {
    for (int d = 0; d < o.directions; d++) layers_.push_back(layer(d));
    emu::machine().mutation = static_cast<int>(o.mutation);
    run_forward();
    if (failure.empty()) run_backward();
    emu::machine().mutation = 0;
  }

 private:
  // Gains below 1: a norm magnifies a small term's roundings by what it magnifies the term, and with gains of 1 a few steps
  // of that would leave no digit of a 16-bit format to compare.
  Doubles gains(size_t n) {
    Doubles v = this->draw(n, 0.1);
    for (double& x : v) x += kLstm ? 0.5 : 0.7;  // LSTM's loop passes two norms
    return v;
  }
  LayerNormReference layer(int d) {
    const int H = o_.H, TN = o_.T * o_.N;
    LayerNormReference l{};
    l.lstm = kLstm, l.reverse = this->reversed(d), l.eps = kEps;
    l.T = o_.T, l.N = o_.N, l.H = H;
    l.lengths = lengths_, l.reset = reset_;
    l.w_hh = this->draw(size_t(G) * H * H, 0.7 / std::sqrt(double(H)));
    l.wx = this->draw(size_t(TN) * G * H, 0.7);
    l.bias_n = this->draw(H, 0.3), l.bias_c = this->draw(H, 0.3);
    l.gain_h = gains(G * H), l.gain_c = gains(H);
    l.h0 = o_.initial ? this->draw(o_.N * H, 0.5) : Doubles(o_.N * H, 0.0);
    l.c0 = o_.initial ? this->draw(o_.N * H, 0.5) : Doubles(o_.N * H, 0.0);
    l.dy = this->draw(TN * H, 1);
    l.dcells = kLstm ? this->draw(TN * H, 1) : Doubles(TN * H, 0.0);
    l.dh_n = this->draw(o_.N * H, 1), l.dc_n = this->draw(o_.N * H, 1);
    for (Doubles* v : {&l.w_hh, &l.h0, &l.c0, &l.dy, &l.dh_n, &l.dc_n}) round_all<D>(*v);
    if (!float_wx()) round_all<D>(l.wx);
    l.run();
    return l;
  }
  bool float_wx() const { return o_.wx_is_float || D::kPerWord == 1; }

  std::vector<Vec4> pack(const LayerNormReference& l, const Geometry& g) {
    PackParams p;
    p.weights = this->tensor(l.w_hh).data();
    return Base::pack(p, g);
  }
  // As the memory of a GPU that was set to the sentinel; every float of it is a NaN of all ones.
  Mail pairs() {
    std::vector<float>& v = this->floats(size_t(o_.T) * o_.N * line_);
    std::memset(v.data(), 0xff, v.size() * sizeof(float));
    return {v.data(), int64_t{o_.N} * line_, line_};
  }
  const float* constants(const Doubles& v) { return this->floats(v).data(); }

  void run_forward() {
    const int H = o_.H, TN = o_.T * o_.N, ND = o_.directions;
    LayerNormForwardParams p;
    this->fill(p);
    p.eps = static_cast<float>(kEps);
    p.wx_is_float = float_wx();
    y_ = &this->tensor(size_t(TN) * H * ND);
    std::vector<std::vector<Vec4>> packed(ND);
    std::vector<Tensor<D>*> h_n, c_n;
    for (int d = 0; d < ND; d++) {
      const LayerNormReference& l = layers_[d];
      LayerNormForwardDirection& f = p.dir[d];
      packed[d] = pack(l, ForwardLayer::kGeometry);
      f.weights = packed[d].data();
      f.wx = this->rows(
          float_wx() ? static_cast<void*>(this->floats(l.wx).data()) : this->tensor(l.wx).data(), G * H);
      f.gain_h = constants(l.gain_h);
      if (kLstm) f.gain_c = constants(l.gain_c), f.bias_c = constants(l.bias_c);
      if (!kLstm) f.bias_n = constants(l.bias_n);
      if (o_.initial) f.h0 = this->tensor(l.h0).data();
      if (o_.initial && kLstm) f.c0 = this->tensor(l.c0).data();
      h_n.push_back(&this->tensor(size_t(o_.N) * H)), c_n.push_back(&this->tensor(size_t(o_.N) * H));
      f.h_n = h_n[d]->data(), f.c_n = c_n[d]->data();
      f.y = this->rows(y_->data() + d * H, H, ND);
      tape_.push_back(&this->tensor(size_t(TN) * 2 * G * H));
      f.tape = this->rows(tape_[d]->data(), 2 * G * H);
      cells_.push_back(&this->floats(size_t(TN) * H));
      f.cells = this->rows(cells_[d]->data(), H);
      statistics_.push_back(&this->floats(size_t(TN) * kRowStatistics));
      f.statistics = this->rows(statistics_[d]->data(), kRowStatistics);
      f.mail = this->mail_in(f.y, H, hp_);
      for (Mail& m : f.pairs) m = pairs();
      f.reverse = l.reverse;
    }
    if (!this->launch("forward", ForwardLayer::kSharedBytes,
                      [&] { layer_norm_forward_kernel<Cell, D, T, ExchangeOf>(p); }))
      return;
    for (int d = 0; d < ND; d++) {
      const LayerNormReference& l = layers_[d];
      this->expect("y", this->part(*y_, d, H), l.y);
      this->expect("h_n", h_n[d]->doubles(), l.h_n);
      if (kLstm) this->expect("c_n", c_n[d]->doubles(), l.c_n);
      if (kLstm) this->expect("cells", this->doubles(*cells_[d]), l.cells);
      for (Tensor<D>* r : {h_n[d], c_n[d]}) results.push_back(*r);
    }
    results.push_back(*y_);
  }

  void run_backward() {
    const int H = o_.H, TN = o_.T * o_.N, ND = o_.directions;
    LayerNormBackwardParams p;
    this->fill(p);
    std::vector<std::vector<Vec4>> packed(ND);
    std::vector<Tensor<D>*> dh0, dc0, dgates, dgates_h, dm;
    for (int d = 0; d < ND; d++) {
      const LayerNormReference& l = layers_[d];
      LayerNormBackwardDirection& b = p.dir[d];
      packed[d] = pack(l, BackwardLayer::kGeometry);
      b.weights = packed[d].data();
      b.gain_h = constants(l.gain_h);
      if (kLstm) b.gain_c = constants(l.gain_c), b.bias_c = constants(l.bias_c);
      if (!kLstm) b.bias_n = constants(l.bias_n);
      b.dy = this->rows(this->tensor(l.dy).data(), H);
      if (kLstm) b.dcells = this->rows(this->floats(l.dcells).data(), H);
      b.dh_n = this->tensor(l.dh_n).data(), b.dc_n = this->tensor(l.dc_n).data();
      dh0.push_back(&this->tensor(size_t(o_.N) * H)), dc0.push_back(&this->tensor(size_t(o_.N) * H));
      b.dh0 = dh0[d]->data(), b.dc0 = dc0[d]->data();
      b.y = this->rows(y_->data() + d * H, H, ND);
      b.tape = this->rows(tape_[d]->data(), 2 * G * H);
      b.cells = this->rows(cells_[d]->data(), H);
      b.statistics = this->rows(statistics_[d]->data(), kRowStatistics);
      if (o_.initial) b.h0 = this->tensor(l.h0).data(), b.c0 = this->tensor(l.c0).data();
      dgates.push_back(&this->tensor(size_t(TN) * G * H)),
          dgates_h.push_back(&this->tensor(size_t(TN) * G * H));
      dm.push_back(&this->tensor(size_t(TN) * H));
      b.dgates = this->rows(dgates[d]->data(), G * H);
      b.dgates_h = this->rows(dgates_h[d]->data(), G * H);
      b.dm = this->rows(dm[d]->data(), H);
      b.mail = this->mail_in(b.dgates_h, H, hp_, G);
      for (Mail& m : b.pairs) m = pairs();
      b.reverse = l.reverse;
    }
    if (!this->launch("backward", BackwardLayer::kSharedBytes,
                      [&] { layer_norm_backward_kernel<Cell, D, T, ExchangeOf>(p); }))
      return;
    for (int d = 0; d < ND; d++) {
      this->expect("dh0", dh0[d]->doubles(), layers_[d].dh0);
      if (kLstm) this->expect("dc0", dc0[d]->doubles(), layers_[d].dc0);
      this->expect("dwx", dgates[d]->doubles(), layers_[d].dwx);
      check_sums(d, *dgates[d], *dgates_h[d], *dm[d]);
      for (Tensor<D>* r : {dh0[d], dc0[d], dgates[d], dgates_h[d]}) results.push_back(*r);
    }
  }

  // The host's products and sums, from what the kernels stored alone.
  void check_sums(int d, const Tensor<D>& dgates, const Tensor<D>& dgates_h, const Tensor<D>& dm) {
    const LayerNormReference& l = layers_[d];
    const int H = o_.H, N = o_.N, GH = G * H;
    const Doubles y = this->part(*y_, d, H);
    Doubles dw_hh(l.dw_hh.size(), 0.0), dgain_h(GH, 0.0), dbias_n(H, 0.0), dgain_c(H, 0.0), dbias_c(H, 0.0);
    for (int t = 0; t < o_.T; t++)
      for (int n = 0; n < N; n++) {
        const size_t at = size_t(t) * N + n;
        const int before = l.reverse ? t + 1 : t - 1;
        const bool first = before < 0 || before >= lengths_[n], cleared = !reset_.empty() && reset_[at];
        if (t >= lengths_[n]) {
          for (int r = 0; r < GH; r++)
            if (dgates[at * GH + r] != 0 || dgates_h[at * GH + r] != 0)
              failure = "a gradient past a row's end";
          continue;
        }
        for (int r = 0; r < GH; r++) {
          const bool of_n = !kLstm && r >= 2 * H;
          const double dz = dgates[at * GH + r] * (of_n ? (*tape_[d])[at * 2 * GH + r - 2 * H] : 1);
          dgain_h[r] += dz * (*tape_[d])[at * 2 * GH + GH + r];
          if (of_n) dbias_n[r - 2 * H] += dz;
          for (int j = 0; j < H && !cleared; j++)
            dw_hh[size_t(r) * H + j] +=
                dgates_h[at * GH + r] * (first ? l.h0[n * H + j] : y[(size_t(before) * N + n) * H + j]);
        }
        for (int j = 0; j < H && kLstm; j++) {
          const std::vector<float>& s = *statistics_[d];
          dbias_c[j] += dm[at * H + j];
          dgain_c[j] += dm[at * H + j] * ((*cells_[d])[at * H + j] - s[at * kRowStatistics + 1]) *
                        s[at * kRowStatistics + 2];
        }
      }
    this->expect("dw_hh", dw_hh, l.dw_hh);
    this->expect("dgain_h", dgain_h, l.dgain_h);
    this->expect("dbias_n", dbias_n, l.dbias_n);
    this->expect("dgain_c", dgain_c, l.dgain_c);
    this->expect("dbias_c", dbias_c, l.dbias_c);
  }

  const int line_;
  std::vector<LayerNormReference> layers_;
  Tensor<D>* y_ = nullptr;
  std::vector<Tensor<D>*> tape_;
  std::vector<std::vector<float>*> cells_, statistics_;
};

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf>
void layer_norm(int most_units) {
  std::vector<Options> all = problems(most_units);
  for (Options& o : all) o.H = std::max(o.H, 5);  // of fewer values a norm leaves little but roundings
  run_problems<LayerNormTrial<Cell, D, T, ExchangeOf>, T>(all);
}

}  // namespace trial

using namespace trial;

#define FASTRNN_LAYER_NORM(name, cell)                                                       \
  TEST(name##_bf16_sentinel) { layer_norm<cell, Bf16, SmallTile<Bf16>, Sentinel>(128); }     \
  TEST(name##_bf16_local) { layer_norm<cell, Bf16, LocalTile<Bf16>, Local>(48); }            \
  TEST(name##_bf16x3_cluster) { layer_norm<cell, Bf16x3, SmallTile<Bf16x3>, Cluster>(128); } \
  FASTRNN_LAYER_NORM_UNSANITIZED(name, cell)
#if defined(__SANITIZE_ADDRESS__)
#define FASTRNN_LAYER_NORM_UNSANITIZED(name, cell)
#else
#define FASTRNN_LAYER_NORM_UNSANITIZED(name, cell)                                       \
  TEST(name##_bf16_wide_tile) { layer_norm<cell, Bf16, WideTile<Bf16>, Sentinel>(96); }  \
  TEST(name##_fp16_sentinel) { layer_norm<cell, Fp16, SmallTile<Fp16>, Sentinel>(128); } \
  TEST(name##_tf32_sentinel) { layer_norm<cell, Tf32, SmallTile<Tf32>, Sentinel>(128); } \
  TEST(name##_bf16x3_sentinel) { layer_norm<cell, Bf16x3, SmallTile<Bf16x3>, Sentinel>(128); }
#endif
FASTRNN_LAYER_NORM(lstm, LayerNormLstm)
FASTRNN_LAYER_NORM(gru, LayerNormGru)

TEST(mutations_are_caught) {
  Options o;
  o.T = 6, o.N = 11, o.H = 37, o.groups = 2, o.reset = true;
  using Sentinels = LayerNormTrial<LayerNormLstm, Bf16, SmallTile<Bf16>, Sentinel>;
  using Locals = LayerNormTrial<LayerNormGru, Bf16x3, LocalTile<Bf16x3>, Local>;
  CHECK(!caught<Sentinels>(o, Mutation::none));
  CHECK(!caught<Locals>(o, Mutation::none));
  for (const Mutation m : {Mutation::dropped_barrier, Mutation::single_reduction_tile, Mutation::unit_tail,
                           Mutation::reset_ignored, Mutation::segment_tail, Mutation::own_segment})
    CHECK(caught<Sentinels>(o, m));
  CHECK(caught<Locals>(o, Mutation::statistics_barrier));
  CHECK(caught<Locals>(o, Mutation::segment_tail));
}

int main(int argc, char** argv) { return check::run(argc, argv); }
