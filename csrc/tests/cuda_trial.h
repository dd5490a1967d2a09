// One problem for the CUDA kernels on the emulator: its inputs, the scalar layer's answer, the launches, the comparison.
#pragma once
#include <functional>
#include <random>

#include "../cuda/core/backward.cuh"
#include "../cuda/core/forward.cuh"
#include "../cuda/core/pack.cuh"
#include "check.h"
#include "cuda_tolerance.h"
#include "naive.h"

namespace trial {

using namespace fastrnn::cuda;
using naive::Doubles;

struct Options {
  int T = 4, N = 5, H = 40;
  int directions = 1, groups = 1;
  bool reverse = false;  // the only direction
  bool lengths = false, reset = false, initial = true, wx_is_float = true;
  bool separate_mail = false;  // results are exchanged beside y even where y would do
  bool linear = false;
  uint64_t seed = 1;
  int dropped_ctas = 0;
  int unitless_ctas = 0;  // that a group has beyond those with units
  int slow_factor = 1;    // the last CTA runs in one round of so many
  bool gives_up = false;  // with an error word, and the patience to see it set
  Mutation mutation = Mutation::none;
  fastrnn::Noise noise;  // its seed is the trial's
  std::string text() const {
    char s[240];
    std::snprintf(s, sizeof s,
                  "T=%d N=%d H=%d D=%d groups=%d reverse=%d lengths=%d reset=%d initial=%d seed=%d slow=%d "
                  "drop=%d %g per_sequence=%d zoneout=%g,%g training=%d",
                  T, N, H, directions, groups, reverse, lengths, reset, initial, static_cast<int>(seed),
                  slow_factor, static_cast<int>(noise.mode), noise.drop, noise.per_sequence, noise.zoneout_h,
                  noise.zoneout_c, noise.training);
    return s;
  }
};

template <class Cell>
constexpr fastrnn::Cell kind_of();
template <>
constexpr fastrnn::Cell kind_of<Lstm>() {
  return fastrnn::Cell::lstm;
}
template <>
constexpr fastrnn::Cell kind_of<Gru<true>>() {
  return fastrnn::Cell::gru;
}
template <>
constexpr fastrnn::Cell kind_of<Gru<false>>() {
  return fastrnn::Cell::gru_reset_before;
}
template <>
constexpr fastrnn::Cell kind_of<Rnn<false>>() {
  return fastrnn::Cell::rnn_tanh;
}
template <>
constexpr fastrnn::Cell kind_of<Rnn<true>>() {
  return fastrnn::Cell::rnn_relu;
}

// A tensor in a format's storage, every byte 0xff until written. Ends where its allocation ends, for the sanitizer.
template <class D>
class Tensor {
 public:
  using Elem = typename D::Elem;
  explicit Tensor(size_t count) : data_(count) { std::memset(data_.data(), 0xff, count * sizeof(Elem)); }
  explicit Tensor(const Doubles& values) : data_(values.size()) {
    for (size_t i = 0; i < values.size(); i++) data_[i] = round(values[i]);
  }
  Elem* data() { return data_.data(); }
  double operator[](size_t i) const { return widen(data_[i]); }
  Doubles doubles() const {
    Doubles out(data_.size());
    for (size_t i = 0; i < out.size(); i++) out[i] = widen(data_[i]);
    return out;
  }
  bool operator==(const Tensor& o) const {
    return std::memcmp(data_.data(), o.data_.data(), data_.size() * sizeof(Elem)) == 0;
  }

 private:
  static Elem round(double v) {
    if constexpr (D::kPerWord == 2)
      return static_cast<Elem>(D::narrow(static_cast<float>(v)));
    else
      return static_cast<float>(v);
  }
  static double widen(Elem e) {
    if constexpr (D::kPerWord == 2)
      return D::widen(e);
    else
      return e;
  }
  std::vector<Elem> data_;
};

template <class D>
void round_all(Doubles& v) {
  v = Tensor<D>(v).doubles();
}

constexpr uint64_t kNoiseSeed = 0x123456789abcdef1;

// Runs forward and backward; `failure` is empty when everything is as it should be.
template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false,
          bool kNoisy = false>
class Trial {
  using Elem = typename D::Elem;
  using ForwardLayer = Forward<Cell, D, T, ExchangeOf, kLinear, kNoisy>;
  using BackwardLayer = Backward<Cell, D, T, ExchangeOf, kLinear, kNoisy>;
  static constexpr int G = Cell::kGates, kTape = kTapeOf<Cell, kNoisy>;
  static constexpr bool kShared = ExchangeOf<D, T, 1>::kInShared;

