// The pointwise part of a batch-normalised step: a CTA has a few units of all rows, so a column's statistics are sums inside it, and
// csrc/cells/bnlstm.h the arithmetic.
//
// Rows lie along the threads, adjacent units along the lanes of a warp. A thread has the same rows in every pass over them and keeps
// what it made of an element where the product's sums were: it alone reads them again, from L1 while the columns fit there.
#pragma once
#include "../../cells/bnlstm.h"
#include "../prim/shared.cuh"
#include "columns.h"
#include "kernels.cuh"

namespace fastrnn::cuda {

// The sums of `Count` values of each unit over the CTA's threads, in an order that the tile decides alone.
template <int Units, int Threads>
class ColumnSums {
  static constexpr StepsColumns kShape{Units, Threads};
  static constexpr int kWarps = Threads / 32;
  static_assert(Units <= 32 && 32 % Units == 0, "a warp has whole rows of units");
  static_assert(kWarps <= 32 && (kWarps & (kWarps - 1)) == 0, "a column's parts are lanes of one warp");

 public:
  FASTRNN_DEVICE ColumnSums()
      : parts_(prim::shared_view<float>(0, kShape.parts())),
        results_(prim::shared_view<float>(kShape.parts() * 4, kShape.results())) {}

  template <int Count>
  FASTRNN_DEVICE void operator()(float (&v)[Count]) const {
    static_assert(Count <= StepsColumns::kMost, "columns");
    const int thread = prim::thread_index(), unit = thread % Units;
    FASTRNN_UNROLL
    for (int i = 0; i < Count; i++) {
      FASTRNN_UNROLL
      for (int m = 16; m >= Units; m /= 2)
        v[i] += prim::bits_float(prim::shuffle_xor(prim::float_bits(v[i]), m));
      if (thread % 32 < Units) parts_.store((i * Units + unit) * kShape.line() + thread / 32, v[i]);
    }
    if (!mutated(Mutation::dropped_barrier)) prim::block_barrier("parts of columns");
    constexpr int kParts = Count * Units * kWarps;
    for (int at = thread; at < round_up(kParts, 32); at += Threads) {
      const int column = at / kWarps, warp = at % kWarps;
      float sum = at < kParts ? parts_.load(column * kShape.line() + warp) : 0.f;
      FASTRNN_UNROLL
      for (int m = 1; m < kWarps; m *= 2)
        sum += prim::bits_float(prim::shuffle_xor(prim::float_bits(sum), m));
      if (at < kParts && warp == 0) results_.store(column, sum);
    }
    // All parts are read, too: the next sums may take their place.
    if (!mutated(Mutation::statistics_barrier)) prim::block_barrier("sums of columns");
    FASTRNN_UNROLL
    for (int i = 0; i < Count; i++) v[i] = results_.load(i * Units + unit);
  }

 private:
  const prim::Shared<float> parts_, results_;
};

// Step s of one direction: what forward and backward share. Columns past the last unit have no rows, and only take part in the sums.
template <class Params, int Units, int Threads>
class Columns {
 protected:
  static constexpr int kRows = Threads / Units;  // of a pass over the batch

  FASTRNN_DEVICE Columns(const Params& p, int direction, int block, int s)
      : p_(p),
        w_(p.work[direction]),
        reverse_(p.dir[direction].reverse),
        s_(s),
        j_(block * Units + prim::thread_index() % Units),
        rows_(j_ < (mutated(Mutation::unit_tail) ? p.H - 1 : p.H) ? p.N : 0) {}

  // A row at this step; not live: past its end, where a row has its zeros at the times that are left.
  struct Place {
    int n = 0, t = 0, length = 0;
    bool exists = false, live = false;
  };
  FASTRNN_DEVICE int time(int s, int length) const { return reverse_ ? length - 1 - s : s; }
  FASTRNN_DEVICE Place place(int n) const {
    Place x;
    x.n = n;
    x.exists = n < rows_;
    x.length = x.exists ? row_length(p_, n) : 0;
    x.live = s_ < x.length;
    x.t = x.live ? time(s_, x.length) : s_;
    return x;
  }
  // The thread's rows, `Block` at a time: load(place, i) with all loads of a block in flight, then use(place, i). Of live rows; of
  // ended ones as well, where asked for.
  template <int Block, bool kEnded, class Load, class Use>
  FASTRNN_DEVICE void each(const Load& load, const Use& use) const {
    for (int n = prim::thread_index() / Units; n < rows_; n += Block * kRows) {
      Place x[Block];
      FASTRNN_UNROLL
      for (int i = 0; i < Block; i++) {
        x[i] = place(n + i * kRows);
        if (x[i].live) load(x[i], i);
      }
      FASTRNN_UNROLL
      for (int i = 0; i < Block; i++)
        if (x[i].live || (kEnded && x[i].exists)) use(x[i], i);
    }
  }
  // Whether a row counts in the statistics.
  FASTRNN_DEVICE bool counts(const Place& x) const {
    return !mutated(Mutation::rows_missing) || x.n < (p_.N - 1) / kRows * kRows;
  }

