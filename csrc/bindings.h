// How Python calls a function of the extension: by name, with the addresses and sizes of
// kernels/native.py's `arguments`, then with what is that function's own.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "shard_ops.h"

namespace infoentropy {

constexpr const char* kFillsStatistics =
    "Fills float [4 to 6, tokens]: MAX, TAIL, SPREAD, TARGET, DISTANCE, SQUARES.";
constexpr const char* kFillsGradient =
    "Fills [tokens, width] of the logits' dtype from float [4 to 6, tokens]: SHIFT, SCALE, SLOPE, "
    "TARGET_GRADIENT, OFFSET, QUADRATIC.";

struct Call {
  Logits logits;
  Targets targets;
  Options options;

  void require_width(std::int64_t width) const {
    if (logits.columns > width) throw std::invalid_argument("columns exceed the width of the output");
  }
};

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// function: void(const Call&, Own...); names: a pybind11::arg for each of its own.
template <class... Own, class Function, class... Names>
void define(pybind11::module_& module, const char* name, const char* says, Function function,
            const Names&... names) {
  using namespace pybind11::literals;
  module.def(
      name,
      [function](std::uintptr_t logits, const std::string& dtype, std::int64_t row_stride,
                 std::int64_t tokens, std::uintptr_t target, std::int64_t vocab_start,
                 std::int64_t columns, std::int64_t ignore_index, float softcap, float temperature,
                 std::uintptr_t inverse_temperatures, bool distance, bool squares, Own... own) {
        const Call call{
            {pointer<void>(logits), dtype_named(dtype), row_stride, tokens, columns},
            {pointer<std::int64_t>(target), vocab_start, ignore_index},
            {softcap, 1.0f / temperature, pointer<const float>(inverse_temperatures), distance, squares}};
        function(call, own...);
      },
      pybind11::kw_only(), "logits"_a, "dtype"_a, "row_stride"_a, "tokens"_a, "target"_a,
      "vocab_start"_a, "columns"_a, "ignore_index"_a, "softcap"_a, "temperature"_a,
      "inverse_temperatures"_a, "distance"_a, "squares"_a, names..., says);
}

}  // namespace infoentropy
