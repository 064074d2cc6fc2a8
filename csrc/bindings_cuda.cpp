// The Python face of shard_ops_cuda.h: addresses and sizes on a GPU, launched and not waited for.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "shard_ops_cuda.h"

namespace py = pybind11;
using namespace pybind11::literals;
using namespace infoentropy;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Options options_of(float softcap, float temperature, std::uintptr_t inverse_temperatures,
                   bool distance, bool squares) {
  return {softcap, 1.0f / temperature, pointer<const float>(inverse_temperatures), distance, squares};
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.def(
      "cuda_shard_statistics",
      [](std::uintptr_t logits, const std::string& dtype, std::int64_t row_stride,
         std::int64_t tokens, std::uintptr_t target, std::int64_t vocab_start,
         std::int64_t columns, std::int64_t ignore_index, float softcap, float temperature,
         std::uintptr_t inverse_temperatures, bool distance, bool squares, std::uintptr_t statistics, int splits, std::uintptr_t workspace,
         int device, std::uintptr_t stream) {
        const Logits x{pointer<void>(logits), dtype_named(dtype), row_stride, tokens, columns};
        const Targets y{pointer<std::int64_t>(target), vocab_start, ignore_index};
        cuda::shard_statistics(x, y, options_of(softcap, temperature, inverse_temperatures, distance, squares), pointer<float>(statistics),
                               splits, pointer<float>(workspace),
                               {device, pointer<void>(stream)});
      },
      py::kw_only(), "logits"_a, "dtype"_a, "row_stride"_a, "tokens"_a, "target"_a,
      "vocab_start"_a, "columns"_a, "ignore_index"_a, "softcap"_a, "temperature"_a,
      "inverse_temperatures"_a, "distance"_a, "squares"_a,
      "statistics"_a, "splits"_a, "workspace"_a, "device"_a, "stream"_a,
      "Fills float [4 to 6, tokens]: MAX, TAIL, SPREAD, TARGET, DISTANCE, SQUARES.");

  module.def(
      "cuda_shard_gradient",
      [](std::uintptr_t logits, const std::string& dtype, std::int64_t row_stride,
         std::int64_t tokens, std::int64_t width, std::uintptr_t target, std::int64_t vocab_start,
         std::int64_t columns, std::int64_t ignore_index, float softcap, float temperature,
         std::uintptr_t inverse_temperatures, bool distance, bool squares, std::uintptr_t coefficients, std::uintptr_t out,
         std::int64_t out_row_stride, int device, std::uintptr_t stream) {
        if (columns > width) throw std::invalid_argument("columns exceed the width of the output");
        const Logits x{pointer<void>(logits), dtype_named(dtype), row_stride, tokens, columns};
        const Targets y{pointer<std::int64_t>(target), vocab_start, ignore_index};
        cuda::shard_gradient(x, y, options_of(softcap, temperature, inverse_temperatures, distance, squares), pointer<float>(coefficients),
                             pointer<void>(out), out_row_stride, width,
                             {device, pointer<void>(stream)});
      },
      py::kw_only(), "logits"_a, "dtype"_a, "row_stride"_a, "tokens"_a, "width"_a, "target"_a,
      "vocab_start"_a, "columns"_a, "ignore_index"_a, "softcap"_a, "temperature"_a,
      "inverse_temperatures"_a, "distance"_a, "squares"_a,
      "coefficients"_a, "out"_a, "out_row_stride"_a, "device"_a, "stream"_a,
      "Fills [tokens, width] of the logits' dtype from float [4 to 6, tokens]: SHIFT, SCALE, "
      "SLOPE, TARGET_GRADIENT, OFFSET, QUADRATIC.");

  module.attr("CUDA_MAX_SPLITS") = cuda::kMaxSplits;
  module.attr("CUDA_WORKSPACE_FLOATS") = cuda::kWorkspaceFloats;
}