  FASTRNN_DEVICE bool resets(int s, const Place& x) const {
    return reset_at(p_, time(s, x.length), x.n) && !mutated(Mutation::reset_ignored);
  }
  FASTRNN_DEVICE int alive() const { return p_.alive ? prim::load_constant(p_.alive + s_) : p_.N; }
  // Fewer than two rows have no variance: given statistics.
  FASTRNN_DEVICE bool measured() const { return p_.batch && alive() >= 2; }
  FASTRNN_DEVICE float share() const {
    return 1.f / static_cast<float>(mutated(Mutation::dead_rows_counted) ? p_.N : alive());
  }
  FASTRNN_DEVICE float of_unit(const float* values, int gate = 0) const {
    return rows_ ? prim::load_constant(values + gate * p_.H + j_) : 0.f;
  }
  FASTRNN_DEVICE int64_t at(int n, int values = 1, int value = 0) const {
    return static_cast<int64_t>(n) * values * p_.H + value * p_.H + j_;
  }

  const Params& p_;
  const StepsWork& w_;
  const bool reverse_;
  const int s_, j_, rows_;
  const ColumnSums<Units, Threads> sums_;
};

template <class D, int Units, int Threads, bool kLinear = false>
class ForwardColumns : Columns<StepsBnForwardParams, Units, Threads> {
  using Base = Columns<StepsBnForwardParams, Units, Threads>;
  using Base::p_, Base::w_, Base::s_, Base::j_, Base::at;
  using typename Base::Place;
  using Elem = typename D::Elem;
  using A = Activations<kLinear>;
  static constexpr int kOutputGate = 3;  // where the product's sums have it, once it is made

 public:
  FASTRNN_DEVICE ForwardColumns(const StepsBnForwardParams& p, int direction, int block, int s)
      : Base(p, direction, block, s), d_(p.dir[direction]) {}

  FASTRNN_DEVICE void run() const {
    const bool measured = this->measured();
    float sum[4] = {}, mean[4], factor[4];
    if (measured)
      this->template each<4, false>(
          [&](const Place& x, int) {
            if (!this->counts(x)) return;
            FASTRNN_UNROLL
            for (int g = 0; g < 4; g++) sum[g] += w_.sums[at(x.n, 4, g)];
          },
          [](const Place&, int) {});
    moments(0, measured, sum, mean, factor, [&](const Place& x, int g) { return w_.sums[at(x.n, 4, g)]; });
    float of_c[1] = {}, mean_c[1], factor_c[1];
    gates(mean, factor, of_c[0]);
    moments(1, measured, of_c, mean_c, factor_c, [&](const Place& x, int) { return w_.c[at(x.n)]; });
    outputs(mean_c[0], factor_c[0]);
  }

