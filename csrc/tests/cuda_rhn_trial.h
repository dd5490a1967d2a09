// A Recurrent Highway layer on the emulator: scalar double reference, launches, comparison.
#pragma once
#include "../cuda/core/rhn.cuh"
#include "cuda_trial.h"

namespace trial {

struct RhnOptions : Options {
  int depth = 3;
  bool masked = true, bias = true;
};

// One direction, row by row; nothing here is clever.
struct RhnReference {
  int T, N, H, I, G, depth;
  bool reverse;
  std::vector<int> lengths;
  std::vector<uint8_t> reset;
  Doubles w_ih, w_hh, bias, x, h0, x_mask, s_mask, dy, dh_n;  // x_mask (N, I), s_mask (N, H)
  Doubles y, h_n, dx, dh0, dw_ih, dw_hh, dbias;               // results
  Doubles operand;                                            // (depth, T, N, H): masked states
  static double sigmoid(double v) { return 1 / (1 + std::exp(-v)); }
  double input(int at, int r) const {
    double sum = bias[r];
    for (int k = 0; k < I; k++) sum += w_ih[r * I + k] * x[at * I + k] * x_mask[at % N * I + k];
    return sum;
  }

  void run() {
    const size_t TN = size_t(T) * N, GH = size_t(G) * H;
    y.assign(TN * H, 0), h_n.assign(size_t(N) * H, 0), dx.assign(TN * I, 0), dh0.assign(size_t(N) * H, 0);
    dw_ih.assign(GH * I, 0), dw_hh.assign(depth * GH * H, 0), dbias.assign(depth * GH, 0);
    operand.assign(depth * TN * H, 0);
    for (int n = 0; n < N; n++) row(n);
  }

 private:
  struct Micro {
    Doubles s, a;  // state before, activated gates (G, H)
  };

  void row(int n) {
    Doubles s(h0.begin() + n * H, h0.begin() + (n + 1) * H);
    std::vector<Micro> tape;
    for (int i = 0; i < lengths[n]; i++) {
      const int t = reverse ? lengths[n] - 1 - i : i, at = t * N + n;
      if (!reset.empty() && reset[at]) s.assign(H, 0);
      for (int l = 0; l < depth; l++) tape.push_back(micro(at, l, s));
      std::copy(s.begin(), s.end(), y.begin() + size_t(at) * H);
    }
    std::copy(s.begin(), s.end(), h_n.begin() + size_t(n) * H);
    Doubles ds(dh_n.begin() + n * H, dh_n.begin() + (n + 1) * H);
    for (int i = lengths[n] - 1; i >= 0; i--) {
      const int t = reverse ? lengths[n] - 1 - i : i, at = t * N + n;
      for (int j = 0; j < H; j++) ds[j] += dy[size_t(at) * H + j];
      for (int l = depth - 1; l >= 0; l--) back(at, l, tape[i * depth + l], ds);
      if (!reset.empty() && reset[at]) ds.assign(H, 0);
    }
    std::copy(ds.begin(), ds.end(), dh0.begin() + size_t(n) * H);
  }

  double* masked(int at, int l) { return operand.data() + (size_t(l) * T * N + at) * H; }

  Micro micro(int at, int l, Doubles& s) {
    Micro m{s, Doubles(G * H)};
    double* u = masked(at, l);
    for (int j = 0; j < H; j++) u[j] = s[j] * s_mask[at % N * H + j];
    for (int r = 0; r < G * H; r++) {
      double z = l ? bias[l * G * H + r] : input(at, r);
      for (int j = 0; j < H; j++) z += w_hh[(size_t(l) * G * H + r) * H + j] * u[j];
      m.a[r] = r < H ? std::tanh(z) : sigmoid(z);
    }
    for (int j = 0; j < H; j++) {
      const double t = m.a[H + j], c = G == 3 ? m.a[2 * H + j] : 1 - t;
      s[j] = m.a[j] * t + s[j] * c;
    }
    return m;
  }

