// What this machine can do at best, for the roofline of the benchmarks: FMA throughput and the
// bandwidth of reading a working set of a given size, on as many threads as asked for.
#pragma once
#include <chrono>
#include <new>

#include "simd.h"
#include "team.h"

namespace fastrnn {
namespace FASTRNN_ISA {

inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

constexpr int kMeasured = 64;  // threads whose share is counted

// Independent FMA chains that fill the registers; flop/s over all threads.
inline double peak_flops(int threads, double seconds) {
  using V = Vec<float>;
  constexpr int kChains = kRegisters == 32 ? 24 : 12;
  double rate[kMeasured] = {};
  team(threads < kMeasured ? threads : kMeasured, [&](int tid, int) {
    V acc[kChains], x = V::set1(1.0001f), y = V::set1(0.999f);
    FASTRNN_UNROLL for (int i = 0; i < kChains; i++) acc[i] = V::set1(float(i));
    const double start = seconds_now();
    double now = start, flops = 0;
    do {
      for (int k = 0; k < 100000; k++)
        FASTRNN_UNROLL for (int i = 0; i < kChains; i++) acc[i] = V::fma(acc[i], x, y);
      flops += 100000.0 * kChains * V::W * 2;
      now = seconds_now();
    } while (now - start < seconds);
    float keep[V::W];
    FASTRNN_UNROLL for (int i = 1; i < kChains; i++) acc[0] = acc[0] + acc[i];
    V::store(keep, acc[0]);
    volatile float sink = keep[0];
    (void)sink;
    rate[tid] = flops / (now - start);
  });
  double sum = 0;
  for (double r : rate) sum += r;
  return sum;
}

// Each thread reads its own part of `buffer` again and again; bytes/s over all threads.
inline double bandwidth(int threads, size_t bytes_per_thread, double seconds) {
  using V = Vec<float>;
  constexpr int kLoads = 8;  // chains that hide the latency of an addition
  const size_t n = bytes_per_thread / 4 / (kLoads * V::W) * (kLoads * V::W);
  double rate[kMeasured] = {};
  team(threads < kMeasured ? threads : kMeasured, [&](int tid, int) {
    float* p = new (std::nothrow) float[n];
    if (!p) return;
    for (size_t i = 0; i < n; i++) p[i] = 1.f;
    V acc[kLoads];
    for (V& sum : acc) sum = V::zero();
    double start = seconds_now(), now = start, bytes = 0;
    for (int pass = 0; now - start < seconds || pass < 2; pass++) {
      if (pass == 1) {
        start = seconds_now();
        bytes = 0;
      }
      for (size_t i = 0; i < n; i += kLoads * V::W)
        FASTRNN_UNROLL for (int j = 0; j < kLoads; j++) acc[j] = acc[j] + V::load(p + i + j * V::W);
      bytes += n * 4.0;
      now = seconds_now();
    }
    float keep[V::W];
    FASTRNN_UNROLL for (int j = 1; j < kLoads; j++) acc[0] = acc[0] + acc[j];
    V::store(keep, acc[0]);
    volatile float sink = keep[0];
    (void)sink;
    delete[] p;
    rate[tid] = bytes / (now - start);
  });
  double sum = 0;
  for (double r : rate) sum += r;
  return sum;
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
