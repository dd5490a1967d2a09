// Random words of csrc/cells/philox.h by the vector, and masks made of them: the same words on every instruction set.
#pragma once
#include <cstdint>

#include "../cells/philox.h"
#include "simd.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// 32-bit words, W of them, with the few operations that Philox needs.
#if defined(__AVX512F__)
struct Words {
  static constexpr int W = 16;
  __m512i v;
  FASTRNN_INLINE Words set1(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  FASTRNN_INLINE Words count_from(uint32_t x) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(x)), lane)};
  }
  FASTRNN_INLINE void store(uint32_t* p, Words a) { _mm512_storeu_si512(p, a.v); }
  // Halves of x * m.
  FASTRNN_INLINE void multiply(Words x, uint32_t m, Words& high, Words& low) {
    const __m512i by = _mm512_set1_epi32(static_cast<int>(m));
    const __m512i even = _mm512_mul_epu32(x.v, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(x.v, 32), by);
    high.v = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
    low.v = _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
  }
  FASTRNN_INLINE Words xor3(Words a, Words b, uint32_t k) {
    return {_mm512_ternarylogic_epi32(a.v, b.v, _mm512_set1_epi32(static_cast<int>(k)), 0x96)};
  }
  // Bit i is set where lane i exceeds the limit.
  FASTRNN_INLINE uint64_t above(Words a, uint32_t limit) {
    return _mm512_cmpgt_epu32_mask(a.v, _mm512_set1_epi32(static_cast<int>(limit)));
  }
};
#elif defined(__AVX2__)
struct Words {
  static constexpr int W = 8;
  __m256i v;
  FASTRNN_INLINE Words set1(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
  FASTRNN_INLINE Words count_from(uint32_t x) {
    return {
        _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(x)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))};
  }
  FASTRNN_INLINE void store(uint32_t* p, Words a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
  FASTRNN_INLINE void multiply(Words x, uint32_t m, Words& high, Words& low) {
    const __m256i by = _mm256_set1_epi32(static_cast<int>(m));
    const __m256i even = _mm256_mul_epu32(x.v, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(x.v, 32), by);
    high.v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low.v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  }
  FASTRNN_INLINE Words xor3(Words a, Words b, uint32_t k) {
    return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), _mm256_set1_epi32(static_cast<int>(k)))};
  }
  FASTRNN_INLINE uint64_t above(Words a, uint32_t limit) {
    const __m256i sign = _mm256_set1_epi32(INT32_MIN), l = _mm256_set1_epi32(static_cast<int>(limit));
    const __m256i gt = _mm256_cmpgt_epi32(_mm256_xor_si256(a.v, sign), _mm256_xor_si256(l, sign));
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(gt)));
  }
};
#else
struct Words {
  static constexpr int W = 4;
  uint32_t v[W];
  FASTRNN_INLINE Words set1(uint32_t x) { return {{x, x, x, x}}; }
  FASTRNN_INLINE Words count_from(uint32_t x) { return {{x, x + 1, x + 2, x + 3}}; }
  FASTRNN_INLINE void store(uint32_t* p, Words a) { std::memcpy(p, a.v, sizeof a.v); }
  FASTRNN_INLINE void multiply(Words x, uint32_t m, Words& high, Words& low) {
    for (int i = 0; i < W; i++) {
      const uint64_t product = static_cast<uint64_t>(x.v[i]) * m;
      high.v[i] = static_cast<uint32_t>(product >> 32);
      low.v[i] = static_cast<uint32_t>(product);
    }
  }
  FASTRNN_INLINE Words xor3(Words a, Words b, uint32_t k) {
    for (int i = 0; i < W; i++) a.v[i] ^= b.v[i] ^ k;
    return a;
  }
  FASTRNN_INLINE uint64_t above(Words a, uint32_t limit) {
    uint64_t bits = 0;
    for (int i = 0; i < W; i++) bits |= static_cast<uint64_t>(a.v[i] > limit) << i;
    return bits;
  }
};
#endif

// Rows of random words: those of (stream, t, n) under a seed.
struct RandomRow {
  uint64_t seed;
  uint32_t stream;
  int64_t t, n;
};

