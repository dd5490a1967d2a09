// The AVX-512 instructions that csrc/cpu uses, on vectors that the compiler takes apart: the kernels of that set then run wherever
// AVX2 does, slowly. Included before everything else (CMakeLists.txt, FASTRNN_EMULATE_AVX512). The bits are the instructions' own but
// for rcp14, which is within the same 2^-14, and dpbf16, of which products and sums are fused here and denormals are kept.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define FASTRNN_EMULATE_AVX512 1
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#ifdef FASTRNN_EMULATE_BF16
#define __AVX512BF16__ 1
#endif

namespace emulated {

#define FASTRNN_EMULATED static inline __attribute__((always_inline))

typedef int32_t Ints __attribute__((vector_size(64), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), may_alias));
typedef uint64_t Longs __attribute__((vector_size(64), may_alias));

template <class To, class From>
FASTRNN_EMULATED To as(From x) {
  static_assert(sizeof(To) == sizeof(From), "a cast keeps the bits");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
template <class V>
FASTRNN_EMULATED V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class V>
FASTRNN_EMULATED void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}
// Elsewhere than at a line's start the instruction faults.
template <class V>
FASTRNN_EMULATED void store_line(void* p, V v) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
  store(p, v);
}
// f(half of a, ...) of both halves.
template <class Half, class V, class F>
FASTRNN_EMULATED V halves(F f, V a, V b, V c) {
  Half x[2], y[2], z[2];
  store(x, a), store(y, b), store(z, c);
  for (int h = 0; h < 2; h++) x[h] = f(x[h], y[h], z[h]);
  return load<V>(x);
}

