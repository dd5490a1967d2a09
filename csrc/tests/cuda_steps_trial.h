// One problem for the kernels that run a layer step by step: its inputs, the scalar layer's answer, all launches, the comparison.
#pragma once
#include "cuda_trial.h"
#include "emu/steps.h"

namespace trial {

struct StepsOptions : Options {
  int O = 0;  // outputs of a projection; 0: none
  bool normed = false, tape = true;
  std::string text() const {
    return Options::text() + " O=" + std::to_string(O) + " normed=" + std::to_string(normed);
  }
};

template <class Cell, class D, class Tile, bool kLinear = false>
class StepsTrial {
  using Elem = typename D::Elem;
  static constexpr int G = Cell::kGates;
  static constexpr int kRowThreads = 64;

 public:
  std::string failure;
  double worst = 0;
  std::vector<Tensor<D>> results;  // for comparison to the bit

  explicit StepsTrial(const StepsOptions& o) : o_(o), random_(o.N * 1000 + o.H + o.O), O_(o.O ? o.O : o.H) {
    o_.noise.seed = &kNoiseSeed;
    do make_problem();
    while (near_a_kink());
    emu::machine().mutation = static_cast<int>(o.mutation);
    run_forward();
    if (failure.empty() && o.tape) run_backward();
    emu::machine().mutation = 0;
  }

 private:
  Doubles draw(size_t n, double scale, double middle = 0) {
    Doubles v(n);
    for (double& x : v) x = middle + scale * std::normal_distribution<double>()(random_);
    return v;
  }

  // ReLU's slope jumps at 0: a unit that rounding could carry across has no gradient to compare.
  bool near_a_kink() const {
    if (kind_of<Cell>() != fastrnn::Cell::rnn_relu || kLinear) return false;
    for (const naive::Layer& l : layers_) {
      const Doubles wx = input_part(l);
      for (int t = 0; t < o_.T; t++)
        for (int n = 0; n < o_.N; n++) {
          if (t >= lengths_[n]) continue;
          const Doubles h = l.masked(state_before(l, l.y, t, n), t, n);
          for (int r = 0; r < o_.H; r++) {
            double z = wx[(t * o_.N + n) * o_.H + r];
            for (int j = 0; j < o_.H; j++) z += l.w_hh[r * o_.H + j] * h[j];
            if (std::fabs(z) < 4 * kUlps * roundoff<D>()) return true;
          }
        }
    }
    return false;
  }
  // The state that step t of row n starts from; y: (T, N, O).
  Doubles state_before(const naive::Layer& l, const Doubles& y, int t, int n) const {
    const int before = l.reverse ? t + 1 : t - 1;
    Doubles h(O_, 0.0);
    if (!reset_.empty() && reset_[t * o_.N + n]) return h;
    const bool first = before < 0 || before >= lengths_[n];
    for (int j = 0; j < O_; j++) h[j] = first ? l.h0[n * O_ + j] : y[(before * o_.N + n) * O_ + j];
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
      l.normed = o_.normed;
      l.projected = o_.O > 0;
      l.reverse = o_.directions == 2 ? d == 1 : o_.reverse;
      l.T = o_.T, l.N = o_.N, l.I = 3, l.H = H, l.O = O_;
      l.lengths.assign(lengths_.begin(), lengths_.end());
      l.reset = reset_;
      // A norm divides by what it finds: terms of a deviation near 1 leave rounding errors what they are.
      l.w_ih = draw(GH * 3, o_.normed ? 1 : 0.5);
      l.w_hh = draw(size_t(GH) * O_, (relu ? 0.2 : o_.normed ? 2.0 : 0.7) / std::sqrt(double(O_)));
      if (l.projected) l.w_hr = draw(size_t(O_) * H, 1 / std::sqrt(double(H)));
      if (l.normed) l.ln_hh = draw(GH, 0.1, 0.3), l.ln_c = draw(H, 0.2, 1), l.ln_bias_c = draw(H, 0.2);
      l.b_ih = draw(GH, 0.3);
      for (int r = 0; relu && r < GH; r++) l.b_ih[r] += random_() % 2 ? 4 : -4;
      l.b_hh = draw(GH, 0.3);
      l.x = draw(TN * 3, 0.7);
      l.h0 = o_.initial ? draw(o_.N * O_, 0.5) : Doubles(o_.N * O_, 0.0);
      l.c0 = o_.initial ? draw(o_.N * H, o_.normed ? 1 : 0.5) : Doubles(o_.N * H, 0.0);
      l.dy = draw(TN * O_, 1);
      l.dcells = Cell::kHasCell ? draw(TN * H, 1) : Doubles(TN * H, 0.0);
      l.dh_n = draw(o_.N * O_, 1);
      l.dc_n = draw(o_.N * H, 1);
      for (Doubles* v : {&l.w_hh, &l.w_hr, &l.h0, &l.c0, &l.dy, &l.dh_n, &l.dc_n}) round_all<D>(*v);
      for (int t = 0; t < o_.T; t++)  // nothing arrives past a row's end
        for (int n = 0; n < o_.N; n++)
          for (int j = 0; t >= lengths_[n] && j < H; j++) l.dcells[(t * o_.N + n) * H + j] = 0;
      l.run();
      layers_.push_back(std::move(l));
    }
  }

