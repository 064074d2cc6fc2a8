// The two functions of megatron_infoentropy/kernels/contract.py over GPU memory, launched on a stream
// and not waited for. That page explains the formulas and the conventions; this one the arguments.
#pragma once

#include <cstdint>

namespace infoentropy::cuda {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

struct Logits {
  const void* data;  // [tokens, >= columns], last dimension contiguous
  Dtype dtype;
  std::int64_t row_stride;  // elements between rows
  std::int64_t tokens;
  std::int64_t columns;  // columns that take part in the softmax
  const std::int64_t* target;
  std::int64_t vocab_start;  // id of column 0
  std::int64_t ignore_index;
  float softcap;  // 0 is none
  float temperature;
};

struct Launch {
  int device;
  void* stream;  // cudaStream_t
};

// statistics: float [4, tokens], or [5, tokens] with `distance`.
// splits: blocks that share a row, at most 32; workspace: splits * tokens * kWorkspaceFloats floats
// where splits > 1. How rows are split decides how sums are rounded, so it must not vary.
constexpr int kMaxSplits = 32;
constexpr int kWorkspaceFloats = 6;
void shard_statistics(const Logits&, bool distance, float* statistics, int splits, float* workspace,
                      const Launch&);

// coefficients: float [rows, tokens], rows 4 or 5. out: [tokens, width] of the logits' dtype,
// `out_row_stride` elements between rows; may be the logits' own memory.
void shard_gradient(const Logits&, const float* coefficients, int rows, void* out,
                    std::int64_t out_row_stride, std::int64_t width, const Launch&);

}  // namespace infoentropy::cuda
