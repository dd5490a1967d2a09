// Layer-normalised LSTM and GRU in scalar double, from the normalised input term on: one direction, row by row.
#pragma once
#include <cmath>
#include <cstdint>

#include "naive.h"

namespace trial {

using naive::Doubles;

struct LayerNormReference {
  bool lstm, reverse;
  int T, N, H;
  double eps;
  std::vector<int> lengths;
  std::vector<uint8_t> reset;
  Doubles w_hh, wx, bias_n, gain_h, gain_c, bias_c, h0, c0, dy, dcells, dh_n, dc_n;
  Doubles y, cells, h_n, c_n, dwx, dh0, dc0, dw_hh, dgain_h, dbias_n, dgain_c, dbias_c;  // results

  void run() {
    const size_t TN = size_t(T) * N, GH = G() * H;
    y.assign(TN * H, 0), cells.assign(TN * H, 0), dwx.assign(TN * GH, 0);
    for (Doubles* v : {&h_n, &c_n, &dh0, &dc0}) v->assign(size_t(N) * H, 0);
    dw_hh.assign(GH * H, 0), dgain_h.assign(GH, 0);
    for (Doubles* v : {&dbias_n, &dgain_c, &dbias_c}) v->assign(H, 0);
    for (int n = 0; n < N; n++) row(n);
  }
  int G() const { return lstm ? 4 : 3; }

 private:
  struct Norm {
    Doubles hat;
    double factor;
  };
  struct Step {
    int at;
    bool cleared;
    Doubles h, c, a, tanh_c;  // state before, activated gates
    Norm of_h, of_c;
  };
  static double sigmoid(double v) { return 1 / (1 + std::exp(-v)); }

  Norm normalised(const Doubles& v) const {
    double mean = 0, var = 0;
    for (double x : v) mean += x / v.size();
    for (double x : v) var += (x - mean) * (x - mean) / v.size();
    Norm n{v, 1 / std::sqrt(var + eps)};
    for (double& x : n.hat) x = (x - mean) * n.factor;
    return n;
  }
  // The gradient of a norm's input from that of its result.
  static Doubles through(const Norm& n, const Doubles& dy) {
    double mean = 0, mean_hat = 0;
    Doubles d(dy.size());
    for (size_t i = 0; i < d.size(); i++) {
      mean += dy[i] / d.size();
      mean_hat += dy[i] * n.hat[i] / d.size();
    }
    for (size_t i = 0; i < d.size(); i++) d[i] = n.factor * (dy[i] - mean - n.hat[i] * mean_hat);
    return d;
  }
  static Doubles part(const Doubles& v, int n, int width) {
    return Doubles(v.begin() + size_t(n) * width, v.begin() + size_t(n + 1) * width);
  }
  static void put(Doubles& to, int n, const Doubles& v) {
    std::copy(v.begin(), v.end(), to.begin() + size_t(n) * v.size());
  }

  void row(int n) {
    Doubles h = part(h0, n, H), c = part(c0, n, H);
    std::vector<Step> tape;
    for (int i = 0; i < lengths[n]; i++)
      tape.push_back(step((reverse ? lengths[n] - 1 - i : i) * N + n, h, c));
    put(h_n, n, h), put(c_n, n, c);
    Doubles dh = part(dh_n, n, H), dc = part(dc_n, n, H);
    for (auto s = tape.rbegin(); s != tape.rend(); ++s) back(*s, dh, dc);
    put(dh0, n, dh), put(dc0, n, dc);
  }

