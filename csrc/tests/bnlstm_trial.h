// One problem for the batch-normalised LSTM's kernels: inputs, the scalar layer's answer, the buffers, and the comparison.
#pragma once

#include "../cpu/bnlstm.h"
#include "naive_bnlstm.h"
#include "trial_base.h"

namespace trial {

struct BnOptions : Options {
  bool batch = true, sequence = false;
  int given_rows = 3;

  std::string text() const {
    std::ostringstream out;
    out << Options::text() << (batch ? " batch" : " given") << (sequence ? " sequence" : "") << " given rows "
        << given_rows;
    return out.str();
  }
};

struct BnTrial : Layout {
  static constexpr double kEps = 1e-3;
  static constexpr int kWeights = 7;  // in the order of BnLstmWeights
  BnOptions o;
  std::vector<naive::BnLstmLayer> want;
  Array x, y, cells, dy, dcells, dx, h0, c0, h_n, c_n, dh_n, dc_n, dh0, dc0;
  std::array<std::array<Array, kWeights>, 2> weights, grads;
  std::array<std::array<Array, kBnTerms>, 2> mean, var;  // given
  std::array<Array, kBnTerms> used;
  int64_t x_width;

  BnTrial(const BnOptions& options, unsigned seed) : BnTrial(options, Random(seed)) {}
  BnTrial(const BnOptions& options, Random random)
      : Layout(options, random), o(options), x_width(rows == Rows::padded ? o.I + 3 : o.I) {
    const int64_t H = o.H, D = o.directions, TN = T * N;
    const double scale = 1 / std::sqrt(static_cast<double>(H));
    const Doubles inputs = random.values(o.type, TN * o.I, 1);
    Doubles all[4];
    dy = Array(o.type, row_count * H * D);
    dcells = Array(o.type, row_count * H * D);
    for (int d = 0; d < D; ++d) {
      naive::BnLstmLayer r{};
      r.T = static_cast<int>(T), r.N = static_cast<int>(N), r.H = static_cast<int>(H);
      r.I = static_cast<int>(o.I), r.given_rows = o.given_rows;
      r.batch = o.batch, r.sequence = o.sequence, r.eps = kEps, r.reverse = d == 1;
      r.lengths.assign(lengths.begin(), lengths.end());
      r.reset = reset;
      r.x = inputs;
      r.w_ih = random.values(o.type, 4 * H * o.I, scale);
      r.w_hh = random.values(o.type, 4 * H * H, scale);
      r.bias = random.values(o.type, o.bias ? 4 * H : 0, scale);
      r.gamma_x = random.values(o.type, 4 * H, 0.3), r.gamma_h = random.values(o.type, 4 * H, 0.3);
      r.gamma_c = random.values(o.type, H, 0.3), r.beta_c = random.values(o.type, H, 0.3);
      r.h0 = random.values(o.type, N * H, 1), r.c0 = random.values(o.type, N * H, 1);
      r.dh_n = random.values(o.type, N * H, 1), r.dc_n = random.values(o.type, N * H, 1);
      r.dy = random.values(o.type, TN * H, 1);
      r.dcells = o.cells ? random.values(o.type, TN * H, 1) : Doubles(TN * H, 0.0);
      Doubles* given[kBnTerms][2] = {{&r.mean_x, &r.var_x}, {&r.mean[0], &r.var[0]}, {&r.mean[1], &r.var[1]}};
      for (int term = 0; term < kBnTerms; ++term) {
        const int64_t size = o.given_rows * (term == 2 ? H : 4 * H);
        *given[term][0] = random.values(o.type, size, 0.5);
        *given[term][1] = random.values(o.type, size, 1);
        for (double& v : *given[term][1]) v = std::abs(v) + 0.25;
        mean[d][term] = Array(o.type, *given[term][0]), var[d][term] = Array(o.type, *given[term][1]);
      }
      r.run_layer();
      const Doubles* source[] = {&r.w_ih, &r.w_hh, &r.bias, &r.gamma_x, &r.gamma_h, &r.gamma_c, &r.beta_c};
      for (int i = 0; i < kWeights; ++i) weights[d][i] = Array(o.type, *source[i]);
      const Doubles* states[] = {&r.h0, &r.c0, &r.dh_n, &r.dc_n};
      for (int i = 0; i < 4; ++i) all[i].insert(all[i].end(), states[i]->begin(), states[i]->end());
      scatter(dy, H * D, d * H, r.dy, H);
      scatter(dcells, H * D, d * H, r.dcells, H);
      want.push_back(std::move(r));
    }
    x = Array(o.type, row_count * x_width);
    scatter(x, x_width, 0, inputs, o.I);
    h0 = Array(o.type, all[0]), c0 = Array(o.type, all[1]);
    dh_n = Array(o.type, all[2]), dc_n = Array(o.type, all[3]);
    clear_results();
  }

  int64_t steps(int term) const { return term == 0 && o.sequence ? 1 : T; }

  void clear_results() {
    y = Array(o.type, row_count * o.H * o.directions);
    cells = Array(o.type, row_count * o.H * o.directions);
    dx = Array(o.type, row_count * o.I);
    for (Array* a : {&h_n, &c_n, &dh0, &dc0}) *a = Array(o.type, h0.size());
    for (int term = 0; term < kBnTerms; ++term)
      used[term] = Array(o.type, o.directions * 2 * steps(term) * (term == 2 ? 1 : 4) * o.H);
    for (int d = 0; d < o.directions; ++d)
      for (int i = 0; i < kWeights; ++i) grads[d][i] = Array(o.type, weights[d][i].size());
  }

