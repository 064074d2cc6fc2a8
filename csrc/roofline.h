// What this processor can do at best: passes over memory and exponentials from the cache, on the same
// threads and instruction set as the kernels, to be timed beside them.
#pragma once

#include "shard_ops.h"

namespace infoentropy {

// Each is one pass; sizes in bytes are rounded down to 4 KiB blocks.
std::uint32_t roofline_read(const void* from, std::int64_t bytes, int threads);
void roofline_copy(const void* from, void* to, std::int64_t bytes, int threads);  // streamed
void roofline_change(void* data, std::int64_t bytes, int threads);                // in place

// About `count` exponentials of logits of that type, conversion included; returns how many.
std::int64_t roofline_exponentials(Dtype, std::int64_t count, int threads);

}  // namespace infoentropy
