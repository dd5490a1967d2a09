// The problems that every cell meets in every exchange, format and tile.
#pragma once
#include "cuda_trial_base.h"

namespace trial {

// For 16-bit and 32-bit formats: K of up to 128, part of the weights in shared memory.
template <class D, int Units = 16, int RowTiles = 1>
using SmallTile = Tile<Units, RowTiles, 128 / (2 * D::kChunk), 128 / (2 * D::kChunk) - 1, 2>;
template <class D>
using LocalTile = SmallTile<D, 48>;
// Three warps, more elements than threads, all weights in registers; K of up to 96.
template <class D>
using WideTile = Tile<16, 2, 96 / (3 * D::kChunk), 96 / (3 * D::kChunk), 3>;

inline std::vector<Options> problems(int most_units) {
  std::vector<Options> all(6);
  all[0].T = 3, all[0].N = 3, all[0].H = std::min(most_units, 72);
  all[1].T = 8, all[1].N = 11, all[1].H = std::min(most_units, 37), all[1].groups = 2;
  all[1].lengths = all[1].reset = true, all[1].wx_is_float = false;
  all[2] = all[1];
  all[2].T = 5, all[2].H = std::min(most_units, 48), all[2].reverse = true, all[2].groups = 3;
  all[3].directions = 2, all[3].H = std::min(most_units, 40), all[3].lengths = true, all[3].N = 6;
  all[4].directions = 2, all[4].H = std::min(most_units, 33), all[4].reset = true, all[4].initial = false;
  all[5].T = 1, all[5].N = 1, all[5].H = 1;
  for (Options& o : all) o.separate_mail = o.H == 40;
  return all;
}

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
void run_all(int most_units) {
  run_problems<Trial<Cell, D, T, ExchangeOf, kLinear>, T>(problems(most_units));
}

}  // namespace trial

#define FASTRNN_TRIALS(name, cell, label, format, tile, exchange, linear, most_units) \
  TEST(name##_##label) { trial::run_all<cell, format, tile, exchange, linear>(most_units); }

using trial::LocalTile;
using trial::SmallTile;
using trial::WideTile;
using namespace fastrnn::cuda;

#define FASTRNN_CELL_TESTS(name, cell)                                                       \
  FASTRNN_TRIALS(name, cell, bf16_sentinel, Bf16, SmallTile<Bf16>, Sentinel, false, 128)     \
  FASTRNN_TRIALS(name, cell, bf16_flags, Bf16, SmallTile<Bf16>, Flags, false, 128)           \
  FASTRNN_TRIALS(name, cell, bf16_local, Bf16, LocalTile<Bf16>, Local, false, 48)            \
  FASTRNN_TRIALS(name, cell, bf16x3_cluster, Bf16x3, SmallTile<Bf16x3>, Cluster, false, 128) \
  FASTRNN_UNSANITIZED_TESTS(name, cell)

// A sanitizer's build takes minutes for each file, and these differ from the others in format and tile alone.
#if defined(__SANITIZE_ADDRESS__)
#define FASTRNN_UNSANITIZED_TESTS(name, cell)
#else
#define FASTRNN_UNSANITIZED_TESTS(name, cell)                                            \
  FASTRNN_TRIALS(name, cell, bf16_wide_tile, Bf16, WideTile<Bf16>, Sentinel, false, 96)  \
  FASTRNN_TRIALS(name, cell, bf16_cluster, Bf16, SmallTile<Bf16>, Cluster, false, 128)   \
  FASTRNN_TRIALS(name, cell, bf16_linear, Bf16, SmallTile<Bf16>, Sentinel, true, 40)     \
  FASTRNN_TRIALS(name, cell, fp16_sentinel, Fp16, SmallTile<Fp16>, Sentinel, false, 128) \
  FASTRNN_TRIALS(name, cell, tf32_sentinel, Tf32, SmallTile<Tf32>, Sentinel, false, 128) \
  FASTRNN_TRIALS(name, cell, tf32_flags, Tf32, SmallTile<Tf32>, Flags, false, 128)       \
  FASTRNN_TRIALS(name, cell, bf16x3_sentinel, Bf16x3, SmallTile<Bf16x3>, Sentinel, false, 128)
#endif
