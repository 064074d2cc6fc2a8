// Spreads the passes of roofline.inl over the threads.
#include "roofline.h"

#include <atomic>
#include <vector>

#include "instruction_sets.h"
#include "parallel_for.h"

namespace infoentropy {
namespace {

constexpr std::int64_t kBlock = 1 << 12, kBlocksAtATime = 256;

// Work: void(std::int64_t offset, std::int64_t bytes)
template <class Work>
void over_blocks(std::int64_t bytes, int threads, const Work& work) {
  parallel_for(bytes / kBlock, kBlocksAtATime, threads, [&](std::int64_t begin, std::int64_t end) {
    work(begin * kBlock, (end - begin) * kBlock);
  });
}

}  // namespace

std::uint32_t roofline_read(const void* from, std::int64_t bytes, int threads) {
  std::atomic<std::uint32_t> result{0};
  over_blocks(bytes, threads, [&](std::int64_t offset, std::int64_t size) {
    result ^= limits().read(static_cast<const char*>(from) + offset, size);
  });
  return result;
}

void roofline_copy(const void* from, void* to, std::int64_t bytes, int threads) {
  // A stream needs an aligned address: what lies before the first one is left out.
  const std::int64_t skip = -reinterpret_cast<std::uintptr_t>(to) & (kBlock - 1);
  over_blocks(bytes - skip, threads, [&](std::int64_t offset, std::int64_t size) {
    offset += skip;
    limits().copy(static_cast<const char*>(from) + offset, static_cast<char*>(to) + offset, size);
    finish_streams();
  });
}

void roofline_change(void* data, std::int64_t bytes, int threads) {
  over_blocks(bytes, threads, [&](std::int64_t offset, std::int64_t size) {
    limits().change(static_cast<char*>(data) + offset, size);
  });
}

std::int64_t roofline_exponentials(Dtype dtype, std::int64_t count, int threads) {
  constexpr std::int64_t kColumns = 2048, kRounds = 64;
  const std::vector<char> zeros(kColumns * sizeof(float));  // logits of 0, whatever the type
  const std::int64_t calls = count / (kColumns * kRounds);
  std::atomic<float> sink{0};
  parallel_for(calls, 4, threads, [&](std::int64_t begin, std::int64_t end) {
    for (; begin < end; ++begin) {
      sink = limits().exponentials[static_cast<int>(dtype)](zeros.data(), kColumns, kRounds);
    }
  });
  return calls * kColumns * kRounds;
}

}  // namespace infoentropy
