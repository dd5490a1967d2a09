// The Recurrent Highway Network's kernels of one instruction set: compiled once per set.
#include "rhn_backward.h"
#include "rhn_forward.h"

namespace fastrnn {
namespace FASTRNN_ISA {
namespace {

template <class F>
auto with_type(const RhnProblem& p, F&& f) {
  if (p.type == Type::f64) return f(Types<double, double, double>{});
  return f(Types<float, float, float>{});
}

Partition plan(const RhnProblem& p, int* threads) {
  const Plan chosen = rhn_plan(p);
  *threads = chosen.threads;
  return chosen.units ? Partition::units : Partition::rows;
}

size_t packed_bytes(const RhnProblem& p) {
  return with_type(p, [&](auto e) { return RhnLayout<decltype(e)>(p).bytes * p.directions; });
}

void pack(const RhnProblem& p, const RhnWeights* weights, void* packed) {
  with_type(p, [&](auto e) {
    using E = decltype(e);
    const RhnLayout<E> layout(p);
    team(p.threads, [&](int tid, int nt) {
      for (int d = 0; d < p.directions; d++)
        pack_rhn<E>(layout, weights[d], static_cast<char*>(packed) + d * layout.bytes, tid, nt);
    });
    return 0;
  });
}

size_t forward_workspace(const RhnForwardArgs& a) {
  return with_type(a, [&](auto e) { return RhnForward<decltype(e)>::workspace(a); });
}

void forward(const RhnForwardArgs& a) {
  with_type(a, [&](auto e) {
    RhnForward<decltype(e)>::run(a);
    return 0;
  });
}

size_t backward_workspace(const RhnBackwardArgs& a) {
  return with_type(a, [&](auto e) { return RhnBackward<decltype(e)>::workspace(a); });
}

void backward(const RhnBackwardArgs& a) {
  with_type(a, [&](auto e) {
    RhnBackward<decltype(e)>::run(a);
    return 0;
  });
}

}  // namespace

extern const RhnKernels rhn_table;
const RhnKernels rhn_table = {plan,    packed_bytes,       pack,    forward_workspace,
                              forward, backward_workspace, backward};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