  void back(int at, int l, const Micro& m, Doubles& ds) {
    Doubles dz(G * H), before(H);
    for (int j = 0; j < H; j++) {
      const double h = m.a[j], t = m.a[H + j], c = G == 3 ? m.a[2 * H + j] : 1 - t;
      dz[j] = ds[j] * t * (1 - h * h);
      dz[H + j] = ds[j] * (G == 3 ? h : h - m.s[j]) * t * (1 - t);
      if (G == 3) dz[2 * H + j] = ds[j] * m.s[j] * c * (1 - c);
      before[j] = ds[j] * c;
    }
    const double* u = masked(at, l);
    for (int r = 0; r < G * H; r++) {
      dbias[l * G * H + r] += dz[r];
      for (int j = 0; j < H; j++) {
        const size_t w = (size_t(l) * G * H + r) * H + j;
        dw_hh[w] += dz[r] * u[j];
        before[j] += dz[r] * w_hh[w] * s_mask[at % N * H + j];
      }
      for (int k = 0; l == 0 && k < I; k++) {
        dw_ih[r * I + k] += dz[r] * x[at * I + k] * x_mask[at % N * I + k];
        dx[at * I + k] += dz[r] * w_ih[r * I + k] * x_mask[at % N * I + k];
      }
    }
    ds = before;
  }
};

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf>
class RhnTrial {
  using Elem = typename D::Elem;
  using ForwardLayer = RhnForward<Cell, D, T, ExchangeOf>;
  using BackwardLayer = RhnBackward<Cell, D, T, ExchangeOf>;
  static constexpr int G = Cell::kG, kTape = Cell::kTape;
  static constexpr bool kShared = ExchangeOf<D, T, 1>::kInShared;

 public:
  std::string failure;
  double worst = 0;
  std::vector<Tensor<D>> results;

  explicit RhnTrial(const RhnOptions& o) : o_(o), random_(o.N * 1000 + o.H) {
    hp_ = round_up(o.H, D::kVec);
    ctas_ = ceil_div(hp_, T::kUnits);
    while (ExchangeOf<D, T, 1>::kBuffers == 2 && ctas_ & (ctas_ - 1)) ctas_++;
    make_problem();
    emu::machine().mutation = static_cast<int>(o.mutation);
    run_forward();
    if (failure.empty()) run_backward();
    emu::machine().mutation = 0;
  }

