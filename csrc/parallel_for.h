// Runs work over [0, count) on a few threads that take blocks from a shared counter, so that rows of
// unequal cost (ignored tokens cost nothing) stay balanced. Every index is computed by the same code
// whichever thread takes it: results do not depend on the number of threads.
//
// The threads are those that torch already has, where its OpenMP runtime is found in the process:
// after an operation of torch they go on spinning for some milliseconds, and threads of our own would
// have to share the cores with them. Elsewhere, and in a forked child, which has none of its parent's
// threads, they are started for the call.
#pragma once

#include <atomic>
#include <cstdint>

namespace infoentropy {

// Calls task(data) on up to `threads` threads at once, the calling one among them, and waits.
void run_on_threads(int threads, void (*task)(void*), void* data);

template <class Work>  // Work: void(std::int64_t begin, std::int64_t end)
void parallel_for(std::int64_t count, std::int64_t block, int threads, const Work& work) {
  if (threads <= 1 || count <= block) {
    if (count > 0) work(std::int64_t{0}, count);
    return;
  }
  std::atomic<std::int64_t> next{0};
  auto take_blocks = [&] {
    for (std::int64_t begin; (begin = next.fetch_add(block)) < count;) {
      work(begin, begin + block < count ? begin + block : count);
    }
  };
  const std::int64_t blocks = (count + block - 1) / block;
  run_on_threads(blocks < threads ? static_cast<int>(blocks) : threads,
                 [](void* task) { (*static_cast<decltype(take_blocks)*>(task))(); }, &take_blocks);
}

}  // namespace infoentropy