  StepsProblem problem(bool backward) const {
    StepsProblem q;
    q.cell = Cell::kKind, q.format = D::kFormat, q.backward = backward, q.normed = o_.normed;
    q.N = o_.N, q.H = o_.H, q.O = o_.O, q.directions = o_.directions;
    return q;
  }
  template <class Params>
  bool run(bool backward, Params& p) {
    StepsKernels k;
    steps_product_functions<D, Tile>(k);
    if (backward)
      steps_backward_functions<Cell, D, kRowThreads, kLinear>(k);
    else
      steps_forward_functions<Cell, D, kRowThreads, kLinear>(k);
    p.T = o_.T;
    p.lengths = o_.lengths ? lengths_.data() : nullptr;
    p.reset = o_.reset ? reset_.data() : nullptr;
    const fastrnn::Noise& n = o_.noise;
    p.noise = noise_of(static_cast<DropKind>(n.mode), n.drop, n.zoneout_h, n.zoneout_c, n.per_sequence,
                       static_cast<int>(n.layer), n.training ? n.seed : nullptr);
    const StepsProblem q = problem(backward);
    const void* weights[2][2] = {};
    for (int d = 0; d < o_.directions; d++) {
      weights[d][0] = tensor(layers_[d].w_hh).data();
      weights[d][1] = o_.O ? tensor(layers_[d].w_hr).data() : weights[d][0];
    }
    std::vector<Vec4> workspace(steps_bind(q, k.tile, nullptr, nullptr) / sizeof(Vec4),
                                Vec4{~0u, ~0u, ~0u, ~0u});
    const std::string went = emu::run_steps(q, k, p, weights, workspace.data(), o_.seed * 1000);
    if (!went.empty()) failure = std::string(backward ? "backward: " : "forward: ") + went;
    return failure.empty();
  }

  Tensor<D>& tensor(const Doubles& v) { return *kept_.emplace_back(new Tensor<D>(v)); }
  Tensor<D>& tensor(size_t n) { return *kept_.emplace_back(new Tensor<D>(n)); }
  std::vector<float>& floats(const Doubles& v) {
    return *floats_.emplace_back(new std::vector<float>(v.begin(), v.end()));
  }
  // (T, N, width), or direction d of a tensor that holds all directions side by side.
  Rows rows(void* data, int64_t width, int parts = 1) const {
    return {data, o_.N * width * parts, width * parts};
  }
  void expect(const char* name, const Doubles& got, const Doubles& expected) {
    const std::string s = compare<D>(name, got, expected, &worst);
    if (failure.empty()) failure = s;
  }

