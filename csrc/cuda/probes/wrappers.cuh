// Each wrapper of csrc/cuda/prim alone, against a host computation: what no emulator can vouch for is that the instruction
// does what its author read in the ISA. The same bodies run on the emulator, which vouches for the host computations.
//
// A body has its launch (kLaunch), what its output is filled with, its input, its device code and its judge: "" or what is
// wrong. Judges know the fragment layouts of the PTX ISA's tables, written out by index.
#pragma once
#include <cstdio>
#include <string>
#include <vector>

#include "../../tests/emu/formats.h"
#include "../core/types.cuh"
#include "../prim/cluster.cuh"

namespace fastrnn::cuda::probes {

using Words = std::vector<uint32_t>;

struct Launch {
  int grid = 1, block = 32, shared = 0, cluster = 1;
};

template <class Body>
FASTRNN_KERNEL(256)
wrapper_kernel(const uint32_t* in, uint32_t* out) {
  if constexpr (Body::kLaunch.cluster > 1 && !prim::kHasClusters)
    prim::unavailable();
  else
    Body::run(in, out);
}

// Asks until there is an answer, or for a second or so: a wrapper that does not work shall not hang the device.
template <class Ready>
FASTRNN_DEVICE bool poll(const char* site, Ready ready) {
  for (uint32_t tries = 0; tries < 1u << 22; tries++) {
    if (ready()) return true;
    prim::poll_failed(site);
  }
  return false;
}

inline std::string wrong(const char* what, size_t at, double got, double expected) {
  char s[160];
  std::snprintf(s, sizeof s, "%s: element %zu is %.9g, expected %.9g", what, at, got, expected);
  return s;
}
// Small, of both signs, and different for neighbours.
inline int drawn(uint32_t i, int most) {
  i = i * 2654435761u + 0x9e3779b9u;
  i ^= i >> 15;
  return static_cast<int>(i % (2 * most + 1)) - most;
}

// ---- mma.sync: operands placed by the ISA's tables; integers, so that sums are exact -----------------------------
template <class Op>
struct Mma {
  static constexpr const char* kName = Op::kName;
  static constexpr Launch kLaunch{};
  static constexpr uint32_t kFill = 0;
  static constexpr int kOfLane = 10;  // a: 4, b: 2, d: 4
  static size_t out_words() { return 32 * 4; }
  static double a(int row, int k) { return drawn(row * 37 + k, 7); }
  static double b(int k, int column) { return drawn(1000 + k * 11 + column, 7); }
  static double d(int row, int column) { return drawn(2000 + row * 8 + column, 100); }
  static Words in() {
    Words w(32 * kOfLane);
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, q = lane % 4;
      uint32_t* mine = w.data() + lane * kOfLane;
      for (int r = 0; r < 4; r++)
        mine[r] = Op::word([&](int i) { return a(g + r % 2 * 8, Op::k_of(q, r / 2, i)); });
      for (int r = 0; r < 2; r++) mine[4 + r] = Op::word([&](int i) { return b(Op::k_of(q, r, i), g); });
      for (int r = 0; r < 4; r++) mine[6 + r] = emu::as_bits(float(d(g + r / 2 * 8, 2 * q + r % 2)));
    }
    return w;
  }
  FASTRNN_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    const uint32_t* mine = in + prim::thread_index() * kOfLane;
    float acc[4];
    for (int r = 0; r < 4; r++) acc[r] = prim::bits_float(mine[6 + r]);
    Op::product(acc, Vec4{mine[0], mine[1], mine[2], mine[3]}, mine[4], mine[5]);
    for (int r = 0; r < 4; r++) out[prim::thread_index() * 4 + r] = prim::float_bits(acc[r]);
  }
  static std::string judge(const Words&, const Words& out) {
    for (int i = 0; i < 128; i++) {
      const int lane = i / 4, r = i % 4, row = lane / 4 + r / 2 * 8, column = 2 * (lane % 4) + r % 2;
      double sum = d(row, column);
      for (int k = 0; k < Op::kK; k++) sum += a(row, k) * b(k, column);
      if (emu::as_float(out[i]) != sum) return wrong("d", i, emu::as_float(out[i]), sum);
    }
    return "";
  }
};

