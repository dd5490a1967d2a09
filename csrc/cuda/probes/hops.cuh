// What one step of each exchange costs, with nothing else in it: every CTA publishes some words, every CTA of its group reads
// those of all, a barrier, and again. The protocols are those of core/exchange.cuh, reduced to the exchange.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../core/geometry.h"
#include "../core/params.h"
#include "../prim/cluster.cuh"
#include "../prim/memory.cuh"

#if !defined(FASTRNN_EMU)
#include <cooperative_groups.h>
#endif

namespace fastrnn::cuda::probes {

constexpr int kHopThreads = 256;
constexpr int kResultWords = 8;  // of a CTA: sum, cycles (2 words), nanoseconds (2 words)

struct HopParams {
  uint32_t* mail = nullptr;  // groups * steps rows
  uint32_t* flags = nullptr;
  uint32_t* results = nullptr;
  int steps = 0, ctas = 1, groups = 1;  // ctas: of a group
  int words = 1;                        // that a CTA publishes in a step
  FASTRNN_HOST_DEVICE int row() const { return (ctas * words + 3) / 4 * 4; }
};

// Never the sentinel.
FASTRNN_HOST_DEVICE uint32_t hop_word(int step, int i) {
  return (step * 2654435761u + i * 40503u + 1u) & 0x7fffffffu;
}
inline uint32_t expected_sum(const HopParams& p) {
  uint32_t sum = 0;
  for (int step = 0; step < p.steps; step++)
    for (int i = 0; i < p.row(); i++) sum += hop_word(step, i);
  return sum;
}

#if defined(FASTRNN_EMU)
FASTRNN_DEVICE int64_t cycle_count() { return 0; }
#else
FASTRNN_DEVICE int64_t cycle_count() { return clock64(); }
#endif

// The place of this CTA, and polls that end: a failed one makes all later ones fail at once.
struct HopBase {
  HopParams p;
  int group, rank;
  bool gone = false;
  FASTRNN_DEVICE explicit HopBase(const HopParams& params)
      : p(params), group(prim::block_index() / params.ctas), rank(prim::block_index() % params.ctas) {}
  // Of the row that this CTA publishes; the last one fills it up to whole vectors.
  FASTRNN_DEVICE int first() const { return rank * p.words; }
  FASTRNN_DEVICE int end() const { return rank == p.ctas - 1 ? p.row() : first() + p.words; }
  FASTRNN_DEVICE uint32_t* row(int step) const {
    return p.mail + (static_cast<int64_t>(group) * p.steps + step) * p.row();
  }
  template <class Ready>
  FASTRNN_DEVICE void wait(const char* site, Ready ready) {
    for (uint32_t tries = 0; !gone && !ready(); tries++) {
      gone = tries > 1u << 22;
      prim::poll_failed(site);
    }
  }
  FASTRNN_DEVICE void start() {}
  FASTRNN_DEVICE void finish() {}
  FASTRNN_DEVICE void store_row(int step) const {
    for (int i = first() + prim::thread_index(); i < end(); i += kHopThreads)
      prim::store_relaxed(row(step) + i, hop_word(step, i));
  }
  FASTRNN_DEVICE static uint32_t sum_of(const Vec4& v) { return v.x + v.y + v.z + v.w; }
};

struct SentinelHop : HopBase {
  using HopBase::HopBase;
  static constexpr uint32_t kFill = ~0u;
  static size_t words(const HopParams& p) { return size_t(p.groups) * p.steps * p.row(); }
  static int shared(const HopParams&) { return kHopThreads * 4; }
  FASTRNN_DEVICE static int shared_end(const HopParams&) { return 0; }
  FASTRNN_DEVICE uint32_t exchange(int step) {
    store_row(step);
    uint32_t sum = 0;
    for (int i = 4 * prim::thread_index(); i < p.row(); i += 4 * kHopThreads) {
      Vec4 v = {};
      wait("mail", [&] {
        v = prim::load_relaxed(reinterpret_cast<const Vec4*>(row(step) + i));
        return v.x != ~0u && v.y != ~0u && v.z != ~0u && v.w != ~0u;
      });
      sum += sum_of(v);
    }
    prim::block_barrier("step");
    return sum;
  }
};

struct FlagHop : HopBase {
  using HopBase::HopBase;
  static constexpr uint32_t kFill = 0;
  static size_t words(const HopParams& p) { return SentinelHop::words(p); }
  static int shared(const HopParams&) { return kHopThreads * 4; }
  FASTRNN_DEVICE static int shared_end(const HopParams&) { return 0; }
  FASTRNN_DEVICE uint32_t exchange(int step) {
    store_row(step);
    prim::block_barrier("published");
    uint32_t* flags = p.flags + static_cast<int64_t>(group) * p.ctas * kFlagStride;
    if (prim::thread_index() == 0) prim::store_release(flags + rank * kFlagStride, step + 1);
    for (int c = prim::thread_index() % 32; c < p.ctas; c += 32)
      wait("flag", [&] { return prim::load_acquire(flags + c * kFlagStride) >= uint32_t(step + 1); });
    prim::warp_barrier("flags");
    uint32_t sum = 0;
    for (int i = 4 * prim::thread_index(); i < p.row(); i += 4 * kHopThreads)
      sum += sum_of(prim::load_relaxed(reinterpret_cast<const Vec4*>(row(step) + i)));
    prim::block_barrier("step");
    return sum;
  }
};

// Its mail is shared memory: two mbarriers, two buffers.
struct ClusterHop : HopBase {
  static constexpr uint32_t kFill = 0;
  prim::MBarriers barriers;
  prim::Shared<uint32_t> words_;
  prim::Shared<Vec4> vectors;
  FASTRNN_DEVICE explicit ClusterHop(const HopParams& params)
      : HopBase(params),
        barriers(prim::shared_view<uint64_t>(0, 2)),
        words_(prim::shared_view<uint32_t>(kBarrierBytes, 2 * params.row())),
        vectors(prim::shared_view<Vec4>(kBarrierBytes, params.row() / 2)) {}
  static size_t words(const HopParams&) { return 4; }
  static int shared(const HopParams& p) { return kBarrierBytes + 8 * p.row() + kHopThreads * 4; }
  FASTRNN_DEVICE static int shared_end(const HopParams& p) { return kBarrierBytes + 8 * p.row(); }
  FASTRNN_DEVICE void start() {
    if (prim::thread_index() == 0)
      for (int b = 0; b < 2; b++) {
        prim::mbarrier_init(barriers, b, 1);
        prim::mbarrier_arrive_expect(barriers, b, 4 * p.row());
      }
    prim::cluster_barrier("starts");
  }
  FASTRNN_DEVICE void finish() { prim::cluster_barrier("ends"); }
  FASTRNN_DEVICE uint32_t exchange(int step) {
    const int b = step & 1;
    for (int i = first() + prim::thread_index(); i < end(); i += kHopThreads)
      for (int to = 0; to < p.ctas; to++)
        prim::store_async(words_.address(b * p.row() + i), hop_word(step, i), barriers, b, to);
    wait("mbarrier", [&] { return prim::mbarrier_passed(barriers, b, step >> 1 & 1); });
    if (prim::thread_index() == 0) prim::mbarrier_arrive_expect(barriers, b, 4 * p.row());
    uint32_t sum = 0;
    for (int i = prim::thread_index(); i < p.row() / 4; i += kHopThreads)
      sum += sum_of(vectors.load(b * p.row() / 4 + i));
    prim::block_barrier("step");
    return sum;
  }
};

#if !defined(FASTRNN_EMU)
struct GridHop : HopBase {
  using HopBase::HopBase;
  static constexpr uint32_t kFill = 0;
  static size_t words(const HopParams& p) { return SentinelHop::words(p); }
  static int shared(const HopParams&) { return kHopThreads * 4; }
  FASTRNN_DEVICE static int shared_end(const HopParams&) { return 0; }
  FASTRNN_DEVICE uint32_t exchange(int step) {
    store_row(step);
    cooperative_groups::this_grid().sync();
    uint32_t sum = 0;
    for (int i = 4 * prim::thread_index(); i < p.row(); i += 4 * kHopThreads)
      sum += sum_of(prim::load_relaxed(reinterpret_cast<const Vec4*>(row(step) + i)));
    prim::block_barrier("step");
    return sum;
  }
};
#endif

template <class Hop>
FASTRNN_DEVICE void run_hops(const HopParams& p) {
  Hop hop(p);
  hop.start();
  const int64_t cycles = cycle_count();
  const uint64_t begin = prim::nanoseconds();
  uint32_t sum = 0;
  for (int step = 0; step < p.steps; step++) sum += hop.exchange(step);
  const int64_t spent[2] = {cycle_count() - cycles, static_cast<int64_t>(prim::nanoseconds() - begin)};
  hop.finish();
  const auto sums = prim::shared_view<uint32_t>(Hop::shared_end(p), kHopThreads);
  sums.store(prim::thread_index(), sum);
  prim::block_barrier("sums");
  if (prim::thread_index() != 0) return;
  uint32_t total = 0;
  for (int i = 0; i < kHopThreads; i++) total += sums.load(i);
  uint32_t* mine = p.results + prim::block_index() * kResultWords;
  prim::store(mine, total);
  for (int i = 0; i < 2; i++) {
    prim::store(mine + 1 + 2 * i, static_cast<uint32_t>(spent[i]));
    prim::store(mine + 2 + 2 * i, static_cast<uint32_t>(spent[i] >> 32));
  }
}

template <class Hop>
FASTRNN_KERNEL(kHopThreads)
hop_kernel(const FASTRNN_GRID_CONSTANT HopParams p) {
  if constexpr (std::is_same_v<Hop, ClusterHop> && !prim::kHasClusters)
    prim::unavailable();
  else
    run_hops<Hop>(p);
}

}  // namespace fastrnn::cuda::probes
