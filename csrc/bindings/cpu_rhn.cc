// The Recurrent Highway Network's part of fastrnn._cpu; fastrnn/backends/cpu_rhn.py names the fields in this order.
#include "../cpu/rhn.h"

#include "inference.h"

namespace fastrnn {
namespace {

void read_problem(Fields& f, RhnProblem& p) {
  p.type = static_cast<Type>(f.integer());
  p.partition = static_cast<Partition>(f.integer());
  p.linear = f.integer() != 0;
  p.threads = static_cast<int>(f.integer());
  p.directions = static_cast<int>(f.integer());
  p.T = f.integer();
  p.N = f.integer();
  p.I = f.integer();
  p.H = p.O = f.integer();
  p.depth = static_cast<int>(f.integer());
  p.gates = static_cast<int>(f.integer());
  p.x_groups = static_cast<int>(f.integer());
  p.s_groups = static_cast<int>(f.integer());
}

RhnProblem problem_of(const py::tuple& problem) {
  RhnProblem p;
  Fields f(problem);
  read_problem(f, p);
  f.end();
  return p;
}

void read_weights(Fields& f, const Problem& p, RhnWeights* w) {
  for (int d = 0; d < p.directions; d++) w[d] = {f.address(), f.address(), f.address()};
}

RhnForwardArgs rhn_forward_args(const py::tuple& problem, const py::tuple& tensors) {
  RhnForwardArgs a;
  static_cast<RhnProblem&>(a) = problem_of(problem);
  Fields g(tensors);
  a.x = g.strides();
  a.y = g.strides();
  a.x.data = g.address();
  a.y.data = g.address();
  a.x_mask = g.address();
  a.s_mask = g.address();
  a.h0 = g.address();
  a.h_n = g.address();
  a.packed = g.address();
  a.tape = g.address();
  read_sequence(g, a);
  read_weights(g, a, a.weights);
  g.end();
  return a;
}

RhnBackwardArgs rhn_backward_args(const py::tuple& problem, const py::tuple& tensors) {
  RhnBackwardArgs a;
  static_cast<RhnProblem&>(a) = problem_of(problem);
  Fields g(tensors);
  a.x = a.dx = g.strides();
  a.y = a.dy = g.strides();
  a.x.data = g.address();
  a.y.data = g.address();
  a.dx.data = g.address();
  a.dy.data = g.address();
  a.x_mask = g.address();
  a.s_mask = g.address();
  a.h0 = g.address();
  a.dh_n = g.address();
  a.dh0 = g.address();
  a.tape = g.address();
  a.want_weights = g.integer() != 0;
  read_sequence(g, a);
  read_weights(g, a, a.weights);
  if (a.want_weights)
    for (int d = 0; d < a.directions; d++) a.grads[d] = {g.address(), g.address(), g.address()};
  g.end();
  return a;
}

class RhnLayer : public InferenceLayer {
 public:
  explicit RhnLayer(const RhnForwardArgs& args)
      : InferenceLayer(args, int64_t(args.gates) * args.depth), args_(args) {}
  void run(const Step& step, bool brief) override {
    RhnForwardArgs a = with_step(args_, step);
    const RhnKernels& rhn = *kernels().rhn;
    if (!bytes_) bytes_ = rhn.forward_workspace(a) + 1;
    const Scratch scratch(bytes_, false);
    a.workspace = scratch.get();
    run_call(brief, [&] { rhn.forward(a); });
  }

 private:
  RhnForwardArgs args_;
  size_t bytes_ = 0;
};

}  // namespace

void bind_rhn(py::module_& m) {
  m.def("rhn_plan", [](const py::tuple& problem) {
    int threads = 0;
    const Partition partition = kernels().rhn->plan(problem_of(problem), &threads);
    return py::make_tuple(threads, partition == Partition::units ? "units" : "rows");
  });
  m.def("rhn_packed_bytes",
        [](const py::tuple& problem) { return kernels().rhn->packed_bytes(problem_of(problem)); });
  m.def("rhn_pack", [](const py::tuple& problem, const py::tuple& weights, intptr_t packed) {
    const RhnProblem p = problem_of(problem);
    RhnWeights w[2];
    Fields g(weights);
    read_weights(g, p, w);
    py::gil_scoped_release release;
    kernels().rhn->pack(p, w, reinterpret_cast<void*>(packed));
  });
  m.def("rhn_forward_workspace", [](const py::tuple& problem, const py::tuple& tensors) {
    return kernels().rhn->forward_workspace(rhn_forward_args(problem, tensors));
  });
  m.def("rhn_forward", [](const py::tuple& problem, const py::tuple& tensors, intptr_t workspace) {
    RhnForwardArgs a = rhn_forward_args(problem, tensors);
    a.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    kernels().rhn->forward(a);
  });
  m.def("rhn_inference_layer", [](const py::tuple& problem, const py::tuple& tensors) {
    return in_capsule(std::make_unique<RhnLayer>(rhn_forward_args(problem, tensors)));
  });
  m.def("rhn_backward_workspace", [](const py::tuple& problem, const py::tuple& tensors) {
    return kernels().rhn->backward_workspace(rhn_backward_args(problem, tensors));
  });
  m.def("rhn_backward", [](const py::tuple& problem, const py::tuple& tensors, intptr_t workspace) {
    RhnBackwardArgs a = rhn_backward_args(problem, tensors);
    a.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    kernels().rhn->backward(a);
  });
}

}  // namespace fastrnn
