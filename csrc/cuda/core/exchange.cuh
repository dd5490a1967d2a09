// How CTAs get each other's results of the step before. Every policy offers
//   start(...)    once, before anything else
//   wait(e)       before the first load of what exchange e published
//   load, retry   one 16-byte vector of a row; retry waits for it where each word vouches for itself
//   publish       one word of a row, to whoever reads it in exchange e
//   done(e)       after the CTA's last word of exchange e
//   finish()      before a CTA ends
// Exchanges count phases: e = step * phases + phase. Row `local` of the CTA is row n of the batch.
#pragma once
#include "../prim/cluster.cuh"
#include "tile.cuh"

namespace fastrnn::cuda {

// A wait that is too long sets the error word, and every CTA that sees it stops waiting: wrong results and an error for the
// host instead of a hang.
template <uint32_t PollsBetweenLooks = prim::kPollsBetweenLooks>
class Guard {
 public:
  FASTRNN_DEVICE explicit Guard(uint32_t* error) : error_(error) {}
  // False: give up.
  FASTRNN_DEVICE bool again(const char* site) {
    prim::poll_failed(site);
    if (++polls_ % PollsBetweenLooks) return !gone_;
    if (!error_ || gone_) return !gone_;
    const uint64_t now = prim::nanoseconds();
    if (!since_) since_ = now;
    if (now - since_ > kPatience) prim::store_relaxed(error_, 1u);
    gone_ = prim::load_relaxed(error_) != 0;
    return !gone_;
  }
  FASTRNN_DEVICE void arrived() { since_ = 0; }

 private:
  static constexpr uint64_t kPatience = 4000000000u;  // ns
  uint32_t* error_;
  uint32_t polls_ = 0;
  uint64_t since_ = 0;
  bool gone_ = false;
};

// Common to the exchanges through global memory (L2).
template <class D>
struct ThroughGlobal {
  using Elem = typename D::Elem;
  static constexpr bool kInShared = false;
  static constexpr bool kIsCluster = false;
  static constexpr int kBuffers = 0;
  FASTRNN_DEVICE static const Vec4* vector_at(const Mail& m, int t, int n, int k) {
    return reinterpret_cast<const Vec4*>(static_cast<const Elem*>(m.data) + t * m.stride_t + n * m.stride_n +
                                         k);
  }
  FASTRNN_DEVICE Vec4 load(const Mail& m, int, int t, int n, int, int k) const {
    return prim::load_relaxed(vector_at(m, t, n, k));
  }
  FASTRNN_DEVICE void publish(const Mail& m, int, int t, int n, int, int k, uint32_t word) const {
    Elem* row = static_cast<Elem*>(m.data) + t * m.stride_t + n * m.stride_n;
    prim::store_relaxed(reinterpret_cast<uint32_t*>(row + k), word);
  }
  FASTRNN_DEVICE void finish() const {}
};

// Every word vouches for itself: the mail is all ones before the launch, no result is ever all ones, a reader asks until
// it is not. No flag, no fence, no order is needed, and each step has its own place, so nothing is ever reused.
template <class D, class T, int Values>
class Sentinel : public ThroughGlobal<D> {
 public:
  FASTRNN_DEVICE Sentinel(const Shape& p, const Place&, int) : guard_(p.error) {}
  FASTRNN_DEVICE void start(const Shape&, int, int) {}
  FASTRNN_DEVICE void wait(int) {}
  FASTRNN_DEVICE void retry(Vec4& v, const Mail& m, int t, int n, int k) {
    while (missing(v)) {
      if (!guard_.again("mail")) return;
      v = prim::load_relaxed(this->vector_at(m, t, n, k));
    }
    guard_.arrived();
  }
  FASTRNN_DEVICE void done(int) const {}

 private:
  FASTRNN_DEVICE static bool missing(const Vec4& v) {
    return v.x == ~0u || v.y == ~0u || v.z == ~0u || v.w == ~0u;
  }
  Guard<> guard_;
};

// A flag for each CTA. The CTA's stores happen before its barrier, the barrier before the release, the release is seen by
// the acquire, and that happens before the reader's loads: causality order at GPU scope.
template <class D, class T, int Values>
class Flags : public ThroughGlobal<D> {
 public:
  FASTRNN_DEVICE Flags(const Shape& p, const Place& place, int)
      : guard_(p.error),
        group_(p.flags + static_cast<int64_t>(place.index - place.cta) * kFlagStride),
        mine_(p.flags + static_cast<int64_t>(place.index) * kFlagStride),
        ctas_(p.ctas) {}
  FASTRNN_DEVICE void start(const Shape&, int, int) {}
  // Each lane watches some CTAs; the warp's barrier orders the lanes' loads after all of them.
  FASTRNN_DEVICE void wait(int e) {
    for (int c = prim::thread_index() % 32; c < ctas_; c += 32)
      while (read_flag(group_ + c * kFlagStride) < static_cast<uint32_t>(e + 1))
        if (!guard_.again("flag")) break;
    guard_.arrived();
    prim::warp_barrier("flags");
  }
  FASTRNN_DEVICE void retry(Vec4&, const Mail&, int, int, int) const {}
  FASTRNN_DEVICE void done(int e) const {
    if (!mutated(Mutation::barrier_after_release)) prim::block_barrier("published");
    if (prim::thread_index() != 0) return;
    if (mutated(Mutation::missing_release))
      prim::store_relaxed(mine_, e + 1);
    else
      prim::store_release(mine_, e + 1);
  }

