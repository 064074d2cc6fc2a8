// The GPU kernels' arithmetic and slicing on a CPU, for tests on machines without a GPU: loops over
// all blocks, warps and lanes of cuda_statistics.h and cuda_gradient.h. It cannot see what only
// threads at work at once can do wrong (races, a missing barrier), nor launches, nor the
// instructions behind `#ifdef __CUDACC__`. Compiled by cuda_emulation.py.
#include <cstdint>
#include <vector>

#include "../../csrc/cuda_gradient.h"
#include "../../csrc/cuda_statistics.h"

namespace infoentropy::cuda {
namespace {

template <class LaneType>
struct EmulatedWarp {
  using Lane = LaneType;
  Lane lanes[kWarp] = {};

  template <class F>
  void each(const F& f) {
    for (int i = 0; i < kWarp; ++i) f(lanes[i], i);
  }
  template <class F>
  bool any(const F& f) const {
    bool found = false;
    for (const Lane& lane : lanes) found |= f(lane);
    return found;
  }
  template <class F>
  float maximum(const F& f) const {
    float result = -kInfinity;
    for (const Lane& lane : lanes) result = fmaxf(result, f(lane));
    return result;
  }
  template <class F>
  void sum(const F& field) {  // as shuffles add: every lane its partner's value, five times
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      float before[kWarp];
      for (int i = 0; i < kWarp; ++i) before[i] = field(lanes[i]);
      for (int i = 0; i < kWarp; ++i) field(lanes[i]) = before[i] + before[i ^ offset];
    }
  }
};

struct Case {
  std::int64_t row_stride, tokens;
  int columns;
  DeviceTargets targets;
  LogitScale logit_scale;
  const float* inverse_temperatures;
  ExtraRows extra;
};

template <class Warp, class SumsType>
SumsType fold(const std::vector<SumsType>& parts, float exponent) {
  Warp warp;
  for (std::size_t i = 0; i < parts.size(); ++i) warp.lanes[i].sums = parts[i];
  fold_lanes(warp, exponent);
  return warp.lanes[0].sums;
}

template <class T, bool kSoftcap, bool kExtra>
void statistics(const T* logits, const Case& c, int splits, float* out) {
  using Warp = EmulatedWarp<Lane<T, kSoftcap, kExtra>>;
  for (std::int64_t token = 0; token < c.tokens; ++token) {
    if (c.targets.ignored(token)) {
      for (int row = 0; row < 4 + c.extra.count; ++row) out[row * c.tokens + token] = 0;
      continue;
    }
    const T* row = logits + token * c.row_stride;
    const LogitScale scale = c.logit_scale.of(c.inverse_temperatures, token);
    std::vector<Sums<kExtra>> of_splits;
    for (int split = 0; split < splits; ++split) {
      std::vector<Sums<kExtra>> of_warps;
      for (int index = 0; index < kThreads / kWarp; ++index) {
        Warp warp;
        sum_up(warp, index, row, c.columns, split, splits, scale);
        of_warps.push_back(warp.lanes[0].sums);
      }
      of_splits.push_back(fold<Warp>(of_warps, scale.exponent));
    }
    write_statistics(fold<Warp>(of_splits, scale.exponent), scale, out, c.extra, token, c.tokens);
    const int column = c.targets.column(token, c.columns);
    out[3 * c.tokens + token] = target_logit<kSoftcap>(row, column, scale);
  }
}

template <class T, bool kSoftcap>
void gradient(const T* logits, const Case& c, const float* coefficients, T* out,
              std::int64_t out_row_stride, int width) {
  const int blocks = gradient_blocks<T>(width);
  for (std::int64_t token = 0; token < c.tokens; ++token) {
    const auto row = gradient_row(logits + token * c.row_stride, out + token * out_row_stride,
                                  c.columns, width, c.targets, token);
    const auto of_row = row_coefficients(coefficients, c.extra, token, c.tokens,
                                         c.logit_scale.of(c.inverse_temperatures, token));
    for (int block = 0; block < blocks; ++block) {
      for (int thread = 0; thread < kThreads; ++thread) {
        write_gradient<T, kSoftcap>(row, of_row, block, thread);
      }
    }
  }
}

// f(T{}) for the interface's number of a storage type.
template <class F>
void choose(int dtype, const F& f) {
  if (dtype == 0) f(float{});
  if (dtype == 1) f(BFloat16{});
  if (dtype == 2) f(Float16{});
}

}  // namespace
}  // namespace infoentropy::cuda

using namespace infoentropy::cuda;

// dtype: 0 float32, 1 bfloat16, 2 float16. inverse_temperatures: [tokens] or null. distance, squares:
// their rows among the statistics or coefficients, 0 for none.
extern "C" void emulate_statistics(const void* logits, int dtype, std::int64_t row_stride,
                                   std::int64_t tokens, int columns, const std::int64_t* target,
                                   std::int64_t vocab_start, std::int64_t ignore_index,
                                   float softcap, float temperature,
                                   const float* inverse_temperatures, int distance, int squares,
                                   int splits, float* out) {
  const Case c{row_stride, tokens, columns, {target, vocab_start, ignore_index},
               LogitScale(softcap, 1 / temperature), inverse_temperatures,
               {(distance != 0) + (squares != 0), distance, squares}};
  choose(dtype, [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(logits);
    using T = decltype(zero);
    if (softcap != 0) {
      statistics<T, true, true>(data, c, splits, out);
    } else if (c.extra.count) {
      statistics<T, false, true>(data, c, splits, out);
    } else {
      statistics<T, false, false>(data, c, splits, out);
    }
  });
}

extern "C" void emulate_gradient(const void* logits, int dtype, std::int64_t row_stride,
                                 std::int64_t tokens, int columns, const std::int64_t* target,
                                 std::int64_t vocab_start, std::int64_t ignore_index,
                                 float softcap, float temperature,
                                 const float* inverse_temperatures, int distance, int squares,
                                 const float* coefficients, void* out,
                                 std::int64_t out_row_stride, int width) {
  const Case c{row_stride, tokens, columns, {target, vocab_start, ignore_index},
               LogitScale(softcap, 1 / temperature), inverse_temperatures,
               {(distance != 0) + (squares != 0), distance, squares}};
  choose(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto* from = static_cast<const T*>(logits);
    auto* to = static_cast<T*>(out);
    if (softcap == 0) gradient<T, false>(from, c, coefficients, to, out_row_stride, width);
    if (softcap != 0) gradient<T, true>(from, c, coefficients, to, out_row_stride, width);
  });
}
