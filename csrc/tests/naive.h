// One direction of one recurrent layer in scalar double, forward and backward: what the kernels are
// compared with. Rows are independent, so each is walked alone through its own steps; nothing here
// is clever.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../cells/layernorm.h"
#include "../cells/philox.h"
#include "../cpu/layer.h"

namespace naive {

using fastrnn::Cell;
using Doubles = std::vector<double>;

inline int gate_count(Cell cell) {
  return cell == Cell::lstm ? 4 : cell == Cell::gru || cell == Cell::gru_reset_before ? 3 : 1;
}

// Inputs (T, N, I) and so on as in layer.h, always dense; row n has lengths[n] steps.
struct Layer {
  Cell cell = Cell::lstm;
  fastrnn::Noise noise;
  bool linear = false, reverse = false, projected = false;
  bool normed =
      false;  // layer norm of the recurrent term and of the cell; of the input term where it has gains
  int64_t T = 0, N = 0, I = 0, H = 0, O = 0;
  std::vector<int64_t> lengths;
  std::vector<uint8_t> reset;  // (T, N), or empty
  Doubles w_ih, w_hh, b_ih, b_hh, w_hr;
  Doubles ln_ih, ln_hh, ln_c, ln_bias_c;
  Doubles x, h0, c0;
  Doubles y, cells, h_n, c_n;      // forward's results
  Doubles dy, dcells, dh_n, dc_n;  // what arrives
  Doubles dx, dh0, dc0;            // backward's results
  Doubles dw_ih, dw_hh, db_ih, db_hh, dw_hr;
  Doubles dln_ih, dln_hh, dln_c, dln_bias_c;

  // The factor of what is kept or dropped, by its definition in docs/maths.md.
  double random(fastrnn::Mask kind, double p, double kept, int64_t t, int64_t n, int64_t u) const {
    const uint32_t stream = fastrnn::random_stream(noise.layer, reverse, kind);
    return fastrnn::random_word(*noise.seed, stream, t, n, u) >= p * 4294967296.0 ? kept : 0;
  }
  double drop(fastrnn::Drop mode, int64_t t, int64_t n, int64_t u) const {
    if (noise.mode != mode) return 1;
    const bool inverted = mode == fastrnn::Drop::state;
    if (!noise.training) return inverted ? 1 : 1 - noise.drop;
    return random(fastrnn::Mask::recurrent, noise.drop, inverted ? 1 / (1 - noise.drop) : 1,
                  noise.per_sequence ? 0 : t, n, u);
  }
  double zoneout(fastrnn::Mask kind, double p, int64_t t, int64_t n, int64_t u) const {
    return noise.training ? random(kind, p, 1, t, n, u) : 1 - p;
  }
  // The state h before step t as W_hh meets it.
  Doubles masked(Doubles h, int64_t t, int64_t n) const {
    for (int64_t j = 0; j < O; ++j) h[j] *= drop(fastrnn::Drop::state, t, n, j);
    return h;
  }

  void run() {
    const int64_t gates = gate_count(cell);
    y.assign(T * N * O, 0);
    cells.assign(T * N * H, 0);
    h_n.assign(N * O, 0);
    c_n.assign(N * H, 0);
    dx.assign(T * N * I, 0);
    dh0.assign(N * O, 0);
    dc0.assign(N * H, 0);
    dw_ih.assign(gates * H * I, 0);
    dw_hh.assign(gates * H * O, 0);
    db_ih.assign(gates * H, 0);
    db_hh.assign(gates * H, 0);
    dw_hr.assign(projected ? O * H : 0, 0);
    dln_ih.assign(ln_ih.size(), 0);
    dln_hh.assign(normed ? gates * H : 0, 0);
    dln_c.assign(normed && cell == Cell::lstm ? H : 0, 0);
    dln_bias_c = dln_c;
    for (int64_t n = 0; n < N; ++n) row(n);
  }

 private:
  struct Step {
    int64_t t;
    bool cleared;
    Doubles h, c;  // state before the step
    Doubles a, un,
        m;  // activated gates (G, H); GRU's recurrent part of n; LSTM's output before projection
    Doubles tanh_c;
    Doubles a_hat, c_hat, x_hat;  // normalised recurrent term, cell and input term, and 1 / their deviations
    double a_scale, c_scale, x_scale;
  };