  template <class Args>
  void fill(Args& a) {
    describe(a, o);
    a.batch = o.batch, a.sequence = o.sequence, a.eps = kEps;
    a.x = at(x, x_width);
    a.y = at(y, o.H * o.directions);
    a.cells = at(cells, o.H * o.directions);
    a.h0 = h0.data(), a.c0 = c0.data();
    for (int d = 0; d < o.directions; ++d) {
      auto& w = weights[d];
      a.weights[d] = {w[0].data(), w[1].data(), w[2].data(), w[3].data(),
                      w[4].data(), w[5].data(), w[6].data()};
    }
    for (int term = 0; term < kBnTerms; ++term) a.used[term] = used[term].data();
  }

  // With a tape, or for inference: without cells and statistics where the options say so.
  void forward(const Scratch* tape) {
    BnLstmForwardArgs a;
    fill(a);
    a.h_n = h_n.data(), a.c_n = c_n.data();
    if (!tape && !o.cells) {
      a.cells = {};
      for (void*& u : a.used) u = nullptr;
    }
    for (int d = 0; d < o.directions; ++d)
      for (int term = 0; term < kBnTerms; ++term) {
        a.given[d].mean[term] = mean[d][term].data(), a.given[d].var[term] = var[d][term].data();
        a.given[d].rows[term] = o.given_rows;
      }
    a.tape = tape ? tape->data() : nullptr;
    const Scratch packed(o.prepacked ? kernels().packed_bytes(a) : 0);
    if (o.prepacked) {
      Weights w[2];
      for (int d = 0; d < o.directions; ++d) w[d].w_ih = a.weights[d].w_ih, w[d].w_hh = a.weights[d].w_hh;
      kernels().pack(a, w, packed.data());
      a.packed = packed.data();
    }
    const Scratch workspace(kernels().bnlstm->forward_workspace(a));
    a.workspace = workspace.data();
    kernels().bnlstm->forward(a);
  }

  void backward(const Scratch& tape) {
    BnLstmBackwardArgs a;
    fill(a);
    a.dx = at(dx, o.I);
    a.dy = at(dy, o.H * o.directions);
    if (o.cells) a.dcells = at(dcells, o.H * o.directions);
    a.dh_n = dh_n.data(), a.dc_n = dc_n.data(), a.dh0 = dh0.data(), a.dc0 = dc0.data();
    a.tape = tape.data();
    for (int d = 0; d < o.directions; ++d) {
      auto& g = grads[d];
      a.grads[d] = {g[0].data(), g[1].data(), g[2].data(), g[3].data(),
                    g[4].data(), g[5].data(), g[6].data()};
    }
    a.want_weights = true;
    const Scratch workspace(kernels().bnlstm->backward_workspace(a));
    a.workspace = workspace.data();
    kernels().bnlstm->backward(a);
  }

  void run_training() {
    const Scratch tape(o.directions * row_count * bnlstm_tape_width(o.H) *
                       (o.type == Type::f64 ? sizeof(double) : sizeof(float)));
    forward(&tape);
    backward(tape);
  }

  void compare_forward(bool training) const {
    const Verdict verdict{o.type, o.text()};
    const int64_t H = o.H, D = o.directions;
    for (int d = 0; d < D; ++d) {
      const auto& w = want[d];
      expect(verdict, "y", w.y, H, y, H * D, d * H);
      verdict.expect("h_n", w.h_n, h_n, d);
      verdict.expect("c_n", w.c_n, c_n, d);
      if (!training && !o.cells) continue;
      expect(verdict, "cells", w.cells, H, cells, H * D, d * H);
      verdict.expect("statistics of the input term", w.used_x, used[0], d);
      verdict.expect("statistics of the recurrent term", w.used[0], used[1], d);
      verdict.expect("statistics of the cell", w.used[1], used[2], d);
    }
  }

  void compare_backward() const {
    const Verdict verdict{o.type, o.text()};
    Doubles sum = want[0].dx;
    for (size_t i = 0; o.directions == 2 && i < sum.size(); ++i) sum[i] += want[1].dx[i];
    expect(verdict, "dx", sum, o.I, dx, o.I);
    const char* names[] = {"dw_ih", "dw_hh", "dbias", "dgamma_ih", "dgamma_hh", "dgamma_c", "dbeta_c"};
    for (int d = 0; d < o.directions; ++d) {
      const auto& w = want[d];
      verdict.expect("dh0", w.dh0, dh0, d);
      verdict.expect("dc0", w.dc0, dc0, d);
      const Doubles* expected[] = {&w.dw_ih,    &w.dw_hh,    &w.dbias,  &w.dgamma_x,
                                   &w.dgamma_h, &w.dgamma_c, &w.dbeta_c};
      for (int i = 0; i < kWeights; ++i)
        if (grads[d][i].size()) verdict.expect(names[i], *expected[i], grads[d][i]);
    }
  }

  // Every result of the two runs, bit for bit.
  bool same_bits(const BnTrial& b) const {
    bool same = y.same_bits(b.y) && cells.same_bits(b.cells) && h_n.same_bits(b.h_n) && c_n.same_bits(b.c_n);
    same = same && dx.same_bits(b.dx) && dh0.same_bits(b.dh0) && dc0.same_bits(b.dc0);
    for (int term = 0; term < kBnTerms; ++term) same = same && used[term].same_bits(b.used[term]);
    for (int d = 0; d < o.directions; ++d)
      for (int i = 0; i < kWeights; ++i) same = same && grads[d][i].same_bits(b.grads[d][i]);
    return same;
  }
};

}  // namespace trial
