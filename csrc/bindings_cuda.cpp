// The Python face of shard_ops_cuda.h: launched on a GPU's stream and not waited for.
#include "bindings.h"
#include "shard_ops_cuda.h"

using namespace pybind11::literals;
using namespace infoentropy;

void bind_cuda(pybind11::module_& module) {
  define<std::uintptr_t, int, std::uintptr_t, int, std::uintptr_t>(
      module, "cuda_shard_statistics", kFillsStatistics,
      [](const Call& call, std::uintptr_t statistics, int splits, std::uintptr_t workspace, int device,
         std::uintptr_t stream) {
        cuda::shard_statistics(call.logits, call.targets, call.options, pointer<float>(statistics),
                               splits, pointer<float>(workspace), {device, pointer<void>(stream)});
      },
      "statistics"_a, "splits"_a, "workspace"_a, "device"_a, "stream"_a);
  define<std::int64_t, std::uintptr_t, std::uintptr_t, std::int64_t, int, std::uintptr_t>(
      module, "cuda_shard_gradient", kFillsGradient,
      [](const Call& call, std::int64_t width, std::uintptr_t coefficients, std::uintptr_t out,
         std::int64_t out_row_stride, int device, std::uintptr_t stream) {
        call.require_width(width);
        cuda::shard_gradient(call.logits, call.targets, call.options, pointer<float>(coefficients),
                             pointer<void>(out), out_row_stride, width,
                             {device, pointer<void>(stream)});
      },
      "width"_a, "coefficients"_a, "out"_a, "out_row_stride"_a, "device"_a, "stream"_a);

  module.attr("CUDA_MAX_SPLITS") = cuda::kMaxSplits;
  module.attr("CUDA_WORKSPACE_FLOATS") = cuda::kWorkspaceFloats;
}
