// Number formats. A format says how tensors are stored, how a weight is packed into tensor core operands, and how one
// 16-byte vector of an exchanged row, the unit in which CTAs read each other's results, meets them.
//
// The columns of a chunk are permuted: lane 4 * row + q holds the 16 bytes that it loaded, elements q * kVec and up of
// the row's chunk, and those serve as both operand registers of the chunk's products, without shuffles or shared
// memory. The weights, packed once, follow the same permutation, so the sums are the same.
#pragma once
#include "../prim/math.cuh"
#include "../prim/memory.cuh"
#include "../prim/mma.cuh"
#include "geometry.h"
#include "mutate.cuh"

namespace fastrnn::cuda {

// Shared by the formats of 16 bits: two products of K = 16 in a chunk.
template <class Self>
struct Format16 {
  using Elem = uint16_t;
  static constexpr int kVec = 8;           // elements of a vector
  static constexpr int kChunk = 4 * kVec;  // elements of four lanes
  FASTRNN_DEVICE static float load(const Elem* p) { return Self::widen(prim::load_constant(p)); }
  FASTRNN_DEVICE static void store(Elem* p, float v) { prim::store(p, static_cast<Elem>(Self::narrow(v))); }
  FASTRNN_DEVICE static float round(float v) { return Self::widen(static_cast<Elem>(Self::narrow(v))); }
  // The 32-bit word that holds a row's elements j and j + 1; `value` is the lane's own element.
  static constexpr int kPerWord = 2;
  FASTRNN_DEVICE static uint32_t word(float value) {
    const uint32_t bits = Self::narrow(value);
    return bits | prim::shuffle_xor(bits, 1) << 16;
  }
  // Operand word of lane column q: half s of the chunk, `high` for the second eight of a product's columns.
  template <class Weight>
  FASTRNN_DEVICE static uint32_t weight_word(Weight weight, int q, int s, int high) {
    const int k = mutated(Mutation::k_permutation) ? 16 * s + 2 * q + 8 * high : 8 * q + 4 * s + 2 * high;
    return Self::narrow(weight(k)) | Self::narrow(weight(k + 1)) << 16;
  }
  template <int MT, class Weights>
  FASTRNN_DEVICE static void multiply(float (*acc)[4], int stride, const Weights& w, const Vec4& h) {
    FASTRNN_UNROLL
    for (int m = 0; m < MT; m++) {
      Self::product(acc[m * stride], w(m, 0), h.x, h.y);
      Self::product(acc[m * stride], w(m, 1), h.z, h.w);
    }
  }
};

struct Bf16 : Format16<Bf16> {
  static constexpr Format kFormat = Format::bf16;
  FASTRNN_DEVICE static float widen(Elem e) { return prim::from_bf16(e); }
  FASTRNN_DEVICE static uint32_t narrow(float f) { return prim::to_bf16(f); }
  FASTRNN_DEVICE static void product(float (&d)[4], const Vec4& a, uint32_t b0, uint32_t b1) {
    prim::mma_bf16(d, a, b0, b1);
  }
};

struct Fp16 : Format16<Fp16> {
  static constexpr Format kFormat = Format::fp16;
  FASTRNN_DEVICE static float widen(Elem e) { return prim::from_fp16(e); }
  FASTRNN_DEVICE static uint32_t narrow(float f) { return prim::to_fp16(f); }
  FASTRNN_DEVICE static void product(float (&d)[4], const Vec4& a, uint32_t b0, uint32_t b1) {
    prim::mma_fp16(d, a, b0, b1);
  }
};

struct Format32 {
  using Elem = float;
  static constexpr int kVec = 4, kChunk = 4 * kVec;
  FASTRNN_DEVICE static float load(const Elem* p) { return prim::load_constant(p); }
  FASTRNN_DEVICE static void store(Elem* p, float v) { prim::store(p, v); }
  FASTRNN_DEVICE static float round(float v) { return v; }
  static constexpr int kPerWord = 1;
  // One NaN stands for all, so a result is never the sentinel.
  FASTRNN_DEVICE static uint32_t word(float value) {
    return value == value ? prim::float_bits(value) : 0x7fc00000u;
  }
};

// fp32 tensors, products of TF32 operands (10 bits of mantissa).
struct Tf32 : Format32 {
  static constexpr Format kFormat = Format::tf32;
  template <class Weight>
  FASTRNN_DEVICE static uint32_t weight_word(Weight weight, int q, int s, int high) {
    const int k = mutated(Mutation::k_permutation) ? 8 * s + q + 4 * high : 4 * q + 2 * s + high;
    return prim::to_tf32(weight(k));
  }
  template <int MT, class Weights>
  FASTRNN_DEVICE static void multiply(float (*acc)[4], int stride, const Weights& w, const Vec4& h) {
    const Vec4 b = {prim::to_tf32(prim::bits_float(h.x)), prim::to_tf32(prim::bits_float(h.y)),
                    prim::to_tf32(prim::bits_float(h.z)), prim::to_tf32(prim::bits_float(h.w))};
    FASTRNN_UNROLL
    for (int m = 0; m < MT; m++) {
      prim::mma_tf32(acc[m * stride], w(m, 0), b.x, b.y);
      prim::mma_tf32(acc[m * stride], w(m, 1), b.z, b.w);
    }
  }
};

// fp32 tensors, each operand the sum of two bfloat16 (16 bits of mantissa), three of the four products.
struct Bf16x3 : Format32 {
  static constexpr Format kFormat = Format::bf16x3;
  struct Pair {
    uint32_t head, rest;
  };
  FASTRNN_DEVICE static Pair split(float f) {
    const uint32_t head = prim::to_bf16(f);
    return {head, prim::to_bf16(f - prim::from_bf16(head))};
  }
  // Half s is the plane: heads or rests.
  template <class Weight>
  FASTRNN_DEVICE static uint32_t weight_word(Weight weight, int q, int s, int high) {
    const int k = mutated(Mutation::k_permutation) ? 2 * q + 8 * high : 4 * q + 2 * high;
    const Pair a = split(weight(k)), b = split(weight(k + 1));
    return s ? a.rest | b.rest << 16 : a.head | b.head << 16;
  }
  template <int MT, class Weights>
  FASTRNN_DEVICE static void multiply(float (*acc)[4], int stride, const Weights& w, const Vec4& h) {
    const Pair x = split(prim::bits_float(h.x)), y = split(prim::bits_float(h.y));
    const Pair z = split(prim::bits_float(h.z)), v = split(prim::bits_float(h.w));
    const uint32_t head0 = x.head | y.head << 16, head1 = z.head | v.head << 16;
    const uint32_t rest0 = x.rest | y.rest << 16, rest1 = z.rest | v.rest << 16;
    FASTRNN_UNROLL
    for (int m = 0; m < MT; m++) {
      prim::mma_bf16(acc[m * stride], w(m, 1), head0, head1);
      prim::mma_bf16(acc[m * stride], w(m, 0), rest0, rest1);
      prim::mma_bf16(acc[m * stride], w(m, 0), head0, head1);
    }
  }
};

}  // namespace fastrnn::cuda
