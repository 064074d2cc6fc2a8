// The contract on a CPU: chooses the instruction set, gives every row its targets and coefficients.
// The arithmetic of one row is in shard_kernels.inl.
#include "shard_ops.h"

#include <cstring>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "instruction_sets.h"
#include "parallel_for.h"

namespace infoentropy {
namespace {

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

std::int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

int meaning_of(const Options& options) {
  return options.softcap != 0 ? kCappedMeaning
         : options.inverse_temperatures || options.inverse_temperature != 1 ? kScaledMeaning
                                                                            : kPlainMeaning;
}

Options of_row(Options options, std::int64_t row) {
  if (options.inverse_temperatures) {
    options.inverse_temperature = options.inverse_temperatures[row];
  }
  return options;
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

// A NaN that survives rounding to bfloat16, see round_to_bfloat16: its bits are the upper 16. A GPU's
// own NaN (0x7fffffff) would round to -0, one whose payload lies in the lower 16 to infinity.
float with_short_nan(float value) { return value == value ? value : __builtin_nanf(""); }

float optional(const float* coefficients, std::int64_t place) {
  return place == 0 ? 0.0f : with_short_nan(coefficients[place]);
}

}  // namespace

Dtype dtype_named(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "bfloat16") return Dtype::kBFloat16;
  if (name == "float16") return Dtype::kFloat16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + name);
}

void shard_statistics(const Logits& logits, const Targets& targets, const Options& options,
                      float* out, int threads) {
  const auto* data = static_cast<const char*>(logits.data);
  const std::int64_t tokens = logits.tokens, columns = logits.columns;
  const std::int64_t row_bytes = logits.row_stride * bytes_of(logits.dtype);
  const StatisticsOfRow statistics_of =
      kernels().statistics[static_cast<int>(logits.dtype)][meaning_of(options)];
  parallel_for(tokens, rows_per_block(columns), threads, [=](std::int64_t i, std::int64_t end) {
    for (; i < end; ++i) {
      float row[6] = {};
      if (!targets.ignored(i)) {
        statistics_of(data + i * row_bytes, columns, targets.column(i, columns),
                      of_row(options, i), row);
      }
      for (int k = 0; k < 4; ++k) out[k * tokens + i] = row[k];
      if (options.distance) out[options.distance_row() * tokens + i] = row[4];
      if (options.squares) out[options.squares_row() * tokens + i] = row[5];
    }
  });
}

void shard_gradient(const Logits& logits, const Targets& targets, const Options& options,
                    const float* coefficients, void* out, std::int64_t out_row_stride,
                    std::int64_t width, int threads) {
  const auto* data = static_cast<const char*>(logits.data);
  auto* const to_data = static_cast<char*>(out);
  const std::int64_t tokens = logits.tokens, columns = logits.columns;
  const std::int64_t bytes = bytes_of(logits.dtype), row_bytes = logits.row_stride * bytes;
  const std::int64_t to_row_bytes = out_row_stride * bytes;
  // Beyond this size nobody can find the gradient in a cache anyway; written around the caches it
  // costs no read of the memory it replaces. In place the line has just been read.
  constexpr std::int64_t kStreamBytes = 8 << 20;
  const bool stream_out = out != logits.data && tokens * width * bytes > kStreamBytes;
  if (stream_out) prefer_huge_pages(out, (tokens - 1) * to_row_bytes + width * bytes);
  const std::int64_t block =
      stream_out ? rows_per_streamed_block(width * bytes) : rows_per_block(columns);
  const GradientOfRow gradient_of =
      kernels().gradient[static_cast<int>(logits.dtype)][meaning_of(options)];
  parallel_for(tokens, block, threads, [=](std::int64_t i, std::int64_t end) {
    for (; i < end; ++i) {
      char* const to = to_data + i * to_row_bytes;
      if (targets.ignored(i)) {
        std::memset(to, 0, width * bytes);
        continue;
      }
      const float* c = coefficients + i;
      const Coefficients row{with_short_nan(c[0]), with_short_nan(c[tokens]),
                             with_short_nan(c[2 * tokens]), with_short_nan(c[3 * tokens]),
                             optional(c, options.distance_row() * tokens),
                             optional(c, options.squares_row() * tokens)};
      gradient_of(data + i * row_bytes, columns, targets.column(i, columns), row,
                  of_row(options, i), to, stream_out);
      std::memset(to + columns * bytes, 0, (width - columns) * bytes);
    }
    finish_streams();
  });
}

}  // namespace infoentropy