 private:
  // Mean and 1 / sqrt(var + eps) of this unit's columns: of the batch, whose first sums come in `sum`, or given.
  template <int Gates, class Value>
  FASTRNN_DEVICE void moments(int term, bool measured, float (&sum)[Gates], float (&mean)[Gates],
                              float (&factor)[Gates], const Value& value) const {
    float var[Gates];
    const int width = Gates * p_.H;
    if (measured) {
      const float part = this->share();
      this->sums_(sum);
      FASTRNN_UNROLL
      for (int g = 0; g < Gates; g++) {
        mean[g] = part * sum[g];
        var[g] = 0.f;
      }
      // Two passes, because the squares of activations cancel.
      this->template each<4, false>(
          [&](const Place& x, int) {
            if (!this->counts(x)) return;
            FASTRNN_UNROLL
            for (int g = 0; g < Gates; g++) {
              const float v = value(x, g) - mean[g];
              var[g] += v * v;
            }
          },
          [](const Place&, int) {});
      this->sums_(var);
      FASTRNN_UNROLL
      for (int g = 0; g < Gates; g++) var[g] *= part;
    } else {
      const BnGiven& given = d_.given[term];
      const int64_t row = static_cast<int64_t>(s_ < given.rows ? s_ : given.rows - 1) * width;
      FASTRNN_UNROLL
      for (int g = 0; g < Gates; g++) {
        mean[g] = this->of_unit(given.mean + row, g);
        var[g] = this->of_unit(given.var + row, g);
      }
    }
    const bool stores = d_.used[term] && this->rows_ && prim::thread_index() < Units;
    FASTRNN_UNROLL
    for (int g = 0; g < Gates; g++) {
      factor[g] = prim::reciprocal_sqrt(var[g] + p_.eps);
      if (!stores) continue;
      float* const used = d_.used[term] + g * p_.H + j_;
      prim::store(used + static_cast<int64_t>(s_) * width, mean[g]);
      prim::store(used + static_cast<int64_t>(p_.T + s_) * width, var[g]);
    }
  }

  FASTRNN_DEVICE float input(const Place& x, int g) const {
    const int column = g * p_.H + j_;
    if (p_.wx_is_float) return prim::load_constant(row_at<const float>(d_.wx, x.t, x.n) + column);
    return D::load(row_at<const Elem>(d_.wx, x.t, x.n) + column);
  }

  // Gates and cell; adds up the cells.
  FASTRNN_DEVICE void gates(const float (&mean)[4], const float (&factor)[4], float& sum) const {
    constexpr int kBlock = 2;
    float gamma[4], a[kBlock][4], wx[kBlock][4], before[kBlock];
    FASTRNN_UNROLL
    for (int g = 0; g < 4; g++) gamma[g] = this->of_unit(d_.gamma_h, g);
    this->template each<kBlock, true>(
        [&](const Place& x, int i) {
          FASTRNN_UNROLL
          for (int g = 0; g < 4; g++) {
            a[i][g] = w_.sums[at(x.n, 4, g)];
            wx[i][g] = input(x, g);
          }
          before[i] = this->resets(s_, x) ? 0.f : w_.c[at(x.n)];
        },
        [&](const Place& x, int i) {
          float c = 0.f;
          if (x.live) {
            float gate[4], hat[4];
            FASTRNN_UNROLL
            for (int g = 0; g < 4; g++) {
              hat[g] = (a[i][g] - mean[g]) * factor[g];
              const float z = batch_norm_gate<A>(hat[g], wx[i][g], gamma[g], 1.f, 0.f);
              gate[g] = g == 2 ? A::tanh(z) : A::sigmoid(z);
            }
            c = lstm_cell<A>(gate[0], gate[1], gate[2], before[i]);
            w_.c[at(x.n)] = c;
            w_.sums[at(x.n, 4, kOutputGate)] = gate[3];
            if (this->counts(x)) sum += c;
            if (d_.tape.data) {
              Elem* const tape = row_at<Elem>(d_.tape, x.t, x.n) + j_;
              FASTRNN_UNROLL
              for (int g = 0; g < 4; g++) {
                D::store(tape + g * p_.H, gate[g]);
                D::store(tape + (4 + g) * p_.H, hat[g]);
              }
            }
            if (d_.c_n && s_ == x.length - 1) D::store(static_cast<Elem*>(d_.c_n) + at(x.n), c);
          }
          if (d_.cells.data) prim::store(row_at<float>(d_.cells, x.t, x.n) + j_, c);
        });
  }

  FASTRNN_DEVICE void outputs(float mean, float factor) const {
    constexpr int kBlock = 4;
    const float gamma = this->of_unit(d_.gamma_c), beta = this->of_unit(d_.beta_c);
    Elem* const next = static_cast<Elem*>(w_.operand[(s_ + 1) & 1]);
    float c[kBlock], o[kBlock];
    this->template each<kBlock, true>(
        [&](const Place& x, int i) {
          c[i] = w_.c[at(x.n)];
          o[i] = w_.sums[at(x.n, 4, kOutputGate)];
        },
        [&](const Place& x, int i) {
          const float h = x.live ? o[i] * A::tanh(A::fma(gamma, (c[i] - mean) * factor, beta)) : 0.f;
          D::store(row_at<Elem>(d_.y, x.t, x.n) + j_, h);
          if (!x.live) return;
          if (s_ == x.length - 1) {
            if (d_.h_n) D::store(static_cast<Elem*>(d_.h_n) + at(x.n), h);
          } else {
            D::store(next + static_cast<int64_t>(x.n) * p_.product[0].inner + j_,
                     this->resets(s_ + 1, x) ? 0.f : h);
          }
        });
  }

