// steps/launch.h on the SIMT emulator: a graph is a loop.
// The cells come first: kernels.h has lists of the same names as their functions.
#include "../emu/steps.h"

#include <mutex>
#include <string>

#include "../../cuda/steps/launch.h"
#include "../../cuda/steps/table.h"
#include "machine.h"

namespace fastrnn::cuda {

namespace {

template <class Params>
Status run(const StepsProblem& q, bool wide, const Params& params, const StepsWeights& weights,
           void* workspace) {
  static std::string text;
  static uint64_t seed = 0;
  const std::lock_guard<std::mutex> lock(emulated_machine());
  seed += 1 << 20;
  text = emu::run_steps(q, steps_kernels(q, wide), params, weights.matrix, workspace, seed);
  return text.empty() ? Status{} : Status{1, text.c_str()};
}

}  // namespace

size_t steps_workspace_bytes(const StepsProblem& problem, bool wide) {
  return steps_bind(problem, steps_kernels(problem, wide).tile, nullptr, nullptr);
}
Status launch(const StepsProblem& problem, bool wide, const StepsForwardParams& params,
              const StepsWeights& weights, void* workspace, void*) {
  return run(problem, wide, params, weights, workspace);
}
Status launch(const StepsProblem& problem, bool wide, const StepsBackwardParams& params,
              const StepsWeights& weights, void* workspace, void*) {
  return run(problem, wide, params, weights, workspace);
}
Status launch(const StepsProblem& problem, bool wide, const StepsBnForwardParams& params,
              const StepsWeights& weights, void* workspace, void*) {
  return run(problem, wide, params, weights, workspace);
}
Status launch(const StepsProblem& problem, bool wide, const StepsBnBackwardParams& params,
              const StepsWeights& weights, void* workspace, void*) {
  return run(problem, wide, params, weights, workspace);
}

}  // namespace fastrnn::cuda