 private:
  FASTRNN_DEVICE static uint32_t read_flag(const uint32_t* flag) {
    return mutated(Mutation::missing_acquire) ? prim::load_relaxed(flag) : prim::load_acquire(flag);
  }
  Guard<> guard_;
  const uint32_t* group_;
  uint32_t* mine_;
  int ctas_;
};

// Rows in shared memory. One buffer serves a CTA alone: it reads before the barrier of the partial sums and writes after it.
// A cluster needs two: a peer may be a step ahead, not more.
template <class D, class T, int Values, int Buffers>
struct InShared {
  static constexpr bool kIsCluster = Buffers == 2;
  static constexpr int kBuffers = Buffers;
  using Elem = typename D::Elem;
  static constexpr bool kInShared = true;
  static constexpr int kRowElements = Values * T::kWarps * T::kChunks * D::kChunk + D::kVec;
  static constexpr int kRowWords = kRowElements * static_cast<int>(sizeof(Elem)) / 4;
  prim::Shared<uint32_t> words;
  prim::Shared<Vec4> vectors;
  int rows;
  FASTRNN_DEVICE InShared(const Shape& p, int offset)
      : words(prim::shared_view<uint32_t>(offset, Buffers * T::mail_rows(p) * kRowWords)),
        vectors(prim::shared_view<Vec4>(offset, Buffers * T::mail_rows(p) * kRowWords / 4)),
        rows(T::mail_rows(p)) {}
  FASTRNN_DEVICE int word_index(int e, int local, int k) const {
    const int buffer = mutated(Mutation::single_cluster_tile) ? 0 : e % Buffers;
    return (buffer * rows + local) * kRowWords + k * static_cast<int>(sizeof(Elem)) / 4;
  }
  FASTRNN_DEVICE Vec4 load(const Mail&, int e, int, int, int local, int k) const {
    return vectors.load(word_index(e, local, k) / 4);
  }
  FASTRNN_DEVICE void retry(Vec4&, const Mail&, int, int, int) const {}
};

// One CTA has all units: no exchange leaves it.
template <class D, class T, int Values>
class Local : public InShared<D, T, Values, 1> {
 public:
  FASTRNN_DEVICE Local(const Shape& p, const Place&, int mail_offset)
      : InShared<D, T, Values, 1>(p, mail_offset) {}
  FASTRNN_DEVICE void start(const Shape&, int, int) {}
  FASTRNN_DEVICE void wait(int) {}
  FASTRNN_DEVICE void publish(const Mail&, int e, int, int, int local, int k, uint32_t word) const {
    this->words.store(this->word_index(e, local, k), word);
  }
  FASTRNN_DEVICE void done(int) const { prim::block_barrier("published"); }
  FASTRNN_DEVICE void finish() const {}
};

// The CTAs of a group are one cluster: each pushes its words into every peer's shared memory, where an mbarrier for each
// buffer counts the bytes. It is armed for exchange e + 2 when e has come, before this CTA publishes e + 1, which all
// peers need before they can publish e + 2.
template <class D, class T, int Values>
class Cluster : public InShared<D, T, Values, 2> {
 public:
  FASTRNN_DEVICE Cluster(const Shape& p, const Place&, int mail_offset)
      : InShared<D, T, Values, 2>(p, mail_offset),
        barriers_(prim::shared_view<uint64_t>(0, 2)),
        guard_(p.error),
        ctas_(p.ctas) {}
  // Values that a unit publishes in even and in odd exchanges.
  FASTRNN_DEVICE void start(const Shape& p, int values_even, int values_odd) {
    const int words = this->rows * p.H_padded / D::kPerWord;
    even_bytes_ = words * values_even * 4 - (mutated(Mutation::single_expectation) ? 4 : 0);
    odd_bytes_ = words * values_odd * 4;
    if (prim::thread_index() == 0) {
      for (int i = 0; i < 2; i++) prim::mbarrier_init(barriers_, i, 1);
      for (int i = 0; i < 2; i++) prim::mbarrier_arrive_expect(barriers_, i, bytes(i));
    }
    prim::cluster_barrier("cluster starts");
  }
  FASTRNN_DEVICE void wait(int e) {
    while (!prim::mbarrier_passed(barriers_, e & 1, e >> 1 & 1))
      if (!guard_.again("mbarrier")) break;
    guard_.arrived();
    if (prim::thread_index() == 0) prim::mbarrier_arrive_expect(barriers_, e & 1, bytes(e));
  }
  FASTRNN_DEVICE void publish(const Mail&, int e, int, int, int local, int k, uint32_t word) const {
    const uint32_t address = this->words.address(this->word_index(e, local, k));
    for (int rank = 0; rank < ctas_; rank++) prim::store_async(address, word, barriers_, e & 1, rank);
  }
  FASTRNN_DEVICE void done(int) const {}
  FASTRNN_DEVICE void finish() const { prim::cluster_barrier("cluster ends"); }

 private:
  // Of exchange e. No array: an index unknown to the compiler would put the whole object into local memory.
  FASTRNN_DEVICE uint32_t bytes(int e) const { return e & 1 ? odd_bytes_ : even_bytes_; }

  prim::MBarriers barriers_;
  Guard<16> guard_;  // a poll of an mbarrier sleeps, for a time that the system chooses
  uint32_t even_bytes_, odd_bytes_;
  int ctas_;
};

}  // namespace fastrnn::cuda