 public:
  std::string failure;
  uint32_t error = 0;
  double worst = 0;
  std::vector<Tensor<D>> results;  // for comparison to the bit

  explicit Trial(const Options& o) : o_(o), random_(o.N * 1000 + o.H) {
    o_.noise.seed = &kNoiseSeed;
    hp_ = round_up(o.H, D::kVec);
    ctas_ = ceil_div(hp_, T::kUnits) + o.unitless_ctas;
    do make_problem();
    while (near_a_kink());
    emu::machine().mutation = static_cast<int>(o.mutation);
    run_forward();
    if (failure.empty()) run_backward();
    emu::machine().mutation = 0;
  }

 private:
  double draw(double scale) { return scale * std::normal_distribution<double>()(random_); }
  Doubles draw(size_t n, double scale) {
    Doubles v(n);
    for (double& x : v) x = draw(scale);
    return v;
  }

  // ReLU's slope jumps at 0: a unit that rounding could carry across has no gradient to compare.
  bool near_a_kink() const {
    if (kind_of<Cell>() != fastrnn::Cell::rnn_relu || kLinear) return false;
    for (const naive::Layer& l : layers_) {
      const Doubles wx = input_part(l);
      for (int i = 0; i < o_.T * o_.N; i++) {
        if (i / o_.N >= lengths_[i % o_.N]) continue;
        const Doubles h = l.masked(state_before(l, l.y, i / o_.N, i % o_.N), i / o_.N, i % o_.N);
        for (int r = 0; r < o_.H; r++) {
          double z = wx[i * o_.H + r];
          for (int j = 0; j < o_.H; j++) z += l.w_hh[r * o_.H + j] * h[j];
          if (std::fabs(z) < 4 * kUlps * roundoff<D>()) return true;
        }
      }
    }
    return false;
  }

  // The state that step t of row n starts from; y: (T, N, H).
  Doubles state_before(const naive::Layer& l, const Doubles& y, int t, int n) const {
    const int H = o_.H, before = l.reverse ? t + 1 : t - 1;
    Doubles h(H, 0.0);
    if (!reset_.empty() && reset_[t * o_.N + n]) return h;
    const bool first = before < 0 || before >= lengths_[n];
    for (int j = 0; j < H; j++) h[j] = first ? l.h0[n * H + j] : y[(before * o_.N + n) * H + j];
    return h;
  }

  void make_problem() {
    const bool relu = kind_of<Cell>() == fastrnn::Cell::rnn_relu;  // most of its units clearly on or off
    layers_.clear();
    const int H = o_.H, GH = G * H, TN = o_.T * o_.N;
    lengths_.assign(o_.N, o_.T);
    if (o_.lengths)
      for (int n = 0; n < o_.N; n++) lengths_[n] = 1 + (n * 5 + o_.T - 1) % o_.T;
    if (o_.reset) {
      reset_.assign(TN, 0);
      for (int i = 0; i < TN; i++) reset_[i] = random_() % 4 == 0;
    }
    for (int d = 0; d < o_.directions; d++) {
      naive::Layer l;
      l.cell = kind_of<Cell>();
      l.linear = kLinear;
      l.noise = o_.noise;
      l.reverse = o_.directions == 2 ? d == 1 : o_.reverse;
      l.T = o_.T, l.N = o_.N, l.I = 3, l.H = l.O = H;
      l.lengths.assign(lengths_.begin(), lengths_.end());
      l.reset = reset_;
      l.w_ih = draw(GH * 3, 0.5);
      l.w_hh = draw(size_t(GH) * H, (relu ? 0.2 : 0.7) / std::sqrt(double(H)));
      l.b_ih = draw(GH, 0.3);
      for (int r = 0; relu && r < GH; r++) l.b_ih[r] += random_() % 2 ? 4 : -4;
      l.b_hh = draw(GH, 0.3);
      l.x = draw(TN * 3, 0.7);
      l.h0 = o_.initial ? draw(o_.N * H, 0.5) : Doubles(o_.N * H, 0.0);
      l.c0 = o_.initial ? draw(o_.N * H, 0.5) : Doubles(o_.N * H, 0.0);
      l.dy = draw(TN * H, 1);
      l.dcells = Cell::kHasCell ? draw(TN * H, 1) : Doubles(TN * H, 0.0);
      l.dh_n = draw(o_.N * H, 1);
      l.dc_n = draw(o_.N * H, 1);
      for (Doubles* v : {&l.w_hh, &l.h0, &l.c0, &l.dy, &l.dh_n, &l.dc_n}) round_all<D>(*v);
      for (int t = 0; t < o_.T; t++)  // nothing arrives past a row's end
        for (int n = 0; n < o_.N; n++)
          for (int j = 0; t >= lengths_[n] && j < H; j++) l.dcells[(t * o_.N + n) * H + j] = 0;
      l.run();
      layers_.push_back(std::move(l));
    }
  }

