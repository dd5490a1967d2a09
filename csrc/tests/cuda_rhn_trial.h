// A Recurrent Highway layer's kernels for a whole sequence on the emulator.
#pragma once
#include "cuda_rhn_reference.h"

namespace trial {

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf>
class RhnTrial : public RhnProblem<Cell, D> {
  using Base = RhnProblem<Cell, D>;
  using Elem = typename D::Elem;
  using ForwardLayer = RhnForward<Cell, D, T, ExchangeOf>;
  using BackwardLayer = RhnBackward<Cell, D, T, ExchangeOf>;
  using Base::G, Base::kTape, Base::o_, Base::layers_, Base::lengths_, Base::reset_, Base::tape_;
  using Base::tensor, Base::rows, Base::check_outputs, Base::check_gradients;
  static constexpr bool kShared = ExchangeOf<D, T, 1>::kInShared;

 public:
  using Base::failure;

  explicit RhnTrial(const RhnOptions& o) : Base(o) {
    hp_ = round_up(o.H, D::kVec);
    ctas_ = ceil_div(hp_, T::kUnits);
    emu::machine().mutation = static_cast<int>(o.mutation);
    run_forward();
    if (failure.empty()) run_backward();
    emu::machine().mutation = 0;
  }

 private:
  void fill(Shape& s) {
    s.T = o_.T, s.N = o_.N, s.H = o_.H, s.H_padded = hp_;
    s.directions = o_.directions, s.groups = o_.groups, s.ctas = ctas_;
    s.lengths = o_.lengths ? lengths_.data() : nullptr;
    s.reset = o_.reset ? reset_.data() : nullptr;
    flags_.assign(size_t(o_.directions) * o_.groups * ctas_ * kFlagStride, 0);
    s.flags = flags_.data();
  }

  template <class Kernel>
  bool launch(const char* what, const SharedLayout& layout, Kernel kernel) {
    emu::Launch l;
    l.grid = o_.directions * o_.groups * ctas_;
    l.block = T::kThreads;
    l.cluster = kShared ? ctas_ : 1;
    l.shared_bytes = layout.bytes;
    l.seed = o_.seed;
    l.slow_cta = l.grid - 1, l.slow_factor = o_.slow_factor;
    const emu::Report r = emu::launch(l, kernel);
    if (!r.ok()) failure = std::string(what) + ": " + r.error;
    return r.ok();
  }

  // Slab after slab, each as a layer's W_hh.
  std::vector<Vec4> pack(const Doubles& w, const Geometry& g) {
    Tensor<D>& rounded = tensor(w);
    const size_t slab = size_t(ctas_) * g.cta_vectors();
    std::vector<Vec4> packed(slab * o_.depth);
    for (int l = 0; l < o_.depth; l++) {
      const PackParams p{
          rounded.data() + size_t(l) * G * o_.H * o_.H, packed.data() + l * slab, g, o_.H, hp_, ctas_};
      emu::Launch launch;
      launch.grid = 2, launch.block = 256;
      const emu::Report r = emu::launch(launch, [&] { pack_kernel<D>(p); });
      if (!r.ok()) failure = r.error;
    }
    return packed;
  }

  SharedLayout layout(bool backward) const {
    const Geometry& g = backward ? BackwardLayer::kGeometry : ForwardLayer::kGeometry;
    return shared_layout(g, D::kFormat, ExchangeOf<D, T, 1>::kBuffers, o_.depth);
  }

  void run_forward() {
    const int H = o_.H, TN = o_.T * o_.N, ND = o_.directions, L = o_.depth;
    RhnForwardParams p;
    fill(p);
    p.depth = L;
    p.wx_is_float = o_.wx_is_float || D::kPerWord == 1;
    Tensor<D>& y = tensor(size_t(TN) * H * ND);
    std::vector<std::vector<float>> wx(ND), bias(ND);
    std::vector<std::vector<Vec4>> packed(ND);
    std::vector<Tensor<D>*> h_n;
    for (int d = 0; d < ND; d++) {
      const RhnReference& r = layers_[d];
      RhnForwardDirection& f = p.dir[d];
      packed[d] = pack(r.w_hh, ForwardLayer::kGeometry);
      f.weights = packed[d].data();
      const Doubles input = r.input_terms();
      Doubles h0_masked = r.h0;
      for (size_t i = 0; i < h0_masked.size(); i++) h0_masked[i] *= r.s_mask[i];
      wx[d].assign(input.begin(), input.end());
      f.wx = rows(p.wx_is_float ? static_cast<void*>(wx[d].data()) : tensor(input).data(), G * H);
      bias[d].assign(r.bias.begin(), r.bias.end());
      f.bias = o_.bias ? bias[d].data() : nullptr;
      f.mask = o_.masked ? tensor(r.s_mask).data() : nullptr;
      if (o_.initial) f.h0 = tensor(r.h0).data(), f.h0_masked = o_.masked ? tensor(h0_masked).data() : f.h0;
      h_n.push_back(&tensor(size_t(o_.N) * H));
      f.h_n = h_n[d]->data();
      f.y = rows(y.data() + d * H, H, ND);
      tape_.push_back(&tensor(size_t(TN) * L * kTape * H));
      f.tape = rows(tape_[d]->data(), kTape * H);
      f.mail = {tensor(size_t(TN) * L * hp_).data(), o_.N * int64_t{hp_}, hp_};
      f.reverse = r.reverse;
    }
    if (!failure.empty() ||
        !launch("forward", layout(false), [&] { rhn_forward_kernel<Cell, D, T, ExchangeOf>(p); }))
      return;
    check_outputs(y, h_n);
  }

  void run_backward() {
    const int H = o_.H, TN = o_.T * o_.N, ND = o_.directions, L = o_.depth;
    RhnBackwardParams p;
    fill(p);
    p.depth = L;
    std::vector<std::vector<Vec4>> packed(ND);
    std::vector<Tensor<D>*> dh0, dgates;
    for (int d = 0; d < ND; d++) {
      const RhnReference& r = layers_[d];
      RhnBackwardDirection& b = p.dir[d];
      packed[d] = pack(r.w_hh, BackwardLayer::kGeometry);
      b.weights = packed[d].data();
      b.dy = rows(tensor(r.dy).data(), H);
      b.dh_n = tensor(r.dh_n).data();
      dh0.push_back(&tensor(size_t(o_.N) * H));
      b.dh0 = dh0[d]->data();
      b.mask = o_.masked ? tensor(r.s_mask).data() : nullptr;
      b.tape = rows(tape_[d]->data(), kTape * H);
      dgates.push_back(&tensor(size_t(TN) * L * G * H));
      b.dgates = rows(dgates[d]->data(), G * H);
      b.mail_is_gradient = H == hp_ && !o_.separate_mail;
      const int64_t width = int64_t{G} * hp_;
      b.mail = b.mail_is_gradient ? Mail{b.dgates.data, b.dgates.stride_t, b.dgates.stride_n}
                                  : Mail{tensor(size_t(TN) * L * width).data(), o_.N * width, width};
      b.reverse = r.reverse;
    }
    if (!failure.empty() ||
        !launch("backward", layout(true), [&] { rhn_backward_kernel<Cell, D, T, ExchangeOf>(p); }))
      return;
    check_gradients(dh0, dgates);
  }

  int hp_, ctas_;
  std::vector<uint32_t> flags_;
};

}  // namespace trial