  const BnLstmForwardDirection& d_;
};

template <class D, int Units, int Threads, bool kLinear = false>
class BackwardColumns : Columns<StepsBnBackwardParams, Units, Threads> {
  using Base = Columns<StepsBnBackwardParams, Units, Threads>;
  using Base::p_, Base::w_, Base::s_, Base::j_, Base::at;
  using typename Base::Place;
  using Elem = typename D::Elem;
  using A = Activations<kLinear>;

 public:
  // The launches walk against the steps; launch T is behind the first step.
  FASTRNN_DEVICE BackwardColumns(const StepsBnBackwardParams& p, int direction, int block, int launch)
      : Base(p, direction, block, p.T - 1 - launch), d_(p.dir[direction]), launch_(launch) {}

  FASTRNN_DEVICE void run() const {
    if (s_ < 0) return initial();
    const bool measured = this->measured();
    const float part = this->share();
    const float mean = used(1, 0, 0), factor = prim::reciprocal_sqrt(used(1, 1, 0) + p_.eps);
    float of_c[2] = {}, of_a[8] = {};  // sums of gradients, then of gradients times normalised values
    outputs(mean, factor, of_c);
    means(measured, part, of_c);
    cells(mean, factor, of_c, of_a);
    means(measured, part, of_a);
    terms(of_a);
  }

 private:
  // Means of the columns' gradients; zeros where the statistics are constants.
  template <int Count>
  FASTRNN_DEVICE void means(bool measured, float part, float (&sum)[Count]) const {
    if (measured) this->sums_(sum);
    FASTRNN_UNROLL
    for (int i = 0; i < Count; i++) sum[i] = measured ? part * sum[i] : 0.f;
  }

  // What reaches the initial state.
  FASTRNN_DEVICE void initial() const {
    for (int n = prim::thread_index() / Units; n < this->rows_; n += this->kRows)
      if (row_length(p_, n) > 0) w_.h[at(n)] = w_.sums[at(n)];
  }

  FASTRNN_DEVICE float used(int term, int what, int gate) const {
    const int width = term ? p_.H : 4 * p_.H;
    return this->of_unit(d_.used[term] + static_cast<int64_t>(what * p_.T + s_) * width, gate);
  }
  FASTRNN_DEVICE float tape(const Place& x, int slot) const {
    return D::load(row_at<const Elem>(d_.tape, x.t, x.n) + slot * p_.H + j_);
  }
  FASTRNN_DEVICE float cell(const Place& x, int t) const {
    return prim::load_constant(row_at<const float>(d_.cells, t, x.n) + j_);
  }

  // Output gate and normalised cell. The latter's gradient stays in the sums, the gate's in the terms.
  FASTRNN_DEVICE void outputs(float mean, float factor, float (&sum)[2]) const {
    constexpr int kBlock = 2;
    const float gamma = this->of_unit(d_.gamma_c), beta = this->of_unit(d_.beta_c);
    float dh[kBlock], o[kBlock], c[kBlock];
    this->template each<kBlock, true>(
        [&](const Place& x, int i) {
          // The last step of a row is reached by nothing but the caller's gradients.
          dh[i] = s_ == x.length - 1 ? w_.h[at(x.n)] : w_.sums[at(x.n)];
          if (d_.dy.data) dh[i] += D::load(row_at<const Elem>(d_.dy, x.t, x.n) + j_);
          o[i] = tape(x, 3);
          c[i] = cell(x, x.t);
        },
        [&](const Place& x, int i) {
          BnOutputGrad<float> r = {0.f, 0.f};
          if (x.live) {
            const float hat = (c[i] - mean) * factor;
            r = bnlstm_backward_output<A>(o[i], A::tanh(A::fma(gamma, hat, beta)), dh[i]);
            w_.sums[at(x.n)] = r.m;
            w_.terms[at(x.n, 4, 3)] = r.o;
            if (this->counts(x)) {
              sum[0] += r.m;
              sum[1] += r.m * hat;
            }
          }
          D::store(row_at<Elem>(d_.dm, x.t, x.n) + j_, r.m);
        });
  }

