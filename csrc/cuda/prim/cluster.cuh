// Thread block clusters (sm_90 and later): pushes into a peer's shared memory that an mbarrier there counts.
#pragma once
#include "shared.cuh"

namespace fastrnn::cuda::prim {

// The mbarrier is element `i` of a view that starts at offset 0.
using MBarriers = Shared<uint64_t>;

#if defined(FASTRNN_EMU)

FASTRNN_DEVICE int cluster_rank() { return emu::cluster_rank(); }
FASTRNN_DEVICE void cluster_barrier(const char* site) { emu::cluster_barrier(site); }
FASTRNN_DEVICE void mbarrier_init(const MBarriers&, int i, int count) { emu::mbarrier_init(i, count); }
FASTRNN_DEVICE void mbarrier_arrive_expect(const MBarriers&, int i, uint32_t bytes) {
  emu::mbarrier_arrive_expect(i, bytes);
}
FASTRNN_DEVICE bool mbarrier_passed(const MBarriers&, int i, uint32_t parity) {
  return emu::mbarrier_passed(i, parity);
}
FASTRNN_DEVICE void store_async(uint32_t address, uint32_t value, const MBarriers&, int i, int rank) {
  emu::store_async(rank, address, value, i);
}

#else

FASTRNN_DEVICE int cluster_rank() {
  uint32_t r;
  asm("mov.u32 %0, %cluster_ctarank;" : "=r"(r));
  return r;
}
FASTRNN_DEVICE void cluster_barrier(const char*) {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// The fence makes the barrier known to peers' asynchronous stores, once the cluster barrier has been passed.
FASTRNN_DEVICE void mbarrier_init(const MBarriers& b, int i, int count) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;\nfence.mbarrier_init.release.cluster;" ::"r"(b.address(i)),
      "r"(count)
      : "memory");
}
// Relaxed: it publishes no data, and its phase cannot end before this arrival, whatever peers have pushed by then. A release
// at cluster scope would be a MEMBAR.ALL.GPU.
FASTRNN_DEVICE void mbarrier_arrive_expect(const MBarriers& b, int i, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.relaxed.cluster.shared::cta.b64 _, [%0], %1;" ::"r"(b.address(i)),
               "r"(bytes)
               : "memory");
}
FASTRNN_DEVICE bool mbarrier_passed(const MBarriers& b, int i, uint32_t parity) {
  uint32_t passed;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(passed)
      : "r"(b.address(i)), "r"(parity)
      : "memory");
  return passed;
}
// `address` and the mbarrier are this CTA's; the word goes to the same places in the CTA of that rank.
FASTRNN_DEVICE void store_async(uint32_t address, uint32_t value, const MBarriers& b, int i, int rank) {
  asm volatile(
      "{\n.reg .b32 to, bar;\n"
      "mapa.shared::cluster.u32 to, %0, %3;\n"
      "mapa.shared::cluster.u32 bar, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %1, [bar];\n}" ::"r"(address),
      "r"(value), "r"(b.address(i)), "r"(rank)
      : "memory");
}

#endif

}  // namespace fastrnn::cuda::prim