struct MmaOf16 {
  static constexpr int kK = 16;
  // Element i of the operand word that holds half `high` of the columns.
  static int k_of(int q, int high, int i) { return 2 * q + 8 * high + i; }
};
struct MmaBf16 : MmaOf16 {
  static constexpr const char* kName = "mma_bf16";
  template <class Value>
  static uint32_t word(Value value) {
    return emu::bf16_bits(float(value(0))) | emu::bf16_bits(float(value(1))) << 16;
  }
  FASTRNN_DEVICE static void product(float (&d)[4], const Vec4& a, uint32_t b0, uint32_t b1) {
    prim::mma_bf16(d, a, b0, b1);
  }
};
struct MmaFp16 : MmaOf16 {
  static constexpr const char* kName = "mma_fp16";
  template <class Value>
  static uint32_t word(Value value) {
    return emu::fp16_bits(float(value(0))) | emu::fp16_bits(float(value(1))) << 16;
  }
  FASTRNN_DEVICE static void product(float (&d)[4], const Vec4& a, uint32_t b0, uint32_t b1) {
    prim::mma_fp16(d, a, b0, b1);
  }
};
struct MmaTf32 {
  static constexpr const char* kName = "mma_tf32";
  static constexpr int kK = 8;
  static int k_of(int q, int high, int) { return q + 4 * high; }
  template <class Value>
  static uint32_t word(Value value) {
    return emu::as_bits(float(value(0)));
  }
  FASTRNN_DEVICE static void product(float (&d)[4], const Vec4& a, uint32_t b0, uint32_t b1) {
    prim::mma_tf32(d, a, b0, b1);
  }
};

// ---- A chunk as the kernels multiply it: permuted columns, 16-byte vectors, every format -------------------------
template <class D>
struct Chunk {
  static constexpr const char* kName = D::kFormat == Format::bf16   ? "chunk_bf16"
                                       : D::kFormat == Format::fp16 ? "chunk_fp16"
                                       : D::kFormat == Format::tf32 ? "chunk_tf32"
                                                                    : "chunk_bf16x3";
  static constexpr Launch kLaunch{};
  static constexpr uint32_t kFill = 0;
  static constexpr bool kExact = D::kFormat != Format::bf16x3;
  static constexpr int kRows = 8, kHidden = 16 * D::kChunk;  // where the exchanged rows begin
  static size_t out_words() { return 32 * 4; }
  // bf16x3 gets values that need both of its parts.
  static float weight(int row, int k) {
    return kExact ? float(drawn(row * 41 + k, 7)) : drawn(row * 41 + k, 30000) / 16384.f;
  }
  static float hidden(int row, int k) {
    return kExact ? float(drawn(5000 + row * 43 + k, 7)) : drawn(5000 + row * 43 + k, 30000) / 16384.f;
  }
  static Words in() {
    Words w;
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < D::kChunk; k++) w.push_back(emu::as_bits(weight(row, k)));
    for (int row = 0; row < kRows; row++)
      for (int k = 0; k < D::kChunk; k += D::kPerWord) {
        const float low = hidden(row, k), high = hidden(row, k + D::kPerWord - 1);
        w.push_back(D::kFormat == Format::bf16   ? emu::bf16_bits(low) | emu::bf16_bits(high) << 16
                    : D::kFormat == Format::fp16 ? emu::fp16_bits(low) | emu::fp16_bits(high) << 16
                                                 : emu::as_bits(low));
      }
    return w;
  }
  FASTRNN_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    const int lane = prim::thread_index();
    Vec4 packed[2];
    for (int s = 0; s < 2; s++) {
      uint32_t word[4];
      for (int r = 0; r < 4; r++) {
        const float* row = reinterpret_cast<const float*>(in) + (lane / 4 + r % 2 * 8) * D::kChunk;
        word[r] = D::weight_word([&](int k) { return row[k]; }, lane % 4, s, r / 2);
      }
      packed[s] = {word[0], word[1], word[2], word[3]};
    }
    const Vec4 h = prim::load_relaxed(reinterpret_cast<const Vec4*>(in + kHidden) + lane);
    float acc[1][4] = {};
    D::template multiply<1>(acc, 1, [&](int, int s) { return packed[s]; }, h);
    for (int r = 0; r < 4; r++) out[lane * 4 + r] = prim::float_bits(acc[0][r]);
  }
  static std::string judge(const Words&, const Words& out) {
    for (int i = 0; i < 128; i++) {
      const int lane = i / 4, r = i % 4, row = lane / 4 + r / 2 * 8, column = 2 * (lane % 4) + r % 2;
      double sum = 0, size = 0;
      for (int k = 0; k < D::kChunk; k++) {
        const double product = double(weight(row, k)) * hidden(column, k);
        sum += product, size += std::fabs(product);
      }
      // Two roundings to 16 bits of mantissa a product, where there are any.
      if (!(std::fabs(emu::as_float(out[i]) - sum) <= (kExact ? 0 : 0x1p-14 * size)))
        return wrong("sum", i, emu::as_float(out[i]), sum);
    }
    return "";
  }
};

