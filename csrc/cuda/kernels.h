// The compiled kernels as the host sees them.
#pragma once
#include "core/geometry.h"
#include "core/params.h"

namespace fastrnn::cuda {

struct Kernel {
  CellKind cell;
  bool backward;
  Format format;
  ExchangeKind exchange;
  TileShape tile;
  int shared_bytes;  // of a highway layer of depth 1, of a batch of one row
  const void*
      function;  // takes ForwardParams or BackwardParams by value, the regularised or a highway layer's ones
  bool regularised = false;
};

struct KernelList {
  const Kernel* data;
  int count;
};

// One list for each file of inst/.
KernelList lstm_forward();
KernelList lstm_backward();
KernelList lstm_flags();
KernelList gru_forward();
KernelList gru_backward();
KernelList gru_reset_before_forward();
KernelList gru_reset_before_backward();
KernelList rnn_tanh_forward();
KernelList rnn_tanh_backward();
KernelList rnn_relu_forward();
KernelList rnn_relu_backward();
KernelList lstm_regularised();
KernelList gru_regularised();
KernelList gru_reset_before_regularised();
KernelList rnn_tanh_regularised();
KernelList rnn_relu_regularised();
KernelList rhn_forward();
KernelList rhn_backward();
KernelList bnlstm_forward();
KernelList bnlstm_backward();
KernelList lstm_projected_forward();
KernelList lstm_projected_backward();
KernelList layer_norm_forward();
KernelList layer_norm_backward();

// The kernel that packs weights of a format; takes PackParams by value.
const void* pack_function(Format format);
// The kernel that masks initial states for recurrent dropout of the state; takes MaskStateParams by value.
const void* mask_state_function(Format format);

}  // namespace fastrnn::cuda
