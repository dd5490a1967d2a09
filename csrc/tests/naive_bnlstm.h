// Batch-normalised LSTM in scalar double: one direction, step by step over the batch.
#pragma once
#include <algorithm>

#include "naive.h"

namespace naive {

// From the normalised input term wx on.
struct BnLstm {
  int T, N, H;
  bool reverse, batch;
  double eps;
  int given_rows;
  std::vector<int> lengths;
  std::vector<uint8_t> reset;
  Doubles wx, w_hh, gamma_h, gamma_c, beta_c, h0, c0, dy, dcells, dh_n, dc_n;
  Doubles mean[2], var[2];  // given, (rows, 4H) and (rows, H)
  Doubles y, cells, h_n, c_n, used[2];
  Doubles dz, dw_hh, dgamma_h, dgamma_c, dbeta_c, dh0, dc0;

  static double sigmoid(double v) { return 1 / (1 + std::exp(-v)); }
  bool lives(int s, int n) const { return s < lengths[n]; }
  size_t at(int s, int n) const { return size_t(reverse ? lengths[n] - 1 - s : s) * N + n; }
  bool resets(int s, int n) const { return !reset.empty() && reset[at(s, n)]; }
  int alive(int s) const {
    return static_cast<int>(std::count_if(lengths.begin(), lengths.end(), [s](int l) { return l > s; }));
  }
  bool measured(int s) const { return batch && alive(s) >= 2; }

  void run() {
    const size_t TN = size_t(T) * N;
    y.assign(TN * H, 0), cells.assign(TN * H, 0), h_n = h0, c_n = c0, dz.assign(TN * 4 * H, 0);
    dw_hh.assign(size_t(4) * H * H, 0), dgamma_h.assign(4 * H, 0);
    dgamma_c.assign(H, 0), dbeta_c.assign(H, 0);
    used[0].assign(size_t(2) * T * 4 * H, 0), used[1].assign(size_t(2) * T * H, 0);
    std::vector<Step> tape;
    for (int s = 0; s < T; s++) tape.push_back(step(s));
    dh0 = dh_n, dc0 = dc_n;
    for (int s = static_cast<int>(tape.size()); s-- > 0;) step_back(s, tape[s]);
  }

 private:
  struct Step {  // by row: states before, gates, normalised recurrent term and cell, tanh of the latter
    std::vector<Doubles> h, c, a, hat, c_hat, q;
  };

  // Statistics of one column at one step, recorded, and its values normalised.
  void normalise(int term, int s, int width, int column, Doubles& v) {
    double m = 0, square = 0;
    if (measured(s)) {
      for (int n = 0; n < N; n++) m += lives(s, n) ? v[n] / alive(s) : 0;
      for (int n = 0; n < N; n++) square += lives(s, n) ? (v[n] - m) * (v[n] - m) / alive(s) : 0;
    } else {
      const int row = std::min(s, given_rows - 1);
      m = mean[term][row * width + column], square = var[term][row * width + column];
    }
    used[term][size_t(s) * width + column] = m;
    used[term][size_t(T + s) * width + column] = square;
    for (double& x : v) x = (x - m) / std::sqrt(square + eps);
  }
  // The gradient of a column's values from that of the normalised ones times gamma.
  void back(int term, int s, int width, int column, const Doubles& hat, double gamma, Doubles& d) const {
    double m = 0, m_hat = 0;
    for (int n = 0; measured(s) && n < N; n++)
      if (lives(s, n)) m += d[n] / alive(s), m_hat += d[n] * hat[n] / alive(s);
    const double r = 1 / std::sqrt(used[term][size_t(T + s) * width + column] + eps);
    for (int n = 0; n < N; n++) d[n] = gamma * r * (d[n] - m - hat[n] * m_hat);
  }

  Step step(int s) {
    Step k;
    k.h = k.c = k.c_hat = k.q = std::vector<Doubles>(N, Doubles(H, 0.0));
    k.a = k.hat = std::vector<Doubles>(N, Doubles(4 * H, 0.0));
    for (int n = 0; n < N; n++)
      for (int j = 0; lives(s, n) && !resets(s, n) && j < H; j++)
        k.h[n][j] = h_n[n * H + j], k.c[n][j] = c_n[n * H + j];
    for (int r = 0; r < 4 * H; r++) {
      Doubles v(N, 0.0);
      for (int n = 0; n < N; n++)
        for (int j = 0; j < H; j++) v[n] += w_hh[size_t(r) * H + j] * k.h[n][j];
      normalise(0, s, 4 * H, r, v);
      for (int n = 0; n < N; n++) {
        if (!lives(s, n)) continue;
        const double z = gamma_h[r] * v[n] + wx[at(s, n) * 4 * H + r];
        k.hat[n][r] = v[n];
        k.a[n][r] = r / H == 2 ? std::tanh(z) : sigmoid(z);
      }
    }
    for (int j = 0; j < H; j++) {
      Doubles v(N, 0.0);
      for (int n = 0; n < N; n++)
        if (lives(s, n)) v[n] = c_n[n * H + j] = k.a[n][H + j] * k.c[n][j] + k.a[n][j] * k.a[n][2 * H + j];
      normalise(1, s, H, j, v);
      for (int n = 0; n < N; n++) {
        if (!lives(s, n)) continue;
        k.c_hat[n][j] = v[n];
        k.q[n][j] = std::tanh(gamma_c[j] * v[n] + beta_c[j]);
        y[at(s, n) * H + j] = h_n[n * H + j] = k.a[n][3 * H + j] * k.q[n][j];
        cells[at(s, n) * H + j] = c_n[n * H + j];
      }
    }
    return k;
  }