  Shape shape() {
    Shape s;
    s.T = o_.T, s.N = o_.N, s.H = o_.H, s.H_padded = hp_;
    s.directions = o_.directions, s.groups = o_.groups, s.ctas = ctas_;
    s.lengths = o_.lengths ? lengths_.data() : nullptr;
    s.reset = o_.reset ? reset_.data() : nullptr;
    flags_.assign(size_t(o_.directions) * o_.groups * ctas_ * kFlagStride, 0);
    s.flags = flags_.data();
    s.error = o_.gives_up ? &error : nullptr;
    return s;
  }

  template <class Kernel>
  bool launch(const char* what, int shared_bytes, Kernel kernel) {
    emu::Launch l;
    l.grid = o_.directions * o_.groups * ctas_ - o_.dropped_ctas;
    l.block = T::kThreads;
    l.cluster = kShared ? ctas_ : 1;
    l.shared_bytes = shared_bytes;
    l.seed = o_.seed;
    l.slow_cta = l.grid - 1, l.slow_factor = o_.slow_factor;
    if (o_.gives_up) l.patience = 1000;
    const emu::Report r = emu::launch(l, kernel);
    if (!r.ok()) failure = std::string(what) + ": " + r.error;
    return r.ok();
  }

  // Through the kernel that packs on a GPU.
  std::vector<Vec4> pack(Tensor<D>& w, const Geometry& g) {
    std::vector<Vec4> packed(size_t(ctas_) * g.cta_vectors());
    const PackParams p{w.data(), packed.data(), g, o_.H, hp_, ctas_};
    emu::Launch l;
    l.grid = 2, l.block = 256;
    const emu::Report r = emu::launch(l, [&] { pack_kernel<D>(p); });
    if (!r.ok()) failure = r.error;
    return packed;
  }

  fastrnn::cuda::Noise noise() const {
    const fastrnn::Noise& n = o_.noise;
    return noise_of(static_cast<DropKind>(n.mode), n.drop, n.zoneout_h, n.zoneout_c, n.per_sequence,
                    static_cast<int>(n.layer), n.training ? n.seed : nullptr);
  }
  bool masks_state() const { return o_.noise.training && o_.noise.mode == fastrnn::Drop::state; }
  // Through the kernel that masks initial states on a GPU.
  const void* mask_first(const RegularisedForwardParams& p, int d) {
    Elem* out = tensor(size_t(o_.N) * o_.H).data();
    const MaskStateParams m{p.dir[d].h0, out, o_.T, o_.N, o_.H, p.lengths, p.dir[d].reverse, p.noise};
    emu::Launch l;
    l.grid = 2, l.block = 256;
    const emu::Report r = emu::launch(l, [&] { mask_state_kernel<D>(m); });
    if (!r.ok()) failure = r.error;
    return out;
  }

  Tensor<D>& tensor(const Doubles& v) { return *kept_.emplace_back(new Tensor<D>(v)); }
  Tensor<D>& tensor(size_t n) { return *kept_.emplace_back(new Tensor<D>(n)); }
  // (T, N, width), or direction d of a tensor that holds all directions side by side.
  fastrnn::cuda::Rows rows(void* data, int64_t width, int parts = 1) const {
    return {data, o_.N * width * parts, width * parts};
  }
  void expect(const char* name, const Doubles& got, const Doubles& expected) {
    const std::string s = compare<D>(name, got, expected, &worst);
    if (failure.empty()) failure = s;
  }