  // v becomes its normalised self; returns 1 / deviation.
  static double normalise(Doubles& v) {
    double mean = 0, square = 0;
    for (double e : v) mean += e / v.size();
    for (double e : v) square += (e - mean) * (e - mean) / v.size();
    const double scale = 1 / std::sqrt(square + fastrnn::kLayerNormEps);
    for (double& e : v) e = (e - mean) * scale;
    return scale;
  }
  // Gradient of what was normalised from that of the result.
  static Doubles normalise_back(Doubles d, const Doubles& hat, double scale) {
    double mean = 0, mean_hat = 0;
    for (size_t i = 0; i < d.size(); ++i) mean += d[i] / d.size(), mean_hat += d[i] * hat[i] / d.size();
    for (size_t i = 0; i < d.size(); ++i) d[i] = scale * (d[i] - mean - hat[i] * mean_hat);
    return d;
  }
  // W_hh h, or its normalised form times the gains, with the bias: all gates of a step.
  Doubles recurrent_parts(Step& s, const Doubles& h) const {
    Doubles part(gate_count(cell) * H);
    for (size_t r = 0; r < part.size(); ++r) part[r] = state_part(r, h);
    if (!normed) return part;
    s.a_hat = part;
    for (size_t r = 0; r < part.size() && !b_hh.empty(); ++r) s.a_hat[r] -= b_hh[r];
    s.a_scale = normalise(s.a_hat);
    for (size_t r = 0; r < part.size(); ++r) part[r] = ln_hh[r] * s.a_hat[r] + (b_hh.empty() ? 0 : b_hh[r]);
    return part;
  }
  // Gradients of the raw recurrent term from those of the part above, whose bias's gradient they are.
  Doubles recurrent_parts_back(const Step& s, const Doubles& d) {
    Doubles scaled = d;
    for (size_t r = 0; r < d.size(); ++r) {
      dln_hh[r] += d[r] * s.a_hat[r];
      scaled[r] *= ln_hh[r];
    }
    scaled = normalise_back(scaled, s.a_hat, s.a_scale);
    for (size_t r = 0; r < d.size(); ++r) db_hh[r] += d[r] - scaled[r];  // accumulate() adds the latter
    return scaled;
  }

  // W_ih x, or its normalised form times the gains, with the bias: all gates of a step.
  Doubles input_parts(Step& s, int64_t at) const {
    Doubles part(gate_count(cell) * H, 0.0);
    for (size_t r = 0; r < part.size(); ++r)
      for (int64_t i = 0; i < I; ++i) part[r] += w_ih[r * I + i] * x[at * I + i];
    if (!ln_ih.empty()) {
      s.x_hat = part;
      s.x_scale = normalise(s.x_hat);
      for (size_t r = 0; r < part.size(); ++r) part[r] = ln_ih[r] * s.x_hat[r];
    }
    for (size_t r = 0; r < part.size() && !b_ih.empty(); ++r) part[r] += b_ih[r];
    return part;
  }
  // Gradients of the raw input term from those of the part above, whose bias's gradient they are.
  Doubles input_parts_back(const Step& s, const Doubles& d) {
    if (ln_ih.empty()) return d;
    Doubles scaled = d;
    for (size_t r = 0; r < d.size(); ++r) {
      dln_ih[r] += d[r] * s.x_hat[r];
      scaled[r] *= ln_ih[r];
    }
    scaled = normalise_back(scaled, s.x_hat, s.x_scale);
    for (size_t r = 0; r < d.size(); ++r) db_ih[r] += d[r] - scaled[r];  // accumulate() adds the latter
    return scaled;
  }

  double sigmoid(double v) const { return linear ? 0.5 + 0.25 * v : 1 / (1 + std::exp(-v)); }
  double sigmoid_slope(double s) const { return linear ? 0.25 : s * (1 - s); }
  double tanh_(double v) const { return linear ? v : std::tanh(v); }
  double tanh_slope(double s) const { return linear ? 1 : 1 - s * s; }
  double hidden(double v) const { return cell == Cell::rnn_tanh || linear ? tanh_(v) : v > 0 ? v : 0; }
  double hidden_slope(double s) const {
    return cell == Cell::rnn_tanh || linear ? tanh_slope(s) : s > 0 ? 1 : 0;
  }