// ---- Scalars ---------------------------------------------------------------------------------------------------
struct Scalars {
  static constexpr const char* kName = "scalars";
  static constexpr Launch kLaunch{4, 256};
  static constexpr uint32_t kFill = 0;
  static constexpr int kCount = 4 * 256, kOps = 8;
  static size_t out_words() { return kCount * kOps; }
  static Words in() {
    Words w;
    for (float f :
         {0.f, -0.f, 1.f, -1.f, 1.f + 0x1p-8f, 1.f + 3 * 0x1p-8f, 1.f + 0x1p-11f, 1.f + 3 * 0x1p-11f, 65519.f,
          65520.f, 0x1p-25f, 0x1.8p-25f, -INFINITY, INFINITY, NAN, -NAN})
      w.push_back(emu::as_bits(f));
    for (int i = static_cast<int>(w.size()); i < kCount; i++)
      w.push_back(
          emu::as_bits(std::ldexp(1.f + (i * 40503u % 65536) / 65536.f, i % 20 - 10) * (i % 2 ? 1 : -1)));
    return w;
  }
  FASTRNN_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    const int i = prim::block_index() * 256 + prim::thread_index();
    const float f = prim::bits_float(in[i]);
    uint32_t* mine = out + i * kOps;
    mine[0] = prim::to_bf16(f);
    mine[1] = prim::to_fp16(f);
    mine[2] = prim::float_bits(prim::from_fp16(in[i] & 0xffffu));
    mine[3] = prim::to_tf32(f);
    mine[4] = prim::float_bits(prim::exp2_approx(f));
    mine[5] = prim::float_bits(prim::reciprocal_approx(f));
    mine[6] = prim::float_bits(prim::reciprocal_sqrt(f));
    mine[7] = prim::float_bits(prim::fma(f, f, -1.f));
  }
  static std::string judge(const Words& in, const Words& out) {
    for (int i = 0; i < kCount; i++) {
      const float f = emu::as_float(in[i]);
      const uint32_t* o = out.data() + i * kOps;
      if (o[0] != emu::bf16_bits(f)) return wrong("to_bf16", i, o[0], emu::bf16_bits(f));
      if (o[1] != emu::fp16_bits(f)) return wrong("to_fp16", i, o[1], emu::fp16_bits(f));
      const float wide = emu::fp16_value(in[i] & 0xffffu);
      if (!std::isnan(wide) && o[2] != emu::as_bits(wide))
        return wrong("from_fp16", i, o[2], emu::as_bits(wide));
      if (std::isfinite(f) && o[3] != ((in[i] + 0x1000u) & ~0x1fffu))
        return wrong("to_tf32", i, o[3], (in[i] + 0x1000u) & ~0x1fffu);
      if (!std::isfinite(f) || f == 0) continue;
      // The ISA's bounds for the approximations are two to three times smaller.
      const struct {
        const char* what;
        double expected;
      } near[] = {{"exp2_approx", std::exp2(double(f))},
                  {"reciprocal_approx", 1 / double(f)},
                  {"reciprocal_sqrt", 1 / std::sqrt(double(f))},
                  {"fma", double(std::fma(f, f, -1.f))}};
      for (int op = 0; op < 4; op++) {
        const double expected = near[op].expected, got = emu::as_float(o[4 + op]);
        const bool tiny =
            std::fabs(expected) < 0x1p-126 || std::fabs(expected) > 0x1.fp127 || std::isnan(expected);
        if (!tiny && !(std::fabs(got - expected) <= 0x1p-21 * std::fabs(expected)))
          return wrong(near[op].what, i, got, expected);
      }
    }
    return "";
  }
};

