// One vector type per element type and instruction set, with the same names everywhere.
// Included once per instruction set inside that set's own namespace (see isa.h), so that no inline
// function compiled for AVX-512 can be picked by the linker for a smaller machine.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "isa.h"

#define FASTRNN_INLINE static inline __attribute__((always_inline))
#define FASTRNN_UNROLL _Pragma("GCC unroll 32")

namespace fastrnn {
namespace FASTRNN_ISA {

struct bf16 {
  uint16_t bits;
};

FASTRNN_INLINE float to_float(bf16 x) {
  uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Round to nearest even, NaN kept quiet: torch's rounding, and vcvtneps2bf16's but for denormals, which that takes for zeros.
FASTRNN_INLINE bf16 to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}

// Portable vector of 16 bytes by the compiler's vector extension. No FMA is assumed.
template <class Scalar>
struct Vec {
  using T = Scalar;
  static constexpr int W = 16 / sizeof(T);
  typedef T type __attribute__((vector_size(16)));
  type v;
  FASTRNN_INLINE Vec zero() { return {type{}}; }
  FASTRNN_INLINE Vec set1(T x) { return {type{} + x}; }
  FASTRNN_INLINE Vec load(const T* p) {
    Vec r;
    std::memcpy(&r.v, p, 16);
    return r;
  }
  FASTRNN_INLINE void store(T* p, Vec a) { std::memcpy(p, &a.v, 16); }
  FASTRNN_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  FASTRNN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }
  FASTRNN_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
  FASTRNN_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
};

#if defined(__AVX512F__)
constexpr int kRegisters = 32;
template <>
struct Vec<float> {
  using T = float;
  static constexpr int W = 16;
  __m512 v;
  FASTRNN_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  FASTRNN_INLINE Vec set1(T x) { return {_mm512_set1_ps(x)}; }
  FASTRNN_INLINE Vec load(const T* p) { return {_mm512_loadu_ps(p)}; }
  FASTRNN_INLINE void store(T* p, Vec a) { _mm512_storeu_ps(p, a.v); }
  FASTRNN_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  FASTRNN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
  FASTRNN_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  FASTRNN_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  // a * 2^n, n in the low bits of `shifted`; a and the result are normal numbers.
  FASTRNN_INLINE Vec times2(Vec a, Vec shifted) {
    return {_mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23)))};
  }
  // d[i] becomes 1 / d[i] for i < NS and a[i] / d[i] for the NT others, d in [1, 2^126]: a Newton step on the
  // 14-bit reciprocal and one on the result, which then is what division gives (csrc/tests/test_math.cc looks at
  // every value), in a third of vdivps's time. For 1 / d the last factor is nudged up by an ulp: at d = 2 - 2^-23
  // that step is a tie that must go up.
  template <int NS, int NT>
  FASTRNN_INLINE void quotients(Vec (&a)[NS + NT], Vec (&d)[NS + NT]) {
    constexpr int M = NS + NT;
    const __m512 one = _mm512_set1_ps(1.f);
    __m512 r[M], e[M];
    FASTRNN_UNROLL for (int i = 0; i < M; i++) r[i] = _mm512_rcp14_ps(d[i].v);
    FASTRNN_UNROLL for (int i = 0; i < M; i++) e[i] = _mm512_fnmadd_ps(d[i].v, r[i], one);
    FASTRNN_UNROLL for (int i = 0; i < M; i++) r[i] = _mm512_fmadd_ps(r[i], e[i], r[i]);
    FASTRNN_UNROLL for (int i = NS; i < M; i++) a[i].v = _mm512_mul_ps(e[i] = a[i].v, r[i]);
    FASTRNN_UNROLL for (int i = 0; i < M; i++) e[i] =
        i < NS ? _mm512_fnmadd_ps(d[i].v, r[i], one) : _mm512_fnmadd_ps(d[i].v, a[i].v, e[i]);
    FASTRNN_UNROLL for (int i = 0; i < M; i++) {
      __m512 up = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(r[i]), _mm512_set1_epi32(1)));
      d[i].v = i < NS ? _mm512_fmadd_ps(e[i], up, r[i]) : _mm512_fmadd_ps(e[i], r[i], a[i].v);
    }
  }
};
template <>
struct Vec<double> {
  using T = double;
  static constexpr int W = 8;
  __m512d v;
  FASTRNN_INLINE Vec zero() { return {_mm512_setzero_pd()}; }
  FASTRNN_INLINE Vec set1(T x) { return {_mm512_set1_pd(x)}; }
  FASTRNN_INLINE Vec load(const T* p) { return {_mm512_loadu_pd(p)}; }
  FASTRNN_INLINE void store(T* p, Vec a) { _mm512_storeu_pd(p, a.v); }
  FASTRNN_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  FASTRNN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
  FASTRNN_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_pd(a.v, b.v)}; }
};
#elif defined(__AVX2__)
constexpr int kRegisters = 16;
template <>
struct Vec<float> {
  using T = float;
  static constexpr int W = 8;
  __m256 v;
  FASTRNN_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  FASTRNN_INLINE Vec set1(T x) { return {_mm256_set1_ps(x)}; }
  FASTRNN_INLINE Vec load(const T* p) { return {_mm256_loadu_ps(p)}; }
  FASTRNN_INLINE void store(T* p, Vec a) { _mm256_storeu_ps(p, a.v); }
  FASTRNN_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  FASTRNN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
  FASTRNN_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  FASTRNN_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  FASTRNN_INLINE Vec times2(Vec a, Vec shifted) {
    return {_mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23)))};
  }
  template <int NS, int NT>
  FASTRNN_INLINE void quotients(Vec (&a)[NS + NT], Vec (&d)[NS + NT]) {
    FASTRNN_UNROLL for (int i = 0; i < NS + NT; i++) d[i].v =
        _mm256_div_ps(i < NS ? _mm256_set1_ps(1.f) : a[i].v, d[i].v);
  }
};
template <>
struct Vec<double> {
  using T = double;
  static constexpr int W = 4;
  __m256d v;
  FASTRNN_INLINE Vec zero() { return {_mm256_setzero_pd()}; }
  FASTRNN_INLINE Vec set1(T x) { return {_mm256_set1_pd(x)}; }
  FASTRNN_INLINE Vec load(const T* p) { return {_mm256_loadu_pd(p)}; }
  FASTRNN_INLINE void store(T* p, Vec a) { _mm256_storeu_pd(p, a.v); }
  FASTRNN_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  FASTRNN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_pd(a.v, b.v, c.v)}; }
  FASTRNN_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_pd(a.v, b.v)}; }
};
#else
constexpr int kRegisters = 16;
#endif