  double state_part(int64_t gate_row, const Doubles& h) const {
    double sum = b_hh.empty() ? 0 : b_hh[gate_row];
    for (int64_t i = 0; i < O; ++i) sum += w_hh[gate_row * O + i] * h[i];
    return sum;
  }

  void row(int64_t n) {
    Doubles h(h0.begin() + n * O, h0.begin() + (n + 1) * O), c(H, 0.0);
    if (cell == Cell::lstm) c.assign(c0.begin() + n * H, c0.begin() + (n + 1) * H);
    std::vector<Step> tape;
    for (int64_t i = 0; i < lengths[n]; ++i) {
      const int64_t t = reverse ? lengths[n] - 1 - i : i;
      tape.push_back(step(t, n, h, c));
    }
    for (int64_t j = 0; j < O; ++j) h_n[n * O + j] = h[j];
    for (int64_t j = 0; j < H; ++j) c_n[n * H + j] = c[j];
    Doubles dh(dh_n.begin() + n * O, dh_n.begin() + (n + 1) * O), dc(H, 0.0);
    if (cell == Cell::lstm) dc.assign(dc_n.begin() + n * H, dc_n.begin() + (n + 1) * H);
    for (auto s = tape.rbegin(); s != tape.rend(); ++s) step_back(*s, n, dh, dc);
    for (int64_t j = 0; j < O; ++j) dh0[n * O + j] = dh[j];
    for (int64_t j = 0; j < H; ++j) dc0[n * H + j] = dc[j];
  }

  Step step(int64_t t, int64_t n, Doubles& h, Doubles& c) {
    const int64_t at = t * N + n;
    Step s{t, !reset.empty() && reset[at] != 0, {}, {}, {}, {}, {}, {}, {}, {}, {}, 1, 1, 1};
    if (s.cleared) {
      h.assign(O, 0);
      c.assign(H, 0);
    }
    s.h = h;
    s.c = c;
    if (cell == Cell::lstm)
      lstm(s, at, h, c);
    else if (cell == Cell::rnn_tanh || cell == Cell::rnn_relu)
      rnn(s, at, h);
    else
      gru(s, at, h);
    for (int64_t j = 0; noise.zoneout_h > 0 && j < O; ++j)
      h[j] += (1 - zoneout(fastrnn::Mask::zoneout_h, noise.zoneout_h, t, n, j)) * (s.h[j] - h[j]);
    for (int64_t j = 0; noise.zoneout_c > 0 && j < H; ++j)
      c[j] += (1 - zoneout(fastrnn::Mask::zoneout_c, noise.zoneout_c, t, n, j)) * (s.c[j] - c[j]);
    for (int64_t j = 0; j < O; ++j) y[at * O + j] = h[j];
    for (int64_t j = 0; j < H; ++j) cells[at * H + j] = c[j];
    return s;
  }

  void lstm(Step& s, int64_t at, Doubles& h, Doubles& c) {
    s.a.resize(4 * H);
    s.m.resize(H);
    s.tanh_c.resize(H);
    const Doubles inputs = input_parts(s, at), parts = recurrent_parts(s, masked(s.h, s.t, at % N));
    for (int64_t r = 0; r < 4 * H; ++r) {
      const double v = inputs[r] + parts[r];
      s.a[r] = r / H == 2 ? tanh_(v) : sigmoid(v);
    }
    for (int64_t j = 0; j < H; ++j) {
      const double update = drop(fastrnn::Drop::update, s.t, at % N, j);
      c[j] = (s.a[H + j] * s.c[j] + s.a[j] * s.a[2 * H + j] * update) *
             drop(fastrnn::Drop::cell, s.t, at % N, j);
    }
    if (normed) {
      s.c_hat = c;
      s.c_scale = normalise(s.c_hat);
    }
    for (int64_t j = 0; j < H; ++j) {
      s.tanh_c[j] = tanh_(normed ? ln_c[j] * s.c_hat[j] + ln_bias_c[j] : c[j]);
      s.m[j] = s.a[3 * H + j] * s.tanh_c[j];
    }
    if (!projected) {
      h = s.m;
      return;
    }
    for (int64_t o = 0; o < O; ++o) {
      h[o] = 0;
      for (int64_t j = 0; j < H; ++j) h[o] += w_hr[o * H + j] * s.m[j];
    }
  }

