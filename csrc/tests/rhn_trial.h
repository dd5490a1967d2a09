// One problem for the Recurrent Highway kernels: inputs, the scalar layer's answer, the buffers, and the comparison.
#pragma once

#include "../cpu/rhn.h"
#include "naive_rhn.h"
#include "trial_base.h"

namespace trial {

struct RhnOptions : Options {
  int depth = 3, gates = 2, x_groups = 0, s_groups = 0;  // groups of masks: 0, 1 or one for each gate

  std::string text() const {
    std::ostringstream out;
    out << Options::text() << " depth " << depth << " gates " << gates << " masks " << x_groups << " "
        << s_groups;
    return out.str();
  }
};

struct RhnTrial : Layout {
  RhnOptions o;
  std::vector<naive::Rhn> want;
  Array x, y, dy, dx, h0, h_n, dh_n, dh0, x_mask, s_mask;
  std::array<std::array<Array, 3>, 2> weights, grads;  // w_ih, w_hh, bias
  int64_t x_width;

  RhnTrial(const RhnOptions& options, unsigned seed) : RhnTrial(options, Random(seed)) {}
  RhnTrial(const RhnOptions& options, Random random)
      : Layout(options, random), o(options), x_width(rows == Rows::padded ? o.I + 3 : o.I) {
    const int64_t G = o.gates, H = o.H, L = o.depth, D = o.directions;
    const double scale = 1 / std::sqrt(static_cast<double>(H));
    const Doubles inputs = random.values(o.type, T * N * o.I, 1);
    Doubles all_h0, all_dh_n, all_x_mask, all_s_mask;
    auto append = [](Doubles& to, const Doubles& from) { to.insert(to.end(), from.begin(), from.end()); };
    dy = Array(o.type, row_count * H * D);
    for (int d = 0; d < D; ++d) {
      naive::Rhn r{};
      r.T = static_cast<int>(T), r.N = static_cast<int>(N), r.H = static_cast<int>(H);
      r.I = static_cast<int>(o.I), r.G = o.gates, r.depth = o.depth;
      r.reverse = d == 1;
      r.lengths.assign(lengths.begin(), lengths.end());
      r.reset = reset;
      r.w_ih = random.values(o.type, G * H * o.I, scale);
      r.w_hh = random.values(o.type, L * G * H * H, scale);
      r.bias = o.bias ? random.values(o.type, L * G * H, scale) : Doubles(L * G * H, 0.0);
      r.x = inputs;
      r.h0 = random.values(o.type, N * H, 1);
      r.dy = random.values(o.type, T * N * H, 1);
      r.dh_n = random.values(o.type, N * H, 1);
      r.x_mask = mask(random, o.x_groups, o.I);
      r.s_mask = mask(random, o.s_groups, H);
      r.run();
      weights[d] = {Array(o.type, r.w_ih), Array(o.type, r.w_hh), Array(o.type, o.bias ? r.bias : Doubles())};
      append(all_h0, r.h0), append(all_dh_n, r.dh_n);
      append(all_x_mask, o.x_groups ? r.x_mask : Doubles());
      append(all_s_mask, o.s_groups ? r.s_mask : Doubles());
      scatter(dy, H * D, d * H, r.dy, H);
      want.push_back(std::move(r));
    }
    x = Array(o.type, row_count * x_width);
    scatter(x, x_width, 0, inputs, o.I);
    h0 = Array(o.type, all_h0), dh_n = Array(o.type, all_dh_n);
    x_mask = Array(o.type, all_x_mask), s_mask = Array(o.type, all_s_mask);
    clear_results();
  }

  // Inverted dropout masks of each group, or ones.
  Doubles mask(Random& random, int groups, int64_t width) const {
    Doubles v(std::max(1, groups) * N * width, 1.0);
    for (double& m : v)
      if (groups) m = random.between(0, 3) ? 1.25 : 0;
    return v;
  }