// Philox on M draws of 64 units side by side, W counters of each: one chain of ten rounds is all latency.
template <int M>
FASTRNN_INLINE void philox_words(const RandomRow& row, int64_t draw, int at, Words (&c)[M][4]) {
  uint32_t k0 = static_cast<uint32_t>(row.seed), k1 = static_cast<uint32_t>(row.seed >> 32);
  FASTRNN_UNROLL for (int i = 0; i < M; i++) {
    c[i][0] = Words::count_from(static_cast<uint32_t>((draw + i) * kCountersPerDraw + at));
    c[i][1] = Words::set1(static_cast<uint32_t>(row.n));
    c[i][2] = Words::set1(static_cast<uint32_t>(row.t));
    c[i][3] = Words::set1(row.stream);
  }
  for (int r = 0; r < kPhiloxRounds; r++) {
    FASTRNN_UNROLL for (int i = 0; i < M; i++) {
      Words high0, low0, high1, low1;
      Words::multiply(c[i][0], kPhiloxM0, high0, low0);
      Words::multiply(c[i][2], kPhiloxM1, high1, low1);
      c[i][0] = Words::xor3(high1, c[i][1], k0);
      c[i][1] = low1;
      c[i][2] = Words::xor3(high0, c[i][3], k1);
      c[i][3] = low0;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

template <int M>
FASTRNN_INLINE void keep_draws(const RandomRow& row, uint32_t limit, int64_t draw, uint64_t* bits) {
  FASTRNN_UNROLL for (int i = 0; i < M; i++) bits[i] = 0;
  for (int at = 0; at < kCountersPerDraw; at += Words::W) {
    Words c[M][4];
    philox_words<M>(row, draw, at, c);
    FASTRNN_UNROLL for (int i = 0; i < M; i++) FASTRNN_UNROLL for (int w = 0; w < 4; w++) bits[i] |=
        Words::above(c[i][w], limit) << (w * kCountersPerDraw + at);
  }
}

// Bit u % 64 of bits[u / 64 - first] says whether unit u is kept, for the draws [first, last): units
// [64 first, 64 last).
static inline void keep_bits(const RandomRow& row, uint64_t threshold, int64_t first, int64_t last,
                             uint64_t* bits) {
  if (threshold == 0 || threshold >> 32) {
    for (int64_t d = first; d < last; d++) *bits++ = threshold ? 0 : ~uint64_t(0);
    return;
  }
  const uint32_t limit = static_cast<uint32_t>(threshold - 1);
  int64_t d = first;
  for (; d + 2 <= last; d += 2, bits += 2) keep_draws<2>(row, limit, d, bits);
  if (d < last) keep_draws<1>(row, limit, d, bits);
}

// The words of units [0, units).
static inline void random_words(const RandomRow& row, int64_t units, uint32_t* out) {
  for (int64_t draw = 0; draw * kUnitsPerDraw < units; draw++) {
    uint32_t words[kUnitsPerDraw];
    for (int at = 0; at < kCountersPerDraw; at += Words::W) {
      Words c[1][4];
      philox_words<1>(row, draw, at, c);
      for (int w = 0; w < 4; w++) Words::store(words + w * kCountersPerDraw + at, c[0][w]);
    }
    const int64_t left = units - draw * kUnitsPerDraw;
    std::memcpy(out + draw * kUnitsPerDraw, words,
                (left < kUnitsPerDraw ? left : kUnitsPerDraw) * sizeof(uint32_t));
  }
}

// Lanes of `on` where the n low bits of `bits` are set, else 0.
template <class S>
FASTRNN_INLINE Vec<S> where_set(uint64_t bits, Vec<S> on) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), on.v)};
  if constexpr (sizeof(S) == 8) return {_mm512_maskz_mov_pd(static_cast<__mmask8>(bits), on.v)};
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return {_mm256_and_ps(on.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)))};
  }
  if constexpr (sizeof(S) == 8) {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi64x(static_cast<long long>(bits)), lane);
    return {_mm256_and_pd(on.v, _mm256_castsi256_pd(_mm256_cmpeq_epi64(set, lane)))};
  }
#endif
  S tmp[Vec<S>::W];
  Vec<S>::store(tmp, on);
  for (int i = 0; i < Vec<S>::W; i++) tmp[i] = bits >> i & 1 ? tmp[i] : S(0);
  return Vec<S>::load(tmp);
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