 private:
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
      r.x_mask = mask(o_.N * 3), r.s_mask = mask(o_.N * H);
      r.dy = draw(o_.T * o_.N * H, 1);
      r.dh_n = draw(o_.N * H, 1);
      for (Doubles* v : {&r.w_hh, &r.h0, &r.dy, &r.dh_n}) round_all<D>(*v);
      r.run();
      layers_.push_back(std::move(r));
    }
  }

  void fill(Shape& s) {
    s.T = o_.T, s.N = o_.N, s.H = o_.H, s.H_padded = hp_;
    s.directions = o_.directions, s.groups = o_.groups, s.ctas = ctas_;
    s.lengths = o_.lengths ? lengths_.data() : nullptr;
    s.reset = o_.reset ? reset_.data() : nullptr;
    flags_.assign(size_t(o_.directions) * o_.groups * ctas_ * kFlagStride, 0);
    s.flags = flags_.data();
  }

  template <class Kernel>
  bool launch(const char* what, const SharedLayout& layout, Kernel kernel) {
    emu::Launch l;
    l.grid = o_.directions * o_.groups * ctas_;
    l.block = T::kThreads;
    l.cluster = kShared ? ctas_ : 1;
    l.shared_bytes = layout.bytes;
    l.seed = o_.seed;
    const emu::Report r = emu::launch(l, kernel);
    if (!r.ok()) failure = std::string(what) + ": " + r.error;
    return r.ok();
  }

  // Slab after slab, each as a layer's W_hh.
  std::vector<Vec4> pack(const Doubles& w, const Geometry& g) {
    Tensor<D>& rounded = tensor(w);
    const size_t slab = size_t(ctas_) * g.cta_vectors();
    std::vector<Vec4> packed(slab * o_.depth);
    for (int l = 0; l < o_.depth; l++) {
      const PackParams p{
          rounded.data() + size_t(l) * G * o_.H * o_.H, packed.data() + l * slab, g, o_.H, hp_, ctas_};
      emu::Launch launch;
      launch.grid = 2, launch.block = 256;
      const emu::Report r = emu::launch(launch, [&] { pack_kernel<D>(p); });
      if (!r.ok()) failure = r.error;
    }
    return packed;
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
  SharedLayout layout(bool backward) const {
    const Geometry& g = backward ? BackwardLayer::kGeometry : ForwardLayer::kGeometry;
    return shared_layout(g, D::kFormat, ExchangeOf<D, T, 1>::kBuffers, o_.depth);
  }

  void run_forward() {
    const int H = o_.H, TN = o_.T * o_.N, ND = o_.directions, L = o_.depth;
    RhnForwardParams p;
    fill(p);
    p.depth = L;
    p.wx_is_float = o_.wx_is_float || D::kPerWord == 1;
    Tensor<D>& y = tensor(size_t(TN) * H * ND);
    std::vector<std::vector<float>> wx(ND), bias(ND);
    std::vector<std::vector<Vec4>> packed(ND);
    std::vector<Tensor<D>*> h_n;
    for (int d = 0; d < ND; d++) {
      const RhnReference& r = layers_[d];
      RhnForwardDirection& f = p.dir[d];
      packed[d] = pack(r.w_hh, ForwardLayer::kGeometry);
      f.weights = packed[d].data();
      Doubles input(size_t(TN) * G * H), h0_masked = r.h0;
      for (int at = 0; at < TN; at++)
        for (int g = 0; g < G * H; g++) input[size_t(at) * G * H + g] = r.input(at, g);
      for (size_t i = 0; i < h0_masked.size(); i++) h0_masked[i] *= r.s_mask[i];
      wx[d].assign(input.begin(), input.end());
      f.wx = rows(p.wx_is_float ? static_cast<void*>(wx[d].data()) : tensor(input).data(), G * H);
      bias[d].assign(r.bias.begin(), r.bias.end());
      f.bias = o_.bias ? bias[d].data() : nullptr;
      f.mask = o_.masked ? tensor(r.s_mask).data() : nullptr;
      if (o_.initial) f.h0 = tensor(r.h0).data(), f.h0_masked = o_.masked ? tensor(h0_masked).data() : f.h0;
      h_n.push_back(&tensor(size_t(o_.N) * H));
      f.h_n = h_n[d]->data();
      f.y = rows(y.data() + d * H, H, ND);
      tape_.push_back(&tensor(size_t(TN) * L * kTape * H));
      f.tape = rows(tape_[d]->data(), kTape * H);
      f.mail = {tensor(size_t(TN) * L * hp_).data(), o_.N * int64_t{hp_}, hp_};
      f.reverse = r.reverse;
    }
    if (!failure.empty() ||
        !launch("forward", layout(false), [&] { rhn_forward_kernel<Cell, D, T, ExchangeOf>(p); }))
      return;
    for (int d = 0; d < ND; d++) {
      Doubles got(size_t(TN) * H);
      for (int i = 0; i < TN; i++)
        for (int j = 0; j < H; j++) got[size_t(i) * H + j] = y[(size_t(i) * ND + d) * H + j];
      expect("y", got, layers_[d].y);
      expect("h_n", h_n[d]->doubles(), layers_[d].h_n);
      results.push_back(*h_n[d]);
    }
    results.push_back(y);
  }

  void run_backward() {
    const int H = o_.H, TN = o_.T * o_.N, ND = o_.directions, L = o_.depth;
    RhnBackwardParams p;
    fill(p);
    p.depth = L;
    std::vector<std::vector<Vec4>> packed(ND);
    std::vector<Tensor<D>*> dh0, dgates;
    for (int d = 0; d < ND; d++) {
      const RhnReference& r = layers_[d];
      RhnBackwardDirection& b = p.dir[d];
      packed[d] = pack(r.w_hh, BackwardLayer::kGeometry);
      b.weights = packed[d].data();
      b.dy = rows(tensor(r.dy).data(), H);
      b.dh_n = tensor(r.dh_n).data();
      dh0.push_back(&tensor(size_t(o_.N) * H));
      b.dh0 = dh0[d]->data();
      b.mask = o_.masked ? tensor(r.s_mask).data() : nullptr;
      b.tape = rows(tape_[d]->data(), kTape * H);
      dgates.push_back(&tensor(size_t(TN) * L * G * H));
      b.dgates = rows(dgates[d]->data(), G * H);
      b.mail_is_gradient = H == hp_ && !o_.separate_mail;
      const int64_t width = int64_t{G} * hp_;
      b.mail = b.mail_is_gradient ? Mail{b.dgates.data, b.dgates.stride_t, b.dgates.stride_n}
                                  : Mail{tensor(size_t(TN) * L * width).data(), o_.N * width, width};
      b.reverse = r.reverse;
    }
    if (!failure.empty() ||
        !launch("backward", layout(true), [&] { rhn_backward_kernel<Cell, D, T, ExchangeOf>(p); }))
      return;
    for (int d = 0; d < ND; d++) {
      expect("dh0", dh0[d]->doubles(), layers_[d].dh0);
      check_products(d, *dgates[d]);
      for (Tensor<D>* r : {dh0[d], dgates[d]}) results.push_back(*r);
    }
  }

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
                  v * (*tape_[d])[(at * kTape + G) * H + j] * r.s_mask[n * H + j];
          }
        }
    expect("dx", dx, r.dx);
    expect("dw_ih", dw_ih, r.dw_ih);
    expect("dw_hh", dw_hh, r.dw_hh);
    expect("dbias", dbias, r.dbias);
  }

  const RhnOptions o_;
  std::mt19937_64 random_;
  int hp_, ctas_;
  std::vector<int> lengths_;
  std::vector<uint8_t> reset_;
  std::vector<uint32_t> flags_;
  std::vector<RhnReference> layers_;
  std::vector<std::unique_ptr<Tensor<D>>> kept_;
  std::vector<Tensor<D>*> tape_;
};

}  // namespace trial
