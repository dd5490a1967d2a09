// The forward kernels of LSTM, GRU and RNN for one instruction set (see kernels.cc).
#include "forward.h"
#include "kernel_types.h"

namespace fastrnn {
namespace FASTRNN_ISA {
namespace {

template <class E, bool Linear, class F>
auto with_cell(Cell cell, F&& f) {
  switch (cell) {
    case Cell::lstm:
      return f(LstmCpu<E, Linear>{});
    case Cell::gru:
      return f(GruCpu<E, Linear>{});
    case Cell::gru_reset_before:
      return f(GruResetBeforeCpu<E, Linear>{});
    case Cell::rnn_tanh:
      return f(RnnCpu<E, Linear, false>{});
    default:
      return f(RnnCpu<E, Linear, true>{});
  }
}

template <class F>
auto forward_class(const Problem& p, F&& f) {
  return with_own_type(p.type, [&](auto e) {
    using E = decltype(e);
    auto run = [&](auto c) { return f(e, c); };
    if constexpr (kHasLinear<E>)
      if (p.linear) return with_cell<E, true>(p.cell, run);
    return with_cell<E, false>(p.cell, run);
  });
}

}  // namespace

size_t layer_forward_workspace(const ForwardArgs& a) {
  return forward_class(a, [&](auto e, auto c) { return Forward<decltype(e), decltype(c)>::workspace(a); });
}

void layer_forward(const ForwardArgs& a) {
  forward_class(a, [&](auto e, auto c) {
    Forward<decltype(e), decltype(c)>::run(a);
    return 0;
  });
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
