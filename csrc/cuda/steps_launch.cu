// Launches of layers that run step by step. kGraphSteps steps are one CUDA graph, replayed along the sequence: the gap between two
// nodes of a graph is a fraction of that between two launches, and the host is free after a few replays. Of a highway layer they
// are micro-steps, so that a graph has as many nodes whatever the depth, and one serves all depths.
//
// A graph is built once for a configuration of kernels and grids, on a device, whatever the pointers, strides and T: its kernels read
// a block of parameters in device memory, one for each graph, and its first node writes that block from its own argument, the only
// thing that a replay changes (cudaGraphExecKernelNodeSetParams). Why no launch reads another's parameters:
//   - a change of an executable graph's node affects later launches of it only, not those already enqueued;
//   - two launches of one executable graph never overlap, whatever their streams, so the block is not written before the last
//     kernel of the launch before has ended;
//   - a mutex makes "change, launch" one action among the process's threads;
//   - a block that goes to another graph waits, on the device, for the event behind the last launch of the graph that had it.
//
// The graphs outlive the call: kMostGraphs of them on each device, the least recently used one goes first. The driver frees a
// graph that is still in flight when it has ended. Blocks are static memory of the module. While the caller's stream is being
// captured there is no graph in the graph: the launches go into the capture one by one, and read the block in the caller's workspace,
// which lives as long as the captured graph does.
#include <cuda_runtime.h>

#include <mutex>
#include <vector>

#include "steps/functions.cuh"
#include "steps/launch.h"
#include "steps/table.h"

namespace fastrnn::cuda {

namespace {

constexpr int kGraphSteps = 64, kMostGraphs = 16;
__device__ __align__(256) unsigned char graph_blocks[kMostGraphs][kStepsBlockBytes];

Status status_of(cudaError_t error) {
  return {static_cast<int>(error), error ? cudaGetErrorString(error) : ""};
}

// A kernel's argument list: the block, the step, which product.
struct Arguments {
  void* block;
  int step, which;
  void* list[3] = {&block, &step, &which};
};

cudaError_t launch_one(const StepsLaunch& l, void* block, int step, cudaStream_t stream) {
  Arguments a{block, step, l.which};
  return cudaLaunchKernel(l.function, dim3(l.grid), dim3(l.block), a.list, l.shared_bytes, stream);
}

template <class Params>
cudaKernelNodeParams block_node(const void* function, void** arguments) {
  cudaKernelNodeParams node = {};
  node.func = const_cast<void*>(function);
  node.gridDim = node.blockDim = dim3(1);
  node.blockDim.x = 256;
  node.kernelParams = arguments;
  return node;
}

struct Graph {
  std::vector<uint64_t> key;  // of which configuration; empty: none yet
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  cudaGraphNode_t first = nullptr;
  cudaEvent_t idle = nullptr;  // behind the last launch
  uint64_t used = 0;
};

std::vector<uint64_t> key_of(const StepsProgram& p, const void* block_function) {
  std::vector<uint64_t> key = {reinterpret_cast<uint64_t>(block_function)};
  for (int i = 0; i < p.count; i++) {
    const StepsLaunch& l = p.step[i];
    key.insert(key.end(), {reinterpret_cast<uint64_t>(l.function), static_cast<uint64_t>(l.grid),
                           static_cast<uint64_t>(l.block), static_cast<uint64_t>(l.shared_bytes),
                           static_cast<uint64_t>(l.which + 1)});
  }
  return key;
}

// The graphs of all devices.
class Graphs {
 public:
  // Replays steps p.first and up of these parameters on the stream.
  template <class Params>
  cudaError_t replay(const StepsProgram& program, const void* block_function, Params p, cudaStream_t stream) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (static_cast<int>(devices_.size()) <= device) devices_.resize(device + 1);
    std::vector<Graph>& graphs = devices_[device];
    graphs.resize(kMostGraphs);
    const std::vector<uint64_t> key = key_of(program, block_function);
    Graph* found = &graphs[0];
    for (Graph& g : graphs) {
      if (g.key == key) {
        found = &g;
        break;
      }
      if (g.used < found->used) found = &g;
    }
    void* block = nullptr;
    if (const cudaError_t error = cudaGetSymbolAddress(&block, graph_blocks)) return error;
    block = static_cast<char*>(block) + (found - graphs.data()) * kStepsBlockBytes;
    void* arguments[] = {&p, &block};
    const cudaKernelNodeParams node = block_node<Params>(block_function, arguments);
    if (found->key != key) {
      if (const cudaError_t error = build(*found, program, node, block)) {
        drop(*found);
        return error;
      }
      found->key = key;
      if (const cudaError_t error = cudaStreamWaitEvent(stream, found->idle, 0)) return error;
    } else if (const cudaError_t error = cudaGraphExecKernelNodeSetParams(found->exec, found->first, &node)) {
      return error;
    }
    found->used = ++clock_;
    if (const cudaError_t error = cudaGraphLaunch(found->exec, stream)) return error;
    return cudaEventRecord(found->idle, stream);
  }

