// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), the counter-based generator of
// Random123: 4 random words from a counter of 4 words and a key of 2, without any state.
//
// The random words of the regularisers. Word u of row (t, n) in a stream depends on (seed, stream, t, n, u) alone:
//   counter = (u / 64 * 16 + u % 16, n, t, stream),  key = (low, high half of the seed),  result word u / 16 % 4
// so 16 counters side by side give the words of 64 units in their own order.
#pragma once
#include <cstdint>

#include "cells.h"

namespace fastrnn {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;
constexpr int kUnitsPerDraw = 64, kCountersPerDraw = 16;

// What a random word decides. The numbers are part of what a seed means.
enum class Mask : uint32_t { recurrent = 0, zoneout_h = 1, zoneout_c = 2, weight = 3 };

FASTRNN_CELL uint32_t random_stream(int64_t layer, int direction, Mask mask) {
  return static_cast<uint32_t>(layer) << 8 | static_cast<uint32_t>(direction) << 4 |
         static_cast<uint32_t>(mask);
}

FASTRNN_CELL void philox4x32(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
  for (int i = 0; i < kPhiloxRounds; i++) {
    const uint64_t a = static_cast<uint64_t>(kPhiloxM0) * c[0], b = static_cast<uint64_t>(kPhiloxM1) * c[2];
    c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(b);
    c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(a);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

// The random word of unit u in row (t, n).
FASTRNN_CELL uint32_t random_word(uint64_t seed, uint32_t stream, int64_t t, int64_t n, int64_t u) {
  uint32_t c[4] = {static_cast<uint32_t>(u / kUnitsPerDraw * kCountersPerDraw + u % kCountersPerDraw),
                   static_cast<uint32_t>(n), static_cast<uint32_t>(t), stream};
  philox4x32(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const int word = static_cast<int>(u / kCountersPerDraw % 4);
  // No index that is unknown to the compiler: on a GPU it would put the words into local memory.
  return word < 2 ? (word ? c[1] : c[0]) : word == 2 ? c[2] : c[3];
}

// A value is kept where its word is at least this; 0 keeps all and 2^32 none, so p = 0 and p = 1 are exact.
FASTRNN_CELL uint64_t drop_threshold(double p) {
  return p <= 0 ? 0 : p >= 1 ? uint64_t(1) << 32 : static_cast<uint64_t>(p * 4294967296.0 + 0.5);
}

}  // namespace fastrnn