template <class S>
FASTRNN_INLINE Vec<S> operator+(Vec<S> a, Vec<S> b) {
  return {a.v + b.v};
}
template <class S>
FASTRNN_INLINE Vec<S> operator-(Vec<S> a, Vec<S> b) {
  return {a.v - b.v};
}
template <class S>
FASTRNN_INLINE Vec<S> operator*(Vec<S> a, Vec<S> b) {
  return {a.v * b.v};
}
template <class S>
FASTRNN_INLINE Vec<S> operator/(Vec<S> a, Vec<S> b) {
  return {a.v / b.v};
}

// x lies in a register from here on: g++ would else load it again for every use.
#if defined(FASTRNN_EMULATE_AVX512)  // csrc/tests/emulated/avx512.h: there is no such register
#define FASTRNN_HOLD(x)
#elif defined(__AVX512F__)
#define FASTRNN_HOLD(x) asm("" : "+v"(x))
#elif defined(__x86_64__)
#define FASTRNN_HOLD(x) asm("" : "+x"(x))
#else
#define FASTRNN_HOLD(x)
#endif
template <class S>
FASTRNN_INLINE Vec<S> held(Vec<S> a) {
  FASTRNN_HOLD(a.v);
  return a;
}

// The sum of a vector's lanes, halves added to each other.
template <class S>
FASTRNN_INLINE S lanes_sum(Vec<S> a) {
  S t[Vec<S>::W];
  Vec<S>::store(t, a);
  for (int w = Vec<S>::W / 2; w > 0; w /= 2)
    for (int i = 0; i < w; i++) t[i] += t[i + w];
  return t[0];
}

