// Layers that run step by step: the part of the CUDA module that fastrnn/backends/cuda_steps.py calls.
#include <type_traits>

#include "../cuda/steps/launch.h"
#include "cuda.h"

namespace fastrnn::cuda {
namespace {

// What a call is: the plan's kernel (as read_kernel's), then T, N, H, outputs of a projection or 0, directions, layer norm, addresses
// of lengths and of reset; of a highway layer also its depth, and whether each gate has a mask of the state.
struct Call {
  StepsProblem problem;
  bool wide = false;
  int T = 0;
  const int* lengths = nullptr;
  const uint8_t* reset = nullptr;
};
Call read_call(const py::tuple& kernel, const py::tuple& shape) {
  Fields name(kernel);
  PlanProblem q = read_problem(name);
  if (static_cast<ExchangeKind>(name.integer()) != ExchangeKind::steps)
    throw std::invalid_argument("fastrnn CUDA library: a kernel that does not run step by step");
  const int units = static_cast<int>(name.integer());
  Call c;
  Fields f(shape);
  c.T = static_cast<int>(f.integer());
  for (int* to : {&q.N, &q.H, &q.O, &q.directions}) *to = static_cast<int>(f.integer());
  q.normed = f.integer() != 0;
  c.lengths = static_cast<const int*>(f.address());
  c.reset = static_cast<const uint8_t*>(f.address());
  if (is_rhn(q.cell)) {
    q.depth = static_cast<int>(f.integer());
    q.gate_masks = f.integer() != 0;
  }
  f.end();
  if (q.directions < 1 || q.directions > 2) throw std::invalid_argument("fastrnn CUDA library: directions");
  if (!takes_steps(q) || (q.O && q.cell != CellKind::lstm) ||
      (q.normed && q.cell != CellKind::lstm && q.cell != CellKind::gru) || q.depth < 1)
    throw std::invalid_argument("fastrnn CUDA library: a cell without kernels of this kind");
  c.problem = steps_problem(q);
  c.wide = units == steps_tile(true).outputs();
  return c;
}

StepsWeights read_weights(const py::tuple& fields, int directions) {
  Fields f(fields);
  StepsWeights w;
  for (int d = 0; d < directions; d++) {
    w.matrix[d][0] = f.address();
    w.matrix[d][1] = f.address();
    if (!w.matrix[d][1])
      w.matrix[d][1] = w.matrix[d][0];  // both products of a cell with two phases read W_hh
  }
  f.end();
  return w;
}

template <class Params>
void run(int ordinal, intptr_t stream, const Call& c, Params& p, const py::tuple& weights,
         intptr_t workspace) {
  const bool batch_norm =
      std::is_same<Params, StepsBnForwardParams>::value || std::is_same<Params, StepsBnBackwardParams>::value;
  if (batch_norm != (c.problem.cell == CellKind::bnlstm))
    throw std::invalid_argument("fastrnn CUDA library: a kernel of other parameters");
  p.T = c.T;
  p.lengths = c.lengths;
  p.reset = c.reset;
  const StepsWeights w = read_weights(weights, c.problem.directions);
  py::gil_scoped_release release;
  check(select_device(ordinal), "selecting the device");
  check(launch(c.problem, c.wide, p, w, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream)),
        "launching a layer's steps");
}

void forward(int ordinal, intptr_t stream, const py::tuple& kernel, const py::tuple& shape,
             const py::tuple& weights, const py::tuple& directions, const py::tuple& noise,
             intptr_t workspace) {
  const Call c = read_call(kernel, shape);
  StepsForwardParams p;
  Fields f(directions);
  for (int i = 0; i < c.problem.directions; i++) {
    StepsForwardDirection& d = p.dir[i];
    d.reverse = i == 1;
    for (const float** to : {&d.bias_n, &d.gain_h, &d.gain_c, &d.bias_c}) *to = read_floats(f);
    d.h0 = f.address();
    d.c0 = f.address();
    d.h_n = f.address();
    d.c_n = f.address();
    for (Rows* rows : {&d.wx, &d.y, &d.tape, &d.cells, &d.mid, &d.scales}) read_rows(f, *rows);
  }
  f.end();
  p.noise = read_noise(noise);
  run(ordinal, stream, c, p, weights, workspace);
}

void backward(int ordinal, intptr_t stream, const py::tuple& kernel, const py::tuple& shape,
              const py::tuple& weights, const py::tuple& directions, const py::tuple& noise,
              intptr_t workspace) {
  const Call c = read_call(kernel, shape);
  StepsBackwardParams p;
  Fields f(directions);
  for (int i = 0; i < c.problem.directions; i++) {
    StepsBackwardDirection& d = p.dir[i];
    d.reverse = i == 1;
    for (const float** to : {&d.gain_h, &d.gain_c, &d.bias_c}) *to = read_floats(f);
    d.h0 = f.address();
    d.c0 = f.address();
    d.dh_n = f.address();
    d.dc_n = f.address();
    d.dh0 = f.address();
    d.dc0 = f.address();
    for (Rows* rows :
         {&d.dy, &d.dcells, &d.y, &d.tape, &d.cells, &d.scales, &d.dgates, &d.dgates_h, &d.dmid, &d.dm})
      read_rows(f, *rows);
  }
  f.end();
  p.noise = read_noise(noise);
  run(ordinal, stream, c, p, weights, workspace);
}

// Highway layers, whose weights are all slabs of a direction.
void micro_steps_forward(int ordinal, intptr_t stream, const py::tuple& kernel, const py::tuple& shape,
                         const py::tuple& weights, const py::tuple& directions, intptr_t workspace) {
  const Call c = read_call(kernel, shape);
  StepsForwardParams p;
  Fields f(directions);
  for (int i = 0; i < c.problem.directions; i++) {
    StepsForwardDirection& d = p.dir[i];
    d.reverse = i == 1;
    d.bias = read_floats(f);
    d.mask = f.address();
    d.h0 = f.address();
    d.h_n = f.address();
    for (Rows* rows : {&d.wx, &d.y, &d.tape}) read_rows(f, *rows);
  }
  f.end();
  run(ordinal, stream, c, p, weights, workspace);
}

void micro_steps_backward(int ordinal, intptr_t stream, const py::tuple& kernel, const py::tuple& shape,
                          const py::tuple& weights, const py::tuple& directions, intptr_t workspace) {
  const Call c = read_call(kernel, shape);
  StepsBackwardParams p;
  Fields f(directions);
  for (int i = 0; i < c.problem.directions; i++) {
    StepsBackwardDirection& d = p.dir[i];
    d.reverse = i == 1;
    d.mask = f.address();
    d.dh_n = f.address();
    d.dh0 = f.address();
    for (Rows* rows : {&d.dy, &d.tape, &d.dgates}) read_rows(f, *rows);
  }
  f.end();
  run(ordinal, stream, c, p, weights, workspace);
}

// Batch-normalised LSTM: the fields of its persistent kernels, of which weights and mail are not read.
template <class Params, bool kBackward>
void bnlstm(int ordinal, intptr_t stream, const py::tuple& kernel, const py::tuple& shape,
            const py::tuple& weights, const py::tuple& directions, const py::tuple& options,
            intptr_t workspace) {
  const Call c = read_call(kernel, shape);
  if (c.problem.backward != kBackward)
    throw std::invalid_argument("fastrnn CUDA library: a kernel of other parameters");
  Params p;
  p.directions = c.problem.directions;
  read_batch_norm(directions, options, p);
  if constexpr (!kBackward) p.wx_is_float = true;
  run(ordinal, stream, c, p, weights, workspace);
}

}  // namespace

void bind_steps(py::module_& m) {
  m.def("steps_forward", &forward);
  m.def("steps_backward", &backward);
  m.def("steps_rhn_forward", &micro_steps_forward);
  m.def("steps_rhn_backward", &micro_steps_backward);
  m.def("steps_bnlstm_forward", &bnlstm<StepsBnForwardParams, false>);
  m.def("steps_bnlstm_backward", &bnlstm<StepsBnBackwardParams, true>);
  m.def("steps_workspace_bytes", [](const py::tuple& kernel, const py::tuple& shape) {
    const Call c = read_call(kernel, shape);
    return steps_workspace_bytes(c.problem, c.wide);
  });
}

}  // namespace fastrnn::cuda
