// One direction of a Recurrent Highway layer in scalar double, forward and backward, row by row; nothing here is clever.
#pragma once
#include <algorithm>

#include "naive.h"

namespace naive {

struct Rhn {
  int T, N, H, I, G, depth;
  bool reverse;
  std::vector<int> lengths;
  std::vector<uint8_t> reset;
  // (N, I) and (N, H), or (G, N, I) and (G, N, H): one for each gate
  Doubles w_ih, w_hh, bias, x, h0, x_mask, s_mask, dy, dh_n;
  Doubles y, h_n, dx, dh0, dw_ih, dw_hh, dbias;  // results

  static double sigmoid(double v) { return 1 / (1 + std::exp(-v)); }
  // Factor of value j of row n, as row r of the weights meets it.
  double mask(const Doubles& all, int width, int r, int n, int j) const {
    const bool of_gate = all.size() > size_t(N) * width;
    return all[((of_gate ? r / H * N : 0) + n) * width + j];
  }
  double state_mask(int r, int n, int j) const { return mask(s_mask, H, r, n, j); }
  double input_mask(int r, int n, int k) const { return mask(x_mask, I, r, n, k); }
  double input(int at, int r) const {
    double sum = bias[r];
    for (int k = 0; k < I; k++) sum += w_ih[r * I + k] * x[at * I + k] * input_mask(r, at % N, k);
    return sum;
  }

  Doubles input_terms() const {
    Doubles all(size_t(T) * N * G * H);
    for (size_t i = 0; i < all.size(); i++) all[i] = input(static_cast<int>(i / (G * H)), i % (G * H));
    return all;
  }

  void run() {
    const size_t TN = size_t(T) * N, GH = size_t(G) * H;
    y.assign(TN * H, 0), h_n.assign(size_t(N) * H, 0), dx.assign(TN * I, 0), dh0.assign(size_t(N) * H, 0);
    dw_ih.assign(GH * I, 0), dw_hh.assign(depth * GH * H, 0), dbias.assign(depth * GH, 0);
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

  Micro micro(int at, int l, Doubles& s) {
    Micro m{s, Doubles(G * H)};
    for (int r = 0; r < G * H; r++) {
      double z = l ? bias[l * G * H + r] : input(at, r);
      for (int j = 0; j < H; j++)
        z += w_hh[(size_t(l) * G * H + r) * H + j] * s[j] * state_mask(r, at % N, j);
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
    for (int r = 0; r < G * H; r++) {
      dbias[l * G * H + r] += dz[r];
      for (int j = 0; j < H; j++) {
        const size_t w = (size_t(l) * G * H + r) * H + j;
        const double mask = state_mask(r, at % N, j);
        dw_hh[w] += dz[r] * m.s[j] * mask;
        before[j] += dz[r] * w_hh[w] * mask;
      }
      for (int k = 0; l == 0 && k < I; k++) {
        dw_ih[r * I + k] += dz[r] * x[at * I + k] * input_mask(r, at % N, k);
        dx[at * I + k] += dz[r] * w_ih[r * I + k] * input_mask(r, at % N, k);
      }
    }
    ds = before;
  }
};

}  // namespace naive
