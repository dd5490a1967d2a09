// The kernels that are compiled: exchange, tile (units, row tiles, chunks, resident, warps, teams if not one). The lists are short because
// every entry is compiled for five cells, two directions and two formats; sizes in between are padded.
#pragma once

// K up to warps * chunks * 32. Weight registers a thread of an LSTM's forward: units / 4 * resident * 8.
#define FASTRNN_TILES_16BIT_TO_1024(X)                    \
  X(Sentinel, 16, 1, 1, 1, 8) /* H to 256 */              \
  X(Sentinel, 16, 1, 2, 2, 8) /* H to 512 */              \
  X(Sentinel, 16, 2, 2, 2, 8)                             \
  X(Sentinel, 16, 1, 4, 4, 8) /* H to 1024 */             \
  X(Sentinel, 16, 2, 4, 4, 8)                             \
  X(Cluster, 16, 1, 1, 1, 4) /* H to 128 in eight CTAs */ \
  X(Local, 64, 1, 1, 0, 2)   /* H to 64 in one CTA */
#define FASTRNN_TILES_16BIT(X)   \
  FASTRNN_TILES_16BIT_TO_1024(X) \
  X(Sentinel, 16, 1, 8, 4, 8) /* H to 2048, half of it in shared memory */
// Two matmuls a step, one after the other: with four resident chunks sm_80 spilled.
#define FASTRNN_TILES_16BIT_TWO_MATMULS(X) \
  FASTRNN_TILES_16BIT_TO_1024(X)           \
  X(Sentinel, 16, 1, 8, 3, 8) /* H to 2048 */

// K up to warps * chunks * 16.
#define FASTRNN_TILES_32BIT(X)               \
  X(Sentinel, 16, 1, 2, 2, 8) /* H to 256 */ \
  X(Sentinel, 16, 1, 4, 4, 8) /* H to 512 */ \
  X(Sentinel, 16, 2, 4, 4, 8)                \
  X(Sentinel, 16, 1, 8, 4, 8) /* H to 1024, half of it in shared memory */
#define FASTRNN_TILES_32BIT_TWO_MATMULS(X) FASTRNN_TILES_32BIT(X)

// With regularisers, for every cell and both directions: few, since the masks cost more than a tile that fits better gains.
#define FASTRNN_TILES_16BIT_REGULARISED(X) \
  X(Sentinel, 16, 1, 2, 2, 8)              \
  X(Sentinel, 16, 1, 4, 4, 8)
#define FASTRNN_TILES_32BIT_REGULARISED(X) \
  X(Sentinel, 16, 1, 2, 2, 8)              \
  X(Sentinel, 16, 1, 4, 4, 8)

// Highway layers, both carries: every slab in shared memory, so `resident` is 0 and the depth is limited by its size.
#define FASTRNN_TILES_16BIT_RHN(X)            \
  X(Sentinel, 16, 1, 1, 0, 8) /* H to 256 */  \
  X(Sentinel, 16, 1, 2, 0, 8) /* H to 512 */  \
  X(Sentinel, 16, 1, 4, 0, 8) /* H to 1024 */ \
  X(Sentinel, 16, 2, 4, 0, 8)
#define FASTRNN_TILES_32BIT_RHN(X)           \
  X(Sentinel, 16, 1, 2, 0, 8) /* H to 256 */ \
  X(Sentinel, 16, 1, 4, 0, 8) /* H to 512 */

// Batch-normalised LSTM, with teams: all rows of the batch in every CTA, 8 * row tiles * teams of them in a pass. Forward
// has few units a CTA, since partial sums are most of its shared memory traffic; backward needs 16 for a product. With four
// row tiles the compiler put arrays into local memory.
#define FASTRNN_TILES_16BIT_BNLSTM_FORWARD(X)           \
  X(Sentinel, 8, 2, 2, 2, 2, 4) /* 64 rows, H to 128 */ \
  X(Sentinel, 8, 2, 4, 4, 4, 2) /* 32 rows, H to 512 */
#define FASTRNN_TILES_16BIT_BNLSTM_BACKWARD(X)           \
  X(Sentinel, 16, 2, 2, 2, 2, 4) /* 64 rows, H to 128 */ \
  X(Sentinel, 16, 2, 4, 4, 4, 2) /* 32 rows, H to 512 */
#define FASTRNN_TILES_32BIT_BNLSTM_FORWARD(X)           \
  X(Sentinel, 8, 2, 4, 4, 2, 4) /* 64 rows, H to 128 */ \
  X(Sentinel, 8, 2, 8, 8, 4, 2) /* 32 rows, H to 512 */
#define FASTRNN_TILES_32BIT_BNLSTM_BACKWARD(X)           \
  X(Sentinel, 16, 2, 4, 4, 2, 4) /* 64 rows, H to 128 */ \
  X(Sentinel, 16, 2, 4, 4, 8)    /* 16 rows, H to 512 */

// LSTM with projection: K up to H in both matmuls of a step, one of which has 16 rows more to hold.
#define FASTRNN_TILES_16BIT_PROJECTED(X)     \
  X(Sentinel, 16, 1, 2, 2, 8) /* H to 512 */ \
  X(Sentinel, 16, 2, 2, 2, 8)                \
  X(Sentinel, 16, 1, 4, 3, 8) /* H to 1024 */
#define FASTRNN_TILES_32BIT_PROJECTED(X)     \
  X(Sentinel, 16, 1, 2, 2, 8) /* H to 256 */ \
  X(Sentinel, 16, 1, 4, 3, 8) /* H to 512 */

// Layer norm, LSTM and GRU.
#define FASTRNN_TILES_16BIT_LAYER_NORM(X)     \
  X(Sentinel, 16, 1, 2, 2, 8) /* H to 512 */  \
  X(Sentinel, 16, 2, 2, 2, 8)                 \
  X(Sentinel, 16, 1, 4, 4, 8) /* H to 1024 */ \
  X(Local, 64, 1, 1, 0, 4)    /* H to 64 in one CTA */
#define FASTRNN_TILES_32BIT_LAYER_NORM(X)    \
  X(Sentinel, 16, 1, 2, 2, 8) /* H to 256 */ \
  X(Sentinel, 16, 1, 4, 4, 8) /* H to 512 */

// The other protocol, for LSTM in bfloat16 only: to compare with.
#define FASTRNN_TILES_FLAGS(X) \
  X(Flags, 16, 1, 2, 2, 8)     \
  X(Flags, 16, 1, 4, 4, 8)

// Products of layers that run step by step (steps/tile.h): 16 outputs, 8 rows, warps over outputs, rows and slices of a stage, chunks
// of a stage, stages. A step of few rows is the reading of the weights: all CTAs share that, with few outputs each. A step of many
// rows is arithmetic: the larger the tile, the less it reads for a product. Both fit into 99 KiB of shared memory.
#define FASTRNN_STEPS_NARROW 4, 4, 1, 2, 4, 4, 4
#define FASTRNN_STEPS_WIDE 8, 16, 2, 4, 1, 2, 3
// Threads of a layer-normalised row.
#define FASTRNN_STEPS_ROW_THREADS 512
// A batch-normalised step: adjacent units of a CTA, and its threads. Eight units are a 32-byte sector of fp32, and of most layers
// as many CTAs as there are SMs.
#define FASTRNN_STEPS_COLUMNS 8, 512
