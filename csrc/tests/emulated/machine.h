// The emulated machine is one: who launches holds this.
#pragma once
#include <mutex>

namespace fastrnn::cuda {
inline std::mutex& emulated_machine() {
  static std::mutex one_at_a_time;
  return one_at_a_time;
}
}  // namespace fastrnn::cuda
