// Python's door to the batch-normalised LSTM; fastrnn/backends/cpu_bnlstm.py names the fields in this order.
#include "../cpu/bnlstm.h"

#include "inference.h"

namespace fastrnn {
namespace {

void read_problem(Fields& f, BnLstmProblem& p) {
  p.type = static_cast<Type>(f.integer());
  p.linear = f.integer() != 0;
  p.threads = static_cast<int>(f.integer());
  p.directions = static_cast<int>(f.integer());
  p.T = f.integer();
  p.N = f.integer();
  p.I = f.integer();
  p.H = p.O = f.integer();
  p.batch = f.integer() != 0;
  p.sequence = f.integer() != 0;
  p.eps = f.real();
  f.end();
}

BnLstmForwardArgs bnlstm_forward_args(const py::tuple& problem, const py::tuple& tensors) {
  BnLstmForwardArgs a;
  Fields f(problem);
  read_problem(f, a);
  Fields g(tensors);
  for (Grid* grid : {&a.x, &a.y, &a.cells}) *grid = g.strides();
  for (Grid* grid : {&a.x, &a.y, &a.cells}) grid->data = g.address();
  a.h0 = g.address();
  a.c0 = g.address();
  a.h_n = g.address();
  a.c_n = g.address();
  a.packed = g.address();
  a.tape = g.address();
  for (void*& used : a.used) used = g.address();
  read_sequence(g, a);
  for (int d = 0; d < a.directions; d++) {
    a.weights[d] = {g.address(), g.address(), g.address(), g.address(),
                    g.address(), g.address(), g.address()};
    for (int term = 0; term < kBnTerms; term++) {
      a.given[d].mean[term] = g.address();
      a.given[d].var[term] = g.address();
      a.given[d].rows[term] = g.integer();
    }
  }
  g.end();
  return a;
}

BnLstmBackwardArgs bnlstm_backward_args(const py::tuple& problem, const py::tuple& tensors) {
  BnLstmBackwardArgs a;
  Fields f(problem);
  read_problem(f, a);
  Fields g(tensors);
  a.x = a.dx = g.strides();
  a.y = a.dy = g.strides();
  a.cells = a.dcells = g.strides();
  for (Grid* grid : {&a.x, &a.y, &a.cells, &a.dx, &a.dy, &a.dcells}) grid->data = g.address();
  a.h0 = g.address();
  a.c0 = g.address();
  a.dh_n = g.address();
  a.dc_n = g.address();
  a.dh0 = g.address();
  a.dc0 = g.address();
  a.tape = g.address();
  for (const void*& used : a.used) used = g.address();
  a.want_weights = g.integer() != 0;
  read_sequence(g, a);
  for (int d = 0; d < a.directions; d++)
    a.weights[d] = {g.address(), g.address(), g.address(), g.address(),
                    g.address(), g.address(), g.address()};
  if (a.want_weights)
    for (int d = 0; d < a.directions; d++)
      a.grads[d] = {g.address(), g.address(), g.address(), g.address(),
                    g.address(), g.address(), g.address()};
  g.end();
  return a;
}

class BnLstmLayer : public InferenceLayer {
 public:
  explicit BnLstmLayer(const BnLstmForwardArgs& args) : InferenceLayer(args, 4), args_(args) {}
  void run(const Step& step, bool brief) override {
    BnLstmForwardArgs a = with_step(args_, step);
    a.c0 = step.c0;
    a.c_n = step.c_n;
    for (int d = 0; d < a.directions && step.first; d++) skip(a.given[d], a, step.first);
    const BnLstmKernels& bnlstm = *kernels().bnlstm;
    const Scratch scratch(bnlstm.forward_workspace(a) + 1, false);
    a.workspace = scratch.get();
    run_call(brief, [&] { bnlstm.forward(a); });
  }

 private:
  BnLstmForwardArgs args_;

  // The statistics from step `first` on; the last row serves all later steps.
  template <typename Given>
  static void skip(Given& given, const BnLstmForwardArgs& a, int64_t first) {
    const int64_t item = a.type == Type::f64 ? 8 : 4;
    for (int term = 0; term < kBnTerms; term++) {
      const int64_t rows = std::min(first, given.rows[term] - 1);
      const int64_t bytes = rows * (term < kBnTerms - 1 ? 4 : 1) * a.H * item;
      given.mean[term] = static_cast<const char*>(given.mean[term]) + bytes;
      given.var[term] = static_cast<const char*>(given.var[term]) + bytes;
      given.rows[term] -= rows;
    }
  }
};

// fields: per direction the addresses of its counts and, for each statistic, the address of the running one, of the one that was
// found, and their elements.
BnLstmFollowArgs follow_args(int type, int threads, double weight, int64_t steps, const py::tuple& fields) {
  BnLstmFollowArgs a;
  a.type = static_cast<Type>(type);
  a.threads = threads;
  a.weight = weight;
  Fields f(fields);
  a.steps = steps;
  for (int64_t*& counts : a.counts) {
    if (f.at_end()) break;
    counts = static_cast<int64_t*>(f.address());
    for (int i = 0; i < 2 * kBnTerms; i++) a.moves[a.count++] = {f.address(), f.address(), f.integer()};
  }
  f.end();
  return a;
}

}  // namespace

void bind_bnlstm(py::module_& m) {
  m.def("bnlstm_tape_width", &bnlstm_tape_width);
  m.def("bnlstm_threads", [](const py::tuple& problem) {
    BnLstmProblem p;
    Fields f(problem);
    read_problem(f, p);
    return kernels().bnlstm->threads(p);
  });
  m.def("bnlstm_forward_workspace", [](const py::tuple& problem, const py::tuple& tensors) {
    return kernels().bnlstm->forward_workspace(bnlstm_forward_args(problem, tensors));
  });
  m.def("bnlstm_forward", [](const py::tuple& problem, const py::tuple& tensors, intptr_t workspace) {
    BnLstmForwardArgs a = bnlstm_forward_args(problem, tensors);
    a.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    kernels().bnlstm->forward(a);
  });
  m.def("bnlstm_inference_layer", [](const py::tuple& problem, const py::tuple& tensors) {
    return in_capsule(std::make_unique<BnLstmLayer>(bnlstm_forward_args(problem, tensors)));
  });
  m.def("bnlstm_backward_workspace", [](const py::tuple& problem, const py::tuple& tensors) {
    return kernels().bnlstm->backward_workspace(bnlstm_backward_args(problem, tensors));
  });
  m.def("bnlstm_backward", [](const py::tuple& problem, const py::tuple& tensors, intptr_t workspace) {
    BnLstmBackwardArgs a = bnlstm_backward_args(problem, tensors);
    a.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    kernels().bnlstm->backward(a);
  });
  m.def("bnlstm_follow", [](int type, int threads, double weight, int64_t steps, const py::tuple& fields) {
    const BnLstmFollowArgs a = follow_args(type, threads, weight, steps, fields);
    py::gil_scoped_release release;
    kernels().bnlstm->follow(a);
  });
}

}  // namespace fastrnn