  void run_forward() {
    const int H = o_.H, TN = o_.T * o_.N, ND = o_.directions;
    ForwardParamsOf<kNoisy> p;
    static_cast<Shape&>(p) = shape();
    p.wx_is_float = o_.wx_is_float || D::kPerWord == 1;
    y_ = &tensor(size_t(TN) * H * ND);
    std::vector<std::vector<float>> wx(ND), bias(ND);
    std::vector<std::vector<Vec4>> packed(ND);
    std::vector<Tensor<D>*> h_n, c_n;
    for (int d = 0; d < ND; d++) {
      const naive::Layer& l = layers_[d];
      ForwardDirection& f = p.dir[d];
      packed[d] = pack(tensor(l.w_hh), ForwardLayer::kGeometry);
      f.weights = packed[d].data();
      const Doubles input = input_part(l);
      wx[d].assign(input.begin(), input.end());
      f.wx = rows(p.wx_is_float ? static_cast<void*>(wx[d].data()) : tensor(input).data(), G * H);
      if (Cell::kTwoGradients) bias[d].assign(l.b_hh.begin() + 2 * H, l.b_hh.end());
      f.bias_n = bias[d].empty() ? nullptr : bias[d].data();
      if (o_.initial) f.h0 = tensor(l.h0).data(), f.c0 = tensor(l.c0).data();
      h_n.push_back(&tensor(o_.N * H)), c_n.push_back(&tensor(o_.N * H));
      f.h_n = h_n[d]->data(), f.c_n = c_n[d]->data();
      f.y = rows(y_->data() + d * H, H, ND);
      tape_.push_back(&tensor(size_t(TN) * H * std::max(kTape, 1)));
      f.tape = rows(kTape ? tape_[d]->data() : nullptr, kTape * H);
      cells_.emplace_back(Cell::kHasCell ? TN * H : 0, NAN);
      f.cells = rows(Cell::kHasCell ? cells_[d].data() : nullptr, H);
      for (Mail& m : f.mail) m = private_mail(hp_);
      if (H == hp_ && !o_.separate_mail && !masks_state())
        f.mail[Cell::kPhases - 1] = {f.y.data, f.y.stride_t, f.y.stride_n};
      f.reverse = l.reverse;
      if constexpr (kNoisy) {
        p.noise = noise();
        if (o_.initial && masks_state()) p.h0_masked[d] = mask_first(p, d);
      }
    }
    if (!launch("forward", ForwardLayer::kLayout.bytes,
                [&] { forward_kernel<Cell, D, T, ExchangeOf, kLinear, kNoisy>(p); }))
      return;
    for (int d = 0; d < ND; d++) {
      const naive::Layer& l = layers_[d];
      expect("y", y_of(d), l.y);
      expect("h_n", h_n[d]->doubles(), l.h_n);
      if (Cell::kHasCell) expect("c_n", c_n[d]->doubles(), l.c_n);
      if (Cell::kHasCell) expect("cells", Doubles(cells_[d].begin(), cells_[d].end()), l.cells);
      for (Tensor<D>* r : {h_n[d], c_n[d]}) results.push_back(*r);
    }
    results.push_back(*y_);
  }

  Doubles y_of(int d) const {
    const int H = o_.H, TN = o_.T * o_.N;
    Doubles y(TN * H);
    for (int i = 0; i < TN; i++)
      for (int j = 0; j < H; j++) y[i * H + j] = (*y_)[(size_t(i) * o_.directions + d) * H + j];
    return y;
  }

  Mail private_mail(int64_t width) {
    return {tensor(size_t(o_.T) * o_.N * width).data(), o_.N * width, width};
  }

  // W_ih x + b_ih + b_hh, without b_hn where that is inside the reset gate's product.
  Doubles input_part(const naive::Layer& l) const {
    const int GH = G * o_.H;
    Doubles out(size_t(o_.T) * o_.N * GH);
    for (int i = 0; i < o_.T * o_.N; i++)
      for (int r = 0; r < GH; r++) {
        double sum = l.b_ih[r] + (Cell::kTwoGradients && r >= 2 * o_.H ? 0 : l.b_hh[r]);
        for (int k = 0; k < 3; k++) sum += l.w_ih[r * 3 + k] * l.x[i * 3 + k];
        out[size_t(i) * GH + r] = sum;
      }
    return out;
  }