  void clear_results() {
    y = Array(o.type, row_count * o.H * o.directions);
    dx = Array(o.type, row_count * o.I);
    h_n = Array(o.type, h0.size());
    dh0 = Array(o.type, h0.size());
    for (int d = 0; d < o.directions; ++d)
      for (int i = 0; i < 3; ++i) grads[d][i] = Array(o.type, weights[d][i].size());
  }

  template <class Args>
  void fill(Args& a) {
    describe(a, o);
    a.depth = o.depth, a.gates = o.gates, a.x_groups = o.x_groups, a.s_groups = o.s_groups;
    a.x = at(x, x_width);
    a.y = at(y, o.H * o.directions);
    a.x_mask = x_mask.data(), a.s_mask = s_mask.data(), a.h0 = h0.data();
    for (int d = 0; d < o.directions; ++d)
      a.weights[d] = {weights[d][0].data(), weights[d][1].data(), weights[d][2].data()};
  }

  void forward(const Scratch* tape) {
    const RhnKernels& k = *kernels().rhn;
    RhnForwardArgs a;
    fill(a);
    a.h_n = h_n.data();
    a.tape = tape ? tape->data() : nullptr;
    const Scratch packed(o.prepacked ? k.packed_bytes(a) : 0);
    if (o.prepacked) {
      k.pack(a, a.weights, packed.data());
      a.packed = packed.data();
    }
    const Scratch workspace(k.forward_workspace(a));
    a.workspace = workspace.data();
    k.forward(a);
  }

  void backward(const Scratch* tape) {
    RhnBackwardArgs a;
    fill(a);
    a.dx = at(dx, o.I);
    a.dy = at(dy, o.H * o.directions);
    a.dh_n = dh_n.data();
    a.dh0 = dh0.data();
    a.tape = tape ? tape->data() : nullptr;
    for (int d = 0; d < o.directions; ++d)
      a.grads[d] = {grads[d][0].data(), grads[d][1].data(), grads[d][2].data()};
    a.want_weights = true;
    const Scratch workspace(kernels().rhn->backward_workspace(a));
    a.workspace = workspace.data();
    kernels().rhn->backward(a);
  }

  void run_training() {
    const Scratch tape(o.recompute ? 0
                                   : o.directions * o.depth * row_count * o.gates * o.H *
                                         (o.type == Type::f64 ? sizeof(double) : sizeof(float)));
    forward(o.recompute ? nullptr : &tape);
    backward(o.recompute ? nullptr : &tape);
  }

  void compare_forward() const {
    const Verdict verdict{o.type, o.text()};
    for (int d = 0; d < o.directions; ++d) {
      expect(verdict, "y", want[d].y, o.H, y, o.H * o.directions, d * o.H);
      verdict.expect("h_n", want[d].h_n, h_n, d);
    }
  }

  void compare_backward() const {
    const Verdict verdict{o.type, o.text()};
    Doubles sum = want[0].dx;
    for (size_t i = 0; o.directions == 2 && i < sum.size(); ++i) sum[i] += want[1].dx[i];
    expect(verdict, "dx", sum, o.I, dx, o.I);
    for (int d = 0; d < o.directions; ++d) {
      verdict.expect("dh0", want[d].dh0, dh0, d);
      verdict.expect("dw_ih", want[d].dw_ih, grads[d][0]);
      verdict.expect("dw_hh", want[d].dw_hh, grads[d][1]);
      if (o.bias) verdict.expect("dbias", want[d].dbias, grads[d][2]);
    }
  }

  // Every result of the two runs, bit for bit.
  bool same_bits(const RhnTrial& b) const {
    bool same = y.same_bits(b.y) && h_n.same_bits(b.h_n) && dx.same_bits(b.dx) && dh0.same_bits(b.dh0);
    for (int d = 0; d < o.directions; ++d)
      for (int i = 0; i < 3; ++i) same = same && grads[d][i].same_bits(b.grads[d][i]);
    return same;
  }
};

}  // namespace trial