  void run_forward() {
    const int H = o_.H, TN = o_.T * o_.N, ND = o_.directions, slots = steps_tape(Cell::kKind, o_.normed);
    StepsForwardParams p;
    p.wx_is_float = o_.wx_is_float || D::kPerWord == 1;
    y_ = &tensor(size_t(TN) * O_ * ND);
    std::vector<Tensor<D>*> h_n, c_n;
    for (int d = 0; d < ND; d++) {
      const naive::Layer& l = layers_[d];
      StepsForwardDirection& f = p.dir[d];
      const Doubles input = input_part(l);
      f.wx = rows(p.wx_is_float ? static_cast<void*>(floats(input).data()) : tensor(input).data(), G * H);
      if (Cell::kTwoGradients) f.bias_n = floats(Doubles(l.b_hh.begin() + 2 * H, l.b_hh.end())).data();
      if (o_.normed) {
        f.gain_h = floats(l.ln_hh).data();
        f.gain_c = floats(l.ln_c).data(), f.bias_c = floats(l.ln_bias_c).data();
      }
      if (o_.initial) f.h0 = tensor(l.h0).data(), f.c0 = tensor(l.c0).data();
      h_n.push_back(&tensor(o_.N * O_)), c_n.push_back(&tensor(o_.N * H));
      f.h_n = h_n[d]->data(), f.c_n = c_n[d]->data();
      f.y = rows(y_->data() + d * O_, O_, ND);
      tape_.push_back(&tensor(size_t(TN) * H * slots));
      mid_.push_back(&tensor(size_t(TN) * H));
      scales_.emplace_back(TN * 2, NAN);
      cells_.emplace_back(Cell::kHasCell ? TN * H : 0, NAN);
      if (o_.tape) {
        f.tape = rows(tape_[d]->data(), slots * H);
        f.mid = rows(o_.O ? mid_[d]->data() : nullptr, H);
        f.scales = rows(o_.normed ? scales_[d].data() : nullptr, 2);
        f.cells = rows(Cell::kHasCell ? cells_[d].data() : nullptr, H);
      }
      f.reverse = l.reverse;
    }
    if (!run(false, p)) return;
    for (int d = 0; d < ND; d++) {
      const naive::Layer& l = layers_[d];
      expect("y", y_of(d), l.y);
      expect("h_n", h_n[d]->doubles(), l.h_n);
      if (Cell::kHasCell) expect("c_n", c_n[d]->doubles(), l.c_n);
      if (Cell::kHasCell && o_.tape) expect("cells", Doubles(cells_[d].begin(), cells_[d].end()), l.cells);
      for (Tensor<D>* r : {h_n[d], c_n[d]}) results.push_back(*r);
    }
    results.push_back(*y_);
  }

  Doubles y_of(int d) const {
    const int TN = o_.T * o_.N;
    Doubles y(TN * O_);
    for (int i = 0; i < TN; i++)
      for (int j = 0; j < O_; j++) y[i * O_ + j] = (*y_)[(size_t(i) * o_.directions + d) * O_ + j];
    return y;
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
    const int H = o_.H, TN = o_.T * o_.N, ND = o_.directions, slots = steps_tape(Cell::kKind, o_.normed);
    const bool twofold = Cell::kTwoGradients || o_.normed;
    StepsBackwardParams p;
    std::vector<Tensor<D>*> dh0, dc0, dgates, dgates_h, dmid, dm;
    for (int d = 0; d < ND; d++) {
      const naive::Layer& l = layers_[d];
      StepsBackwardDirection& b = p.dir[d];
      b.dy = rows(tensor(l.dy).data(), O_);
      if (Cell::kHasCell) b.dcells = rows(floats(l.dcells).data(), H);
      b.dh_n = tensor(l.dh_n).data(), b.dc_n = tensor(l.dc_n).data();
      dh0.push_back(&tensor(o_.N * O_)), dc0.push_back(&tensor(o_.N * H));
      b.dh0 = dh0[d]->data(), b.dc0 = dc0[d]->data();
      b.y = rows(y_->data() + d * O_, O_, ND);
      b.tape = rows(tape_[d]->data(), slots * H);
      b.cells = rows(cells_[d].data(), H);
      b.scales = rows(scales_[d].data(), 2);
      if (o_.normed) {
        b.gain_h = floats(l.ln_hh).data();
        b.gain_c = floats(l.ln_c).data(), b.bias_c = floats(l.ln_bias_c).data();
      }
      if (o_.initial) b.h0 = tensor(l.h0).data(), b.c0 = tensor(l.c0).data();
      dgates.push_back(&tensor(size_t(TN) * G * H));
      dgates_h.push_back(twofold ? &tensor(size_t(TN) * G * H) : dgates[d]);
      dmid.push_back(&tensor(size_t(TN) * O_)), dm.push_back(&tensor(size_t(TN) * H));
      b.dgates = rows(dgates[d]->data(), G * H);
      if (twofold) b.dgates_h = rows(dgates_h[d]->data(), G * H);
      if (o_.O) b.dmid = rows(dmid[d]->data(), O_);
      b.dm = rows(dm[d]->data(), H);
      b.reverse = l.reverse;
    }
    if (!run(true, p)) return;
    for (int d = 0; d < ND; d++) {
      const naive::Layer& l = layers_[d];
      expect("dh0", dh0[d]->doubles(), l.dh0);
      if (Cell::kHasCell) expect("dc0", dc0[d]->doubles(), l.dc0);
      check_products(d, dgates[d]->doubles(), dgates_h[d]->doubles());
      if (o_.O) check_projection(d, dmid[d]->doubles());
      if (o_.normed) check_norms(d, dgates[d]->doubles(), dm[d]->doubles());
      for (Tensor<D>* r : {dh0[d], dc0[d], dgates[d], dgates_h[d]}) results.push_back(*r);
    }
  }