// First n lanes only; the others read as zero and are not touched in memory.
template <class S>
FASTRNN_INLINE Vec<S> load_n(const S* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane))};
  }
#endif
  S tmp[Vec<S>::W] = {};
  for (int i = 0; i < n; i++) tmp[i] = p[i];
  return Vec<S>::load(tmp);
}
template <class S>
FASTRNN_INLINE void store_n(S* p, Vec<S> a, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane), a.v);
    return;
  }
#endif
  S tmp[Vec<S>::W];
  Vec<S>::store(tmp, a);
  for (int i = 0; i < n; i++) p[i] = tmp[i];
}

// Loads and stores of n <= W elements that convert between the compute type and the tensor's type.
template <class V>
FASTRNN_INLINE V load_as(const typename V::T* p, int n) {
  return n == V::W ? V::load(p) : load_n(p, n);
}
template <class V>
FASTRNN_INLINE V load_as(const bf16* p, int n) {
#if defined(__AVX512F__)
  __m256i h = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
#else
#if defined(__AVX2__)
  if (n == V::W)
    return {_mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))};
#endif
  typename V::T tmp[V::W] = {};
  for (int i = 0; i < n; i++) tmp[i] = to_float(p[i]);
  return V::load(tmp);
#endif
}
// Of bfloat16 pairs, (k, k+1) in 32 bits each, the even elements or the odd ones. `Tight`: no register is left for a mask.
#if defined(__AVX512F__)
template <bool Odd, bool Tight>
FASTRNN_INLINE __m512 half_of(__m512i pairs) {
  const __m512i mask = _mm512_set1_epi32(-65536);
  return _mm512_castsi512_ps(Odd ? _mm512_and_si512(pairs, mask) : _mm512_slli_epi32(pairs, 16));
}
#elif defined(__AVX2__)
template <bool Odd, bool Tight>
FASTRNN_INLINE __m256 half_of(__m256i pairs) {
  if (!Odd) return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  if (!Tight) return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)));
  alignas(32) static const int32_t mask[8] = {-65536, -65536, -65536, -65536, -65536, -65536, -65536, -65536};
  __m256i odd;
  asm("vpand %2, %1, %0" : "=x"(odd) : "x"(pairs), "m"(mask));
  return _mm256_castsi256_ps(odd);
}
#endif
// p holds a pair for each lane ...
template <class V, bool Odd, bool Tight>
FASTRNN_INLINE V half_of_pairs(const bf16* p) {
#if defined(__AVX512F__)
  return {half_of<Odd, Tight>(_mm512_loadu_si512(p))};
#elif defined(__AVX2__)
  return {half_of<Odd, Tight>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
#else
  typename V::T half[V::W];
  for (int i = 0; i < V::W; i++) half[i] = to_float(p[2 * i + Odd]);
  return V::load(half);
#endif
}
// ... or one for all lanes.
template <class V, bool Odd, bool Tight>
FASTRNN_INLINE V half_of_pair(const bf16* p) {
#if defined(__AVX2__)
  int pair;
  std::memcpy(&pair, p, 4);
#endif
#if defined(__AVX512F__)
  return {half_of<Odd, Tight>(_mm512_set1_epi32(pair))};
#elif defined(__AVX2__)
  return {half_of<Odd, Tight>(_mm256_set1_epi32(pair))};
#else
  return V::set1(to_float(p[Odd]));
#endif
}

template <class V>
FASTRNN_INLINE void store_as(typename V::T* p, V a, int n) {
  if (n == V::W)
    V::store(p, a);
  else
    store_n(p, a, n);
}
template <class V>
FASTRNN_INLINE void store_as(bf16* p, V a, int n) {
#if defined(__AVX512BF16__)
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)_mm512_cvtneps_pbh(a.v));
#elif defined(__AVX512F__)
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i bits = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16);
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), _mm512_cvtepi32_epi16(bits));
#else
#if defined(__AVX2__)
  if (n == V::W) {
    const __m256i u = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i bits = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m128i low = _mm256_castsi256_si128(bits), high = _mm256_extracti128_si256(bits, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
    return;
  }
#endif
  typename V::T tmp[V::W];
  V::store(tmp, a);
  for (int i = 0; i < n; i++) p[i] = to_bf16(tmp[i]);
#endif
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