// ---- Loads, stores, shuffles, shared memory ---------------------------------------------------------------------
struct Memory {
  static constexpr const char* kName = "memory";
  static constexpr Launch kLaunch{1, 64, 64 * 16};
  static constexpr uint32_t kFill = 0;
  static constexpr int kOps = 24;
  static size_t out_words() { return 64 * kOps; }
  static Words in() {
    Words w;
    for (uint32_t i = 0; i < 64 * 4; i++) w.push_back(i * 2654435761u + 17);
    return w;
  }
  FASTRNN_DEVICE static void put(uint32_t* to, const Vec4& v) {
    prim::store(to, v.x), prim::store(to + 1, v.y), prim::store(to + 2, v.z), prim::store(to + 3, v.w);
  }
  FASTRNN_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    const int i = prim::thread_index();
    const uint32_t* word = in + 4 * i;
    uint32_t* mine = out + i * kOps;
    put(mine, prim::load_constant(reinterpret_cast<const Vec4*>(word)));
    put(mine + 4, prim::load_relaxed(reinterpret_cast<const Vec4*>(word)));
    prim::store(mine + 8, prim::float_bits(prim::load_constant(reinterpret_cast<const float*>(word))));
    prim::store(mine + 9, uint32_t(prim::load_constant(reinterpret_cast<const int*>(word))));
    prim::store(mine + 10, uint32_t(prim::load_constant(reinterpret_cast<const uint16_t*>(word))));
    prim::store(mine + 11, uint32_t(prim::load_constant(reinterpret_cast<const uint8_t*>(word))));
    const uint64_t two = prim::load_constant(reinterpret_cast<const uint64_t*>(word));
    prim::store(mine + 12, uint32_t(two)), prim::store(mine + 13, uint32_t(two >> 32));
    prim::store(mine + 14, prim::load_relaxed(word));
    prim::store(mine + 15, prim::load_acquire(word));
    prim::store_relaxed(mine + 16, word[1]);
    prim::store_release(mine + 17, word[2]);
    for (int b = 0; b < 5; b++) prim::store(mine + 18 + b, prim::shuffle_xor(word[0], 1 << b));
    const auto shared = prim::shared_view<Vec4>(0, 64);
    shared.store(i, Vec4{word[3], 0, 0, word[0]});
    prim::block_barrier("memory");
    const Vec4 other = shared.load(63 - i);
    prim::store(mine + 23, other.x ^ other.w);
  }
  static std::string judge(const Words& in, const Words& out) {
    for (int i = 0; i < 64; i++) {
      const uint32_t* w = in.data() + 4 * i;
      const uint32_t* other = in.data() + 4 * (63 - i);
      Words expected = {w[0], w[1],           w[2],         w[3], w[0], w[1], w[2], w[3], w[0],
                        w[0], w[0] & 0xffffu, w[0] & 0xffu, w[0], w[1], w[0], w[0], w[1], w[2]};
      for (int b = 0; b < 5; b++) expected.push_back(in[4 * (i ^ 1 << b)]);
      expected.push_back(other[3] ^ other[0]);
      for (int op = 0; op < kOps; op++)
        if (out[i * kOps + op] != expected[op])
          return wrong(("operation " + std::to_string(op)).c_str(), i, out[i * kOps + op], expected[op]);
    }
    return "";
  }
};

// ---- Messages between CTAs ----------------------------------------------------------------------------------------
// CTA 0 writes a round's words, CTA 1 reads them: after an acquired flag, or as soon as no word is the sentinel.
template <bool WithFlags>
struct Message {
  static constexpr const char* kName = WithFlags ? "release_acquire" : "sentinel";
  static constexpr Launch kLaunch{2, 64};
  static constexpr uint32_t kFill = WithFlags ? 0 : ~0u;
  static constexpr int kRounds = 64, kWords = 256;
  static constexpr int kData = 32, kSeen = kData + kRounds * kWords;
  static size_t out_words() { return kSeen + kRounds * kWords; }
  static Words in() { return Words(4); }
  FASTRNN_HOST_DEVICE static uint32_t value(int round, int i) { return (round + 1) * 7919u + i * 104729u; }
  FASTRNN_DEVICE static void run(const uint32_t*, uint32_t* out) {
    const int i = prim::thread_index();
    for (int round = 0; round < kRounds; round++) {
      uint32_t* data = out + kData + round * kWords + 4 * i;
      if (prim::block_index() == 0) {
        for (int k = 0; k < 4; k++) prim::store_relaxed(data + k, value(round, 4 * i + k));
        if (!WithFlags) continue;
        prim::block_barrier("written");
        if (i == 0) prim::store_release(out, round + 1);
        continue;
      }
      Vec4 v = {};
      if (WithFlags) {
        if (!poll("flag", [&] { return prim::load_acquire(out) >= uint32_t(round + 1); })) return;
        prim::warp_barrier("flag");
        v = prim::load_relaxed(reinterpret_cast<const Vec4*>(data));
      } else {
        const bool came = poll("mail", [&] {
          v = prim::load_relaxed(reinterpret_cast<const Vec4*>(data));
          return v.x != ~0u && v.y != ~0u && v.z != ~0u && v.w != ~0u;
        });
        if (!came) return;
      }
      uint32_t* seen = out + kSeen + round * kWords + 4 * i;
      prim::store_relaxed(seen, v.x), prim::store_relaxed(seen + 1, v.y);
      prim::store_relaxed(seen + 2, v.z), prim::store_relaxed(seen + 3, v.w);
    }
  }
  static std::string judge(const Words&, const Words& out) {
    for (int k = 0; k < kRounds * kWords; k++)
      if (out[kSeen + k] != value(k / kWords, k % kWords))
        return wrong("word", k, out[kSeen + k], value(k / kWords, k % kWords));
    return "";
  }
};

