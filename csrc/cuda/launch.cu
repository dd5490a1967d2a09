#include "launch.h"

#include <cuda_runtime.h>

#include "table.h"

namespace fastrnn::cuda {

namespace {

Status status_of(cudaError_t error) {
  return {static_cast<int>(error), error ? cudaGetErrorString(error) : ""};
}

// Attributes live as long as the configuration that points at them.
struct Configuration {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};
  Configuration(const Kernel& kernel, int grid, int cluster, int depth, void* stream) {
    config.gridDim = dim3(grid);
    config.blockDim = dim3(32 * kernel.tile.warps);
    config.dynamicSmemBytes = shared_bytes(kernel, depth);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    // Cooperative: the driver refuses a grid that is not resident as a whole, instead of a deadlock.
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    config.numAttrs = 1;
    if (kernel.exchange != ExchangeKind::cluster) return;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = cluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.numAttrs = 2;
  }
};

cudaError_t allow_shared_memory(const Kernel& kernel, int depth) {
  return cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              shared_bytes(kernel, depth));
}

template <class Params>
Status launch_with(const Kernel& kernel, const Params& params, void* stream, int depth = 1) {
  if (!takes(kernel, params)) return status_of(cudaErrorInvalidValue);
  if (const cudaError_t error = allow_shared_memory(kernel, depth)) return status_of(error);
  const Configuration c(kernel, params.directions * params.groups * params.ctas, params.ctas, depth, stream);
  Params copy = params;
  void* arguments[] = {&copy};
  return status_of(cudaLaunchKernelExC(&c.config, kernel.function, arguments));
}

}  // namespace

const Kernel* find_kernel(const PlanProblem& problem, const Plan& plan) {
  return find_in_table(problem, plan);
}

Status select_device(int ordinal) { return status_of(cudaSetDevice(ordinal)); }

Status read_device(Device* device) {
  int ordinal = 0, major = 0, minor = 0, cooperative = 0;
  if (const cudaError_t error = cudaGetDevice(&ordinal)) return status_of(error);
  const struct {
    int* to;
    cudaDeviceAttr which;
  } wanted[] = {{&device->sms, cudaDevAttrMultiProcessorCount},
                {&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                {&device->registers, cudaDevAttrMaxRegistersPerMultiprocessor},
                {&major, cudaDevAttrComputeCapabilityMajor},
                {&minor, cudaDevAttrComputeCapabilityMinor},
                {&cooperative, cudaDevAttrCooperativeLaunch}};
  for (const auto& w : wanted)
    if (const cudaError_t error = cudaDeviceGetAttribute(w.to, w.which, ordinal)) return status_of(error);
  device->compute_capability = 10 * major + minor;
  // Eight-CTA clusters take whole groups of SMs; resident_ctas() has the driver's word on a given kernel.
  device->most_clusters = major >= 9 ? device->sms / 9 : 0;
  if (!cooperative) return status_of(cudaErrorNotSupported);
  return {};
}

Status resident_ctas(const Kernel& kernel, int ctas_of_a_cluster, int* count, int depth) {
  *count = 0;
  if (const cudaError_t error = allow_shared_memory(kernel, depth)) return status_of(error);
  if (kernel.exchange == ExchangeKind::cluster) {
    const Configuration c(kernel, ctas_of_a_cluster, ctas_of_a_cluster, depth, nullptr);
    int clusters = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel.function, &c.config);
    *count = clusters * ctas_of_a_cluster;
    return status_of(error);
  }
  Device device;
  if (const Status status = read_device(&device); !status.ok()) return status;
  int of_sm = 0;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &of_sm, kernel.function, 32 * kernel.tile.warps, shared_bytes(kernel, depth));
  *count = of_sm * device.sms;
  return status_of(error);
}

Status prepare_mail(void* mail, size_t bytes, void* stream) {
  return status_of(cudaMemsetAsync(mail, 0xff, bytes, static_cast<cudaStream_t>(stream)));
}
Status clear(void* words, size_t bytes, void* stream) {
  return status_of(cudaMemsetAsync(words, 0, bytes, static_cast<cudaStream_t>(stream)));
}

Status launch(const Kernel& kernel, const ForwardParams& params, void* stream) {
  return launch_with(kernel, params, stream);
}
Status launch(const Kernel& kernel, const BackwardParams& params, void* stream) {
  return launch_with(kernel, params, stream);
}
Status launch(const Kernel& kernel, const RegularisedForwardParams& params, void* stream) {
  return launch_with(kernel, params, stream);
}
Status launch(const Kernel& kernel, const RegularisedBackwardParams& params, void* stream) {
  return launch_with(kernel, params, stream);
}

Status launch(const Kernel& kernel, const RhnForwardParams& params, void* stream) {
  return launch_with(kernel, params, stream, params.depth);
}
Status launch(const Kernel& kernel, const RhnBackwardParams& params, void* stream) {
  return launch_with(kernel, params, stream, params.depth);
}

Status launch(const Kernel& kernel, const BnLstmForwardParams& params, void* stream) {
  return launch_with(kernel, params, stream);
}
Status launch(const Kernel& kernel, const BnLstmBackwardParams& params, void* stream) {
  return launch_with(kernel, params, stream);
}

Status mask_state(Format format, const MaskStateParams& params, void* stream) {
  MaskStateParams copy = params;
  void* arguments[] = {&copy};
  const int grid = mask_state_blocks(params);
  return status_of(cudaLaunchKernel(mask_state_function(format), dim3(grid), dim3(256), arguments, 0,
                                    static_cast<cudaStream_t>(stream)));
}

size_t packed_bytes(const Kernel& kernel, int ctas) { return packed_size(kernel, ctas); }

Status pack(const Kernel& kernel, const PackJob& job, void* stream) {
  PackParams p = pack_params(kernel, job);
  void* arguments[] = {&p};
  const int grid = ceil_div(p.ctas * p.geometry.cta_vectors(), 256);
  return status_of(cudaLaunchKernel(pack_function(kernel.format), dim3(grid), dim3(256), arguments, 0,
                                    static_cast<cudaStream_t>(stream)));
}

}  // namespace fastrnn::cuda
