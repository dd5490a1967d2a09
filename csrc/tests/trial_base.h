// What every test of the CPU kernels shares: arrays that show an overrun, options, how rows lie in memory, and the verdict.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../cpu/layer.h"
#include "check.h"
#include "naive.h"

namespace trial {

using namespace fastrnn;
using naive::Doubles;

struct Bf16 {
  uint16_t bits;
};

inline float widen(Bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline Bf16 round_to_bf16(double v) {
  const float f = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// An array of one of the tensor types, given and read as double. The payload ends where the
// allocation ends, so the address sanitizer sees an overrun; tensors start off any vector boundary,
// as a slice would.
class Array {
 public:
  Array() = default;
  Array(Type type, size_t count) : type_(type), count_(count), raw_(width(type) + bytes()) {
    data_ = raw_.get() + width(type);
    std::memset(data_, 0xff, bytes());
  }
  Array(Type type, const Doubles& values) : Array(type, values.size()) {
    for (size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }

  void* data() { return count_ ? data_ : nullptr; }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * width(type_); }
  double operator[](size_t i) const {
    if (type_ == Type::f64) return get<double>(i);
    if (type_ == Type::f32) return get<float>(i);
    return widen(get<Bf16>(i));
  }
  void set(size_t i, double v) {
    if (type_ == Type::f64)
      put(i, v);
    else if (type_ == Type::f32)
      put(i, static_cast<float>(v));
    else
      put(i, round_to_bf16(v));
  }
  bool same_bits(const Array& other) const {
    return bytes() == other.bytes() && (!count_ || std::memcmp(data_, other.data_, bytes()) == 0);
  }

 private:
  static size_t width(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }
  template <class T>
  T get(size_t i) const {
    T v;
    std::memcpy(&v, data_ + i * sizeof(T), sizeof(T));
    return v;
  }
  template <class T>
  void put(size_t i, T v) {
    std::memcpy(data_ + i * sizeof(T), &v, sizeof(T));
  }

  struct Block {
    std::unique_ptr<char, void (*)(void*)> memory{nullptr, std::free};
    Block() = default;
    explicit Block(size_t n) {
      void* p = nullptr;
      if (posix_memalign(&p, 64, n)) std::abort();
      memory.reset(static_cast<char*>(p));
    }
    char* get() const { return memory.get(); }
  };

  Type type_ = Type::f32;
  size_t count_ = 0;
  Block raw_;
  char* data_ = nullptr;
};

// Scratch, packed weights and tape: 64-byte aligned, exact size, full of NaN.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    void* p = nullptr;
    if (bytes && posix_memalign(&p, 64, bytes)) std::abort();
    if (bytes) std::memset(p, 0xff, bytes);
    memory_.reset(p);
  }
  void* data() const { return memory_.get(); }

 private:
  std::unique_ptr<void, void (*)(void*)> memory_{nullptr, std::free};
};

enum class Rows { dense, batch_first, padded, lengths, packed };

struct Options {
  Cell cell = Cell::lstm;
  Type type = Type::f32;
  Rows rows = Rows::dense;
  Partition partition = Partition::automatic;
  int64_t T = 5, N = 3, I = 7, H = 9, P = 0;
  int directions = 1, threads = 1;
  bool bias = true, reset = false, linear = false, scattered = false, prepacked = false, cells = true,
       recompute = false;
  Noise noise;  // its seed is the trial's

  std::string text() const {
    std::ostringstream out;
    out << kernels().isa << " cell " << int(cell) << " type " << int(type) << " rows " << int(rows)
        << " partition " << int(partition) << " T" << T << " N" << N << " I" << I << " H" << H << " P" << P
        << " D" << directions << " threads " << threads << (bias ? " bias" : "") << (reset ? " reset" : "")
        << (linear ? " linear" : "") << (scattered ? " scattered" : "") << (prepacked ? " prepacked" : "")
        << (cells ? " cells" : "") << (recompute ? " recompute" : "");
    if (noise.any())
      out << " drop " << int(noise.mode) << " " << noise.drop << " zoneout " << noise.zoneout_h << " "
          << noise.zoneout_c << (noise.training ? " training" : "")
          << (noise.per_sequence ? " sequence" : "");
    return out.str();
  }
};

inline Type tensor_type(Type type) { return type == Type::f32_bf16 ? Type::f32 : type; }
inline Type compute_type(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }

// One rule for every comparison: a multiple of the type's step, relative to the largest value of
// the tensor.
inline double tolerance(Type type) { return type == Type::f64 ? 1e-12 : type == Type::f32 ? 2e-5 : 3e-2; }

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int64_t between(int64_t lo, int64_t hi) { return std::uniform_int_distribution<int64_t>(lo, hi)(engine_); }
  bool coin() { return between(0, 1) == 1; }
  // Values that the tensor type holds exactly, so that both sides start from the same numbers.
  Doubles values(Type type, size_t count, double scale) {
    std::uniform_real_distribution<double> draw(-scale, scale);
    Doubles out(count);
    for (double& v : out) {
      v = draw(engine_);
      if (type == Type::f32) v = static_cast<float>(v);
      if (type == Type::bf16 || type == Type::f32_bf16) v = widen(round_to_bf16(v));
    }
    return out;
  }

