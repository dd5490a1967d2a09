// Running statistics follow those of a batch: running += weight * (found - running), as torch.lerp rounds it.
// Several small arrays in one call of the team: as operators of torch they took as long as a hundredth of the layer.
#pragma once
#include "bnlstm.h"
#include "cells_cpu.h"
#include "team.h"

namespace fastrnn {
namespace FASTRNN_ISA {

constexpr int64_t kFollowed = 2048;  // elements that a thread takes at a time

template <class T>
static void follow_part(const BnLstmFollowArgs& a, int tid, int nt) {
  using V = Vec<T>;
  const V weight = V::set1(static_cast<T>(a.weight)), rest = V::set1(T(1) - static_cast<T>(a.weight));
  for (int i = 0; i < a.count; i++) {
    const auto& move = a.moves[i];
    const int64_t pieces = ceil_div(move.n, kFollowed);
    for (int64_t piece = pieces * tid / nt; piece < pieces * (tid + 1) / nt; piece++) {
      T* running = static_cast<T*>(move.running) + piece * kFollowed;
      const T* found = static_cast<const T*>(move.found) + piece * kFollowed;
      each_vector<V>(static_cast<int>(imin(kFollowed, move.n - piece * kFollowed)), [&](int u, auto n) {
        const V from = load_as<V>(running + u, n), to = load_as<V>(found + u, n), way = to - from;
        store_as<V>(running + u, a.weight < 0.5 ? V::fma(weight, way, from) : V::fnma(way, rest, to), n);
      });
    }
  }
}

inline void follow_statistics(const BnLstmFollowArgs& a) {
  for (int64_t* counts : a.counts)
    for (int64_t s = 0; counts && s < a.steps; s++) counts[s]++;
  team(a.threads, [&](int tid, int nt) {
    if (a.type == Type::f64)
      follow_part<double>(a, tid, nt);
    else
      follow_part<float>(a, tid, nt);
  });
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