  void gru(Step& s, int64_t at, Doubles& h) {
    s.a.resize(3 * H);
    s.un.resize(H);
    Doubles read = masked(s.h, s.t, at % N);
    const Doubles inputs = input_parts(s, at), parts = recurrent_parts(s, read);
    for (int64_t r = 0; r < 2 * H; ++r) s.a[r] = sigmoid(inputs[r] + parts[r]);
    if (cell == Cell::gru_reset_before)
      for (int64_t j = 0; j < H; ++j) read[j] *= s.a[j];
    for (int64_t j = 0; j < H; ++j) {
      s.un[j] = cell == Cell::gru ? parts[2 * H + j] : state_part(2 * H + j, read);
      const double gate = cell == Cell::gru ? s.a[j] : 1;
      s.a[2 * H + j] = tanh_(inputs[2 * H + j] + gate * s.un[j]);
    }
    for (int64_t j = 0; j < H; ++j) {
      const double n = s.a[2 * H + j] * drop(fastrnn::Drop::update, s.t, at % N, j);
      h[j] = (1 - s.a[H + j]) * n + s.a[H + j] * s.h[j];
    }
  }

  void rnn(Step& s, int64_t at, Doubles& h) {
    const Doubles inputs = input_parts(s, at), read = masked(s.h, s.t, at % N);
    for (int64_t j = 0; j < H; ++j) h[j] = hidden(inputs[j] + state_part(j, read));
    s.a = h;
  }

