// The layer-normalised LSTM's and GRU's kernels of one instruction set (see kernels.cc).
#include "norm_backward.h"
#include "norm_forward.h"

namespace fastrnn {
namespace FASTRNN_ISA {
namespace {

using F32 = Types<float, float, float>;
using F64 = Types<double, double, double>;

// f(types, cell) with the cell's class for them; straight lines in the place of sigmoid and tanh exist for tests.
template <template <class, bool> class Lstm, template <class, bool> class Gru, class F>
auto with_cell(const Problem& p, F&& f) {
  auto pick = [&](auto e, auto linear) {
    using E = decltype(e);
    constexpr bool kLinear = decltype(linear)::value;
    return is_lstm(p.cell) ? f(e, Lstm<E, kLinear>{}) : f(e, Gru<E, kLinear>{});
  };
  auto typed = [&](auto e) { return p.linear ? pick(e, std::true_type{}) : pick(e, std::false_type{}); };
  return p.type == Type::f64 ? typed(F64{}) : typed(F32{});
}

}  // namespace

size_t norm_forward_workspace(const ForwardArgs& a) {
  return with_cell<NormLstm, NormGru>(
      a, [&](auto e, auto c) { return NormForward<decltype(e), decltype(c)>::workspace(a); });
}
void norm_forward(const ForwardArgs& a) {
  with_cell<NormLstm, NormGru>(a, [&](auto e, auto c) { NormForward<decltype(e), decltype(c)>::run(a); });
}
size_t norm_backward_workspace(const BackwardArgs& a) {
  return with_cell<NormLstmGrad, NormGruGrad>(
      a, [&](auto e, auto c) { return NormBackward<decltype(e), decltype(c)>::workspace(a); });
}
void norm_backward(const BackwardArgs& a) {
  with_cell<NormLstmGrad, NormGruGrad>(
      a, [&](auto e, auto c) { NormBackward<decltype(e), decltype(c)>::run(a); });
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