 private:
  std::mt19937 engine_;
};

// Runs body with each instruction set of this machine.
template <class F>
void each_isa(F body) {
  for (const char* const* isa = available_isas(); *isa; ++isa) {
    CHECK(select_isa(*isa));
    body();
  }
  CHECK(select_isa(available_isas()[0]));
}

// The one comparison: every value of a tensor against its expectation, the first that is beyond the rule is named.
struct Verdict {
  Type type;
  std::string problem;

  static double largest(const Doubles& values) {
    double m = 0;
    for (double v : values) m = std::max(m, std::abs(v));
    return m;
  }
  // got(i): what should be near expected[i].
  template <class F>
  void expect(const char* name, const Doubles& expected, F&& got) const {
    const double allowed = tolerance(type) * std::max(1.0, largest(expected));
    for (size_t i = 0; i < expected.size(); ++i) {
      const double value = got(i);
      if (std::abs(value - expected[i]) <= allowed) continue;
      std::ostringstream out;
      out << name << ": got " << value << ", expected " << expected[i] << " (" << problem << ")";
      check::fail(__FILE__, __LINE__, out.str());
      return;
    }
  }
  // Part `part` of an array of several as large as what is expected.
  void expect(const char* name, const Doubles& expected, const Array& got, size_t part = 0) const {
    expect(name, expected, [&](size_t i) { return got[part * expected.size() + i]; });
  }
};

// Which steps the rows of a problem have, and where they lie.
struct Layout {
  Rows rows;
  int64_t T, N;
  std::vector<int64_t> lengths, batch_sizes, first_row;
  std::vector<uint8_t> reset;
  int64_t stride_t, stride_n, row_count = 0;

  Layout(const Options& o, Random& random) : rows(o.rows), T(o.T), N(o.N), lengths(o.N, o.T) {
    if (rows == Rows::lengths || rows == Rows::packed)
      for (auto& length : lengths) length = random.between(1, T);
    if (rows == Rows::packed) {
      std::sort(lengths.rbegin(), lengths.rend());
      lengths[0] = T;
      for (int64_t t = 0; t < T; ++t) {
        first_row.push_back(row_count);
        batch_sizes.push_back(0);
        for (int64_t length : lengths) batch_sizes[t] += length > t;
        row_count += batch_sizes[t];
      }
    } else {
      row_count = T * N;
    }
    stride_t = rows == Rows::batch_first ? 1 : N;
    stride_n = rows == Rows::batch_first ? T : 1;
    if (o.reset && rows != Rows::packed) {
      reset.resize(T * N);
      for (auto& r : reset) r = random.between(0, 3) == 0;
    }
  }
  // Number of row (t, n) in the buffers; a packed one has none past the end.
  int64_t row(int64_t t, int64_t n) const {
    if (rows == Rows::packed) return first_row[t] + n;
    return rows == Rows::batch_first ? n * T + t : t * N + n;
  }
  bool exists(int64_t t, int64_t n) const { return rows != Rows::packed || t < lengths[n]; }
  Grid at(Array& a, int64_t width) const { return {a.data(), stride_t * width, stride_n * width}; }

  // Copies (T, N, width) into rows of `row_width` from `column` on; what is past the end stays NaN.
  void scatter(Array& to, int64_t row_width, int64_t column, const Doubles& from, int64_t width) const {
    for (int64_t t = 0; t < T; ++t)
      for (int64_t n = 0; n < N && width; ++n)
        for (int64_t j = 0; j < width && t < lengths[n]; ++j)
          to.set(row(t, n) * row_width + column + j, from[(t * N + n) * width + j]);
  }
  // Compares rows of `row_width` from `column` on with (T, N, width).
  void expect(const Verdict& verdict, const char* name, const Doubles& expected, int64_t width,
              const Array& got, int64_t row_width, int64_t column = 0) const {
    verdict.expect(name, expected, [&](size_t i) {
      const int64_t j = i % width, n = i / width % N, t = i / width / N;
      return exists(t, n) ? got[row(t, n) * row_width + column + j] : expected[i];
    });
  }
  void describe(Problem& p, const Options& o) const {
    p.cell = o.cell;
    p.type = o.type;
    p.partition = o.partition;
    p.linear = o.linear;
    p.scattered = o.scattered;
    p.threads = o.threads;
    p.directions = o.directions;
    p.T = T;
    p.N = N;
    p.I = o.I;
    p.H = p.O = o.H;
    p.noise = o.noise;
    if (rows == Rows::packed) p.batch_sizes = batch_sizes.data();
    if (rows == Rows::lengths) p.lengths = lengths.data();
    if (!reset.empty()) {
      p.reset = reset.data();
      p.reset_stride_t = N;
      p.reset_stride_n = 1;
    }
  }
};

}  // namespace trial