  Step step(int at, Doubles& h, Doubles& c) {
    Step s{at, !reset.empty() && reset[at], {}, {}, Doubles(G() * H), Doubles(H), {}, {}};
    if (s.cleared) h.assign(H, 0), c.assign(H, 0);
    s.h = h, s.c = c;
    Doubles a(G() * H, 0.0);
    for (int r = 0; r < G() * H; r++)
      for (int j = 0; j < H; j++) a[r] += w_hh[size_t(r) * H + j] * h[j];
    s.of_h = normalised(a);
    for (int r = 0; r < G() * H; r++) {
      const double rec = gain_h[r] * s.of_h.hat[r], x = wx[size_t(at) * G() * H + r];
      if (lstm)
        s.a[r] = r / H == 2 ? std::tanh(x + rec) : sigmoid(x + rec);
      else
        s.a[r] = r / H == 2 ? std::tanh(x + s.a[r - 2 * H] * (rec + bias_n[r - 2 * H])) : sigmoid(x + rec);
    }
    for (int j = 0; j < H; j++) {
      if (lstm)
        c[j] = s.a[H + j] * c[j] + s.a[j] * s.a[2 * H + j];
      else
        h[j] = (1 - s.a[H + j]) * s.a[2 * H + j] + s.a[H + j] * h[j];
    }
    if (lstm) {
      s.of_c = normalised(c);
      for (int j = 0; j < H; j++) {
        s.tanh_c[j] = std::tanh(gain_c[j] * s.of_c.hat[j] + bias_c[j]);
        h[j] = s.a[3 * H + j] * s.tanh_c[j];
      }
    }
    put(y, at, h);
    if (lstm) put(cells, at, c);
    return s;
  }

  void back(const Step& s, Doubles& dh, Doubles& dc) {
    Doubles dz(G() * H), dr(G() * H), before(H, 0.0);  // dr: on the recurrent side
    for (int j = 0; j < H; j++) dh[j] += dy[size_t(s.at) * H + j];
    if (lstm) {
      Doubles dm(H), gained(H);
      for (int j = 0; j < H; j++) {
        const double o = s.a[3 * H + j];
        dz[3 * H + j] = dh[j] * s.tanh_c[j] * o * (1 - o);
        dm[j] = dh[j] * o * (1 - s.tanh_c[j] * s.tanh_c[j]);
        dgain_c[j] += dm[j] * s.of_c.hat[j];
        dbias_c[j] += dm[j];
        gained[j] = dm[j] * gain_c[j];
      }
      const Doubles of_c = through(s.of_c, gained);
      for (int j = 0; j < H; j++) {
        const double i = s.a[j], f = s.a[H + j], g = s.a[2 * H + j];
        const double d = dc[j] + dcells[size_t(s.at) * H + j] + of_c[j];
        dz[j] = d * g * i * (1 - i);
        dz[H + j] = d * s.c[j] * f * (1 - f);
        dz[2 * H + j] = d * i * (1 - g * g);
        dc[j] = d * f;
      }
      dr = dz;
    } else {
      for (int j = 0; j < H; j++) {
        const double r = s.a[j], z = s.a[H + j], n = s.a[2 * H + j];
        const double un = gain_h[2 * H + j] * s.of_h.hat[2 * H + j] + bias_n[j];
        dz[2 * H + j] = dh[j] * (1 - z) * (1 - n * n);
        dz[H + j] = dr[H + j] = dh[j] * (s.h[j] - n) * z * (1 - z);
        dz[j] = dr[j] = dz[2 * H + j] * un * r * (1 - r);
        dr[2 * H + j] = dz[2 * H + j] * r;
        dbias_n[j] += dr[2 * H + j];
        before[j] = dh[j] * z;
      }
    }
    put(dwx, s.at, dz);
    for (int r = 0; r < G() * H; r++) {
      dgain_h[r] += dr[r] * s.of_h.hat[r];
      dr[r] *= gain_h[r];
    }
    const Doubles da = through(s.of_h, dr);
    for (int r = 0; r < G() * H; r++)
      for (int j = 0; j < H; j++) {
        dw_hh[size_t(r) * H + j] += da[r] * s.h[j];
        before[j] += da[r] * w_hh[size_t(r) * H + j];
      }
    dh = before;
    if (s.cleared) dh.assign(H, 0), dc.assign(H, 0);
  }
};

}  // namespace trial
