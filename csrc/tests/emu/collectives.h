// Warp collectives: the 32 lanes meet, the last to come computes for all.
#pragma once
#include "formats.h"
#include "machine.h"

namespace emu {

template <class Finish>
void collective(const char* what, const Operand& operand, Finish finish) {
  Thread& me = self();
  Warp& warp = *me.warp;
  warp.operand[me.lane] = operand;
  warp.operand[me.lane].what = what;
  meet(warp.collective, warp.live, what, [&] {
    for (const Operand& o : warp.operand)
      if (o.what != what) return machine().fail("lanes of a warp meet in different collectives");
    finish(warp.operand);
  });
}

// D[16][8] += A[16][K] B[K][8] with the fragment layouts of mma.sync.m16n8k{16,8}: `value` reads element i of a word.
template <int K, class Value>
void mma(const char* what, float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Value value) {
  Operand mine;
  for (int i = 0; i < 4; i++) mine.word[i] = a[i];
  mine.word[4] = b0;
  mine.word[5] = b1;
  mine.result = d;
  collective(what, mine, [&](Operand* lanes) {
    constexpr int kPerWord = K / 8;  // elements in a register: 2 of 16 bits or 1 of 32
    float ma[16][K], mb[8][K];
    for (int lane = 0; lane < kWarp; lane++)
      for (int r = 0; r < 4; r++)
        for (int i = 0; i < kPerWord; i++) {
          const int k = (lane % 4) * kPerWord + i + (r / 2) * (K / 2);
          ma[lane / 4 + (r % 2) * 8][k] = value(lanes[lane].word[r], i);
          if (r < 2)
            mb[lane / 4][(lane % 4) * kPerWord + i + r * (K / 2)] = value(lanes[lane].word[4 + r], i);
        }
    for (int lane = 0; lane < kWarp; lane++)
      for (int r = 0; r < 4; r++) {
        const int row = lane / 4 + (r / 2) * 8, column = (lane % 4) * 2 + r % 2;
        float sum = static_cast<float*>(lanes[lane].result)[r];
        for (int k = 0; k < K; k++) sum += ma[row][k] * mb[column][k];
        static_cast<float*>(lanes[lane].result)[r] = sum;
      }
  });
}

inline uint32_t shuffle_xor(uint32_t value, int mask) {
  uint32_t got = 0;
  Operand mine;
  mine.word[0] = value;
  mine.word[1] = mask;
  mine.result = &got;
  collective("shfl.xor", mine, [](Operand* lanes) {
    for (int lane = 0; lane < kWarp; lane++)
      *static_cast<uint32_t*>(lanes[lane].result) = lanes[lane ^ lanes[lane].word[1]].word[0];
  });
  return got;
}

inline void block_barrier(const char* site) { meet(self().cta->barrier, self().cta->live, site); }
inline void warp_barrier(const char* site) { meet(self().warp->sync, self().warp->live, site); }

}  // namespace emu