FASTRNN_EMULATED __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  return halves<__m256>([](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}
FASTRNN_EMULATED __m512 fnmadd(__m512 a, __m512 b, __m512 c) {
  return halves<__m256>([](__m256 x, __m256 y, __m256 z) { return _mm256_fnmadd_ps(x, y, z); }, a, b, c);
}
FASTRNN_EMULATED __m512d fmadd(__m512d a, __m512d b, __m512d c) {
  return halves<__m256d>([](__m256d x, __m256d y, __m256d z) { return _mm256_fmadd_pd(x, y, z); }, a, b, c);
}
FASTRNN_EMULATED __m512d fnmadd(__m512d a, __m512d b, __m512d c) {
  return halves<__m256d>([](__m256d x, __m256d y, __m256d z) { return _mm256_fnmadd_pd(x, y, z); }, a, b, c);
}
// Of NaN and zeros the second operand, as the instructions give.
template <class V>
FASTRNN_EMULATED V least(V a, V b) {
  return a < b ? a : b;
}
template <class V>
FASTRNN_EMULATED V most(V a, V b) {
  return a > b ? a : b;
}

// Lanes of a mask, the others zero and untouched in memory.
template <class V, class S>
FASTRNN_EMULATED V load_lanes(uint32_t mask, const void* p) {
  S lanes[sizeof(V) / sizeof(S)] = {};
  for (unsigned i = 0; i < sizeof(V) / sizeof(S); i++)
    if (mask >> i & 1) std::memcpy(lanes + i, static_cast<const S*>(p) + i, sizeof(S));
  return load<V>(lanes);
}
template <class S, class V>
FASTRNN_EMULATED void store_lanes(void* p, uint32_t mask, V v) {
  S lanes[sizeof(V) / sizeof(S)];
  store(lanes, v);
  for (unsigned i = 0; i < sizeof(V) / sizeof(S); i++)
    if (mask >> i & 1) std::memcpy(static_cast<S*>(p) + i, lanes + i, sizeof(S));
}
template <class S, class V>
FASTRNN_EMULATED V blend(uint32_t mask, V zero, V one) {
  S a[sizeof(V) / sizeof(S)], b[sizeof(V) / sizeof(S)];
  store(a, zero);
  store(b, one);
  for (unsigned i = 0; i < sizeof(V) / sizeof(S); i++) a[i] = mask >> i & 1 ? b[i] : a[i];
  return load<V>(a);
}
// A bit for every lane that is not zero.
FASTRNN_EMULATED __mmask16 mask_of(Ints truth) {
  unsigned bits = 0;
  for (int i = 0; i < 16; i++) bits |= (truth[i] != 0) << i;
  return static_cast<__mmask16>(bits);
}
template <int How>
FASTRNN_EMULATED __mmask16 compare(__m512 a, __m512 b) {
  static_assert(How == _CMP_UNORD_Q, "the one comparison that is used");
  return mask_of(as<Ints>((a != a) | (b != b)));
}
template <int Table>
FASTRNN_EMULATED __m512i logic(__m512i a, __m512i b, __m512i c) {
  static_assert(Table == 0x96, "the one table that is used");
  return a ^ b ^ c;
}

FASTRNN_EMULATED __m512 reciprocal14(__m512 d) {
  const __m512 exact = (__m512{} + 1.f) / d;
  return as<__m512>(as<Words>(exact) & (Words{} + 0xfffffe00u));
}
FASTRNN_EMULATED __m512i multiply_even(__m512i a, __m512i b) {
  return as<__m512i>((as<Longs>(a) & 0xffffffffu) * (as<Longs>(b) & 0xffffffffu));
}
// Lanes of each run of four chosen by two bits each.
FASTRNN_EMULATED __m512i shuffle(__m512i a, int by) {
  const Ints x = as<Ints>(a);
  Ints r;
  for (int i = 0; i < 16; i++) r[i] = x[i / 4 * 4 + (by >> i % 4 * 2 & 3)];
  return as<__m512i>(r);
}
FASTRNN_EMULATED __m512 shuffle_quarters(__m512 a, __m512 b, int by) {
  __m512 r;
  for (int i = 0; i < 16; i++) {
    const int at = (by >> i / 4 * 2 & 3) * 4 + i % 4;
    r[i] = i < 8 ? a[at] : b[at];
  }
  return r;
}
// The low or the high half of each quarter of a and b, lane by lane in turns.
template <class V>
FASTRNN_EMULATED V unpack(V a, V b, bool high) {
  constexpr int kQuarter = 16 / sizeof(a[0]);
  V r;
  for (int i = 0; i < 4 * kQuarter; i++) {
    const int at = i / kQuarter * kQuarter + high * kQuarter / 2 + i % kQuarter / 2;
    r[i] = i % 2 ? b[at] : a[at];
  }
  return r;
}
FASTRNN_EMULATED __m512i widen(__m256i halfwords) {
  uint16_t x[16];
  store(x, halfwords);
  Ints r;
  for (int i = 0; i < 16; i++) r[i] = x[i];
  return as<__m512i>(r);
}
FASTRNN_EMULATED __m256i narrow(__m512i words) {
  const Ints x = as<Ints>(words);
  uint16_t r[16];
  for (int i = 0; i < 16; i++) r[i] = static_cast<uint16_t>(x[i]);
  return load<__m256i>(r);
}
FASTRNN_EMULATED __m256i round_to_bf16(__m512 x) {
  const Words u = as<Words>(x), rounded = u + (u >> 16 & 1) + 0x7fff;
  return narrow(as<__m512i>((x != x ? u | 0x400000u : rounded) >> 16));
}
FASTRNN_EMULATED __m512 pairs(__m512 sum, Words a, Words b) {
  const __m512 odd = fmadd(as<__m512>(a & 0xffff0000u), as<__m512>(b & 0xffff0000u), sum);
  return fmadd(as<__m512>(a << 16), as<__m512>(b << 16), odd);
}

}  // namespace emulated

#undef _mm512_setr_epi32
#define _mm512_setzero_ps() \
  __m512 {}
#define _mm512_setzero_pd() \
  __m512d {}