 private:
  static void drop(Graph& g) {
    if (g.exec) cudaGraphExecDestroy(g.exec);
    if (g.graph) cudaGraphDestroy(g.graph);
    g.exec = nullptr;
    g.graph = nullptr;
    g.key.clear();
    g.used = 0;
  }
  // A chain: each launch after the one before. The event stays, it is about the block.
  static cudaError_t build(Graph& g, const StepsProgram& program, const cudaKernelNodeParams& first,
                           void* block) {
    drop(g);
    if (!g.idle)
      if (const cudaError_t error = cudaEventCreateWithFlags(&g.idle, cudaEventDisableTiming)) return error;
    if (const cudaError_t error = cudaGraphCreate(&g.graph, 0)) return error;
    if (const cudaError_t error = cudaGraphAddKernelNode(&g.first, g.graph, nullptr, 0, &first)) return error;
    cudaGraphNode_t last = g.first;
    cudaError_t error = cudaSuccess;
    steps_range(program, 0, kGraphSteps, [&](const StepsLaunch& l, int step) {
      Arguments a{block, step, l.which};
      cudaKernelNodeParams node = {};
      node.func = const_cast<void*>(l.function);
      node.gridDim = dim3(l.grid);
      node.blockDim = dim3(l.block);
      node.sharedMemBytes = l.shared_bytes;
      node.kernelParams = a.list;
      cudaGraphNode_t made;
      error = cudaGraphAddKernelNode(&made, g.graph, &last, 1, &node);
      last = made;
      return error == cudaSuccess;
    });
    if (error) return error;
    return cudaGraphInstantiateWithFlags(&g.exec, g.graph, 0);
  }

  std::mutex mutex_;
  std::vector<std::vector<Graph>> devices_;
  uint64_t clock_ = 0;
};

Graphs& graphs() {
  static Graphs* const all =
      new Graphs;  // never destroyed: the driver may be gone before the process's statics are
  return *all;
}

template <class Params>
Status launch_steps(const StepsProblem& q, bool wide, Params params, const StepsWeights& weights,
                    void* workspace, void* stream_of_caller) {
  const StepsKernels k = steps_kernels(q, wide);
  const StepsProgram program = steps_program(k, q);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_of_caller);
  steps_bind(q, k.tile, &params, workspace);
  cudaStreamCaptureStatus capture;
  if (const cudaError_t error = cudaStreamIsCapturing(stream, &capture)) return status_of(error);
  if (const cudaError_t error =
          cudaFuncSetAttribute(k.product, cudaFuncAttributeMaxDynamicSharedMemorySize, k.tile.shared_bytes()))
    return status_of(error);
  cudaError_t error = cudaSuccess;
  steps_matrices(q, params, [&](int d, int i, const StepsMatrix& matrix, Vec4* packed) {
    StepsPack pack{weights.matrix[d][i], packed, k.tile, matrix};
    void* arguments[] = {&pack};
    const int64_t vectors = steps_packed_vectors(k.tile, matrix, q.format);
    const int grid = static_cast<int>(vectors / 256 < 16384 ? (vectors + 255) / 256 : 16384);
    error = cudaLaunchKernel(k.pack, dim3(grid), dim3(256), arguments, 0, stream);
    return error == cudaSuccess;
  });
  if (error) return status_of(error);
  void* arguments[] = {&params, &workspace};
  error = cudaLaunchKernel(k.block, dim3(1), dim3(256), arguments, 0, stream);
  if (error) return status_of(error);
  const auto one = [&](const StepsLaunch& l, int s) {
    error = launch_one(l, workspace, s, stream);
    return error == cudaSuccess;
  };
  if (!one(program.begin, 0)) return status_of(error);
  const int count = params.launched();
  int s = 0;
  if (capture == cudaStreamCaptureStatusNone)
    for (; s + kGraphSteps <= count; s += kGraphSteps) {
      Params part = params;
      part.first = s;
      if (const cudaError_t failed = graphs().replay(program, k.block, part, stream)) {
        if (failed != cudaErrorMemoryAllocation) return status_of(failed);
        cudaGetLastError();
        break;  // no room for a graph, and none of its steps was launched: one by one
      }
    }
  if (steps_range(program, s, count, one)) steps_after(program, count, one);
  return status_of(error);
}

}  // namespace

size_t steps_workspace_bytes(const StepsProblem& problem, bool wide) {
  return steps_bind(problem, steps_kernels(problem, wide).tile, nullptr, nullptr);
}

Status launch(const StepsProblem& problem, bool wide, const StepsForwardParams& params,
              const StepsWeights& weights, void* workspace, void* stream) {
  return launch_steps(problem, wide, params, weights, workspace, stream);
}
Status launch(const StepsProblem& problem, bool wide, const StepsBackwardParams& params,
              const StepsWeights& weights, void* workspace, void* stream) {
  return launch_steps(problem, wide, params, weights, workspace, stream);
}
Status launch(const StepsProblem& problem, bool wide, const StepsBnForwardParams& params,
              const StepsWeights& weights, void* workspace, void* stream) {
  return launch_steps(problem, wide, params, weights, workspace, stream);
}
Status launch(const StepsProblem& problem, bool wide, const StepsBnBackwardParams& params,
              const StepsWeights& weights, void* workspace, void* stream) {
  return launch_steps(problem, wide, params, weights, workspace, stream);
}

}  // namespace fastrnn::cuda
