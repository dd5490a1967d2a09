// launch.h on the SIMT emulator: a "device" whose memory is the host's, so that all of the Python side runs without a GPU.
#include "../../cuda/launch.h"

#include <cstring>

#include "../../cuda/table.h"
#include "../emu/emu.h"
#include "machine.h"

namespace fastrnn::cuda {

namespace {

template <class Params>
Status run(const void* function, const Params& params, emu::Launch launch) {
  static std::string text;
  static uint64_t seed = 0;
  const std::lock_guard<std::mutex> lock(emulated_machine());
  launch.seed = ++seed;  // another schedule in each launch: the results must not tell
  const auto kernel = reinterpret_cast<void (*)(Params)>(const_cast<void*>(function));
  const emu::Report report = emu::launch(launch, [&] { kernel(params); });
  if (report.ok()) return {};
  text = report.error;
  return {1, text.c_str()};
}

template <class Params>
Status launch_layer(const Kernel& kernel, Params params, int extent = 1) {
  if (!takes(kernel, params)) return {1, "a kernel of other parameters"};
  params.error = nullptr;  // its clock is not time: who waits in vain is reported as a deadlock
  emu::Launch l;
  l.grid = params.directions * params.groups * params.ctas;
  l.block = kernel.tile.threads();
  l.cluster = mail_buffers(kernel.exchange) ? params.ctas : 1;
  l.shared_bytes = shared_bytes(kernel, extent);
  return run(kernel.function, params, l);
}

}  // namespace

const Kernel* find_kernel(const PlanProblem& problem, const Plan& plan) {
  return find_in_table(problem, plan);
}

Status select_device(int) { return {}; }
Status read_device(Device* device) {
  *device = Device{};
  return {};
}
Status resident_ctas(const Kernel&, int, int* count, int) {
  *count = Device{}.sms;
  return {};
}

Status prepare_mail(void* mail, size_t bytes, void*) {
  std::memset(mail, 0xff, bytes);
  return {};
}
Status clear(void* words, size_t bytes, void*) {
  std::memset(words, 0, bytes);
  return {};
}

Status launch(const Kernel& kernel, const ForwardParams& params, void*) {
  return launch_layer(kernel, params);
}
Status launch(const Kernel& kernel, const BackwardParams& params, void*) {
  return launch_layer(kernel, params);
}
Status launch(const Kernel& kernel, const RegularisedForwardParams& params, void*) {
  return launch_layer(kernel, params);
}
Status launch(const Kernel& kernel, const RegularisedBackwardParams& params, void*) {
  return launch_layer(kernel, params);
}
Status launch(const Kernel& kernel, const RhnForwardParams& params, void*) {
  return launch_layer(kernel, params, params.depth);
}
Status launch(const Kernel& kernel, const RhnBackwardParams& params, void*) {
  return launch_layer(kernel, params, params.depth);
}
Status launch(const Kernel& kernel, const BnLstmForwardParams& params, void*) {
  return launch_layer(kernel, params, params.N);
}
Status launch(const Kernel& kernel, const BnLstmBackwardParams& params, void*) {
  return launch_layer(kernel, params, params.N);
}
Status launch(const Kernel& kernel, const ProjectedForwardParams& params, void*) {
  return launch_layer(kernel, params);
}
Status launch(const Kernel& kernel, const ProjectedBackwardParams& params, void*) {
  return launch_layer(kernel, params);
}
Status launch(const Kernel& kernel, const LayerNormForwardParams& params, void*) {
  return launch_layer(kernel, params);
}
Status launch(const Kernel& kernel, const LayerNormBackwardParams& params, void*) {
  return launch_layer(kernel, params);
}
Status mask_state(Format format, const MaskStateParams& params, void*) {
  emu::Launch l;
  l.grid = 2;
  l.block = 256;
  return run(mask_state_function(format), params, l);
}

size_t packed_bytes(const Kernel& kernel, int ctas) { return packed_size(kernel, ctas); }
Status pack(const Kernel& kernel, const PackJob& job, void*) {
  emu::Launch l;
  l.grid = 2;
  l.block = 256;
  return run(pack_function(kernel.format), pack_params(kernel, job), l);
}

}  // namespace fastrnn::cuda
