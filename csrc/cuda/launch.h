// The CUDA library's door for the host: which kernels there are, what the device holds, and launches on a given stream.
// Framework-free: raw device pointers in, nothing allocated, nothing waited for.
#pragma once
#include <cstddef>

#include "core/bnlstm.h"
#include "core/layernorm.h"
#include "core/noise.h"
#include "core/projected.h"
#include "core/rhn.h"
#include "kernels.h"
#include "plan.h"

namespace fastrnn::cuda {

// What went wrong; code 0 is success. The text lives as long as the program.
struct Status {
  int code = 0;
  const char* text = "";
  bool ok() const { return code == 0; }
};

// The compiled kernel of a plan, or null.
const Kernel* find_kernel(const PlanProblem& problem, const Plan& plan);

// Makes a device of the process the thread's current one: all calls below are about that.
Status select_device(int ordinal);
// Numbers of the current device.
Status read_device(Device* device);

// CTAs (or, for clusters, CTAs in whole clusters) of this kernel that the device holds at once, by the driver's own count.
// extent: micro-steps of a highway layer, rows of a batch-normalised layer's batch.
Status resident_ctas(const Kernel& kernel, int ctas_of_a_cluster, int* count, int extent = 1);

// Sets `bytes` of mail to the sentinel; before every launch, on the same stream.
Status prepare_mail(void* mail, size_t bytes, void* stream);
// Zeros `bytes` of flags and of the error word; before every launch, on the same stream.
Status clear(void* words, size_t bytes, void* stream);

Status launch(const Kernel& kernel, const ForwardParams& params, void* stream);
Status launch(const Kernel& kernel, const BackwardParams& params, void* stream);
// For kernels with regularisers, and for no others.
Status launch(const Kernel& kernel, const RegularisedForwardParams& params, void* stream);
Status launch(const Kernel& kernel, const RegularisedBackwardParams& params, void* stream);
// For highway layers, whose weights are packed slab after slab.
Status launch(const Kernel& kernel, const RhnForwardParams& params, void* stream);
Status launch(const Kernel& kernel, const RhnBackwardParams& params, void* stream);
Status launch(const Kernel& kernel, const BnLstmForwardParams& params, void* stream);
Status launch(const Kernel& kernel, const BnLstmBackwardParams& params, void* stream);
Status launch(const Kernel& kernel, const ProjectedForwardParams& params, void* stream);
Status launch(const Kernel& kernel, const ProjectedBackwardParams& params, void* stream);
Status launch(const Kernel& kernel, const LayerNormForwardParams& params, void* stream);
Status launch(const Kernel& kernel, const LayerNormBackwardParams& params, void* stream);
// Masked initial states of one direction; before its forward launch, on the same stream.
Status mask_state(Format format, const MaskStateParams& params, void* stream);

struct PackJob {
  const void* weights;               // W_hh (G * H, H) in the format's tensor type
  void* packed;                      // packed_bytes()
  int H, ctas;                       // ctas: the plan's
  const void* projection = nullptr;  // W_hr (P, H) of an LSTM with projection, whose W_hh is (4H, P)
  int P = 0;
};
size_t packed_bytes(const Kernel& kernel, int ctas);
Status pack(const Kernel& kernel, const PackJob& job, void* stream);

}  // namespace fastrnn::cuda
