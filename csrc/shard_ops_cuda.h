// The two functions of shard_ops.h for memory of a GPU: launched on a stream and not waited for.
#pragma once

#include "shard_ops.h"

namespace infoentropy::cuda {

struct Launch {
  int device;
  void* stream;  // cudaStream_t
};

// splits: blocks that share a row; where there are several, workspace holds kWorkspaceFloats floats
// a split and token. How rows are split decides how sums are rounded.
constexpr int kMaxSplits = 32;
constexpr int kWorkspaceFloats = 7;
void shard_statistics(const Logits&, const Targets&, const Options&, float* statistics, int splits,
                      float* workspace, const Launch&);

void shard_gradient(const Logits&, const Targets&, const Options&, const float* coefficients,
                    void* out, std::int64_t out_row_stride, std::int64_t width, const Launch&);

}  // namespace infoentropy::cuda
