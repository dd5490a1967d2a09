// LSTM with projection on the emulator: two matmuls a step, forward and backward, against the scalar double layer.
#include "../cuda/core/projected.cuh"
#include "cuda_cases.h"
#include "cuda_trial_base.h"

namespace trial {

struct ProjectedOptions : Options {
  int P = 20;
};

template <class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
class ProjectedTrial : public TrialBase<D, T, ExchangeOf> {
  using Base = TrialBase<D, T, ExchangeOf>;
  using ForwardLayer = ProjectedForward<D, T, ExchangeOf, kLinear>;
  using BackwardLayer = ProjectedBackward<D, T, ExchangeOf, kLinear>;
  using Base::o_, Base::hp_, Base::lengths_, Base::reset_;

 public:
  using Base::failure, Base::results;
  explicit ProjectedTrial(const ProjectedOptions& o) : Base(o), P_(o.P), pp_(round_up(o.P, D::kVec)) {
    for (int d = 0; d < o.directions; d++) layers_.push_back(layer(d));
    emu::machine().mutation = static_cast<int>(o.mutation);
    run_forward();
    if (failure.empty()) run_backward();
    emu::machine().mutation = 0;
  }

 private:
  naive::Layer layer(int d) {
    const int H = o_.H, TN = o_.T * o_.N;
    naive::Layer l;
    l.projected = true, l.linear = kLinear, l.reverse = this->reversed(d);
    l.T = o_.T, l.N = o_.N, l.I = 3, l.H = H, l.O = P_;
    l.lengths.assign(lengths_.begin(), lengths_.end());
    l.reset = reset_;
    l.w_ih = this->draw(4 * H * 3, 0.5);
    l.w_hh = this->draw(size_t(4) * H * P_, 0.7 / std::sqrt(double(P_)));
    l.w_hr = this->draw(size_t(P_) * H, 1 / std::sqrt(double(H)));
    l.b_ih = this->draw(4 * H, 0.3);
    l.b_hh = this->draw(4 * H, 0.3);
    l.x = this->draw(TN * 3, 0.7);
    l.h0 = o_.initial ? this->draw(o_.N * P_, 0.5) : Doubles(o_.N * P_, 0.0);
    l.c0 = o_.initial ? this->draw(o_.N * H, 0.5) : Doubles(o_.N * H, 0.0);
    l.dy = this->draw(TN * P_, 1);
    l.dcells = this->draw(TN * H, 1);
    l.dh_n = this->draw(o_.N * P_, 1);
    l.dc_n = this->draw(o_.N * H, 1);
    for (Doubles* v : {&l.w_hh, &l.w_hr, &l.h0, &l.c0, &l.dy, &l.dh_n, &l.dc_n}) round_all<D>(*v);
    for (int i = 0; i < TN; i++)  // nothing arrives past a row's end
      for (int j = 0; i / o_.N >= lengths_[i % o_.N] && j < H; j++) l.dcells[size_t(i) * H + j] = 0;
    l.run();
    return l;
  }

  std::vector<Vec4> pack(const naive::Layer& l, const Geometry& g) {
    PackParams p;
    p.weights = this->tensor(l.w_hh).data();
    p.projection = this->tensor(l.w_hr).data();
    p.P = P_;
    return Base::pack(p, g);
  }

