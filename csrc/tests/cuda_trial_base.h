// What trials of layers of a structure of their own share: the drawn problem's sizes, tensors, launches, comparison.
#pragma once
#include "cuda_trial.h"

namespace trial {

template <class D, class T, template <class, class, int> class ExchangeOf>
class TrialBase {
 public:
  std::string failure;
  double worst = 0;
  std::vector<Tensor<D>> results;  // for comparison to the bit

 protected:
  static constexpr bool kShared = ExchangeOf<D, T, 1>::kInShared;

  explicit TrialBase(const Options& o) : o_(o), random_(o.N * 1000 + o.H) {
    hp_ = round_up(o.H, D::kVec);
    ctas_ = ceil_div(hp_, T::kUnits);
    lengths_.assign(o.N, o.T);
    for (int n = 0; o.lengths && n < o.N; n++) lengths_[n] = 1 + (n * 5 + o.T - 1) % o.T;
    for (int i = 0; o.reset && i < o.T * o.N; i++) reset_.push_back(random_() % 4 == 0);
  }

  Doubles draw(size_t n, double scale) {
    Doubles v(n);
    for (double& x : v) x = scale * std::normal_distribution<double>()(random_);
    return v;
  }
  bool reversed(int direction) const { return o_.directions == 2 ? direction == 1 : o_.reverse; }

  void fill(Shape& s) {
    s.T = o_.T, s.N = o_.N, s.H = o_.H, s.H_padded = hp_;
    s.directions = o_.directions, s.groups = o_.groups, s.ctas = ctas_;
    s.lengths = o_.lengths ? lengths_.data() : nullptr;
    s.reset = o_.reset ? reset_.data() : nullptr;
    flags_.assign(size_t(o_.directions) * o_.groups * ctas_ * kFlagStride, 0);
    s.flags = flags_.data();
  }

  template <class Kernel>
  bool launch(const char* what, int shared_bytes, Kernel kernel) {
    if (!failure.empty()) return false;
    emu::Launch l;
    l.grid = o_.directions * o_.groups * ctas_;
    l.block = T::kThreads;
    l.cluster = kShared ? ctas_ : 1;
    l.shared_bytes = shared_bytes;
    l.seed = o_.seed;
    l.slow_cta = l.grid - 1, l.slow_factor = o_.slow_factor;
    const emu::Report r = emu::launch(l, kernel);
    if (!r.ok()) failure = std::string(what) + ": " + r.error;
    return r.ok();
  }

  // Through the kernel that packs on a GPU; p has the matrices.
  std::vector<Vec4> pack(PackParams p, const Geometry& g) {
    std::vector<Vec4> packed(size_t(ctas_) * g.cta_vectors());
    p.packed = packed.data();
    p.geometry = g;
    p.H = o_.H, p.H_padded = hp_, p.ctas = ctas_;
    emu::Launch l;
    l.grid = 2, l.block = 256;
    const emu::Report r = emu::launch(l, [&] { pack_kernel<D>(p); });
    if (!r.ok()) failure = r.error;
    return packed;
  }

  Tensor<D>& tensor(const Doubles& v) { return *kept_.emplace_back(new Tensor<D>(v)); }
  Tensor<D>& tensor(size_t n) { return *kept_.emplace_back(new Tensor<D>(n)); }
  // fp32, of doubles or unwritten.
  std::vector<float>& floats(const Doubles& v) {
    return *floats_.emplace_back(new std::vector<float>(v.begin(), v.end()));
  }
  std::vector<float>& floats(size_t n) { return floats(Doubles(n, NAN)); }
  static Doubles doubles(const std::vector<float>& v) { return Doubles(v.begin(), v.end()); }

  // (T, N, width), or a direction of a tensor that holds all directions side by side.
  fastrnn::cuda::Rows rows(void* data, int64_t width, int parts = 1) const {
    return {data, o_.N * width * parts, width * parts};
  }
  Mail private_mail(int64_t width) {
    return {tensor(size_t(o_.T) * o_.N * width).data(), o_.N * width, width};
  }
  // The tensor itself where its rows may be exchanged.
  Mail mail_in(const fastrnn::cuda::Rows& r, int width, int padded, int values = 1) {
    if (width == padded && !o_.separate_mail) return {r.data, r.stride_t, r.stride_n};
    return private_mail(int64_t{values} * padded);
  }
  Doubles part(Tensor<D>& all, int d, int width) const {
    Doubles out(size_t(o_.T) * o_.N * width);
    for (int i = 0; i < o_.T * o_.N; i++)
      for (int j = 0; j < width; j++)
        out[size_t(i) * width + j] = all[(size_t(i) * o_.directions + d) * width + j];
    return out;
  }
  void expect(const char* name, const Doubles& got, const Doubles& expected) {
    const std::string s = compare<D>(name, got, expected, &worst);
    if (failure.empty()) failure = s;
  }

  Options o_;
  std::mt19937_64 random_;
  int hp_, ctas_;
  std::vector<int> lengths_;
  std::vector<uint8_t> reset_;
  std::vector<uint32_t> flags_;
  std::vector<std::unique_ptr<Tensor<D>>> kept_;
  std::vector<std::unique_ptr<std::vector<float>>> floats_;
};

// All problems under three schedules, the long ones under a fourth in which the last CTA falls behind as far as its peers let
// it: the same bits, near the reference.
template <class OneTrial, class Tile, class Problems>
void run_problems(const Problems& problems) {
  double worst = 0;
  for (auto o : problems) {
    decltype(OneTrial::results) first;
    o.groups = std::max(o.groups, ceil_div(o.N, Tile::kRows));
    for (o.seed = 1; o.seed <= (o.T < 8 ? 3 : 4); o.seed++) {
      o.slow_factor = o.seed < 4 ? 1 : 4;
      const OneTrial trial(o);
      report(__FILE__, __LINE__, o, trial.failure);
      worst = std::max(worst, trial.worst);
      if (o.seed == 1) first = trial.results;
      if (trial.failure.empty()) CHECK(first == trial.results);
    }
  }
  std::printf("  worst error: %.2f of what is allowed\n", worst);
}

// Some schedule fails.
template <class OneTrial, class Problem>
bool caught(Problem o, Mutation m) {
  o.mutation = m;
  for (o.seed = 1; o.seed <= 3; o.seed++) {
    const OneTrial trial(o);
    if (trial.failure.empty()) continue;
    std::printf("  mutation %d: %s\n", static_cast<int>(m), trial.failure.c_str());
    return true;
  }
  return false;
}

}  // namespace trial
