// Compiles the .inl files once per instruction set, by attributes,
// so that one portable build serves every processor, and chooses among them when first asked.
#include "instruction_sets.h"

#include <atomic>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// In the loops over a row nothing may stay a call: its operands would pass through memory.
#define ALWAYS_INLINE inline __attribute__((always_inline))

#define INFOENTROPY_BASELINE 0
#define INFOENTROPY_AVX2 1
#define INFOENTROPY_AVX512 2

namespace infoentropy {
namespace {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

namespace baseline {  // SSE2 or NEON, whatever the compiler may use unasked
constexpr int kLanes = 4;
#define INFOENTROPY_ISA INFOENTROPY_BASELINE
#include "vectors.inl"
#include "meanings.inl"
#include "shard_kernels.inl"
#undef INFOENTROPY_ISA
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
constexpr int kLanes = 8;
#define INFOENTROPY_ISA INFOENTROPY_AVX2
#include "vectors.inl"
#include "meanings.inl"
#include "shard_kernels.inl"
#undef INFOENTROPY_ISA
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
namespace avx512 {
constexpr int kLanes = 16;
#define INFOENTROPY_ISA INFOENTROPY_AVX512
#include "vectors.inl"
#include "meanings.inl"
#include "shard_kernels.inl"
#undef INFOENTROPY_ISA
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// The compilers' own question does not know f16c everywhere.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

struct InstructionSet {
  const char* name;
  bool (*available)();
  const Kernels* kernels;
};

constexpr InstructionSet kInstructionSets[] = {  // best first
#if defined(__x86_64__)
    {"avx512", has_avx512, &avx512::kKernels},
    {"avx2", has_avx2, &avx2::kKernels},
#endif
    {"baseline", [] { return true; }, &baseline::kKernels},
};

const InstructionSet* best() {
  const InstructionSet* set = kInstructionSets;
  while (!set->available()) ++set;
  return set;
}

std::atomic<const InstructionSet*> in_use{best()};

}  // namespace

const Kernels& kernels() { return *in_use.load()->kernels; }

void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : kInstructionSets) {
    if (set.available()) names.push_back(set.name);
  }
  return names;
}

const char* instruction_set() { return in_use.load()->name; }

bool use_instruction_set(const std::string& name) {
  for (const InstructionSet& set : kInstructionSets) {
    if (name == set.name && set.available()) {
      in_use = &set;
      return true;
    }
  }
  return false;
}

}  // namespace infoentropy
