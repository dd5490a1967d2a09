// The tiles of the emulated Python module: small ones of every exchange, so that it compiles in a minute or two.
#pragma once
#include "../../cuda/tiles.h"

#undef FASTRNN_TILES_16BIT
#undef FASTRNN_TILES_32BIT
#undef FASTRNN_TILES_FLAGS
#undef FASTRNN_TILES_16BIT_REGULARISED
#undef FASTRNN_TILES_32BIT_REGULARISED
#undef FASTRNN_TILES_16BIT_RHN
#undef FASTRNN_TILES_32BIT_RHN
#undef FASTRNN_TILES_16BIT_BNLSTM_FORWARD
#undef FASTRNN_TILES_32BIT_BNLSTM_FORWARD
#undef FASTRNN_TILES_16BIT_BNLSTM_BACKWARD
#undef FASTRNN_TILES_32BIT_BNLSTM_BACKWARD
#undef FASTRNN_TILES_16BIT_PROJECTED
#undef FASTRNN_TILES_32BIT_PROJECTED
#undef FASTRNN_TILES_16BIT_LAYER_NORM
#undef FASTRNN_TILES_32BIT_LAYER_NORM
#undef FASTRNN_STEPS_NARROW
#undef FASTRNN_STEPS_WIDE
#undef FASTRNN_STEPS_ROW_THREADS

// K up to 64.
#define FASTRNN_TILES_16BIT(X) \
  X(Sentinel, 16, 1, 1, 1, 2)  \
  X(Sentinel, 16, 2, 1, 1, 2)  \
  X(Cluster, 16, 1, 1, 1, 2)   \
  X(Local, 48, 1, 1, 0, 2)
#define FASTRNN_TILES_32BIT(X) X(Sentinel, 16, 1, 2, 2, 2)
#define FASTRNN_TILES_FLAGS(X) X(Flags, 16, 1, 1, 1, 2)

#define FASTRNN_TILES_16BIT_REGULARISED(X) X(Sentinel, 16, 1, 1, 1, 2)
#define FASTRNN_TILES_32BIT_REGULARISED(X) X(Sentinel, 16, 1, 2, 2, 2)
#define FASTRNN_TILES_16BIT_RHN(X) X(Sentinel, 16, 1, 1, 0, 2)
#define FASTRNN_TILES_32BIT_RHN(X) X(Sentinel, 16, 1, 2, 0, 2)
#define FASTRNN_TILES_16BIT_BNLSTM_FORWARD(X) X(Sentinel, 8, 1, 1, 1, 2, 2)
#define FASTRNN_TILES_16BIT_BNLSTM_BACKWARD(X) X(Sentinel, 16, 1, 1, 1, 2, 2)
#define FASTRNN_TILES_32BIT_BNLSTM_FORWARD(X) X(Sentinel, 8, 1, 2, 2, 2, 2)
#define FASTRNN_TILES_32BIT_BNLSTM_BACKWARD(X) X(Sentinel, 16, 1, 2, 2, 2, 2)
#define FASTRNN_TILES_16BIT_PROJECTED(X) X(Sentinel, 16, 1, 1, 1, 2)
#define FASTRNN_TILES_32BIT_PROJECTED(X) X(Sentinel, 16, 1, 2, 1, 2)
#define FASTRNN_TILES_16BIT_LAYER_NORM(X) X(Sentinel, 16, 1, 1, 1, 2)
#define FASTRNN_TILES_32BIT_LAYER_NORM(X) \
  X(Sentinel, 16, 1, 2, 2, 2)             \
  X(Local, 48, 1, 2, 0, 2)
#define FASTRNN_STEPS_NARROW 1, 1, 1, 1, 2, 2, 3
#define FASTRNN_STEPS_WIDE 2, 2, 2, 1, 1, 1, 2
#define FASTRNN_STEPS_ROW_THREADS 64