  // Adds the gradients of `rows` gate rows from first_row on, whose state operand was `read`; dread
  // += W^T da.
  void accumulate(int64_t first_row, int64_t rows, const double* da_x, const double* da_h, int64_t at,
                  const Doubles& read, Doubles& dread) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first_row + r;
      db_ih[row] += da_x[r];
      db_hh[row] += da_h[r];
      for (int64_t i = 0; i < I; ++i) {
        dw_ih[row * I + i] += da_x[r] * x[at * I + i];
        dx[at * I + i] += da_x[r] * w_ih[row * I + i];
      }
      for (int64_t i = 0; i < O; ++i) {
        dw_hh[row * O + i] += da_h[r] * read[i];
        dread[i] += da_h[r] * w_hh[row * O + i];
      }
    }
  }

  // dh, dc: gradients of the state after the step on entry, of the state before it on return.
  void step_back(const Step& s, int64_t n, Doubles& dh, Doubles& dc) {
    const int64_t at = s.t * N + n;
    for (int64_t j = 0; j < O; ++j) dh[j] += dy[at * O + j];
    Doubles old_h(O, 0.0), old_c(H, 0.0);  // what zoneout sends straight to the state before
    for (int64_t j = 0; noise.zoneout_h > 0 && j < O; ++j) {
      const double w = zoneout(fastrnn::Mask::zoneout_h, noise.zoneout_h, s.t, n, j);
      old_h[j] = (1 - w) * dh[j];
      dh[j] *= w;
    }
    if (cell == Cell::lstm)
      lstm_back(s, at, dh, dc, old_c);
    else if (cell == Cell::rnn_tanh || cell == Cell::rnn_relu)
      rnn_back(s, at, dh);
    else
      gru_back(s, at, dh);
    for (int64_t j = 0; j < O; ++j) dh[j] += old_h[j];
    for (int64_t j = 0; j < H; ++j) dc[j] += old_c[j];
    if (s.cleared) {
      dh.assign(O, 0);
      dc.assign(H, 0);
    }
  }

  void lstm_back(const Step& s, int64_t at, Doubles& dh, Doubles& dc, Doubles& old_c) {
    Doubles dm = dh;
    if (projected) {
      dm.assign(H, 0);
      for (int64_t o = 0; o < O; ++o)
        for (int64_t j = 0; j < H; ++j) {
          dm[j] += dh[o] * w_hr[o * H + j];
          dw_hr[o * H + j] += dh[o] * s.m[j];
        }
    }
    Doubles da(4 * H), by_output(H);
    for (int64_t j = 0; j < H; ++j) {
      by_output[j] = dm[j] * s.a[3 * H + j] * tanh_slope(s.tanh_c[j]);
      if (!normed) continue;
      dln_c[j] += by_output[j] * s.c_hat[j];
      dln_bias_c[j] += by_output[j];
      by_output[j] *= ln_c[j];
    }
    if (normed) by_output = normalise_back(by_output, s.c_hat, s.c_scale);
    for (int64_t j = 0; j < H; ++j) {
      const double i = s.a[j], f = s.a[H + j], g = s.a[2 * H + j], o = s.a[3 * H + j];
      double reaches = dc[j] + dcells[at * H + j];
      if (noise.zoneout_c > 0) {
        const double w = zoneout(fastrnn::Mask::zoneout_c, noise.zoneout_c, s.t, at % N, j);
        old_c[j] = (1 - w) * reaches;
        reaches *= w;
      }
      const double update = drop(fastrnn::Drop::update, s.t, at % N, j);
      const double d = (reaches + by_output[j]) * drop(fastrnn::Drop::cell, s.t, at % N, j);
      da[j] = d * update * g * sigmoid_slope(i);
      da[H + j] = d * s.c[j] * sigmoid_slope(f);
      da[2 * H + j] = d * update * i * tanh_slope(g);
      da[3 * H + j] = dm[j] * s.tanh_c[j] * sigmoid_slope(o);
      dc[j] = d * f;
    }
    dh.assign(O, 0);
    const Doubles da_x = input_parts_back(s, da), da_h = normed ? recurrent_parts_back(s, da) : da;
    accumulate(0, 4 * H, da_x.data(), da_h.data(), at, masked(s.h, s.t, at % N), dh);
    dh = masked(dh, s.t, at % N);
  }

  void gru_back(const Step& s, int64_t at, Doubles& dh) {
    const bool after = cell == Cell::gru;
    Doubles da(3 * H), dn_h(H), dread(O, 0.0), before(O), sum(O, 0.0);
    const Doubles operand = masked(s.h, s.t, at % N);
    Doubles read = operand;
    for (int64_t j = 0; j < H; ++j) {
      const double z = s.a[H + j], cand = s.a[2 * H + j];
      const double update = drop(fastrnn::Drop::update, s.t, at % N, j);
      da[2 * H + j] = dh[j] * (1 - z) * update * tanh_slope(cand);
      da[H + j] = dh[j] * (s.h[j] - cand * update) * sigmoid_slope(z);
      before[j] = dh[j] * z;
      dn_h[j] = da[2 * H + j] * (after ? s.a[j] : 1);
      if (!after) read[j] *= s.a[j];
    }
    if (!normed) accumulate(2 * H, H, da.data() + 2 * H, dn_h.data(), at, read, dread);
    for (int64_t j = 0; j < H; ++j) {
      const double r = s.a[j];
      da[j] = (after ? da[2 * H + j] * s.un[j] : dread[j] * operand[j]) * sigmoid_slope(r);
      sum[j] = dread[j] * (after ? 1 : r);
    }
    if (normed) {
      Doubles d(da.begin(), da.begin() + 2 * H);
      d.insert(d.end(), dn_h.begin(), dn_h.end());
      const Doubles da_x = input_parts_back(s, da), da_h = recurrent_parts_back(s, d);
      accumulate(0, 3 * H, da_x.data(), da_h.data(), at, operand, sum);
    } else {
      accumulate(0, 2 * H, da.data(), da.data(), at, operand, sum);
    }
    sum = masked(sum, s.t, at % N);
    for (int64_t j = 0; j < H; ++j) dh[j] = before[j] + sum[j];
  }

  void rnn_back(const Step& s, int64_t at, Doubles& dh) {
    Doubles da(H);
    for (int64_t j = 0; j < H; ++j) da[j] = dh[j] * hidden_slope(s.a[j]);
    dh.assign(O, 0);
    accumulate(0, H, da.data(), da.data(), at, masked(s.h, s.t, at % N), dh);
    dh = masked(dh, s.t, at % N);
  }
};

}  // namespace naive
