// Kernels and launches; what one warp or thread does is in cuda_statistics.h and cuda_gradient.h.
#include "shard_ops_cuda.h"

#include <cuda_runtime.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "cuda_gradient.h"
#include "cuda_statistics.h"

namespace infoentropy::cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 4;  // 64 registers a thread, 64 KiB of loads in flight

template <class LaneType>
struct Warp {
  using Lane = LaneType;
  Lane self;

  template <class F>
  __device__ __forceinline__ void each(const F& f) {
    f(self, static_cast<int>(threadIdx.x) % kWarp);
  }
  template <class F>
  __device__ __forceinline__ bool any(const F& f) const {
    return __any_sync(~0u, f(self));
  }
  template <class F>
  __device__ __forceinline__ float maximum(const F& f) const {
    float value = f(self);
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
    }
    return value;
  }
  template <class F>
  __device__ __forceinline__ void sum(const F& field) {
    float& value = field(self);
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(~0u, value, offset);
    }
  }
};

struct Arguments {
  std::int64_t row_stride, tokens;
  int columns;
  DeviceTargets targets;
  LogitScale logit_scale;
  const float* inverse_temperatures;  // [tokens] or null
  ExtraRows extra;

  __device__ __forceinline__ LogitScale scale(std::int64_t token) const {
    return logit_scale.of(inverse_temperatures, token);
  }
};

// Block b works on part b % splits of row b / splits.
template <class T, bool kSoftcap, bool kExtra>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    statistics_kernel(const T* logits, Arguments a, int splits, float* statistics,
                      Sums<kExtra>* workspace) {
  const std::int64_t token = blockIdx.x / splits;
  const int split = blockIdx.x % splits;
  if (a.targets.ignored(token)) {
    if (split == 0 && threadIdx.x < a.extra.count + 4) {
      statistics[threadIdx.x * a.tokens + token] = 0;
    }
    return;
  }
  const T* row = logits + token * a.row_stride;
  const LogitScale scale = a.scale(token);
  if (split == 0 && threadIdx.x == 0) {
    const int column = a.targets.column(token, a.columns);
    statistics[3 * a.tokens + token] = target_logit<kSoftcap>(row, column, scale);
  }
  // Plain memory: no thread may run a constructor over what another warp has written.
  __shared__ alignas(Vector) unsigned char memory[sizeof(Sums<kExtra>) * (kThreads / kWarp)];
  auto* of_warps = reinterpret_cast<Sums<kExtra>*>(memory);
  const int index = threadIdx.x / kWarp;
  Warp<Lane<T, kSoftcap, kExtra>> warp;
  sum_up(warp, index, row, a.columns, split, splits, scale);
  if (threadIdx.x % kWarp == 0) of_warps[index] = warp.self.sums;
  __syncthreads();
  if (index != 0) return;
  warp.self.sums = threadIdx.x < kThreads / kWarp ? of_warps[threadIdx.x] : Sums<kExtra>{};
  fold_lanes(warp, scale.exponent);
  if (threadIdx.x != 0) return;
  if (splits == 1) {
    write_statistics(warp.self.sums, scale, statistics, a.extra, token, a.tokens);
  } else {
    workspace[token * splits + split] = warp.self.sums;
  }
}

// One warp a row, one lane a part of it.
template <bool kExtra>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const Sums<kExtra>* workspace, Arguments a, int splits, float* statistics) {
  const std::int64_t token = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (token >= a.tokens || a.targets.ignored(token)) return;
  Warp<Lane<float, false, kExtra>> warp;
  const int lane = threadIdx.x % kWarp;
  warp.self.sums = lane < splits ? workspace[token * splits + lane] : Sums<kExtra>{};
  const LogitScale scale = a.scale(token);
  fold_lanes(warp, scale.exponent);
  if (lane == 0) write_statistics(warp.self.sums, scale, statistics, a.extra, token, a.tokens);
}

// Rows from the last to the first: the statistics read the last ones last, so those are the
// likeliest to be still in the cache.
template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    gradient_kernel(const T* logits, Arguments a, const float* coefficients, T* out,
                    std::int64_t out_row_stride, int width, int blocks) {
  const std::int64_t token = a.tokens - 1 - blockIdx.x / blocks;
  const auto row = gradient_row(logits + token * a.row_stride, out + token * out_row_stride,
                                a.columns, width, a.targets, token);
  const auto of_row = row_coefficients(coefficients, a.extra, token, a.tokens, a.scale(token));
  write_gradient<T, kSoftcap>(row, of_row, blockIdx.x % blocks, threadIdx.x);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::string reason = std::string(what) + " failed: " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    reason += "; the extension was built for other GPUs than this one, build it again here";
  }
  throw std::runtime_error(reason);
}

