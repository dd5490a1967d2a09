// Constants of the cost model of plan.h, as data: one a line, in the form that `python -m benchmarks.gpu --stage refit --write`
// reads and writes. Cycles and bytes per cycle.
// Provenance: estimates for an H200-class device from published microbenchmarks; nothing was timed.
#pragma once

namespace fastrnn::cuda {

struct CostModel {
  double mhz = 1850;
  double flops_16bit = 2680;             // mma.sync, of an SM
  double flops_tf32 = 1340;              // the same
  double l2_total = 4000;                // all SMs reading the same
  double l2_of_sm = 64;                  // one SM alone
  double dsmem = 16;                     // pushed into a CTA's shared memory
  double shared = 128;                   // a CTA's own
  double hop[4] = {60, 250, 700, 1350};  // publish, wait and nothing else; local, cluster, sentinel, flags
  double reduction = 100;                // partial sums of a step, without their traffic
  double epilogue = 200;                 // a step's pointwise part
  double epilogue_element = 1.6;         // and for each element of the tile
  double pass = 300;                     // each further pass over the rows of a batch-normalised layer
  double statistics = 250;               // of a batch-normalised step
  double statistics_element = 1.5;       // and for each element of the tile
};

}  // namespace fastrnn::cuda
