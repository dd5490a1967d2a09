// What has to be known of a GPU before anything else is measured on it: each wrapper of csrc/cuda/prim against the host,
// the hop of every exchange, reads of the same data by all SMs, what cluster launches are accepted. One JSON object a line,
// flushed, so that what was found stays when a later probe fails. Arguments: names of probes, none for all.
//   nvcc -std=c++17 -O3 -Icsrc -gencode=arch=compute_90a,code=sm_90a csrc/cuda/probes/main.cu -o probes
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "hops.cuh"
#include "rates.cuh"
#include "wrappers.cuh"

namespace fastrnn::cuda::probes {
namespace {

int failures = 0;
std::vector<std::string> wanted;

bool is_wanted(const std::string& name) {
  if (wanted.empty()) return true;
  for (const std::string& w : wanted)
    if (name.rfind(w, 0) == 0) return true;
  return false;
}

void say(const char* probe, const std::string& problem, const std::string& more = "") {
  std::string text;
  for (char c : problem)
    if (c == '"' || c == '\\' || c == '\n')
      text += ' ';
    else
      text += c;
  std::printf("{\"probe\": \"%s\", \"ok\": %s, \"message\": \"%s\"%s}\n", probe,
              problem.empty() ? "true" : "false", text.c_str(), more.c_str());
  std::fflush(stdout);
  failures += !problem.empty();
}

std::string field(const char* name, double value) {
  char s[80];
  std::snprintf(s, sizeof s, ", \"%s\": %.9g", name, value);
  return s;
}

std::string text_of(cudaError_t error) { return error ? cudaGetErrorString(error) : ""; }

// After an error of a running kernel nothing else works in this process.
void leave_if_broken(const char* probe) {
  if (const cudaError_t error = cudaDeviceSynchronize()) {
    say(probe, text_of(error));
    std::exit(3);
  }
}

// Device memory of one probe.
class Buffer {
 public:
  explicit Buffer(size_t words, int fill = 0) : bytes_(4 * words) {
    if (cudaMalloc(&data_, bytes_) == cudaSuccess) this->fill(fill);
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void fill(int byte) { cudaMemset(data_, byte, bytes_); }
  void put(const Words& from) { cudaMemcpy(data_, from.data(), 4 * from.size(), cudaMemcpyHostToDevice); }
  Words get() const {
    Words all(bytes_ / 4);
    cudaMemcpy(all.data(), data_, bytes_, cudaMemcpyDeviceToHost);
    return all;
  }
  uint32_t* words() const { return static_cast<uint32_t*>(data_); }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

cudaError_t launch(const void* kernel, int grid, int block, int shared, int cluster, bool cooperative,
                   void** arguments) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t c = {};
  c.gridDim = dim3(grid), c.blockDim = dim3(block), c.dynamicSmemBytes = shared, c.attrs = attributes;
  if (cooperative) {
    attributes[c.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[c.numAttrs++].val.cooperative = 1;
  }
  if (cluster > 1) {
    attributes[c.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[c.numAttrs].val.clusterDim.x = cluster;
    attributes[c.numAttrs].val.clusterDim.y = attributes[c.numAttrs].val.clusterDim.z = 1;
    c.numAttrs++;
  }
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared))
    return error;
  const cudaError_t error = cudaLaunchKernelExC(&c, kernel, arguments);
  cudaGetLastError();
  return error;
}

template <class Body>
void try_wrapper() {
  const std::string name = std::string("wrapper_") + Body::kName;
  const Words in = Body::in();
  Buffer from(in.size()), to(Body::out_words(), static_cast<int>(Body::kFill & 0xff));
  from.put(in);
  const uint32_t* from_words = from.words();
  uint32_t* to_words = to.words();
  void* arguments[] = {&from_words, &to_words};
  constexpr Launch l = Body::kLaunch;
  const auto kernel = reinterpret_cast<const void*>(&wrapper_kernel<Body>);
  // Those that wait for another CTA need all of them resident.
  const cudaError_t error = launch(kernel, l.grid, l.block, l.shared, l.cluster, l.cluster == 1, arguments);
  if (error) return say(name.c_str(), text_of(error));
  leave_if_broken(name.c_str());
  say(name.c_str(), Body::judge(in, to.get()));
}

double cycles_of(const Words& results, int ctas, int word = 1) {
  double most = 0;
  for (int c = 0; c < ctas; c++) {
    const uint32_t* r = results.data() + c * kResultWords + word;
    const double spent = r[0] + 4294967296.0 * r[1];
    if (spent > most) most = spent;
  }
  return most;
}

struct HopResult {
  double cycles = 0, nanoseconds = 0;
  std::string problem;
};

template <class Hop>
HopResult run_hop(HopParams p, int cluster, bool cooperative) {
  HopResult r;
  const int grid = p.ctas * p.groups;
  Buffer mail(Hop::words(p), static_cast<int>(Hop::kFill & 0xff)), flags(size_t(grid) * kFlagStride),
      results(size_t(grid) * kResultWords);
  p.mail = mail.words(), p.flags = flags.words(), p.results = results.words();
  void* arguments[] = {&p};
  const cudaError_t error = launch(reinterpret_cast<const void*>(&hop_kernel<Hop>), grid, kHopThreads,
                                   Hop::shared(p), cluster, cooperative, arguments);
  if (error) {
    r.problem = text_of(error);
    return r;
  }
  leave_if_broken("hop");
  const Words got = results.get();
  const uint32_t sum = expected_sum(p);
  for (int c = 0; c < grid && r.problem.empty(); c++)
    if (got[c * kResultWords] != sum) r.problem = wrong("sum of CTA", c, got[c * kResultWords], sum);
  r.cycles = cycles_of(got, grid, 1), r.nanoseconds = cycles_of(got, grid, 3);
  return r;
}

// Microseconds and cycles of a step, from runs of two lengths; the middle one of five.
template <class Hop>
void time_hop(const char* name, int ctas, int groups, int words, int cluster = 1) {
  const int lengths[2] = {500, 2500};
  std::vector<double> us, cycles, mhz;
  std::string problem;
  for (int attempt = 0; attempt < 6 && problem.empty(); attempt++) {
    HopResult of[2];
    for (int i = 0; i < 2; i++) {
      HopParams p;
      p.steps = lengths[i], p.ctas = ctas, p.groups = groups, p.words = words;
      of[i] = run_hop<Hop>(p, cluster, cluster == 1);  // a cluster is resident as a whole anyway
      problem += of[i].problem;
    }
    if (attempt == 0) continue;  // clocks and caches
    const double steps = lengths[1] - lengths[0];
    us.push_back((of[1].nanoseconds - of[0].nanoseconds) / steps / 1e3);
    cycles.push_back((of[1].cycles - of[0].cycles) / steps);
    mhz.push_back(of[1].cycles / of[1].nanoseconds * 1e3);
  }
  std::string more = field("ctas", ctas) + field("groups", groups) + field("words", words);
  if (problem.empty())
    for (std::vector<double>* v : {&us, &cycles, &mhz}) {
      std::sort(v->begin(), v->end());
      more += field(v == &us ? "us" : v == &cycles ? "cycles" : "mhz", (*v)[v->size() / 2]);
    }
  say(name, problem, more);
}

void read_same(int sms, int kib, int ctas, bool rotated) {
  ReadParams p;
  p.vectors = kib * 64;
  p.rounds = 32768 / kib + 1, p.stagger = rotated ? p.vectors / sms : 0;
  Buffer data(size_t(p.vectors) * 4, 1), results(size_t(ctas) * kResultWords);
  p.data = reinterpret_cast<const Vec4*>(data.words()), p.results = results.words();
  void* arguments[] = {&p};
  // As many loads under way as there are for a thread, up to eight.
  const auto kernel = reinterpret_cast<const void*>(kib >= 32   ? &read_kernel<8>
                                                    : kib >= 16 ? &read_kernel<4>
                                                                : &read_kernel<2>);
  double best = 0;
  for (int attempt = 0; attempt < 4; attempt++) {
    const cudaError_t error = launch(kernel, ctas, kHopThreads, 0, 1, true, arguments);
    if (error) return say("read_same", text_of(error));
    leave_if_broken("read_same");
    const double rate = double(p.rounds) * p.vectors * 16 / cycles_of(results.get(), ctas);
    if (rate > best) best = rate;
  }
  say("read_same", "",
      field("kib", kib) + field("ctas", ctas) + field("rotated", rotated) + field("bytes_per_cycle", best));
}

template <class Op>
void multiply(const char* name, int sms) {
  int rounds = 4096;
  Buffer results(size_t(sms) * kResultWords);
  uint32_t* words = results.words();
  void* arguments[] = {&rounds, &words};
  double best = 0;
  for (int attempt = 0; attempt < 4; attempt++) {
    const cudaError_t error =
        launch(reinterpret_cast<const void*>(&product_kernel<Op>), sms, kHopThreads, 0, 1, true, arguments);
    if (error) return say(name, text_of(error));
    leave_if_broken(name);
    const double flops = 2.0 * 16 * 8 * Op::kK * kProductsOfRound * rounds * (kHopThreads / 32);
    const double rate = flops / cycles_of(results.get(), sms);
    if (rate > best) best = rate;
  }
  say(name, "", field("flops_per_cycle", best));
}

// How many clusters are resident, and whether the driver takes them in a cooperative launch.
void clusters(int size, int shared) {
  const auto kernel = reinterpret_cast<const void*>(&hop_kernel<ClusterHop>);
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t c = {};
  c.gridDim = dim3(size), c.blockDim = dim3(kHopThreads), c.dynamicSmemBytes = shared, c.attrs = &attribute;
  c.numAttrs = 1;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = size, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  int count = 0;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (!error) error = cudaOccupancyMaxActiveClusters(&count, kernel, &c);
  cudaGetLastError();
  const std::string sizes = field("size", size) + field("shared_bytes", shared);
  say("clusters", text_of(error), sizes + field("resident", count));
  if (error || !count) return;
  HopParams p;
  p.steps = 4, p.ctas = size, p.groups = count;
  const HopResult r = run_hop<ClusterHop>(p, size, true);
  say("cooperative_clusters", r.problem, sizes + field("groups", count));
}

struct BroadcastSizes {
  int kib[5] = {8, 16, 32, 64, 128};
};

int run() {
  int ordinal = 0;
  cudaDeviceProp device = {};
  if (const cudaError_t error = cudaGetDeviceProperties(&device, ordinal)) {
    say("device", text_of(error));
    return 2;
  }
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver), cudaRuntimeGetVersion(&runtime);
  const int sms = device.multiProcessorCount;
  say("device", "",
      ", \"name\": \"" + std::string(device.name) + "\"" + field("sms", sms) +
          field("compute_capability", 10 * device.major + device.minor) +
          field("shared_bytes", device.sharedMemPerBlockOptin) + field("l2_bytes", device.l2CacheSize) +
          field("driver", driver) + field("runtime", runtime));
  const bool has_clusters = device.major >= 9;
  if (is_wanted("wrapper"))
    each_wrapper([&](auto body) {
      using Body = decltype(body);
      if (Body::kLaunch.cluster > 1 && !has_clusters) return;
      try_wrapper<Body>();
    });
  if (is_wanted("hop")) {
    std::vector<int> counts = {2, 16, 64, sms};
    for (int ctas : counts) {
      time_hop<SentinelHop>("hop_sentinel", ctas, 1, 1);
      time_hop<FlagHop>("hop_flags", ctas, 1, 1);
      time_hop<GridHop>("hop_grid", ctas, 1, 1);
    }
    time_hop<SentinelHop>("hop_sentinel", sms / 4, 4, 64);  // as a layer does it: 128 bytes a CTA
    time_hop<SentinelHop>("hop_sentinel", sms, 1, 64);
    if (has_clusters)
      for (int size : {2, 4, 8})
        for (int words : {1, 64, 512}) time_hop<ClusterHop>("hop_cluster", size, 1, words, size);
  }
  if (is_wanted("read"))
    for (int kib : BroadcastSizes{}.kib)
      for (int ctas : {1, sms})
        for (bool rotated : {false, true})
          if (ctas > 1 || !rotated) read_same(sms, kib, ctas, rotated);
  if (is_wanted("multiply")) {
    multiply<MmaBf16>("multiply_bf16", sms);
    multiply<MmaFp16>("multiply_fp16", sms);
    multiply<MmaTf32>("multiply_tf32", sms);
  }
  if (is_wanted("clusters") && has_clusters)
    for (int size : {2, 3, 4, 5, 8})
      for (int shared : {16 << 10, 160 << 10})
        if (size_t(shared) <= device.sharedMemPerBlockOptin) clusters(size, shared);
  return failures ? 1 : 0;
}

}  // namespace
}  // namespace fastrnn::cuda::probes

int main(int argc, char** argv) {
  for (int i = 1; i < argc; i++) fastrnn::cuda::probes::wanted.push_back(argv[i]);
  return fastrnn::cuda::probes::run();
}
