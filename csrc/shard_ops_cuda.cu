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
  Targets targets;
  LogitScale scale;
};

// Block b works on part b % splits of row b / splits.
template <class T, bool kSoftcap, bool kDistance>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    statistics_kernel(const T* logits, Arguments a, int splits, float* statistics,
                      Sums<kDistance>* workspace) {
  const std::int64_t token = blockIdx.x / splits;
  const int split = blockIdx.x % splits;
  if (a.targets.ignored(token)) {
    if (split == 0 && threadIdx.x < (kDistance ? 5 : 4)) {
      statistics[threadIdx.x * a.tokens + token] = 0;
    }
    return;
  }
  const T* row = logits + token * a.row_stride;
  if (split == 0 && threadIdx.x == 0) {
    const int column = a.targets.column(token, a.columns);
    statistics[3 * a.tokens + token] = target_logit<kSoftcap>(row, column, a.scale);
  }
  __shared__ Sums<kDistance> of_warps[kThreads / kWarp];
  const int index = threadIdx.x / kWarp;
  Warp<Lane<T, kSoftcap, kDistance>> warp;
  sum_up(warp, index, row, a.columns, split, splits, a.scale);
  if (threadIdx.x % kWarp == 0) of_warps[index] = warp.self.sums;
  __syncthreads();
  if (index != 0) return;
  warp.self.sums = threadIdx.x < kThreads / kWarp ? of_warps[threadIdx.x] : Sums<kDistance>{};
  fold_lanes(warp, a.scale.exponent);
  if (threadIdx.x != 0) return;
  if (splits == 1) {
    write_statistics(warp.self.sums, a.scale, statistics, token, a.tokens);
  } else {
    workspace[token * splits + split] = warp.self.sums;
  }
}

// One warp a row, one lane a part of it.
template <bool kDistance>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const Sums<kDistance>* workspace, Arguments a, int splits, float* statistics) {
  const std::int64_t token = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (token >= a.tokens || a.targets.ignored(token)) return;
  Warp<Lane<float, false, kDistance>> warp;
  const int lane = threadIdx.x % kWarp;
  warp.self.sums = lane < splits ? workspace[token * splits + lane] : Sums<kDistance>{};
  fold_lanes(warp, a.scale.exponent);
  if (lane == 0) write_statistics(warp.self.sums, a.scale, statistics, token, a.tokens);
}

// Rows from the last to the first: the statistics read the last ones last, so those are the likeliest
// to be still in the cache.
template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    gradient_kernel(const T* logits, Arguments a, const float* coefficients, int rows, T* out,
                    std::int64_t out_row_stride, int width, int blocks) {
  const std::int64_t token = a.tokens - 1 - blockIdx.x / blocks;
  const auto row = gradient_row(logits + token * a.row_stride, out + token * out_row_stride,
                                a.columns, width, a.targets, token);
  const auto of_row = row_coefficients(coefficients, rows, token, a.tokens, a.scale);
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

Arguments arguments(const Logits& x) {
  return {x.row_stride, x.tokens, checked_columns(x.columns),
          {x.target, x.vocab_start, x.ignore_index}, LogitScale(x.softcap, x.temperature)};
}

template <class T, bool kSoftcap, bool kDistance>
void launch_statistics(const Logits& x, float* out, int splits, void* workspace, cudaStream_t on) {
  const Arguments a = arguments(x);
  auto* parts = static_cast<Sums<kDistance>*>(workspace);
  statistics_kernel<T, kSoftcap, kDistance><<<grid(x.tokens, splits), kThreads, 0, on>>>(
      static_cast<const T*>(x.data), a, splits, out, parts);
  check(cudaGetLastError(), "launching the statistics kernel");
  if (splits == 1) return;
  constexpr int kRows = kThreads / kWarp;
  fold_kernel<kDistance><<<grid((x.tokens + kRows - 1) / kRows, 1), kThreads, 0, on>>>(
      parts, a, splits, out);
  check(cudaGetLastError(), "launching the fold kernel");
}

template <class T>
void choose_statistics(const Logits& x, bool distance, float* out, int splits, void* workspace,
                       cudaStream_t on) {
  const bool softcap = x.softcap != 0;
  if (!softcap && !distance) launch_statistics<T, false, false>(x, out, splits, workspace, on);
  if (!softcap && distance) launch_statistics<T, false, true>(x, out, splits, workspace, on);
  if (softcap && !distance) launch_statistics<T, true, false>(x, out, splits, workspace, on);
  if (softcap && distance) launch_statistics<T, true, true>(x, out, splits, workspace, on);
}

template <class T>
void choose_gradient(const Logits& x, const float* coefficients, int rows, void* out,
                     std::int64_t out_row_stride, int width, cudaStream_t on) {
  const auto kernel = x.softcap != 0 ? gradient_kernel<T, true> : gradient_kernel<T, false>;
  const int blocks = gradient_blocks<T>(width);
  kernel<<<grid(x.tokens, blocks), kThreads, 0, on>>>(
      static_cast<const T*>(x.data), arguments(x), coefficients, rows, static_cast<T*>(out),
      out_row_stride, width, blocks);
  check(cudaGetLastError(), "launching the gradient kernel");
}

// Calls f with a value of the storage type.
template <class F>
void with_type_of(const Logits& x, const F& f) {
  if (x.dtype == Dtype::kFloat32) f(float{});
  if (x.dtype == Dtype::kBFloat16) f(BFloat16{});
  if (x.dtype == Dtype::kFloat16) f(Float16{});
}

}  // namespace

void shard_statistics(const Logits& x, bool distance, float* statistics, int splits,
                      float* workspace, const Launch& launch) {
  static_assert(sizeof(Sums<true>) == kWorkspaceFloats * sizeof(float), "");
  static_assert(sizeof(Sums<false>) == kWorkspaceFloats * sizeof(float), "");
  if (splits < 1 || splits > kMaxSplits) {
    throw std::invalid_argument("splits must lie in 1..32, got " + std::to_string(splits));
  }
  if (x.tokens == 0) return;
  check(cudaSetDevice(launch.device), "choosing the GPU");
  with_type_of(x, [&](auto zero) {
    choose_statistics<decltype(zero)>(x, distance, statistics, splits, workspace,
                                      static_cast<cudaStream_t>(launch.stream));
  });
}

void shard_gradient(const Logits& x, const float* coefficients, int rows, void* out,
                    std::int64_t out_row_stride, std::int64_t width, const Launch& launch) {
  if (x.columns > width) throw std::invalid_argument("columns exceed the width of the output");
  if (x.tokens == 0 || width == 0) return;
  check(cudaSetDevice(launch.device), "choosing the GPU");
  with_type_of(x, [&](auto zero) {
    choose_gradient<decltype(zero)>(x, coefficients, rows, out, out_row_stride,
                                    checked_columns(width),
                                    static_cast<cudaStream_t>(launch.stream));
  });
}

}  // namespace infoentropy::cuda