// Every CTA of a cluster pushes eight words to all of them; two buffers, armed as the kernels do it.
template <int Ctas>
struct Pushes {
  static constexpr const char* kName = Ctas == 2   ? "cluster_2"
                                       : Ctas == 3 ? "cluster_3"
                                       : Ctas == 4 ? "cluster_4"
                                                   : "cluster_8";
  static constexpr Launch kLaunch{2 * Ctas, 32, 16 + 2 * Ctas * 32, Ctas};
  static constexpr uint32_t kFill = 0;
  static constexpr int kRounds = 9, kWords = 8 * Ctas;  // of a buffer
  static size_t out_words() { return 2 * Ctas * kRounds * kWords; }
  static Words in() { return Words(4); }
  FASTRNN_HOST_DEVICE static uint32_t value(int cluster, int round, int slot) {
    return cluster << 24 | (round + 1) << 16 | slot;
  }
  FASTRNN_DEVICE static void run(const uint32_t*, uint32_t* out) {
    const auto barriers = prim::shared_view<uint64_t>(0, 2);
    const auto words = prim::shared_view<uint32_t>(16, 2 * kWords);
    const int lane = prim::thread_index(), rank = prim::cluster_rank(), cta = prim::block_index();
    if (lane == 0)
      for (int b = 0; b < 2; b++) {
        prim::mbarrier_init(barriers, b, 1);
        prim::mbarrier_arrive_expect(barriers, b, 4 * kWords);
      }
    prim::cluster_barrier("starts");
    for (int e = 0; e < kRounds; e++) {
      const int slot = rank * 8 + lane;
      if (lane < 8)
        for (int to = 0; to < Ctas; to++)
          prim::store_async(words.address(e % 2 * kWords + slot), value(cta / Ctas, e, slot), barriers, e % 2,
                            to);
      if (!poll("mbarrier", [&] { return prim::mbarrier_passed(barriers, e & 1, e >> 1 & 1); })) break;
      prim::converge();
      if (lane == 0) prim::mbarrier_arrive_expect(barriers, e & 1, 4 * kWords);
      for (int i = lane; i < kWords; i += 32)
        prim::store(out + (cta * kRounds + e) * kWords + i, words.load(e % 2 * kWords + i));
      prim::block_barrier("read");
    }
    prim::cluster_barrier("ends");
  }
  static std::string judge(const Words&, const Words& out) {
    for (int k = 0; k < 2 * Ctas * kRounds * kWords; k++) {
      const uint32_t expected = value(k / kWords / kRounds / Ctas, k / kWords % kRounds, k % kWords);
      if (out[k] != expected) return wrong("word", k, out[k], expected);
    }
    return "";
  }
};

// Gives every body to `visit`, as visit(Body{}).
template <class Visit>
void each_wrapper(Visit visit) {
  visit(Mma<MmaBf16>{}), visit(Mma<MmaFp16>{}), visit(Mma<MmaTf32>{});
  visit(Chunk<Bf16>{}), visit(Chunk<Fp16>{}), visit(Chunk<Tf32>{}), visit(Chunk<Bf16x3>{});
  visit(Scalars{}), visit(Memory{});
  visit(Message<false>{}), visit(Message<true>{});
  visit(Pushes<2>{}), visit(Pushes<3>{}), visit(Pushes<4>{}), visit(Pushes<8>{});
}

}  // namespace fastrnn::cuda::probes
