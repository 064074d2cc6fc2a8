// Runs work over [0, count) on a few threads that take blocks from a shared counter, so that rows of
// unequal cost (ignored tokens cost nothing) stay balanced. Every index is computed by the same code
// whichever thread takes it: results do not depend on the number of threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace infoentropy {

template <class Work>  // Work: void(std::int64_t begin, std::int64_t end)
void parallel_for(std::int64_t count, std::int64_t block, int threads, const Work& work) {
  if (threads <= 1 || count <= block) {
    if (count > 0) work(std::int64_t{0}, count);
    return;
  }
  std::atomic<std::int64_t> next{0};
  const auto take_blocks = [&] {
    for (std::int64_t begin; (begin = next.fetch_add(block)) < count;) {
      work(begin, begin + block < count ? begin + block : count);
    }
  };
  const std::int64_t blocks = (count + block - 1) / block;
  std::vector<std::thread> helpers;
  try {
    for (std::int64_t i = 1; i < threads && i < blocks; ++i) helpers.emplace_back(take_blocks);
  } catch (const std::system_error&) {
    // The system grants no more threads: those there are, at least this one, do all the work.
  }
  take_blocks();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace infoentropy
