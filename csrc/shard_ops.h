// The two functions of megatron_infoentropy/kernels/contract.py over raw memory. That page explains
// the formulas and the conventions; this one only the arguments.
#pragma once

#include <cstdint>

namespace infoentropy {

enum class Dtype { kFloat32, kBFloat16 };

struct Logits {
  const void* data;  // [tokens, >= columns], last dimension contiguous
  Dtype dtype;
  std::int64_t row_stride;  // elements between rows
  std::int64_t tokens;
  std::int64_t columns;  // columns that take part in the softmax
};

struct Targets {
  const std::int64_t* data;  // [tokens], vocabulary ids
  std::int64_t vocab_start;  // id of column 0
  std::int64_t ignore_index;

  // The target's column on this shard, or -1 where another shard owns it.
  std::int64_t column(std::int64_t token, std::int64_t columns) const {
    const std::int64_t column = data[token] - vocab_start;
    return column >= 0 && column < columns ? column : -1;
  }
  bool ignored(std::int64_t token) const { return data[token] == ignore_index; }
};

// statistics: float [4, tokens] = MAX, TAIL, SPREAD, TARGET.
void shard_statistics(const Logits&, const Targets&, float* statistics, int threads);

// coefficients: float [4, tokens] = SHIFT, SCALE, SLOPE, TARGET_GRADIENT.
// out: [tokens, width] of the logits' dtype, `out_row_stride` elements between rows; columns in
// [columns, width) are padding and become 0. May be the logits' own memory.
void shard_gradient(const Logits&, const Targets&, const float* coefficients, void* out,
                    std::int64_t out_row_stride, std::int64_t width, int threads);

// "avx2" or "baseline"; chosen once from what the processor can do.
const char* instruction_set();

// Forces a choice, for tests and measurements. False where this processor lacks it.
bool use_instruction_set(const char* name);

}  // namespace infoentropy
