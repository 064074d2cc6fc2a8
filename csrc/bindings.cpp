// The Python face of shard_ops.h: called without the interpreter's lock.
#include <pybind11/stl.h>

#include "bindings.h"

namespace py = pybind11;
using namespace pybind11::literals;
using namespace infoentropy;

#if INFOENTROPY_CUDA
void bind_cuda(py::module_& module);  // bindings_cuda.cpp
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "The kernels of megatron_infoentropy.kernels.contract, over raw addresses.";
  define<std::uintptr_t, int>(
      module, "shard_statistics", kFillsStatistics,
      [](const Call& call, std::uintptr_t statistics, int threads) {
        py::gil_scoped_release unlocked;
        shard_statistics(call.logits, call.targets, call.options, pointer<float>(statistics), threads);
      },
      "statistics"_a, "threads"_a);
  define<std::int64_t, std::uintptr_t, std::uintptr_t, std::int64_t, int>(
      module, "shard_gradient", kFillsGradient,
      [](const Call& call, std::int64_t width, std::uintptr_t coefficients, std::uintptr_t out,
         std::int64_t out_row_stride, int threads) {
        call.require_width(width);
        py::gil_scoped_release unlocked;
        shard_gradient(call.logits, call.targets, call.options, pointer<float>(coefficients),
                       pointer<void>(out), out_row_stride, width, threads);
      },
      "width"_a, "coefficients"_a, "out"_a, "out_row_stride"_a, "threads"_a);

  module.def("instruction_sets", &instruction_sets, "What this processor can run, best first.");
  module.def("instruction_set", &instruction_set, "The vector instructions in use.");
  module.def("use_instruction_set", &use_instruction_set, "name"_a,
             "Forces one of instruction_sets(); False where the processor lacks it.");
#if INFOENTROPY_CUDA
  bind_cuda(module);
#endif
}
