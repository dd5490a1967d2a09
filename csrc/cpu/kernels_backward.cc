// The backward kernels of LSTM, GRU and RNN for one instruction set (see kernels.cc).
#include "backward.h"
#include "kernel_types.h"

namespace fastrnn {
namespace FASTRNN_ISA {
namespace {

template <class E, bool Linear, class F>
auto with_grad(Cell cell, F&& f) {
  switch (cell) {
    case Cell::lstm:
      return f(LstmGradCpu<E, Linear>{});
    case Cell::gru:
      return f(GruGradCpu<E, Linear>{});
    case Cell::gru_reset_before:
      return f(GruResetBeforeGradCpu<E, Linear>{});
    case Cell::rnn_tanh:
      return f(RnnGradCpu<E, Linear, false>{});
    default:
      return f(RnnGradCpu<E, Linear, true>{});
  }
}

template <class F>
auto backward_class(const Problem& p, F&& f) {
  auto pick = [&](auto e) {
    using E = decltype(e);
    auto run = [&](auto c) { return f(e, c); };
    if constexpr (kHasLinear<E>)
      if (p.linear) return with_grad<E, true>(p.cell, run);
    return with_grad<E, false>(p.cell, run);
  };
  switch (p.type) {
    case Type::f64:
      return pick(F64{});
    case Type::bf16:
      return pick(BF16Grad{});
    default:
      return pick(F32{});
  }
}

}  // namespace

size_t layer_backward_workspace(const BackwardArgs& a) {
  return backward_class(a, [&](auto e, auto c) { return Backward<decltype(e), decltype(c)>::workspace(a); });
}

void layer_backward(const BackwardArgs& a) {
  backward_class(a, [&](auto e, auto c) {
    Backward<decltype(e), decltype(c)>::run(a);
    return 0;
  });
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
