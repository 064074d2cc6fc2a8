// The kernels of one row for every instruction set compiled in, and the choice among them.
#pragma once

#include "shard_ops.h"

namespace infoentropy {

struct Coefficients {  // of one row
  float shift, scale, slope, target, offset, quadratic;
};

// `own` is the target's column on this shard or -1; row: MAX, TAIL, SPREAD, TARGET, DISTANCE,
// SQUARES. Of the options a row has its own inverse_temperature.
using StatisticsOfRow = void (*)(const void* logits, std::int64_t columns, std::int64_t own,
                                 const Options&, float* row);

// stream_out: write around the caches; finish_streams before another thread may look.
using GradientOfRow = void (*)(const void* logits, std::int64_t columns, std::int64_t own,
                               const Coefficients&, const Options&, void* out, bool stream_out);

enum { kPlainMeaning, kScaledMeaning, kCappedMeaning };  // what is done to a stored logit first

struct Kernels {
  StatisticsOfRow statistics[3][3];  // [Dtype][meaning]
  GradientOfRow gradient[3][3];
};

// Of the instruction set in use.
const Kernels& kernels();

void finish_streams();

}  // namespace infoentropy
