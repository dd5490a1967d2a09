// The batch-normalised LSTM's kernels of one instruction set (see kernels.cc).
#include "bnlstm_backward.h"
#include "bnlstm_forward.h"
#include "bnlstm_statistics.h"

namespace fastrnn {
namespace FASTRNN_ISA {
namespace {

using F32 = Types<float, float, float>;
using F64 = Types<double, double, double>;

// Straight lines in the place of sigmoid and tanh exist for tests, in the type that hides least.
template <template <class, bool> class Driver, class F>
auto with_driver(const BnLstmProblem& p, F&& f) {
  if (p.type != Type::f64) return f(static_cast<Driver<F32, false>*>(nullptr));
  return p.linear ? f(static_cast<Driver<F64, true>*>(nullptr))
                  : f(static_cast<Driver<F64, false>*>(nullptr));
}

template <class P>
using Pointed = std::remove_pointer_t<P>;

int threads(const BnLstmProblem& p) { return choose_plan(p).threads; }
size_t forward_workspace(const BnLstmForwardArgs& a) {
  return with_driver<BnLstmForward>(a, [&](auto* d) { return Pointed<decltype(d)>::workspace(a); });
}
void forward(const BnLstmForwardArgs& a) {
  with_driver<BnLstmForward>(a, [&](auto* d) { Pointed<decltype(d)>::run(a); });
}
size_t backward_workspace(const BnLstmBackwardArgs& a) {
  return with_driver<BnLstmBackward>(a, [&](auto* d) { return Pointed<decltype(d)>::workspace(a); });
}
void backward(const BnLstmBackwardArgs& a) {
  with_driver<BnLstmBackward>(a, [&](auto* d) { Pointed<decltype(d)>::run(a); });
}

}  // namespace

extern const BnLstmKernels bnlstm_table;
const BnLstmKernels bnlstm_table = {threads,  forward_workspace, forward, backward_workspace,
                                    backward, follow_statistics};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
