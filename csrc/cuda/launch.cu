#include "launch.h"

#include <cuda_runtime.h>

#include "table.h"

namespace fastrnn::cuda {

namespace {

Status status_of(cudaError_t error) {
  return {static_cast<int>(error), error ? cudaGetErrorString(error) : ""};
}

// The attribute lives as long as the configuration that points at it.
struct Configuration {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};
  Configuration(const Kernel& kernel, int grid, int cluster, int extent, void* stream) {
    config.gridDim = dim3(grid);
    config.blockDim = dim3(kernel.tile.threads());
    config.dynamicSmemBytes = shared_bytes(kernel, extent);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (kernel.exchange == ExchangeKind::cluster) {
      // Resident as a whole by itself, and clusters do not wait for each other.
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else {
      // The driver refuses a grid that is not resident as a whole, instead of a deadlock.
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
  }
};

// As much as the device has, not what a launch takes: the bound belongs to the function, which other threads launch too.
cudaError_t allow_shared_memory(const Kernel& kernel) {
  int ordinal = 0, most = 0;
  if (const cudaError_t error = cudaGetDevice(&ordinal)) return error;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal))
    return error;
  return cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// What the driver translates from an older architecture's code has that one's limits: beyond them there is no kernel.
cudaError_t is_compiled(const Kernel& kernel, int extent, bool* yes) {
  cudaFuncAttributes code = {};
  if (const cudaError_t error = cudaFuncGetAttributes(&code, kernel.function)) return error;
  *yes = shared_bytes(kernel, extent) <= prim::most_shared(code.ptxVersion) &&
         (kernel.exchange != ExchangeKind::cluster || prim::has_clusters(code.ptxVersion));
  return cudaSuccess;
}

template <class Params>
Status launch_with(const Kernel& kernel, const Params& params, void* stream, int extent = 1) {
  if (!takes(kernel, params)) return status_of(cudaErrorInvalidValue);
  if (const cudaError_t error = allow_shared_memory(kernel)) return status_of(error);
  const Configuration c(kernel, params.directions * params.groups * params.ctas, params.ctas, extent, stream);
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

Status resident_ctas(const Kernel& kernel, int ctas_of_a_cluster, int* count, int extent) {
  *count = 0;
  bool compiled = false;
  if (const cudaError_t error = is_compiled(kernel, extent, &compiled)) return status_of(error);
  if (!compiled) return {};
  if (const cudaError_t error = allow_shared_memory(kernel)) return status_of(error);
  if (kernel.exchange == ExchangeKind::cluster) {
    const Configuration c(kernel, ctas_of_a_cluster, ctas_of_a_cluster, extent, nullptr);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel.function, &c.config) == cudaSuccess)
      *count = clusters * ctas_of_a_cluster;
    else
      cudaGetLastError();  // a size that the device does not take: none, and the next plan serves
    return {};
  }
  Device device;
  if (const Status status = read_device(&device); !status.ok()) return status;
  int of_sm = 0;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &of_sm, kernel.function, kernel.tile.threads(), shared_bytes(kernel, extent));
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
  return launch_with(kernel, params, stream, params.N);
}
Status launch(const Kernel& kernel, const BnLstmBackwardParams& params, void* stream) {
  return launch_with(kernel, params, stream, params.N);
}

Status launch(const Kernel& kernel, const ProjectedForwardParams& params, void* stream) {
  return launch_with(kernel, params, stream);
}
Status launch(const Kernel& kernel, const ProjectedBackwardParams& params, void* stream) {
  return launch_with(kernel, params, stream);
}

Status launch(const Kernel& kernel, const LayerNormForwardParams& params, void* stream) {
  return launch_with(kernel, params, stream);
}
Status launch(const Kernel& kernel, const LayerNormBackwardParams& params, void* stream) {
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
