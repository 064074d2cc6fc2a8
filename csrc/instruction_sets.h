// The kernels of one row for every instruction set compiled in, and the choice among them.
#pragma once

#include "shard_ops.h"

namespace infoentropy {

struct Coefficients {  // of one row
  float shift, scale, slope, target, offset;
};

// `own` is the target's column on this shard or -1; row: MAX, TAIL, SPREAD, TARGET, DISTANCE.
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

struct Limits {  // see roofline.inl
  std::uint32_t (*read)(const char* from, std::int64_t bytes);
  void (*copy)(const char* from, char* to, std::int64_t bytes);
  void (*change)(char* data, std::int64_t bytes);
  float (*exponentials[3])(const void* row, std::int64_t count, std::int64_t rounds);  // [Dtype]
};

// Of the instruction set in use.
const Kernels& kernels();
const Limits& limits();

void finish_streams();

}  // namespace infoentropy