  // The host's GEMMs: gradients of input, weights and biases from the gate gradients and the saved states.
  void check_products(int d, const Doubles& da, const Doubles& da_h) {
    const naive::Layer& l = layers_[d];
    const int H = o_.H, GH = G * H, N = o_.N, slots = steps_tape(Cell::kKind, o_.normed);
    Doubles dx(o_.T * N * 3, 0.0), dw_ih(GH * 3, 0.0), dw_hh(size_t(GH) * O_, 0.0), db_ih(GH, 0.0),
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
          for (int j = 0; j < O_; j++)
            dw_hh[size_t(r) * O_ + j] +=
                rec * h[j] * (reads_reset ? (*tape_[d])[size_t(at) * slots * H + j] : 1);
        }
      }
    expect("dx", dx, l.dx);
    expect("dw_ih", dw_ih, l.dw_ih);
    expect("dw_hh", dw_hh, l.dw_hh);
    expect("db_ih", db_ih, l.db_ih);
    if (!o_.normed) expect("db_hh", db_hh, l.db_hh);
  }

  void check_projection(int d, const Doubles& dh) {
    const int H = o_.H;
    Doubles dw_hr(size_t(O_) * H, 0.0);
    for (int i = 0; i < o_.T * o_.N; i++) {
      if (i / o_.N >= lengths_[i % o_.N]) continue;
      for (int o = 0; o < O_; o++)
        for (int j = 0; j < H; j++)
          dw_hr[o * H + j] += dh[size_t(i) * O_ + o] * (*mid_[d])[size_t(i) * H + j];
    }
    expect("dw_hr", dw_hr, layers_[d].dw_hr);
  }

  // Gains and biases behind a norm: sums of the gradients times what the tape has, GRU's candidate behind its reset gate.
  void check_norms(int d, const Doubles& dz, const Doubles& dm) {
    const naive::Layer& l = layers_[d];
    const int H = o_.H, GH = G * H, slots = steps_tape(Cell::kKind, true);
    Doubles gains(GH, 0.0), biases(GH, 0.0), gain_c(l.dln_c.size(), 0.0), bias_c(gain_c);
    for (int i = 0; i < o_.T * o_.N; i++) {
      if (i / o_.N >= lengths_[i % o_.N]) continue;
      const auto tape = [&](int slot, int j) { return (*tape_[d])[(size_t(i) * slots + slot) * H + j]; };
      for (int g = 0; g < G; g++)
        for (int j = 0; j < H; j++) {
          double v = dz[size_t(i) * GH + g * H + j];
          if (Cell::kTwoGradients && g == 2) v *= tape(0, j);
          gains[g * H + j] += v * tape(Cell::kTape + g, j);
          biases[g * H + j] += v;
        }
      for (int j = 0; j < H && Cell::kHasCell; j++) {
        gain_c[j] += dm[size_t(i) * H + j] * tape(8, j);
        bias_c[j] += dm[size_t(i) * H + j];
      }
    }
    expect("dln_hh", gains, l.dln_hh);
    expect("db_hh", biases, l.db_hh);
    expect("dln_c", gain_c, l.dln_c);
    expect("dln_bias_c", bias_c, l.dln_bias_c);
  }

  StepsOptions o_;
  std::mt19937_64 random_;
  const int O_;
  std::vector<int> lengths_;
  std::vector<uint8_t> reset_;
  std::vector<naive::Layer> layers_;
  std::vector<std::unique_ptr<Tensor<D>>> kept_;
  std::vector<std::unique_ptr<std::vector<float>>> floats_;
  Tensor<D>* y_ = nullptr;
  std::vector<Tensor<D>*> tape_, mid_;
  std::vector<std::vector<float>> cells_, scales_;
};

}  // namespace trial
