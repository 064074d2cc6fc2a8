// The contract on a CPU: chooses the instruction set, gives every row its targets and coefficients.
// The arithmetic of one row is in shard_kernels.inl.
#include "shard_ops.h"

#include <atomic>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "parallel_for.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace infoentropy {
namespace {

struct BFloat16 {
  std::uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void from_float(float value, float& to) { to = value; }

inline void from_float(float value, BFloat16& to) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to.bits = value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

namespace baseline {  // SSE2 or NEON, whatever the compiler may use unasked
constexpr int kLanes = 4;
#define INFOENTROPY_AVX2 0
#include "shard_kernels.inl"
#undef INFOENTROPY_AVX2
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
constexpr int kLanes = 8;
#define INFOENTROPY_AVX2 1
#include "shard_kernels.inl"
#undef INFOENTROPY_AVX2
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

std::atomic<bool> use_avx2{has_avx2()};

template <class T>
void one_row_statistics(const T* x, std::int64_t columns, float& m, float& r, float& u) {
#if defined(__x86_64__)
  if (use_avx2) return avx2::row_statistics(x, columns, m, r, u);
#endif
  baseline::row_statistics(x, columns, m, r, u);
}

template <class T>
void one_row_gradient(const T* x, std::int64_t columns, float shift, float scale, float slope,
                      T* out, bool stream_out) {
#if defined(__x86_64__)
  if (use_avx2) return avx2::row_gradient(x, columns, {shift, scale, slope}, out, stream_out);
#endif
  baseline::row_gradient(x, columns, {shift, scale, slope}, out, stream_out);
}

// Rows a thread takes at a time: enough work to be worth a thread, few enough to balance.
std::int64_t rows_per_block(std::int64_t columns) {
  constexpr std::int64_t kElements = 1 << 17;
  return 1 + kElements / (columns + 1);
}

// The same for writing into fresh memory: blocks of several huge pages. Threads that first touch one
// page together would each have the system clear a page for it, and one of the two for nothing.
std::int64_t rows_per_streamed_block(std::int64_t row_bytes) {
  constexpr std::int64_t kBytes = 16 << 20;
  return 1 + kBytes / (row_bytes + 1);
}

template <class T>
void statistics(const Logits& logits, const Targets& targets, float* out, int threads) {
  const T* data = static_cast<const T*>(logits.data);
  const std::int64_t tokens = logits.tokens, columns = logits.columns;
  float *max = out, *tail = max + tokens, *spread = tail + tokens, *target = spread + tokens;
  parallel_for(tokens, rows_per_block(columns), threads, [=](std::int64_t i, std::int64_t end) {
    for (; i < end; ++i) {
      if (targets.ignored(i)) {
        max[i] = tail[i] = spread[i] = target[i] = 0;
        continue;
      }
      const T* x = data + i * logits.row_stride;
      one_row_statistics(x, columns, max[i], tail[i], spread[i]);
      const std::int64_t column = targets.column(i, columns);
      target[i] = column < 0 ? 0 : to_float(x[column]);
    }
  });
}

// Memory fresh from the system costs one page fault per 4 KiB when first written: for a gradient of
// hundreds of MiB several times what computing it does. Where the system allows it (transparent huge
// pages on request), ask for pages of 2 MiB; where it does not, nothing happens.
void prefer_huge_pages(void* data, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kHuge = 2 << 20;
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

template <class T>
void gradient(const Logits& logits, const Targets& targets, const float* coefficients, T* out,
              std::int64_t out_row_stride, std::int64_t width, int threads) {
  const T* data = static_cast<const T*>(logits.data);
  const std::int64_t tokens = logits.tokens, columns = logits.columns;
  const float *shift = coefficients, *scale = shift + tokens, *slope = scale + tokens;
  const float* target = slope + tokens;
  // Beyond this size nobody can find the gradient in a cache anyway; written around the caches it
  // costs no read of the memory it replaces. In place the line has just been read.
  constexpr std::int64_t kStreamBytes = 8 << 20;
  const bool stream_out =
      out != data && tokens * width * std::int64_t{sizeof(T)} > kStreamBytes;
  if (stream_out) prefer_huge_pages(out, ((tokens - 1) * out_row_stride + width) * sizeof(T));
  const std::int64_t block =
      stream_out ? rows_per_streamed_block(width * sizeof(T)) : rows_per_block(columns);
  parallel_for(tokens, block, threads, [=](std::int64_t i, std::int64_t end) {
    for (; i < end; ++i) {
      T* to = out + i * out_row_stride;
      if (targets.ignored(i)) {
        std::memset(to, 0, width * sizeof(T));
        continue;
      }
      one_row_gradient(data + i * logits.row_stride, columns, shift[i], scale[i], slope[i], to,
                       stream_out);
      const std::int64_t column = targets.column(i, columns);
      if (column >= 0) from_float(target[i], to[column]);
      std::memset(to + columns, 0, (width - columns) * sizeof(T));
    }
#if defined(__x86_64__)
    _mm_sfence();  // streamed writes become visible before the thread says it is done
#endif
  });
}

}  // namespace

void shard_statistics(const Logits& logits, const Targets& targets, float* out, int threads) {
  if (logits.dtype == Dtype::kFloat32) {
    statistics<float>(logits, targets, out, threads);
  } else {
    statistics<BFloat16>(logits, targets, out, threads);
  }
}

void shard_gradient(const Logits& logits, const Targets& targets, const float* coefficients,
                    void* out, std::int64_t out_row_stride, std::int64_t width, int threads) {
  if (logits.dtype == Dtype::kFloat32) {
    gradient(logits, targets, coefficients, static_cast<float*>(out), out_row_stride, width,
             threads);
  } else {
    gradient(logits, targets, coefficients, static_cast<BFloat16*>(out), out_row_stride, width,
             threads);
  }
}

const char* instruction_set() { return use_avx2 ? "avx2" : "baseline"; }

bool use_instruction_set(const char* name) {
  const bool avx2 = std::strcmp(name, "avx2") == 0;
  if (avx2 ? !has_avx2() : std::strcmp(name, "baseline") != 0) return false;
  use_avx2 = avx2;
  return true;
}

}  // namespace infoentropy
