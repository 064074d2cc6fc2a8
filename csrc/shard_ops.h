// The two functions of megatron_infoentropy/kernels/contract.py over raw memory. That page explains
// the formulas and the conventions; this one only the arguments.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace infoentropy {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

Dtype dtype_named(const std::string& name);  // as torch names them; throws std::invalid_argument

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

struct Options {
  float softcap = 0;  // 0 is none
  float inverse_temperature = 1;
  const float* inverse_temperatures = nullptr;  // [tokens], in the place of the one
  bool distance = false, squares = false;       // one more row of statistics and coefficients each

  int distance_row() const { return distance ? 4 : 0; }  // 0: there is none
  int squares_row() const { return squares ? 4 + distance : 0; }
  int rows() const { return 4 + distance + squares; }
};

// statistics: float [4 to 6, tokens] = MAX, TAIL, SPREAD, TARGET, DISTANCE, SQUARES.
void shard_statistics(const Logits&, const Targets&, const Options&, float* statistics,
                      int threads);

// coefficients: float [4 to 6, tokens] = SHIFT, SCALE, SLOPE, TARGET_GRADIENT, OFFSET, QUADRATIC.
// out: [tokens, width] of the logits' dtype, `out_row_stride` elements between rows; columns in
// [columns, width) are padding and become 0. May be the logits' own memory.
void shard_gradient(const Logits&, const Targets&, const Options&, const float* coefficients,
                    void* out, std::int64_t out_row_stride, std::int64_t width, int threads);

// Those compiled in that this processor has, the one chosen by itself first.
std::vector<std::string> instruction_sets();

const char* instruction_set();  // the one in use

// Forces a choice, for tests and measurements. False where this processor lacks it.
bool use_instruction_set(const std::string& name);

}  // namespace infoentropy