unsigned grid(std::int64_t tokens, std::int64_t blocks) {
  if (tokens > std::numeric_limits<int>::max() / blocks) {
    throw std::invalid_argument("a launch of " + std::to_string(tokens) + " rows of " +
                                std::to_string(blocks) + " blocks is too large");
  }
  return static_cast<unsigned>(tokens * blocks);
}

int checked_columns(std::int64_t columns) {
  if (columns < 0 || columns > std::numeric_limits<int>::max() / 2) {
    throw std::invalid_argument("columns must be below 2^30, got " + std::to_string(columns));
  }
  return static_cast<int>(columns);
}

// One call, checked: what the launchers below share.
struct Call {
  const Logits& logits;
  Arguments arguments;
  bool softcap;
  cudaStream_t stream;

  Call(const Logits& x, const Targets& y, const Options& options, const Launch& launch)
      : logits(x),
        arguments{x.row_stride, x.tokens, checked_columns(x.columns),
                  {y.data, y.vocab_start, y.ignore_index},
                  LogitScale(options.softcap, options.inverse_temperature),
                  options.inverse_temperatures,
                  {options.rows() - 4, options.distance_row(), options.squares_row()}},
        softcap(options.softcap != 0),
        stream(static_cast<cudaStream_t>(launch.stream)) {
    check(cudaSetDevice(launch.device), "choosing the GPU");
  }
};

template <class T, bool kSoftcap, bool kExtra>
void launch_statistics(const Call& call, float* out, int splits, void* workspace) {
  const Arguments& a = call.arguments;
  auto* parts = static_cast<Sums<kExtra>*>(workspace);
  statistics_kernel<T, kSoftcap, kExtra>
      <<<grid(a.tokens, splits), kThreads, 0, call.stream>>>(
          static_cast<const T*>(call.logits.data), a, splits, out, parts);
  check(cudaGetLastError(), "launching the statistics kernel");
  if (splits == 1) return;
  constexpr int kTokens = kThreads / kWarp;  // of a block
  fold_kernel<kExtra><<<grid((a.tokens + kTokens - 1) / kTokens, 1), kThreads, 0, call.stream>>>(
      parts, a, splits, out);
  check(cudaGetLastError(), "launching the fold kernel");
}

template <class T>
void statistics(const Call& call, float* out, int splits, void* workspace) {
  if (call.softcap) {  // tanh costs so much more than the extra sums that one kernel does all
    launch_statistics<T, true, true>(call, out, splits, workspace);
  } else if (call.arguments.extra.count) {
    launch_statistics<T, false, true>(call, out, splits, workspace);
  } else {
    launch_statistics<T, false, false>(call, out, splits, workspace);
  }
}

template <class T>
void gradient(const Call& call, const float* coefficients, T* out, std::int64_t out_row_stride,
              int width) {
  const auto kernel = call.softcap ? gradient_kernel<T, true> : gradient_kernel<T, false>;
  const int blocks = gradient_blocks<T>(width);
  kernel<<<grid(call.arguments.tokens, blocks), kThreads, 0, call.stream>>>(
      static_cast<const T*>(call.logits.data), call.arguments, coefficients, out,
      out_row_stride, width, blocks);
  check(cudaGetLastError(), "launching the gradient kernel");
}

}  // namespace

void shard_statistics(const Logits& x, const Targets& y, const Options& options, float* out,
                      int splits, float* workspace, const Launch& launch) {
  static_assert(sizeof(Sums<true>) == kWorkspaceFloats * sizeof(float), "the workspace holds Sums");
  static_assert(sizeof(Sums<false>) == sizeof(Sums<true>), "with and without extra sums");
  if (splits < 1 || splits > kMaxSplits) {
    throw std::invalid_argument("splits must lie in 1.." + std::to_string(kMaxSplits) + ", got " +
                                std::to_string(splits));
  }
  if (x.tokens == 0) return;
  const Call call(x, y, options, launch);
  switch (x.dtype) {
    case Dtype::kFloat32: return statistics<float>(call, out, splits, workspace);
    case Dtype::kBFloat16: return statistics<BFloat16>(call, out, splits, workspace);
    case Dtype::kFloat16: return statistics<Float16>(call, out, splits, workspace);
  }
}

void shard_gradient(const Logits& x, const Targets& y, const Options& options,
                    const float* coefficients, void* out, std::int64_t stride,
                    std::int64_t width, const Launch& launch) {
  const int columns = checked_columns(width);
  if (x.tokens == 0 || width == 0) return;
  const Call call(x, y, options, launch);
  switch (x.dtype) {
    case Dtype::kFloat32:
      return gradient(call, coefficients, static_cast<float*>(out), stride, columns);
    case Dtype::kBFloat16:
      return gradient(call, coefficients, static_cast<BFloat16*>(out), stride, columns);
    case Dtype::kFloat16:
      return gradient(call, coefficients, static_cast<Float16*>(out), stride, columns);
  }
}

}  // namespace infoentropy::cuda