  void run_backward() {
    const int H = o_.H, TN = o_.T * o_.N, ND = o_.directions;
    BackwardParamsOf<kNoisy> p;
    if constexpr (kNoisy) p.noise = noise();
    static_cast<Shape&>(p) = shape();
    std::vector<std::vector<Vec4>> packed(ND);
    std::vector<std::vector<float>> dcells(ND);
    std::vector<Tensor<D>*> dh0, dc0, dgates, dgates_h;
    for (int d = 0; d < ND; d++) {
      const naive::Layer& l = layers_[d];
      BackwardDirection& b = p.dir[d];
      packed[d] = pack(tensor(l.w_hh), BackwardLayer::kGeometry);
      b.weights = packed[d].data();
      b.dy = rows(tensor(l.dy).data(), H);
      dcells[d].assign(l.dcells.begin(), l.dcells.end());
      if (Cell::kHasCell) b.dcells = rows(dcells[d].data(), H);
      b.dh_n = tensor(l.dh_n).data(), b.dc_n = tensor(l.dc_n).data();
      dh0.push_back(&tensor(o_.N * H)), dc0.push_back(&tensor(o_.N * H));
      b.dh0 = dh0[d]->data(), b.dc0 = dc0[d]->data();
      b.y = rows(y_->data() + d * H, H, ND);
      b.tape = rows(tape_[d]->data(), kTape * H);
      b.cells = rows(cells_[d].data(), H);
      if (o_.initial) b.h0 = tensor(l.h0).data(), b.c0 = tensor(l.c0).data();
      dgates.push_back(&tensor(size_t(TN) * G * H)), dgates_h.push_back(&tensor(size_t(TN) * G * H));
      b.dgates = rows(dgates[d]->data(), G * H);
      b.dgates_h = rows(dgates_h[d]->data(), G * H);
      b.mail_is_gradient = H == hp_ && !o_.separate_mail;
      const fastrnn::cuda::Rows& recurrent = Cell::kTwoGradients ? b.dgates_h : b.dgates;
      for (int ph = 0; ph < Cell::kPhases; ph++) {
        Elem* at = static_cast<Elem*>(recurrent.data) + Cell::kShape.published[ph].first * H;
        b.mail[ph] = b.mail_is_gradient ? Mail{at, recurrent.stride_t, recurrent.stride_n}
                                        : private_mail(int64_t{Cell::kShape.published[ph].count} * hp_);
      }
      b.reverse = l.reverse;
    }
    if (!launch("backward", BackwardLayer::kLayout.bytes,
                [&] { backward_kernel<Cell, D, T, ExchangeOf, kLinear, kNoisy>(p); }))
      return;
    for (int d = 0; d < ND; d++) {
      const naive::Layer& l = layers_[d];
      expect("dh0", dh0[d]->doubles(), l.dh0);
      if (Cell::kHasCell) expect("dc0", dc0[d]->doubles(), l.dc0);
      check_products(d, dgates[d]->doubles(), (Cell::kTwoGradients ? dgates_h[d] : dgates[d])->doubles());
      for (Tensor<D>* r : {dh0[d], dc0[d], dgates[d]}) results.push_back(*r);
    }
  }

  // The host's GEMMs: gradients of input, weights and biases from the gate gradients and the saved states.
  void check_products(int d, const Doubles& da, const Doubles& da_h) {
    const naive::Layer& l = layers_[d];
    const int H = o_.H, GH = G * H, N = o_.N;
    Doubles dx(o_.T * N * 3, 0.0), dw_ih(GH * 3, 0.0), dw_hh(size_t(GH) * H, 0.0), db_ih(GH, 0.0),
        db_hh(GH, 0.0);
    const Doubles y = y_of(d);
    for (int t = 0; t < o_.T; t++)
      for (int n = 0; n < N; n++) {
        const int at = t * N + n;
        const Doubles h = l.masked(state_before(l, y, t, n), t, n);
        for (int r = 0; r < GH; r++) {
          const double x = da[size_t(at) * GH + r], rec = da_h[size_t(at) * GH + r];
          db_ih[r] += x;
          db_hh[r] += rec;
          for (int k = 0; k < 3; k++) {
            dx[at * 3 + k] += x * l.w_ih[r * 3 + k];
            dw_ih[r * 3 + k] += x * l.x[at * 3 + k];
          }
          if (t >= lengths_[n]) continue;
          const bool reads_reset = Cell::kPhases == 2 && r >= 2 * H;
          for (int j = 0; j < H; j++)
            dw_hh[size_t(r) * H + j] +=
                rec * h[j] * (reads_reset ? (*tape_[d])[size_t(at) * kTape * H + j] : 1);
        }
      }
    expect("dx", dx, l.dx);
    expect("dw_ih", dw_ih, l.dw_ih);
    expect("dw_hh", dw_hh, l.dw_hh);
    expect("db_ih", db_ih, l.db_ih);
    expect("db_hh", db_hh, l.db_hh);
  }

  Options o_;
  std::mt19937_64 random_;
  int hp_, ctas_;
  std::vector<int> lengths_;
  std::vector<uint8_t> reset_;
  std::vector<uint32_t> flags_;
  std::vector<naive::Layer> layers_;
  std::vector<std::unique_ptr<Tensor<D>>> kept_;
  Tensor<D>* y_ = nullptr;
  std::vector<Tensor<D>*> tape_;
  std::vector<std::vector<float>> cells_;
};

inline void report(const char* file, int line, const Options& o, const std::string& failure) {
  if (!failure.empty()) check::fail(file, line, o.text() + ": " + failure);
}

}  // namespace trial
