// The Python face of shard_ops.h: addresses and sizes, checked, without the interpreter's lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "shard_ops.h"

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

void bind_shard_ops(py::module_& module) {
  module.def(
      "shard_statistics",
      [](std::uintptr_t logits, const std::string& dtype, std::int64_t row_stride,
         std::int64_t tokens, std::uintptr_t target, std::int64_t vocab_start,
         std::int64_t columns, std::int64_t ignore_index, float softcap, float temperature,
         std::uintptr_t inverse_temperatures, bool distance, bool squares, std::uintptr_t statistics, int threads) {
        const Logits x{pointer<void>(logits), dtype_named(dtype), row_stride, tokens, columns};
        const Targets y{pointer<std::int64_t>(target), vocab_start, ignore_index};
        py::gil_scoped_release unlocked;
        shard_statistics(x, y, options_of(softcap, temperature, inverse_temperatures, distance, squares), pointer<float>(statistics),
                         threads);
      },
      py::kw_only(), "logits"_a, "dtype"_a, "row_stride"_a, "tokens"_a, "target"_a,
      "vocab_start"_a, "columns"_a, "ignore_index"_a, "softcap"_a = 0.0f, "temperature"_a = 1.0f,
      "inverse_temperatures"_a = 0, "distance"_a = false, "squares"_a = false, "statistics"_a, "threads"_a,
      "Fills float [4 to 6, tokens]: MAX, TAIL, SPREAD, TARGET, DISTANCE, SQUARES.");

  module.def(
      "shard_gradient",
      [](std::uintptr_t logits, const std::string& dtype, std::int64_t row_stride,
         std::int64_t tokens, std::int64_t width, std::uintptr_t target, std::int64_t vocab_start,
         std::int64_t columns, std::int64_t ignore_index, float softcap, float temperature,
         std::uintptr_t inverse_temperatures, bool distance, bool squares, std::uintptr_t coefficients, std::uintptr_t out,
         std::int64_t out_row_stride, int threads) {
        if (columns > width) throw std::invalid_argument("columns exceed the width of the output");
        const Logits x{pointer<void>(logits), dtype_named(dtype), row_stride, tokens, columns};
        const Targets y{pointer<std::int64_t>(target), vocab_start, ignore_index};
        py::gil_scoped_release unlocked;
        shard_gradient(x, y, options_of(softcap, temperature, inverse_temperatures, distance, squares), pointer<float>(coefficients),
                       pointer<void>(out), out_row_stride, width, threads);
      },
      py::kw_only(), "logits"_a, "dtype"_a, "row_stride"_a, "tokens"_a, "width"_a, "target"_a,
      "vocab_start"_a, "columns"_a, "ignore_index"_a, "softcap"_a = 0.0f, "temperature"_a = 1.0f,
      "inverse_temperatures"_a = 0, "distance"_a = false, "squares"_a = false, "coefficients"_a, "out"_a, "out_row_stride"_a, "threads"_a,
      "Fills [tokens, width] of the logits' dtype from float [4 to 6, tokens]: SHIFT, SCALE, "
      "SLOPE, TARGET_GRADIENT, OFFSET, QUADRATIC.");

  module.def("instruction_sets", &instruction_sets, "What this processor can run, best first.");
  module.def("instruction_set", &instruction_set, "The vector instructions in use.");
  module.def("use_instruction_set", &use_instruction_set, "name"_a,
             "Forces one of instruction_sets(); False where the processor lacks it.");
}

}  // namespace

#if INFOENTROPY_CUDA
void bind_cuda(py::module_& module);  // bindings_cuda.cpp
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "The kernels of megatron_infoentropy.kernels.contract, over raw addresses.";
  bind_shard_ops(module);
#if INFOENTROPY_CUDA
  bind_cuda(module);
#endif
}