  void run_forward() {
    const int H = o_.H, TN = o_.T * o_.N, ND = o_.directions;
    ProjectedForwardParams p;
    this->fill(p);
    p.P = P_, p.P_padded = pp_;
    p.wx_is_float = o_.wx_is_float || D::kPerWord == 1;
    y_ = &this->tensor(size_t(TN) * P_ * ND);
    std::vector<std::vector<Vec4>> packed(ND);
    std::vector<Tensor<D>*> h_n, c_n;
    for (int d = 0; d < ND; d++) {
      const naive::Layer& l = layers_[d];
      ProjectedForwardDirection& f = p.dir[d];
      packed[d] = pack(l, ForwardLayer::kGeometry);
      f.weights = packed[d].data();
      Doubles input(size_t(TN) * 4 * H);
      for (int i = 0; i < TN; i++)
        for (int r = 0; r < 4 * H; r++) {
          double sum = l.b_ih[r] + l.b_hh[r];
          for (int k = 0; k < 3; k++) sum += l.w_ih[r * 3 + k] * l.x[i * 3 + k];
          input[size_t(i) * 4 * H + r] = sum;
        }
      f.wx = this->rows(
          p.wx_is_float ? static_cast<void*>(this->floats(input).data()) : this->tensor(input).data(), 4 * H);
      if (o_.initial) f.h0 = this->tensor(l.h0).data(), f.c0 = this->tensor(l.c0).data();
      h_n.push_back(&this->tensor(size_t(o_.N) * P_)), c_n.push_back(&this->tensor(size_t(o_.N) * H));
      f.h_n = h_n[d]->data(), f.c_n = c_n[d]->data();
      f.y = this->rows(y_->data() + d * P_, P_, ND);
      tape_.push_back(&this->tensor(size_t(TN) * 4 * H));
      f.tape = this->rows(tape_[d]->data(), 4 * H);
      cells_.push_back(&this->floats(size_t(TN) * H));
      f.cells = this->rows(cells_[d]->data(), H);
      f.middle_mail = this->private_mail(hp_);
      f.state_mail = this->mail_in(f.y, P_, pp_);
      f.reverse = l.reverse;
    }
    if (!this->launch("forward", ForwardLayer::kLayout.bytes,
                      [&] { projected_forward_kernel<D, T, ExchangeOf, kLinear>(p); }))
      return;
    for (int d = 0; d < ND; d++) {
      const naive::Layer& l = layers_[d];
      this->expect("y", this->part(*y_, d, P_), l.y);
      this->expect("h_n", h_n[d]->doubles(), l.h_n);
      this->expect("c_n", c_n[d]->doubles(), l.c_n);
      this->expect("cells", this->doubles(*cells_[d]), l.cells);
      for (Tensor<D>* r : {h_n[d], c_n[d]}) results.push_back(*r);
    }
    results.push_back(*y_);
  }

  void run_backward() {
    const int H = o_.H, TN = o_.T * o_.N, ND = o_.directions;
    ProjectedBackwardParams p;
    this->fill(p);
    p.P = P_, p.P_padded = pp_;
    std::vector<std::vector<Vec4>> packed(ND);
    std::vector<Tensor<D>*> dh0, dc0, dgates, dh, middle;
    for (int d = 0; d < ND; d++) {
      const naive::Layer& l = layers_[d];
      ProjectedBackwardDirection& b = p.dir[d];
      packed[d] = pack(l, BackwardLayer::kGeometry);
      b.weights = packed[d].data();
      b.dy = this->rows(this->tensor(l.dy).data(), P_);
      b.dcells = this->rows(this->floats(l.dcells).data(), H);
      b.dh_n = this->tensor(l.dh_n).data(), b.dc_n = this->tensor(l.dc_n).data();
      dh0.push_back(&this->tensor(size_t(o_.N) * P_)), dc0.push_back(&this->tensor(size_t(o_.N) * H));
      b.dh0 = dh0[d]->data(), b.dc0 = dc0[d]->data();
      b.tape = this->rows(tape_[d]->data(), 4 * H);
      b.cells = this->rows(cells_[d]->data(), H);
      if (o_.initial) b.c0 = this->tensor(l.c0).data();
      dgates.push_back(&this->tensor(size_t(TN) * 4 * H));
      dh.push_back(&this->tensor(size_t(TN) * P_)), middle.push_back(&this->tensor(size_t(TN) * H));
      b.dgates = this->rows(dgates[d]->data(), 4 * H);
      b.dh = this->rows(dh[d]->data(), P_);
      b.middle = this->rows(middle[d]->data(), H);
      b.gradient_mail = this->mail_in(b.dgates, H, hp_, 4);
      b.state_mail = this->mail_in(b.dh, P_, pp_);
      b.reverse = l.reverse;
    }
    if (!this->launch("backward", BackwardLayer::kLayout.bytes,
                      [&] { projected_backward_kernel<D, T, ExchangeOf, kLinear>(p); }))
      return;
    for (int d = 0; d < ND; d++) {
      this->expect("dh0", dh0[d]->doubles(), layers_[d].dh0);
      this->expect("dc0", dc0[d]->doubles(), layers_[d].dc0);
      check_products(d, *dgates[d], *dh[d], *middle[d]);
      for (Tensor<D>* r : {dh0[d], dc0[d], dgates[d], dh[d]}) results.push_back(*r);
    }
  }

