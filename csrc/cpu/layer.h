// The CPU library's C++ interface: one recurrent layer (one or two directions) over a whole sequence.
//
// Framework-free: raw pointers in, nothing allocated, nothing kept. The caller owns every buffer;
// `workspace` is scratch of workspace_bytes() that carries nothing from one call to the next.
//
// Shapes: T steps, N rows, I inputs, H hidden units, O = P with a projection, else H; D directions.
// G gates in torch's order. A "row" is one (t, n); x, y, cells, dx, dy are addressed by Grid.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastrnn {

enum class Cell : int32_t {
  lstm = 0,
  gru = 1,
  gru_reset_before = 2,
  rnn_tanh = 3,
  rnn_relu = 4,
  lstm_layer_norm = 5,
  gru_layer_norm = 6
};

// Cells that normalise their terms over a row's features; float and double only.
constexpr bool normalises(Cell c) { return c == Cell::lstm_layer_norm || c == Cell::gru_layer_norm; }
constexpr bool is_lstm(Cell c) { return c == Cell::lstm || c == Cell::lstm_layer_norm; }

// Tensor type; compute is float for all but f64. f32_bf16: float tensors, but weights and the
// operands that meet them are rounded to bfloat16 (inference only).
enum class Type : int32_t { f32 = 0, f64 = 1, bf16 = 2, f32_bf16 = 3 };
constexpr bool multiplies_bf16(Type t) { return t == Type::bf16 || t == Type::f32_bf16; }

enum class Partition : int32_t { automatic = 0, units = 1, rows = 2 };

// Address of row (t, n): data + t * stride_t + n * stride_n elements; rows are contiguous inside.
// Packed sequences use stride_n alone, with n counted from the step's first row.
struct Grid {
  void* data = nullptr;
  int64_t stride_t = 0, stride_n = 0;
};

struct Weights {  // torch layout, contiguous; biases and w_hr may be null
  const void *w_ih = nullptr, *w_hh = nullptr, *b_ih = nullptr, *b_hh = nullptr, *w_hr = nullptr;
  // Layer norm: gains of the input and the recurrent term (G * H), gain and bias of the cell (H), LSTM only.
  const void *ln_ih = nullptr, *ln_hh = nullptr, *ln_c = nullptr, *ln_bias_c = nullptr;
};

// Where recurrent dropout acts; see csrc/cells and docs/maths.md.
enum class Drop : int32_t { none = 0, update = 1, cell = 2, state = 3 };

// Recurrent dropout and zoneout; probabilities of 0 are off. In training masks are drawn from the seed (read through its
// address), else expectations take their place.
struct Noise {
  Drop mode = Drop::none;
  bool training = false, per_sequence = false;
  double drop = 0, zoneout_h = 0, zoneout_c = 0;
  int64_t layer = 0;
  const uint64_t* seed = nullptr;
  bool any() const { return mode != Drop::none || zoneout_h > 0 || zoneout_c > 0; }
  // Zoneout mixes new and old values: an Elman layer's derivative then needs the new ones, on its tape.
  bool mixes() const { return !training && (zoneout_h > 0 || zoneout_c > 0); }
};

struct Problem {
  Cell cell = Cell::lstm;
  Type type = Type::f32;
  Partition partition = Partition::automatic;
  bool linear = false;  // activations replaced by straight lines: tests only
  bool scattered =
      false;  // threads take over from one another whatever they can, before their own: tests only
  int threads = 1;
  int directions = 1;
  int64_t T = 0, N = 0, I = 0, H = 0, O = 0;
  bool projected = false;
  const int64_t* batch_sizes = nullptr;  // packed: rows active at each step, not increasing
  const int64_t* lengths = nullptr;      // dense: steps of each row, 1..T
  const uint8_t* reset = nullptr;        // state zeroed before step (t, n) where non-zero
  int64_t reset_stride_t = 0, reset_stride_n = 0;
  Noise noise;
};

struct ForwardArgs : Problem {
  Grid x, y, cells;  // y: O * D wide; cells: H * D wide in the compute type, may be null
  const void *h0 = nullptr, *c0 = nullptr;  // (D, N, O), (D, N, H)
  void *h_n = nullptr, *c_n = nullptr;
  Weights weights[2];
  const void* packed = nullptr;  // from pack(), or null: packed inside the call
  void* gates = nullptr;         // tape (D, rows, slots(cell) * H) in the compute type, or null
  void* workspace = nullptr;
};

struct BackwardArgs : Problem {
  Grid x, y, cells, dx, dy, dcells;  // dx.data, dy.data, dcells.data may be null
  const void *h0 = nullptr, *c0 = nullptr, *dh_n = nullptr, *dc_n = nullptr;
  void *dh0 = nullptr, *dc0 = nullptr;  // null: not wanted
  Weights weights[2];
  const void* gates = nullptr;  // null: recomputed chunk by chunk from x, y and cells
  struct {
    void *w_ih = nullptr, *w_hh = nullptr, *b_ih = nullptr, *b_hh = nullptr, *w_hr = nullptr;
    void *ln_ih = nullptr, *ln_hh = nullptr, *ln_c = nullptr, *ln_bias_c = nullptr;
  } grads[2];
  bool want_weights = false;
  void* workspace = nullptr;
};

// Tape entries of H units per row: LSTM i,f,g,o; GRU r,z,n,un; GRU reset_before r,z,n; RNN none, or h_t before
// zoneout where Noise::mixes(); with layer norm the input and the recurrent term, in the order of the packed weights.
int tape_slots(Cell cell);

struct RhnKernels;     // rhn.h
struct BnLstmKernels;  // bnlstm.h

// Random numbers of a mask: rows (t, n) of `units` words each, t in [0, T), n in [0, N); see csrc/cells/philox.h.
struct RandomArgs {
  uint64_t seed;
  uint32_t stream;
  uint64_t threshold;
  int64_t T, N, units;
  int threads = 1;
};

// One instruction set's entry points.
struct Kernels {
  const char* isa;
  Partition (*plan)(const Problem&, int* threads);  // what forward and backward will do
  size_t (*packed_bytes)(const Problem&);
  void (*pack)(const Problem&, const Weights* weights, void* packed);
  size_t (*forward_workspace)(const ForwardArgs&);
  void (*forward)(const ForwardArgs&);
  size_t (*backward_workspace)(const BackwardArgs&);
  void (*backward)(const BackwardArgs&);
  // The words, and whether each is at least the threshold: (T, N, units) each, either may be null.
  void (*random)(const RandomArgs&, uint32_t* words, uint8_t* keep);
  double (*peak_flops)(int threads, double seconds);
  double (*bandwidth)(int threads, size_t bytes_per_thread, double seconds);
  const RhnKernels* rhn;
  const BnLstmKernels* bnlstm;
};

// The chosen set: the first of available_isas(), or what FASTRNN_ISA names.
const Kernels& kernels();
// Who made this CPU: "amd", "intel", or "" for others.
const char* cpu_vendor();
// Names of the sets compiled in that this machine can run, fastest first, null-terminated.
const char* const* available_isas();
// Selects a set by name; false if it is unknown or the machine lacks it.
bool select_isa(const char* name);

}  // namespace fastrnn