#define _mm512_set1_ps(x) (__m512{} + float(x))
#define _mm512_set1_pd(x) (__m512d{} + double(x))
#define _mm512_set1_epi32(x) emulated::as<__m512i>(emulated::Ints{} + int(x))
#define _mm512_setr_epi32(...) emulated::as<__m512i>(emulated::Ints{__VA_ARGS__})
#define _mm512_loadu_ps(p) emulated::load<__m512>(p)
#define _mm512_loadu_pd(p) emulated::load<__m512d>(p)
#define _mm512_loadu_si512(p) emulated::load<__m512i>(p)
#define _mm512_storeu_ps(p, v) emulated::store<__m512>(p, v)
#define _mm512_storeu_pd(p, v) emulated::store<__m512d>(p, v)
#define _mm512_storeu_si512(p, v) emulated::store<__m512i>(p, v)
#define _mm512_stream_ps(p, v) emulated::store_line<__m512>(p, v)
#define _mm512_stream_pd(p, v) emulated::store_line<__m512d>(p, v)
#define _mm512_maskz_loadu_ps(m, p) emulated::load_lanes<__m512, float>(m, p)
#define _mm512_mask_storeu_ps(p, m, v) emulated::store_lanes<float>(p, m, v)
#define _mm256_maskz_loadu_epi16(m, p) emulated::load_lanes<__m256i, uint16_t>(m, p)
#define _mm256_mask_storeu_epi16(p, m, v) emulated::store_lanes<uint16_t>(p, m, v)
#define _mm512_maskz_mov_ps(m, v) emulated::blend<float>(m, __m512{}, v)
#define _mm512_maskz_mov_pd(m, v) emulated::blend<double>(m, __m512d{}, v)
#define _mm512_mask_blend_epi32(m, a, b) emulated::blend<int32_t>(m, a, b)
#define _mm512_fmadd_ps(a, b, c) emulated::fmadd(a, b, c)
#define _mm512_fnmadd_ps(a, b, c) emulated::fnmadd(a, b, c)
#define _mm512_fmadd_pd(a, b, c) emulated::fmadd(a, b, c)
#define _mm512_fnmadd_pd(a, b, c) emulated::fnmadd(a, b, c)
#define _mm512_mul_ps(a, b) ((a) * (b))
#define _mm512_min_ps(a, b) emulated::least<__m512>(a, b)
#define _mm512_max_ps(a, b) emulated::most<__m512>(a, b)
#define _mm512_max_pd(a, b) emulated::most<__m512d>(a, b)
#define _mm512_rcp14_ps(x) emulated::reciprocal14(x)
#define _mm512_cmp_ps_mask(a, b, how) emulated::compare<how>(a, b)
#define _mm512_cmpgt_epu32_mask(a, b) \
  emulated::mask_of(emulated::as<emulated::Words>(a) > emulated::as<emulated::Words>(b))
#define _mm512_ternarylogic_epi32(a, b, c, table) emulated::logic<table>(a, b, c)
#define _mm512_mul_epu32(a, b) emulated::multiply_even(a, b)
#define _mm512_mask_shuffle_epi32(src, m, a, by) emulated::blend<int32_t>(m, src, emulated::shuffle(a, by))
#define _mm512_shuffle_f32x4(a, b, by) emulated::shuffle_quarters(a, b, by)
#define _mm512_unpacklo_ps(a, b) emulated::unpack<__m512>(a, b, false)
#define _mm512_unpackhi_ps(a, b) emulated::unpack<__m512>(a, b, true)
#define _mm512_unpacklo_pd(a, b) emulated::unpack<__m512d>(a, b, false)
#define _mm512_unpackhi_pd(a, b) emulated::unpack<__m512d>(a, b, true)
#define _mm512_cvtepu16_epi32(a) emulated::widen(a)
#define _mm512_cvtepi32_epi16(a) emulated::narrow(a)
#define _mm512_cvtneps_pbh(a) emulated::as<__m256bh>(emulated::round_to_bf16(a))
#define _mm512_dpbf16_ps(sum, a, b) \
  emulated::pairs(sum, emulated::as<emulated::Words>(a), emulated::as<emulated::Words>(b))
#define _mm512_castps_si512(x) emulated::as<__m512i>(x)
#define _mm512_castsi512_ps(x) emulated::as<__m512>(x)
#define _mm512_castps_pd(x) emulated::as<__m512d>(x)
#define _mm512_castpd_ps(x) emulated::as<__m512>(x)
#define _mm512_add_epi32(a, b) \
  emulated::as<__m512i>(emulated::as<emulated::Words>(a) + emulated::as<emulated::Words>(b))
#define _mm512_and_si512(a, b) ((a) & (b))
#define _mm512_or_si512(a, b) ((a) | (b))
#define _mm512_slli_epi32(a, n) emulated::as<__m512i>(emulated::as<emulated::Words>(a) << (n))
#define _mm512_srli_epi32(a, n) emulated::as<__m512i>(emulated::as<emulated::Words>(a) >> (n))
#define _mm512_srli_epi64(a, n) emulated::as<__m512i>(emulated::as<emulated::Longs>(a) >> (n))
