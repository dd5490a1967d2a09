// Layers that run step by step, for the host: see launch.h for the conventions.
#pragma once
#include "../launch.h"
#include "program.h"

namespace fastrnn::cuda {

// By direction: W_hh, and with a projection W_hr; in the format's tensor type.
struct StepsWeights {
  const void* matrix[2][2] = {};
};

// Scratch of one call, 256-byte aligned; it carries nothing to the next.
size_t steps_workspace_bytes(const StepsProblem& problem, bool wide);

// All of a call, on the stream. Of the parameters the caller sets the tensors, T, lengths, reset, noise.
Status launch(const StepsProblem& problem, bool wide, const StepsForwardParams& params,
              const StepsWeights& weights, void* workspace, void* stream);
Status launch(const StepsProblem& problem, bool wide, const StepsBackwardParams& params,
              const StepsWeights& weights, void* workspace, void* stream);
// Batch-normalised LSTM; also eps, whose statistics, alive.
Status launch(const StepsProblem& problem, bool wide, const StepsBnForwardParams& params,
              const StepsWeights& weights, void* workspace, void* stream);
Status launch(const StepsProblem& problem, bool wide, const StepsBnBackwardParams& params,
              const StepsWeights& weights, void* workspace, void* stream);

}  // namespace fastrnn::cuda