  // Cell and the other gates, whose gradients go to the terms.
  FASTRNN_DEVICE void cells(float mean, float factor, const float (&of_c)[2], float (&sum)[8]) const {
    constexpr int kBlock = 2;
    const float scale = this->of_unit(d_.gamma_c) * factor;
    float m[kBlock], dz_o[kBlock], dc[kBlock], c[kBlock], before[kBlock], values[kBlock][7];
    this->template each<kBlock, true>(
        [&](const Place& x, int i) {
          m[i] = w_.sums[at(x.n)];
          dz_o[i] = w_.terms[at(x.n, 4, 3)];
          dc[i] = w_.c[at(x.n)];
          if (d_.dcells.data) dc[i] += prim::load_constant(row_at<const float>(d_.dcells, x.t, x.n) + j_);
          c[i] = cell(x, x.t);
          before[i] = 0.f;
          if (s_)
            before[i] = cell(x, this->time(s_ - 1, x.length));
          else if (d_.c0)
            before[i] = D::load(static_cast<const Elem*>(d_.c0) + at(x.n));
          FASTRNN_UNROLL
          for (int k = 0; k < 7; k++) values[i][k] = tape(x, k < 3 ? k : k + 1);
        },
        [&](const Place& x, int i) {
          float dz[4] = {};
          if (x.live) {
            const bool cleared = this->resets(s_, x);
            const float sent =
                dc[i] + batch_norm_backward<A>(m[i], (c[i] - mean) * factor, scale, of_c[0], of_c[1]);
            const BnCellGrad<float> r = bnlstm_backward_cell<A>(values[i][0], values[i][1], values[i][2],
                                                                cleared ? 0.f : before[i], sent);
            dz[0] = r.i, dz[1] = r.f, dz[2] = r.g, dz[3] = dz_o[i];
            w_.c[at(x.n)] = cleared ? 0.f : r.c_prev;
            const bool counts = this->counts(x);
            FASTRNN_UNROLL
            for (int g = 0; g < 4; g++) {
              if (g < 3) w_.terms[at(x.n, 4, g)] = dz[g];
              if (!counts) continue;
              sum[g] += dz[g];
              sum[4 + g] += dz[g] * values[i][3 + g];
            }
          }
          FASTRNN_UNROLL
          for (int g = 0; g < 4; g++) D::store(row_at<Elem>(d_.dgates, x.t, x.n) + g * p_.H + j_, dz[g]);
        });
  }

  // The recurrent term's gradient, which the product of the step before reads; nothing of a state that was reset. Rows whose last
  // step is still to come have zeros there since the beginning.
  FASTRNN_DEVICE void terms(const float (&of_a)[8]) const {
    constexpr int kBlock = 2;
    float scale[4], dz[kBlock][4], hat[kBlock][4];
    FASTRNN_UNROLL
    for (int g = 0; g < 4; g++)
      scale[g] = this->of_unit(d_.gamma_h, g) * prim::reciprocal_sqrt(used(0, 1, g) + p_.eps);
    Elem* const next = static_cast<Elem*>(w_.operand[(launch_ + 1) & 1]);
    this->template each<kBlock, true>(
        [&](const Place& x, int i) {
          FASTRNN_UNROLL
          for (int g = 0; g < 4; g++) {
            dz[i][g] = w_.terms[at(x.n, 4, g)];
            hat[i][g] = tape(x, 4 + g);
          }
        },
        [&](const Place& x, int i) {
          const bool cleared = x.live && this->resets(s_, x);
          FASTRNN_UNROLL
          for (int g = 0; g < 4; g++) {
            float da = 0.f;
            if (x.live) {
              da = batch_norm_backward<A>(dz[i][g], hat[i][g], scale[g], of_a[g], of_a[4 + g]);
              D::store(next + static_cast<int64_t>(x.n) * p_.product[0].inner + g * p_.H_padded + j_,
                       cleared ? 0.f : da);
            }
            D::store(row_at<Elem>(d_.dgates_h, x.t, x.n) + g * p_.H + j_, da);
          }
        });
  }

  const BnLstmBackwardDirection& d_;
  const int launch_;
};

}  // namespace fastrnn::cuda
