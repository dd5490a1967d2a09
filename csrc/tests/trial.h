// One problem for the kernels: its inputs, the scalar layer's answer, the buffers the kernels
// write, and the comparison.
#pragma once

#include "trial_base.h"

namespace trial {

// One problem with its inputs, the naive answer, and the buffers the kernels write.
struct Trial : Layout {
  Options o;
  int64_t O, G;
  const uint64_t mask_seed = 0x9e3779b97f4a7c15u;
  std::vector<naive::Layer> want;
  Array x, y, cells, dy, dcells, dx, h0, c0, h_n, c_n, dh_n, dc_n, dh0, dc0;
  std::array<std::array<Array, 9>, 2> weights, grads;  // in the order of Weights
  int64_t x_width;

  Trial(const Options& options, unsigned seed) : Trial(options, Random(seed)) {}
  Trial(const Trial&) = delete;  // options hold the address of the seed
  Trial(const Options& options, Random random)
      : Layout(options, random),
        o(options),
        O(o.P ? o.P : o.H),
        G(naive::gate_count(naive_cell())),
        x_width(rows == Rows::padded ? o.I + 3 : o.I) {
    o.noise.seed = &mask_seed;
    const Type io = tensor_type(o.type), real = compute_type(o.type);
    const int64_t D = o.directions;
    naive::Layer layer;
    layer.cell = naive_cell();
    layer.linear = o.linear;
    layer.noise = o.noise;
    layer.normed = normalises(o.cell);
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
      const int64_t norms[] = {G * o.H, G * o.H, is_lstm() * o.H, is_lstm() * o.H};
      Doubles* gains[] = {&layer.ln_ih, &layer.ln_hh, &layer.ln_c, &layer.ln_bias_c};
      for (int i = 0; i < 4 && layer.normed; ++i) *gains[i] = random.values(o.type, norms[i], 1);
      layer.run();
      const Doubles* source[] = {&layer.w_ih,  &layer.w_hh,  &layer.b_ih, &layer.b_hh,     &layer.w_hr,
                                 &layer.ln_ih, &layer.ln_hh, &layer.ln_c, &layer.ln_bias_c};
      for (int i = 0; i < 9; ++i) weights[d][i] = Array(io, *source[i]);
      want.push_back(layer);
    }
    x = Array(io, row_count * x_width);
    scatter(x, x_width, 0, layer.x, o.I);
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

  Array grid(Type type, int64_t width, Doubles naive::Layer::* member) {
    Array out(type, row_count * width * o.directions);
    for (int64_t d = 0; d < o.directions; ++d)
      scatter(out, width * o.directions, d * width, want[d].*member, width);
    return out;
  }

  Array states(Type type, Doubles naive::Layer::* member) {
    Doubles all;
    for (auto& layer : want) all.insert(all.end(), (layer.*member).begin(), (layer.*member).end());
    return Array(type, all);
  }

  void describe(Problem& p) const {
    Layout::describe(p, o);
    p.O = O;
    p.projected = o.P > 0;
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
    const bool mixed = (o.cell == Cell::rnn_tanh || o.cell == Cell::rnn_relu) && o.noise.mixes();
    const size_t slots = o.recompute ? 0 : mixed ? 1 : tape_slots(o.cell);
    const size_t width = compute_type(o.type) == Type::f64 ? 8 : 4;
    const Scratch tape(o.directions * row_count * slots * o.H * width);
    forward(true, slots ? &tape : nullptr);
    backward(slots ? &tape : nullptr);
  }

  Verdict verdict() const { return {o.type, o.text()}; }

  void compare_grid(const char* name, const Array& got, int64_t width, Doubles naive::Layer::* member) const {
    for (int64_t d = 0; d < o.directions; ++d)
      expect(verdict(), name, want[d].*member, width, got, width * o.directions, d * width);
  }

  void compare_states(const char* name, const Array& got, Doubles naive::Layer::* member) const {
    for (int64_t d = 0; d < o.directions; ++d) verdict().expect(name, want[d].*member, got, d);
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
    expect(verdict(), "dx", sum, o.I, dx, o.I);
    compare_states("dh0", dh0, &naive::Layer::dh0);
    if (is_lstm()) compare_states("dc0", dc0, &naive::Layer::dc0);
    const char* names[] = {"dw_ih",  "dw_hh",  "db_ih", "db_hh",     "dw_hr",
                           "dln_ih", "dln_hh", "dln_c", "dln_bias_c"};
    for (int64_t d = 0; d < o.directions; ++d) {
      const auto& w = want[d];
      const Doubles* expected[] = {&w.dw_ih,  &w.dw_hh,  &w.db_ih, &w.db_hh,     &w.dw_hr,
                                   &w.dln_ih, &w.dln_hh, &w.dln_c, &w.dln_bias_c};
      for (int i = 0; i < 9; ++i)
        if (grads[d][i].size()) verdict().expect(names[i], *expected[i], grads[d][i]);
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

// Inference and training against the scalar layer.
inline void check_training(const Options& o, unsigned seed) {
  Trial trial(o, seed);
  trial.forward(false, nullptr);
  trial.compare_forward();
  trial.clear_results();
  trial.run_training();
  trial.compare_forward();
  trial.compare_backward();
}

template <size_t Count>
Options draw(Random& random, Type type, const std::array<Cell, Count>& cells) {
  Options o;
  o.type = type;
  o.cell = cells[random.between(0, cells.size() - 1)];
  o.rows = static_cast<Rows>(random.between(0, 4));
  o.partition = static_cast<Partition>(random.between(0, 2));
  o.T = random.between(1, 9);
  o.N = random.between(1, 19);
  o.I = random.between(1, 37);
  o.H = random.between(1, 70);
  if (is_lstm(o.cell) && o.H > 1 && random.between(0, 2) == 0) o.P = random.between(1, o.H - 1);
  o.directions = static_cast<int>(random.between(1, 2));
  o.threads = static_cast<int>(random.between(1, 4));
  o.bias = random.between(0, 3) > 0;
  o.reset = random.coin();
  // The straight-line activations exist in the types that have a reference to compare with.
  o.linear = (type == Type::f32 || type == Type::f64) && random.between(0, 3) == 0;
  // Rounding to bfloat16 moves values across relu's corner, where the two slopes cannot be compared.
  if (o.cell == Cell::rnn_relu && type == Type::bf16) o.cell = Cell::rnn_tanh;
  o.prepacked = random.coin();
  o.cells = random.coin();
  o.scattered = random.coin();
  o.recompute = random.between(0, 2) == 0;
  return o;
}

}  // namespace trial