  // The host's GEMMs, from what the kernels stored alone.
  void check_products(int d, const Tensor<D>& dgates, const Tensor<D>& dh, const Tensor<D>& middle) {
    const naive::Layer& l = layers_[d];
    const int H = o_.H, N = o_.N, P = P_;
    const Doubles y = this->part(*y_, d, P);
    Doubles dx(l.dx.size(), 0.0), dw_ih(l.dw_ih.size(), 0.0), dw_hh(l.dw_hh.size(), 0.0),
        db(l.db_ih.size(), 0.0), dw_hr(l.dw_hr.size(), 0.0);
    for (int t = 0; t < o_.T; t++)
      for (int n = 0; n < N; n++) {
        const int at = t * N + n, before = l.reverse ? t + 1 : t - 1;
        const bool first = before < 0 || before >= lengths_[n];
        const bool cleared = !reset_.empty() && reset_[at];
        for (int o = 0; o < P; o++)
          for (int j = 0; j < H; j++)
            dw_hr[size_t(o) * H + j] += dh[size_t(at) * P + o] * middle[size_t(at) * H + j];
        for (int r = 0; r < 4 * H; r++) {
          const double g = dgates[size_t(at) * 4 * H + r];
          db[r] += g;
          for (int k = 0; k < 3; k++) {
            dx[at * 3 + k] += g * l.w_ih[r * 3 + k];
            dw_ih[r * 3 + k] += g * l.x[at * 3 + k];
          }
          if (t >= lengths_[n] || cleared) continue;
          for (int j = 0; j < P; j++)
            dw_hh[size_t(r) * P + j] += g * (first ? l.h0[n * P + j] : y[(size_t(before) * N + n) * P + j]);
        }
      }
    this->expect("dx", dx, l.dx);
    this->expect("dw_ih", dw_ih, l.dw_ih);
    this->expect("dw_hh", dw_hh, l.dw_hh);
    this->expect("db", db, l.db_ih);
    this->expect("dw_hr", dw_hr, l.dw_hr);
  }

  const int P_, pp_;
  std::vector<naive::Layer> layers_;
  Tensor<D>* y_ = nullptr;
  std::vector<Tensor<D>*> tape_;
  std::vector<std::vector<float>*> cells_;
};

inline std::vector<ProjectedOptions> projected_problems(int most_units) {
  std::vector<ProjectedOptions> all;
  for (const Options& o : problems(most_units)) {
    ProjectedOptions p;
    static_cast<Options&>(p) = o;
    p.P = o.H == 1 ? 1 : o.H > 40 ? 24 : o.H / 2;  // in fewer CTAs than H, in as many, alone
    if (o.H == 37) p.P = 36;
    if (o.H == 40) p.P = 8;
    all.push_back(p);
  }
  return all;
}

template <class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
void projected(int most_units) {
  run_problems<ProjectedTrial<D, T, ExchangeOf, kLinear>, T>(projected_problems(most_units));
}

}  // namespace trial

using namespace trial;

TEST(projected_bf16_sentinel) { projected<Bf16, SmallTile<Bf16>, Sentinel>(128); }
TEST(projected_bf16_flags) { projected<Bf16, SmallTile<Bf16>, Flags>(128); }
TEST(projected_bf16_local) { projected<Bf16, LocalTile<Bf16>, Local>(48); }
TEST(projected_bf16x3_cluster) { projected<Bf16x3, SmallTile<Bf16x3>, Cluster>(128); }
#if !defined(__SANITIZE_ADDRESS__)
TEST(projected_bf16_cluster) { projected<Bf16, SmallTile<Bf16>, Cluster>(128); }
TEST(projected_bf16_wide_tile) { projected<Bf16, WideTile<Bf16>, Sentinel>(96); }
TEST(projected_bf16_linear) { projected<Bf16, SmallTile<Bf16>, Sentinel, true>(40); }
TEST(projected_fp16_sentinel) { projected<Fp16, SmallTile<Fp16>, Sentinel>(128); }
TEST(projected_tf32_sentinel) { projected<Tf32, SmallTile<Tf32>, Sentinel>(128); }
TEST(projected_bf16x3_sentinel) { projected<Bf16x3, SmallTile<Bf16x3>, Sentinel>(128); }
#endif

TEST(mutations_are_caught) {
  ProjectedOptions o;
  o.T = 6, o.N = 11, o.H = 37, o.groups = 2, o.reset = true;
  using Sentinels = ProjectedTrial<Bf16, SmallTile<Bf16>, Sentinel>;
  using Clusters = ProjectedTrial<Bf16, SmallTile<Bf16>, Cluster>;
  CHECK(!caught<Sentinels>(o, Mutation::none));
  CHECK(!caught<Clusters>(o, Mutation::none));
  for (const Mutation m : {Mutation::dropped_barrier, Mutation::single_reduction_tile, Mutation::unit_tail,
                           Mutation::reset_ignored, Mutation::other_width})
    CHECK(caught<Sentinels>(o, m));
  CHECK(caught<Clusters>(o, Mutation::single_cluster_tile));
  CHECK(caught<Clusters>(o, Mutation::single_expectation));
}

int main(int argc, char** argv) { return check::run(argc, argv); }
