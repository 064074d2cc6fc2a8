// The Python face of shard_ops.h: addresses and sizes, checked, without the interpreter's lock.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "shard_ops.h"

namespace py = pybind11;
using namespace infoentropy;

namespace {

Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "bfloat16") return Dtype::kBFloat16;
  throw std::invalid_argument("dtype must be float32 or bfloat16, got " + name);
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of megatron_infoentropy.kernels.contract, over raw addresses.";

  module.def(
      "shard_statistics",
      [](std::uintptr_t logits, const std::string& dtype, std::int64_t row_stride,
         std::int64_t tokens, std::uintptr_t target, std::int64_t vocab_start,
         std::int64_t columns, std::int64_t ignore_index, std::uintptr_t statistics, int threads) {
        const Logits x{pointer<void>(logits), parse_dtype(dtype), row_stride, tokens, columns};
        const Targets y{pointer<std::int64_t>(target), vocab_start, ignore_index};
        py::gil_scoped_release unlocked;
        shard_statistics(x, y, pointer<float>(statistics), threads);
      },
      py::kw_only(), py::arg("logits"), py::arg("dtype"), py::arg("row_stride"),
      py::arg("tokens"), py::arg("target"), py::arg("vocab_start"), py::arg("columns"),
      py::arg("ignore_index"), py::arg("statistics"), py::arg("threads"),
      "Fills float [4, tokens]: MAX, TAIL, SPREAD, TARGET.");

  module.def(
      "shard_gradient",
      [](std::uintptr_t logits, const std::string& dtype, std::int64_t row_stride,
         std::int64_t tokens, std::int64_t width, std::uintptr_t target, std::int64_t vocab_start,
         std::int64_t columns, std::int64_t ignore_index, std::uintptr_t coefficients,
         std::uintptr_t out, std::int64_t out_row_stride, int threads) {
        if (columns > width) throw std::invalid_argument("columns exceed the width of the output");
        const Logits x{pointer<void>(logits), parse_dtype(dtype), row_stride, tokens, columns};
        const Targets y{pointer<std::int64_t>(target), vocab_start, ignore_index};
        py::gil_scoped_release unlocked;
        shard_gradient(x, y, pointer<float>(coefficients), pointer<void>(out), out_row_stride,
                       width, threads);
      },
      py::kw_only(), py::arg("logits"), py::arg("dtype"), py::arg("row_stride"),
      py::arg("tokens"), py::arg("width"), py::arg("target"), py::arg("vocab_start"),
      py::arg("columns"), py::arg("ignore_index"), py::arg("coefficients"), py::arg("out"),
      py::arg("out_row_stride"), py::arg("threads"),
      "Fills [tokens, width] of the logits' dtype from float [4, tokens]: SHIFT, SCALE, SLOPE, "
      "TARGET_GRADIENT.");

  module.def("instruction_set", &instruction_set, "The vector instructions in use.");
  module.def("use_instruction_set", &use_instruction_set, py::arg("name"),
             "Forces \"avx2\" or \"baseline\"; False where the processor lacks it.");
}
