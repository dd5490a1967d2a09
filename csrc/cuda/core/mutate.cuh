// Planted errors: csrc/tests/test_cuda_mutations.cc switches one on and expects its test to fail. In a kernel built for
// a GPU every hook is the constant false.
#pragma once
#include "../prim/platform.cuh"

namespace fastrnn::cuda {

enum class Mutation : int {
  none,
  dropped_barrier,        // none between the partial sums and their reader
  single_reduction_tile,  // partial sums of consecutive steps in the same place
  missing_release,        // the flag is set by a relaxed store
  missing_acquire,        // the flag is read by a relaxed load
  barrier_after_release,  // none between the data and the flag
  single_cluster_tile,    // one buffer for what the peers of a cluster push
  unit_tail,              // the last unit is not written
  reduction_tail,         // one vector too few of the exchanged rows is read
  k_permutation,          // the weights' columns are in their natural order
  reset_ignored,          // the exchange does not zero a state that is reset
  single_expectation,     // the cluster's mbarrier expects a word too few
  other_step_mask,        // the masked state of one step is given another step's mask
  masked_carry,           // a highway layer's carry sees the masked state
  one_slab,               // every micro-step uses the first one's weights
  dead_rows_counted,      // statistics divide by all rows, not by those that reach the step
  statistics_barrier,     // none between the statistics and their reader
  rows_missing,           // statistics leave out the rows of the last pass
  other_width,            // the projection's matmul reads as many columns as the state has
  segment_tail,           // the last 16 units of a row count as 16 though there are fewer
  own_segment,            // statistics of a row are those of the CTA's own units
  count
};

#if defined(FASTRNN_EMU)
inline bool mutated(Mutation m) { return emu::machine().mutation == static_cast<int>(m); }
#else
FASTRNN_HOST_DEVICE constexpr bool mutated(Mutation) { return false; }
#endif

}  // namespace fastrnn::cuda
