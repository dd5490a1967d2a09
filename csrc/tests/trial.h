// One problem for the kernels: its inputs, the scalar layer's answer, the buffers the kernels
// write, and the comparison.
#pragma once

#include <algorithm>
#include <array>
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
  bool bias = true, reset = false, linear = false, prepacked = false, cells = true, recompute = false;

  std::string text() const {
    std::ostringstream out;
    out << kernels().isa << " cell " << int(cell) << " type " << int(type) << " rows " << int(rows)
        << " partition " << int(partition) << " T" << T << " N" << N << " I" << I << " H" << H << " P" << P
        << " D" << directions << " threads " << threads << (bias ? " bias" : "") << (reset ? " reset" : "")
        << (linear ? " linear" : "") << (prepacked ? " prepacked" : "") << (cells ? " cells" : "")
        << (recompute ? " recompute" : "");
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

// One problem with its inputs, the naive answer, and the buffers the kernels write.
struct Trial {
  Options o;
  int64_t O, G;
  std::vector<int64_t> lengths, batch_sizes, first_row;
  std::vector<uint8_t> reset;
  std::vector<naive::Layer> want;
  Array x, y, cells, dy, dcells, dx, h0, c0, h_n, c_n, dh_n, dc_n, dh0, dc0;
  std::array<std::array<Array, 9>, 2> weights, grads;  // in the order of Weights
  int64_t stride_t = 0, stride_n = 0, x_width = 0, row_count = 0;

  Trial(const Options& options, unsigned seed)
      : o(options), O(o.P ? o.P : o.H), G(naive::gate_count(naive_cell())) {
    Random random(seed);
    make_rows(random);
    const Type io = tensor_type(o.type), real = compute_type(o.type);
    const int64_t D = o.directions;
    naive::Layer layer;
    layer.cell = naive_cell();
    layer.linear = o.linear;
    layer.projected = o.P > 0;
    layer.T = o.T;
    layer.N = o.N;
    layer.I = o.I;
    layer.H = o.H;
    layer.O = O;
    layer.lengths = lengths;
    layer.reset = reset;
    layer.x = random.values(o.type, o.T * o.N * o.I, 1);
    for (int64_t d = 0; d < D; ++d) {
      const double scale = 1 / std::sqrt(static_cast<double>(o.H));
      layer.reverse = d == 1;
      layer.w_ih = random.values(o.type, G * o.H * o.I, scale);
      layer.w_hh = random.values(o.type, G * o.H * O, scale);
      layer.b_ih = random.values(o.type, o.bias ? G * o.H : 0, scale);
      layer.b_hh = random.values(o.type, o.bias ? G * o.H : 0, scale);
      layer.w_hr = random.values(o.type, O * o.H * (o.P > 0), scale);
      layer.h0 = random.values(o.type, o.N * O, 1);
      layer.c0 = random.values(o.type, o.N * o.H, 1);
      layer.dy = random.values(o.type, o.T * o.N * O, 1);
      layer.dh_n = random.values(o.type, o.N * O, 1);
      layer.dc_n = random.values(o.type, o.N * o.H, 1);
      layer.dcells =
          o.cells && is_lstm() ? random.values(o.type, o.T * o.N * o.H, 1) : Doubles(o.T * o.N * o.H, 0.0);
      if (!normalises(o.cell)) layer.run();  // the scalar layer has no norms
      const Doubles* source[] = {&layer.w_ih, &layer.w_hh, &layer.b_ih, &layer.b_hh, &layer.w_hr};
      for (int i = 0; i < 5; ++i) weights[d][i] = Array(io, *source[i]);
      const int64_t norms[] = {G * o.H, G * o.H, is_lstm() * o.H, is_lstm() * o.H};
      for (int i = 0; i < 4 && normalises(o.cell); ++i)
        weights[d][5 + i] = Array(io, random.values(o.type, norms[i], 1));
      want.push_back(layer);
    }
    x = Array(io, row_count * x_width);
    for (int64_t t = 0; t < o.T; ++t)
      for (int64_t n = 0; n < o.N; ++n)
        for (int64_t i = 0; i < o.I; ++i)
          if (t < lengths[n])  // what is past the end stays NaN
            x.set(row(t, n) * x_width + i, layer.x[(t * o.N + n) * o.I + i]);
    dy = grid(io, O, &naive::Layer::dy);
    dcells = grid(real, o.H, &naive::Layer::dcells);
    h0 = states(io, &naive::Layer::h0);
    c0 = states(io, &naive::Layer::c0);
    dh_n = states(io, &naive::Layer::dh_n);
    dc_n = states(io, &naive::Layer::dc_n);
    clear_results();
  }

  void clear_results() {
    const Type io = tensor_type(o.type), real = compute_type(o.type);
    const int64_t D = o.directions;
    y = Array(io, row_count * O * D);
    cells = Array(real, row_count * o.H * D);
    dx = Array(io, row_count * o.I);
    h_n = Array(io, D * o.N * O);
    c_n = Array(io, D * o.N * o.H);
    dh0 = Array(io, D * o.N * O);
    dc0 = Array(io, D * o.N * o.H);
    for (int64_t d = 0; d < D; ++d)
      for (int i = 0; i < 9; ++i) grads[d][i] = Array(io, weights[d][i].size());
  }

  // Number of row (t, n) in the buffers.
  int64_t row(int64_t t, int64_t n) const {
    if (o.rows == Rows::packed) return first_row[t] + n;
    return o.rows == Rows::batch_first ? n * o.T + t : t * o.N + n;
  }

  void make_rows(Random& random) {
    lengths.assign(o.N, o.T);
    if (o.rows == Rows::lengths || o.rows == Rows::packed)
      for (auto& length : lengths) length = random.between(1, o.T);
    if (o.rows == Rows::packed) {
      std::sort(lengths.rbegin(), lengths.rend());
      lengths[0] = o.T;
      for (int64_t t = 0; t < o.T; ++t) {
        first_row.push_back(row_count);
        batch_sizes.push_back(0);
        for (int64_t length : lengths) batch_sizes[t] += length > t;
        row_count += batch_sizes[t];
      }
    } else {
      row_count = o.T * o.N;
    }
    x_width = o.rows == Rows::padded ? o.I + 3 : o.I;
    stride_t = o.rows == Rows::batch_first ? 1 : o.N;
    stride_n = o.rows == Rows::batch_first ? o.T : 1;
    if (o.reset && o.rows != Rows::packed) {
      reset.resize(o.T * o.N);
      for (auto& r : reset) r = random.between(0, 3) == 0;
    }
  }

  Array grid(Type type, int64_t width, Doubles naive::Layer::* member) {
    Array out(type, row_count * width * o.directions);
    for (int64_t d = 0; d < o.directions; ++d)
      for (int64_t t = 0; t < o.T; ++t)
        for (int64_t n = 0; n < o.N; ++n)
          for (int64_t j = 0; j < width && t < lengths[n]; ++j)
            out.set((row(t, n) * o.directions + d) * width + j, (want[d].*member)[(t * o.N + n) * width + j]);
    return out;
  }

  Array states(Type type, Doubles naive::Layer::* member) {
    Doubles all;
    for (auto& layer : want) all.insert(all.end(), (layer.*member).begin(), (layer.*member).end());
    return Array(type, all);
  }

  Grid at(Array& a, int64_t width) const { return {a.data(), stride_t * width, stride_n * width}; }

  void describe(Problem& p) const {
    p.cell = o.cell;
    p.type = o.type;
    p.partition = o.partition;
    p.linear = o.linear;
    p.threads = o.threads;
    p.directions = o.directions;
    p.T = o.T;
    p.N = o.N;
    p.I = o.I;
    p.H = o.H;
    p.O = O;
    p.projected = o.P > 0;
    if (o.rows == Rows::packed) p.batch_sizes = batch_sizes.data();
    if (o.rows == Rows::lengths) p.lengths = lengths.data();
    if (!reset.empty()) {
      p.reset = reset.data();
      p.reset_stride_t = o.N;
      p.reset_stride_n = 1;
    }
  }

  Weights weights_of(int d) {
    auto& w = weights[d];
    return {w[0].data(), w[1].data(), w[2].data(), w[3].data(), w[4].data(),
            w[5].data(), w[6].data(), w[7].data(), w[8].data()};
  }

  bool is_lstm() const { return fastrnn::is_lstm(o.cell); }
  Cell naive_cell() const { return !normalises(o.cell) ? o.cell : is_lstm() ? Cell::lstm : Cell::gru; }

  void forward(bool training, const Scratch* tape) {
    ForwardArgs a;
    describe(a);
    a.x = at(x, x_width);
    a.y = at(y, O * o.directions);
    if (is_lstm() && (o.cells || training)) a.cells = at(cells, o.H * o.directions);
    a.h0 = h0.data();
    a.h_n = h_n.data();
    if (is_lstm()) {
      a.c0 = c0.data();
      a.c_n = c_n.data();
    }
    for (int d = 0; d < o.directions; ++d) a.weights[d] = weights_of(d);
    a.gates = tape ? tape->data() : nullptr;
    const Scratch packed(o.prepacked ? kernels().packed_bytes(a) : 0);
    if (o.prepacked) {
      kernels().pack(a, a.weights, packed.data());
      a.packed = packed.data();
    }
    const Scratch workspace(kernels().forward_workspace(a));
    a.workspace = workspace.data();
    kernels().forward(a);
  }

  void backward(const Scratch* tape) {
    BackwardArgs a;
    describe(a);
    a.x = at(x, x_width);
    a.y = at(y, O * o.directions);
    a.dy = at(dy, O * o.directions);
    a.dx = at(dx, o.I);
    if (is_lstm()) a.cells = at(cells, o.H * o.directions);
    if (is_lstm() && o.cells) a.dcells = at(dcells, o.H * o.directions);
    a.h0 = h0.data();
    a.dh_n = dh_n.data();
    a.dh0 = dh0.data();
    if (is_lstm()) {
      a.c0 = c0.data();
      a.dc_n = dc_n.data();
      a.dc0 = dc0.data();
    }
    for (int d = 0; d < o.directions; ++d) {
      auto& g = grads[d];
      a.weights[d] = weights_of(d);
      a.grads[d] = {g[0].data(), g[1].data(), g[2].data(), g[3].data(), g[4].data(),
                    g[5].data(), g[6].data(), g[7].data(), g[8].data()};
    }
    a.want_weights = true;
    a.gates = tape ? tape->data() : nullptr;
    const Scratch workspace(kernels().backward_workspace(a));
    a.workspace = workspace.data();
    kernels().backward(a);
  }

  void run_training() {
    const size_t slots = o.recompute ? 0 : tape_slots(o.cell);
    const size_t width = compute_type(o.type) == Type::f64 ? 8 : 4;
    const Scratch tape(o.directions * row_count * slots * o.H * width);
    forward(true, slots ? &tape : nullptr);
    backward(slots ? &tape : nullptr);
  }

  void compare(const char* name, double got, double expected, double scale, bool& reported) const {
    if (std::abs(got - expected) <= tolerance(o.type) * std::max(1.0, scale) || reported) return;
    reported = true;
    std::ostringstream out;
    out << name << ": got " << got << ", expected " << expected << " (" << o.text() << ")";
    check::fail(__FILE__, __LINE__, out.str());
  }

  static double largest(const Doubles& values) {
    double m = 0;
    for (double v : values) m = std::max(m, std::abs(v));
    return m;
  }

  void compare_grid(const char* name, const Array& got, int64_t width, Doubles naive::Layer::* member) const {
    bool reported = false;
    for (int64_t d = 0; d < o.directions; ++d) {
      const Doubles& expected = want[d].*member;
      for (int64_t t = 0; t < o.T; ++t)
        for (int64_t n = 0; n < o.N; ++n) {
          if (o.rows == Rows::packed && t >= lengths[n]) continue;
          for (int64_t j = 0; j < width; ++j)
            compare(name, got[(row(t, n) * o.directions + d) * width + j],
                    expected[(t * o.N + n) * width + j], largest(expected), reported);
        }
    }
  }

  void compare_states(const char* name, const Array& got, Doubles naive::Layer::* member) const {
    bool reported = false;
    for (int64_t d = 0; d < o.directions; ++d) {
      const Doubles& expected = want[d].*member;
      for (size_t i = 0; i < expected.size(); ++i)
        compare(name, got[d * expected.size() + i], expected[i], largest(expected), reported);
    }
  }

  void compare_forward() const {
    compare_grid("y", y, O, &naive::Layer::y);
    compare_states("h_n", h_n, &naive::Layer::h_n);
    if (!is_lstm()) return;
    compare_states("c_n", c_n, &naive::Layer::c_n);
    if (o.cells) compare_grid("cells", cells, o.H, &naive::Layer::cells);
  }

  void compare_backward() const {
    // x feeds both directions: their gradients add up.
    Doubles sum = want[0].dx;
    if (o.directions == 2)
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += want[1].dx[i];
    bool reported = false;
    for (int64_t t = 0; t < o.T; ++t)
      for (int64_t n = 0; n < o.N; ++n)
        for (int64_t i = 0; i < o.I && (o.rows != Rows::packed || t < lengths[n]); ++i)
          compare("dx", dx[row(t, n) * o.I + i], sum[(t * o.N + n) * o.I + i], largest(sum), reported);
    compare_states("dh0", dh0, &naive::Layer::dh0);
    if (is_lstm()) compare_states("dc0", dc0, &naive::Layer::dc0);
    const char* names[] = {"dw_ih", "dw_hh", "db_ih", "db_hh", "dw_hr"};
    for (int64_t d = 0; d < o.directions; ++d) {
      const Doubles* expected[] = {&want[d].dw_ih, &want[d].dw_hh, &want[d].db_ih, &want[d].db_hh,
                                   &want[d].dw_hr};
      for (int i = 0; i < 5; ++i) {
        reported = false;
        for (size_t k = 0; k < grads[d][i].size(); ++k)
          compare(names[i], grads[d][i][k], (*expected[i])[k], largest(*expected[i]), reported);
      }
    }
  }

  // Every result of the two runs, bit for bit.
  bool same_bits(const Trial& b) const {
    bool same = y.same_bits(b.y) && h_n.same_bits(b.h_n) && dx.same_bits(b.dx) && dh0.same_bits(b.dh0);
    if (is_lstm()) same = same && c_n.same_bits(b.c_n) && dc0.same_bits(b.dc0) && cells.same_bits(b.cells);
    for (int64_t d = 0; d < o.directions; ++d)
      for (int i = 0; i < 9; ++i) same = same && grads[d][i].same_bits(b.grads[d][i]);
    return same;
  }
};

}  // namespace trial
