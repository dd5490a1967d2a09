// Who computes which piece of a stage: every piece once, whoever is slow, and what a slow thread has not begun is taken over.
#include <algorithm>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "../cpu/claims.h"
#include "../cpu/team.h"
#include "check.h"

using namespace fastrnn;
using namespace fastrnn::FASTRNN_ISA;

namespace {

// Runs body(division, barrier) on `count` threads, all of them at once.
void group(int count, bool scattered, const std::function<void(Division&, Barrier&)>& body) {
  std::vector<Claim> room(2 * count);
  Barrier barrier;
  Problem problem;
  problem.scattered = scattered;
  std::vector<std::thread> threads;
  for (int id = 0; id < count; id++)
    threads.emplace_back([&, id] {
      Division division;
      division.begin(room.data(), Share(1, id, count), problem);
      barrier.wait(count);
      body(division, barrier);
    });
  for (auto& thread : threads) thread.join();
}

void spin(int64_t rounds) {
  for (volatile int64_t i = 0; i < rounds;) i = i + 1;
}

}  // namespace

TEST(every_piece_is_computed_once) {
  constexpr int kStages = kSanitizer ? 60 : 600, kMost = 9;
  for (int count : {1, 2, 3, 4})
    for (bool scattered : {false, true}) {
      const auto pieces = [](int stage, int id) { return (stage * 7 + id * 5) % (kMost + 1); };
      std::vector<std::atomic<int>> done(kStages * count * kMost);
      std::vector<std::atomic<int>> foreign(kStages);
      group(count, scattered, [&](Division& division, Barrier& barrier) {
        for (int stage = 0; stage < kStages; stage++) {
          const bool shared = stage % 5 != 3;
          int last = -1;
          division.run(
              shared, [&](int id) { return pieces(stage, id); },
              [&](int id, int64_t piece) {
                spin((stage * 31 + division.id * 17 + piece) % 7 * 40);
                done[(stage * count + id) * kMost + piece]++;
                if (id != division.id) foreign[stage]++;
                if (id == division.id && piece != ++last)
                  check::fail(__FILE__, __LINE__, "own pieces out of order");
              });
          if (shared) barrier.wait(count);
        }
      });
      for (int stage = 0; stage < kStages; stage++) {
        for (int id = 0; id < count; id++)
          for (int piece = 0; piece < kMost; piece++)
            CHECK_EQ(done[(stage * count + id) * kMost + piece].load(), piece < pieces(stage, id) ? 1 : 0);
        if (stage % 5 == 3) CHECK_EQ(foreign[stage].load(), 0);
      }
    }
}

// One thread stands in its first piece until all that can be taken over from it has been.
TEST(a_slow_thread_is_relieved_of_half_of_its_pieces) {
  constexpr int kPieces = 10;
  for (int count : {2, 3}) {
    std::atomic<int> others{0}, taken_over{0};
    std::atomic<bool> in_time{true};
    group(count, false, [&](Division& division, Barrier& barrier) {
      division.run(
          true, [](int) { return kPieces; },
          [&](int id, int64_t piece) {
            if (division.id != 0) {
              others++;
              if (id == 0) taken_over++, CHECK(piece >= kPieces / 2);
              return;
            }
            const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
            while (piece == 0 && others < kPieces * (count - 1) + kPieces / 2 && in_time) {
              std::this_thread::yield();
              if (std::chrono::steady_clock::now() > end) in_time = false;
            }
          });
      barrier.wait(count);
    });
    CHECK(in_time.load());
    CHECK_EQ(taken_over.load(), kPieces / 2);
  }
}

// Blocks of a matrix as few rows meet them: each once, wherever threads and runs of several blocks begin and end.
TEST(panels_are_met_once) {
  using E = Types<float, float, float>;
  for (int count : {1, 2, 3})
    for (int gates : {1, 4})
      for (int64_t width : {1, 15, 16, 40, 130, 257})
        for (int64_t rows : {1, 2, 3, 20})
          for (bool back : {false, true})
            for (bool split : {false, true}) {
              const Panels<E> p(gates, width);
              std::vector<std::atomic<int>> met(p.blocks);
              std::atomic<int> wrong{0};
              group(count, true, [&](Division& division, Barrier& barrier) {
                division.panels(p, 8, rows, {split, split, back}, [&](int64_t b, int n, int64_t next) {
                  for (int i = 0; i < n; i++) met[b + i]++, wrong += p.vectors(b + i) != p.vectors(b);
                  wrong += next >= 0 && next >= b && next < b + n;
                });
                barrier.wait(count);
              });
              CHECK_EQ(wrong.load(), 0);
              for (int64_t b = 0; b < p.blocks; b++) CHECK_EQ(met[b].load(), split ? 1 : count);
            }
}

int main(int argc, char** argv) { return check::run(argc, argv); }