  void step_back(int s, const Step& k) {
    for (int j = 0; j < H; j++) {
      Doubles dm(N, 0.0), hat(N, 0.0);
      for (int n = 0; n < N; n++) {
        if (!lives(s, n)) continue;
        const double dh = dh0[n * H + j] + dy[at(s, n) * H + j], o = k.a[n][3 * H + j], q = k.q[n][j];
        dz[at(s, n) * 4 * H + 3 * H + j] = dh * q * o * (1 - o);
        dm[n] = dh * o * (1 - q * q);
        hat[n] = k.c_hat[n][j];
        dgamma_c[j] += dm[n] * hat[n];
        dbeta_c[j] += dm[n];
      }
      back(1, s, H, j, hat, gamma_c[j], dm);
      for (int n = 0; n < N; n++) {
        if (!lives(s, n)) continue;
        const double i = k.a[n][j], f = k.a[n][H + j], g = k.a[n][2 * H + j];
        const double dc = dc0[n * H + j] + dcells[at(s, n) * H + j] + dm[n];
        double* d = dz.data() + at(s, n) * 4 * H + j;
        d[0] = dc * g * i * (1 - i);
        d[H] = dc * k.c[n][j] * f * (1 - f);
        d[2 * H] = dc * i * (1 - g * g);
        dc0[n * H + j] = resets(s, n) ? 0 : dc * f;
      }
    }
    std::vector<Doubles> before(N, Doubles(H, 0.0));
    for (int r = 0; r < 4 * H; r++) {
      Doubles da(N, 0.0), hat(N, 0.0);
      for (int n = 0; n < N; n++) {
        if (!lives(s, n)) continue;
        da[n] = dz[at(s, n) * 4 * H + r];
        hat[n] = k.hat[n][r];
        dgamma_h[r] += da[n] * hat[n];
      }
      back(0, s, 4 * H, r, hat, gamma_h[r], da);
      for (int n = 0; n < N; n++)
        for (int j = 0; lives(s, n) && j < H; j++) {
          dw_hh[size_t(r) * H + j] += da[n] * k.h[n][j];
          before[n][j] += da[n] * w_hh[size_t(r) * H + j];
        }
    }
    for (int n = 0; n < N; n++)
      for (int j = 0; lives(s, n) && j < H; j++) dh0[n * H + j] = resets(s, n) ? 0 : before[n][j];
  }
};

// With the norm of the input term before it: of each step's rows, or of all of them where `sequence`.
struct BnLstmLayer : BnLstm {
  int I;
  bool sequence;
  Doubles x, w_ih, gamma_x, bias;  // bias may be empty
  Doubles mean_x, var_x;           // given, (rows, 4H)
  Doubles used_x;
  Doubles dx, dw_ih, dgamma_x, dbias;

  void run_layer() {
    const size_t TN = size_t(T) * N, G = size_t(4) * H;
    const int parts = sequence ? 1 : T;
    wx.assign(TN * G, 0), hat_.assign(TN * G, 0), used_x.assign(2 * parts * G, 0);
    for (int part = 0; part < parts; part++)
      for (size_t r = 0; r < G; r++) normalise_input(part, rows_of(part), r);
    run();
    dx.assign(TN * I, 0), dw_ih.assign(G * I, 0), dgamma_x.assign(G, 0), dbias.assign(G, 0);
    for (int part = 0; part < parts; part++)
      for (size_t r = 0; r < G; r++) input_back(part, rows_of(part), r);
  }

 private:
  Doubles hat_;

  std::vector<size_t> rows_of(int part) const {
    std::vector<size_t> rows;
    for (int s = sequence ? 0 : part; s < (sequence ? T : part + 1); s++)
      for (int n = 0; n < N; n++)
        if (lives(s, n)) rows.push_back(at(s, n));
    return rows;
  }
  bool input_measured(size_t rows) const { return batch && (sequence ? N : rows) >= 2; }

  void normalise_input(int part, const std::vector<size_t>& rows, size_t r) {
    const size_t G = size_t(4) * H, given = std::min(part, given_rows - 1) * G + r;
    double m = 0, square = 0;
    for (size_t at : rows) {
      for (int i = 0; i < I; i++) hat_[at * G + r] += w_ih[r * I + i] * x[at * I + i];
      m += hat_[at * G + r] / rows.size();
    }
    for (size_t at : rows) square += std::pow(hat_[at * G + r] - m, 2) / rows.size();
    if (!input_measured(rows.size())) m = mean_x[given], square = var_x[given];
    used_x[part * G + r] = m, used_x[used_x.size() / 2 + part * G + r] = square;
    for (size_t at : rows) {
      hat_[at * G + r] = (hat_[at * G + r] - m) / std::sqrt(square + eps);
      wx[at * G + r] = gamma_x[r] * hat_[at * G + r] + (bias.empty() ? 0 : bias[r]);
    }
  }

  void input_back(int part, const std::vector<size_t>& rows, size_t r) {
    const size_t G = size_t(4) * H;
    double m = 0, m_hat = 0;
    for (size_t at : rows) {
      const double d = dz[at * G + r], hat = hat_[at * G + r];
      dbias[r] += d, dgamma_x[r] += d * hat;
      if (input_measured(rows.size())) m += d / rows.size(), m_hat += d * hat / rows.size();
    }
    const double scale = gamma_x[r] / std::sqrt(used_x[used_x.size() / 2 + part * G + r] + eps);
    for (size_t at : rows) {
      const double d = scale * (dz[at * G + r] - m - hat_[at * G + r] * m_hat);
      for (int i = 0; i < I; i++) {
        dx[at * I + i] += d * w_ih[r * I + i];
        dw_ih[r * I + i] += d * x[at * I + i];
      }
    }
  }
};

}  // namespace naive
