// Ceilings that the cost model needs: reads of the same data by all SMs, and tensor core products. GPU only.
#pragma once
#include "../prim/memory.cuh"
#include "../prim/mma.cuh"
#include "hops.cuh"

namespace fastrnn::cuda::probes {

struct ReadParams {
  const Vec4* data = nullptr;
  int vectors = 0;  // a power of two, at least kAhead of each thread
  int rounds = 0;
  int stagger = 0;  // vectors between where two CTAs begin
  uint32_t* results = nullptr;
};

template <int kAhead>
FASTRNN_KERNEL(kHopThreads)
read_kernel(const FASTRNN_GRID_CONSTANT ReadParams p) {
  const int first = prim::block_index() * p.stagger + prim::thread_index();
  const int of_thread = p.vectors / kHopThreads;
  const int64_t begin = cycle_count();
  uint32_t seen = 0;
  for (int round = 0; round < p.rounds; round++)
    for (int k = 0; k < of_thread; k += kAhead) {
      Vec4 v[kAhead];
      FASTRNN_UNROLL
      for (int i = 0; i < kAhead; i++)
        v[i] = prim::load_relaxed(p.data + ((first + (k + i) * kHopThreads) & (p.vectors - 1)));
      FASTRNN_UNROLL
      for (int i = 0; i < kAhead; i++) seen ^= HopBase::sum_of(v[i]);
    }
  prim::block_barrier("read");
  const int64_t spent = cycle_count() - begin;
  uint32_t* mine = p.results + prim::block_index() * kResultWords;
  if (prim::thread_index() == 0) prim::store(mine + 1, static_cast<uint32_t>(spent));
  if (seen == 0x12345678u) prim::store(mine, seen);  // keeps the loads alive
}

template <class Op>
FASTRNN_KERNEL(kHopThreads)
product_kernel(int rounds, uint32_t* results) {
  constexpr int kIndependent = 8;
  float acc[kIndependent][4] = {};
  const uint32_t seed = prim::thread_index() * 0x01010101u & 0x3f3f3f3fu;
  const Vec4 a = {seed, seed + 1, seed + 2, seed + 3};
  const int64_t begin = cycle_count();
  for (int round = 0; round < rounds; round++) {
    FASTRNN_UNROLL
    for (int i = 0; i < kIndependent; i++) Op::product(acc[i], a, seed, seed + i);
  }
  prim::block_barrier("multiplied");
  const int64_t spent = cycle_count() - begin;
  float sum = 0;
  FASTRNN_UNROLL
  for (int i = 0; i < kIndependent; i++) sum += acc[i][0] + acc[i][1] + acc[i][2] + acc[i][3];
  uint32_t* mine = results + prim::block_index() * kResultWords;
  if (prim::thread_index() == 0) prim::store(mine + 1, static_cast<uint32_t>(spent));
  if (sum == 12345.f) prim::store(mine, 1u);
}
constexpr int kProductsOfRound = 8;

}  // namespace fastrnn::cuda::probes
