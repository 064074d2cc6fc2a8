// Which threads parallel_for.h runs on.
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__)
#include <dlfcn.h>
#include <unistd.h>
#endif

#include "parallel_for.h"

namespace infoentropy {
namespace {

// The entry of GNU's OpenMP runtime (LLVM's has it too) behind `#pragma omp parallel`: looked up, not
// linked, since a second runtime would bring a second set of threads.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

OpenMpParallel find_torch_threads() {
#if defined(__unix__)
  static const pid_t owner = getpid();
  static const auto found =
      reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return getpid() == owner ? found : nullptr;
#else
  return nullptr;
#endif
}

// At load, so that a later fork is recognised even if the parent never computed anything.
[[maybe_unused]] const OpenMpParallel loaded = find_torch_threads();

}  // namespace

void run_on_threads(int threads, void (*task)(void*), void* data) {
  if (const OpenMpParallel parallel = find_torch_threads()) {
    parallel(task, data, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < threads; ++i) helpers.emplace_back(task, data);
  } catch (const std::system_error&) {
    // The system grants no more threads: those there are, at least this one, do all the work.
  }
  task(data);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace infoentropy
