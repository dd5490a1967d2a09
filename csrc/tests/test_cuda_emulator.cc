// The emulator itself: that it computes what the instructions do, and that it sees what it promises to see.
#include "../cuda/prim/cluster.cuh"
#include "../cuda/prim/math.cuh"
#include "../cuda/prim/memory.cuh"
#include "../cuda/prim/mma.cuh"
#include "check.h"

using namespace fastrnn::cuda;

static emu::Report launch(unsigned grid, unsigned block, size_t shared, std::function<void()> kernel,
                          uint64_t seed = 1, unsigned cluster = 1) {
  emu::Launch l;
  l.grid = grid, l.block = block, l.shared_bytes = shared, l.seed = seed, l.cluster = cluster;
  return emu::launch(l, kernel);
}
static bool says(const emu::Report& r, const char* what) { return r.error.find(what) != std::string::npos; }

TEST(half_formats_round_trip) {
  for (uint32_t h = 0; h < 0x10000; h++) {
    const float f = emu::fp16_value(h), b = emu::bf16_value(h);
    CHECK(std::isnan(f) ? emu::fp16_bits(f) == 0x7fff : emu::fp16_bits(f) == h);
    CHECK(std::isnan(b) ? emu::bf16_bits(b) == 0x7fff : emu::bf16_bits(b) == h);
  }
  // Halfway between neighbours: the even one.
  CHECK_EQ(emu::fp16_bits(1.f + 0x1p-11f), 0x3c00u);
  CHECK_EQ(emu::fp16_bits(1.f + 3 * 0x1p-11f), 0x3c02u);
  CHECK_EQ(emu::fp16_bits(65519.f), 0x7bffu);
  CHECK_EQ(emu::fp16_bits(65520.f), 0x7c00u);
  CHECK_EQ(emu::fp16_bits(0x1p-25f), 0u);
  CHECK_EQ(emu::fp16_bits(0x1.8p-25f), 1u);
  CHECK_EQ(emu::bf16_bits(1.f + 0x1p-8f), 0x3f80u);
  CHECK_EQ(emu::bf16_bits(1.f + 3 * 0x1p-8f), 0x3f82u);
}

// The fragment layouts of the PTX ISA's tables for m16n8k16, written out by index.
TEST(mma_multiplies_matrices) {
  float a[16][16], b[16][8], d[16][8], got[16][8];
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++) a[i][k] = float((i * 7 + k * 3) % 11 - 5);
  for (int k = 0; k < 16; k++)
    for (int j = 0; j < 8; j++) b[k][j] = float((k * 5 + j * 2) % 7 - 3);
  const auto pair = [](float low, float high) { return emu::bf16_bits(low) | emu::bf16_bits(high) << 16; };
  const emu::Report r = launch(1, 32, 0, [&] {
    const int lane = prim::thread_index(), g = lane / 4, q = lane % 4;
    const Vec4 wa = {pair(a[g][2 * q], a[g][2 * q + 1]), pair(a[g + 8][2 * q], a[g + 8][2 * q + 1]),
                     pair(a[g][2 * q + 8], a[g][2 * q + 9]), pair(a[g + 8][2 * q + 8], a[g + 8][2 * q + 9])};
    float acc[4] = {1, 1, 1, 1};
    prim::mma_bf16(acc, wa, pair(b[2 * q][g], b[2 * q + 1][g]), pair(b[2 * q + 8][g], b[2 * q + 9][g]));
    got[g][2 * q] = acc[0], got[g][2 * q + 1] = acc[1];
    got[g + 8][2 * q] = acc[2], got[g + 8][2 * q + 1] = acc[3];
  });
  CHECK_EQ(r.error, std::string());
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) {
      d[i][j] = 1;
      for (int k = 0; k < 16; k++) d[i][j] += a[i][k] * b[k][j];
      CHECK_EQ(got[i][j], d[i][j]);
    }
}

TEST(shared_memory_errors_are_seen) {
  CHECK(says(launch(1, 32, 128, [] { prim::shared_view<float>(0, 32).store(prim::thread_index() + 1, 0.f); }),
             "index out of range"));
  CHECK(says(launch(1, 32, 64, [] { prim::shared_view<float>(0, 32).store(prim::thread_index(), 0.f); }),
             "access out of range"));
  CHECK(says(launch(1, 32, 128, [] { prim::shared_view<float>(0, 32).load(prim::thread_index()); }),
             "unwritten"));
  const auto neighbour = [](bool block_barrier, bool warp_barrier) {
    return launch(1, 64, 256, [=] {
      const auto s = prim::shared_view<float>(0, 64);
      const int i = prim::thread_index();
      s.store(i, 1.f);
      if (block_barrier) prim::block_barrier("test");
      if (warp_barrier) prim::warp_barrier("test");
      s.load(i ^ (block_barrier ? 32 : 1));
    });
  };
  CHECK(neighbour(true, false).ok());
  CHECK(neighbour(false, true).ok());  // the neighbour is in the same warp
  CHECK(says(neighbour(false, false), "race") || says(neighbour(false, false), "unwritten"));
  const auto both_write = [] { prim::shared_view<float>(0, 1).store(0, 1.f); };
  CHECK(says(launch(1, 2, 16, both_write), "race: two threads write"));
  const auto write_after_read = [] {
    const auto s = prim::shared_view<float>(0, 1);
    if (prim::thread_index() == 0) s.store(0, 1.f);
    prim::block_barrier("test");
    s.load(0);
    prim::shuffle_xor(0, 1);  // all have read, but a shuffle orders no memory
    if (prim::thread_index() == 0) s.store(0, 2.f);
  };
  CHECK(says(launch(1, 32, 16, write_after_read), "race: write after another thread's read"));
}

