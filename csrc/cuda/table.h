// All compiled kernels in one table, and what follows from an entry: shared by the launches on a GPU and on the emulator.
#pragma once
#include "core/pack.cuh"
#include "launch.h"

namespace fastrnn::cuda {

inline bool same(const TileShape& a, const TileShape& b) {
  return a.units == b.units && a.row_tiles == b.row_tiles && a.chunks == b.chunks &&
         a.resident == b.resident && a.warps == b.warps;
}

inline Geometry geometry_of(const Kernel& kernel) {
  return geometry_of(cell_shape(kernel.cell), kernel.tile, kernel.backward);
}

inline const Kernel* find_in_table(const PlanProblem& problem, const Plan& plan) {
  const KernelList lists[] = {
      lstm_forward(),
      lstm_backward(),
      lstm_flags(),
      gru_forward(),
      gru_backward(),
      gru_reset_before_forward(),
      gru_reset_before_backward(),
      rnn_tanh_forward(),
      rnn_tanh_backward(),
      rnn_relu_forward(),
      rnn_relu_backward(),
      lstm_regularised(),
      gru_regularised(),
      gru_reset_before_regularised(),
      rnn_tanh_regularised(),
      rnn_relu_regularised(),
      rhn_forward(),
      rhn_backward(),
      bnlstm_forward(),
      bnlstm_backward(),
  };
  for (const KernelList& list : lists)
    for (int i = 0; i < list.count; i++) {
      const Kernel& k = list.data[i];
      if (k.cell == problem.cell && k.backward == problem.backward && k.format == problem.format &&
          k.regularised == problem.regularised && k.exchange == plan.exchange && same(k.tile, plan.tile))
        return &k;
    }
  return nullptr;
}

// Which kernels take which parameters.
inline bool is_plain(const Kernel& k) {
  return !k.regularised && !is_rhn(k.cell) && k.cell != CellKind::bnlstm;
}
inline bool takes(const Kernel& k, const ForwardParams&) { return is_plain(k) && !k.backward; }
inline bool takes(const Kernel& k, const BackwardParams&) { return is_plain(k) && k.backward; }
inline bool takes(const Kernel& k, const RegularisedForwardParams&) { return k.regularised && !k.backward; }
inline bool takes(const Kernel& k, const RegularisedBackwardParams&) { return k.regularised && k.backward; }
inline bool takes(const Kernel& k, const RhnForwardParams&) { return is_rhn(k.cell) && !k.backward; }
inline bool takes(const Kernel& k, const RhnBackwardParams&) { return is_rhn(k.cell) && k.backward; }
inline bool takes(const Kernel& k, const BnLstmForwardParams&) {
  return k.cell == CellKind::bnlstm && !k.backward;
}
inline bool takes(const Kernel& k, const BnLstmBackwardParams&) {
  return k.cell == CellKind::bnlstm && k.backward;
}

inline int shared_bytes(const Kernel& k, int depth) {
  return shared_bytes(k.cell, k.tile, k.backward, k.format, k.exchange, depth);
}

inline int mask_state_blocks(const MaskStateParams& p) {
  const int64_t elements = static_cast<int64_t>(p.stride_n ? p.T : 1) * p.N * p.H;
  return static_cast<int>((elements + 255) / 256 < 4096 ? (elements + 255) / 256 : 4096);
}

inline size_t packed_size(const Kernel& kernel, int ctas) {
  return static_cast<size_t>(ctas) * geometry_of(kernel).cta_vectors() * sizeof(Vec4);
}

inline PackParams pack_params(const Kernel& kernel, const PackJob& job) {
  PackParams p;
  p.weights = job.weights;
  p.packed = static_cast<Vec4*>(job.packed);
  p.geometry = geometry_of(kernel);
  p.H = job.H;
  p.H_padded = round_up(job.H, vector_elements(kernel.format));
  p.ctas = job.ctas;
  return p;
}

}  // namespace fastrnn::cuda