TEST(deadlocks_name_the_place) {
  const emu::Report r = launch(2, 64, 0, [] {
    if (prim::block_index() == 1 && prim::thread_index() < 32) prim::warp_barrier("nobody comes");
    if (prim::block_index() == 1) {
      uint32_t never = 0;
      while (!prim::load_relaxed(&never)) prim::poll_failed("the flag");
    }
  });
  CHECK(says(r, "deadlock"));
  CHECK(says(r, "CTA 1: 64 threads at the flag"));
}

TEST(divergent_collectives_are_seen) {
  const emu::Report r = launch(1, 32, 0, [] {
    float d[4] = {};
    if (prim::thread_index() == 3)
      prim::shuffle_xor(0, 1);
    else
      prim::mma_bf16(d, {0, 0, 0, 0}, 0, 0);
  });
  CHECK(says(r, "different collectives"));
}

// Message passing: data, then a flag. How often the reader sees the flag but not the data.
static int stale_reads(bool release, bool barrier, bool acquire) {
  int stale = 0;
  for (uint64_t seed = 1; seed <= 40; seed++) {
    uint32_t data[32] = {}, flag = 0;
    const emu::Report r = launch(
        2, 32, 0,
        [&] {
          const int i = prim::thread_index();
          if (prim::block_index() == 0) {
            prim::store_relaxed(data + i, 1);
            if (barrier) prim::warp_barrier("data");
            if (i == 0) release ? prim::store_release(&flag, 1) : prim::store_relaxed(&flag, 1);
          } else if (i == 0) {
            while (!(acquire ? prim::load_acquire(&flag) : prim::load_relaxed(&flag)))
              prim::poll_failed("flag");
            for (uint32_t& d : data) stale += !prim::load_relaxed(&d);
          }
        },
        seed);
    CHECK_EQ(r.error, std::string());
  }
  return stale;
}

TEST(only_a_release_after_a_barrier_that_is_acquired_orders_the_data) {
  CHECK_EQ(stale_reads(true, true, true), 0);
  CHECK(stale_reads(false, true, true) > 0);
  CHECK(stale_reads(true, true, false) > 0);
  CHECK(stale_reads(true, false, true) > 0);  // the release orders its own thread's stores alone
}

TEST(one_word_keeps_the_order_of_its_stores) {
  for (uint64_t seed = 1; seed <= 20; seed++) {
    uint32_t word = 0;
    const emu::Report r = launch(
        2, 1, 0,
        [&] {
          if (prim::block_index() == 0) {
            for (uint32_t v = 1; v <= 8; v++) prim::store_relaxed(&word, v);
            return;
          }
          for (uint32_t last = 0, v = 0; last < 8; last = v) {
            v = prim::load_relaxed(&word);
            CHECK(v >= last);
            prim::poll_failed("word");
          }
        },
        seed);
    CHECK_EQ(r.error, std::string());
  }
}

TEST(pushes_arrive_with_their_mbarrier) {
  for (uint64_t seed = 1; seed <= 10; seed++) {
    const emu::Report r = launch(
        2, 32, 16 + 32 * 4,
        [] {
          const auto barriers = prim::shared_view<uint64_t>(0, 2);
          const auto words = prim::shared_view<uint32_t>(16, 32);
          const int i = prim::thread_index(), peer = 1 - prim::cluster_rank();
          if (i == 0) {
            prim::mbarrier_init(barriers, 0, 1);
            prim::mbarrier_arrive_expect(barriers, 0, 32 * 4);
          }
          prim::cluster_barrier("start");
          prim::store_async(words.address(i), 100 * prim::cluster_rank() + i, barriers, 0, peer);
          while (!prim::mbarrier_passed(barriers, 0, 0)) prim::poll_failed("mbarrier");
          CHECK_EQ(words.load(i), static_cast<uint32_t>(100 * peer + i));
          prim::cluster_barrier("end");
        },
        seed, 2);
    CHECK_EQ(r.error, std::string());
  }
}

int main(int argc, char** argv) { return check::run(argc, argv); }
