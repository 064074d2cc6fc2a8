// The kernels of csrc on memory without a byte to spare, from several threads at once, to be built
// with sanitizers: AddressSanitizer sees a read past a row, ThreadSanitizer a row written twice.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "../../csrc/parallel_for.h"
#include "../../csrc/shard_ops.h"

using namespace infoentropy;

namespace {

template <class T>
std::unique_ptr<T[]> exactly(std::size_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

// A finite number below 2 of the type: its exponent is at most that of 1.
void fill(unsigned char* data, std::size_t count, int dtype, unsigned seed) {
  const std::size_t size = dtype == 0 ? 4 : 2;
  for (std::size_t i = 0; i < count; ++i) {
    seed = seed * 1664525 + 1013904223;
    const std::uint32_t mantissa = seed >> 9;
    const std::uint32_t bits = dtype == 0   ? 0x3f800000 | mantissa
                               : dtype == 1 ? 0x3f80 | (mantissa & 0x7f)
                                            : 0x3c00 | (mantissa & 0x3ff);
    std::memcpy(data + i * size, &bits, size);
  }
}

int use(std::int64_t tokens, std::int64_t columns, std::int64_t padding, int dtype,
        const Options& options) {
  const std::size_t size = dtype == 0 ? 4 : 2;
  const std::int64_t stride = columns + padding;
  const std::size_t count = tokens > 0 ? (tokens - 1) * stride + columns : 0;
  const auto z = exactly<unsigned char>(count * size);
  fill(z.get(), count, dtype, static_cast<unsigned>(columns));
  const auto target = exactly<std::int64_t>(tokens);
  for (std::int64_t i = 0; i < tokens; ++i) target[i] = i % 3 == 1 ? -100 : i % (2 * columns);
  const int rows = options.rows();
  const auto one = exactly<float>(rows * tokens), many = exactly<float>(rows * tokens);
  const Logits logits{z.get(), static_cast<Dtype>(dtype), stride, tokens, columns};
  const Targets targets{target.get(), 0, -100};
  shard_statistics(logits, targets, options, one.get(), 1);
  shard_statistics(logits, targets, options, many.get(), 4);
  int differences = std::memcmp(one.get(), many.get(), rows * tokens * sizeof(float)) != 0;

  const auto out = exactly<unsigned char>(tokens * stride * size);
  shard_gradient(logits, targets, options, one.get(), out.get(), stride, stride, 4);
  shard_gradient(logits, targets, options, one.get(), z.get(), stride, columns, 1);  // in place
  for (std::int64_t i = 0; i < tokens; ++i) {
    const std::size_t start = i * stride * size;
    differences += std::memcmp(out.get() + start, z.get() + start, columns * size) != 0;
  }
  return differences;
}

}  // namespace

int main() {
  int differences = 0;
  const Options every[] = {{},
                           {0, 1, nullptr, true, false},
                           {0, 1, nullptr, false, true},
                           {30, 1.4f, nullptr, false, false},
                           {5, 2, nullptr, true, true}};
  for (const std::string& name : instruction_sets()) {
    if (!use_instruction_set(name)) return 1;
    for (const Options& options : every) {
      for (int dtype = 0; dtype < 3; ++dtype) {
        for (std::int64_t columns : {1, 3, 8, 15, 17, 31, 33, 64, 1025}) {
          for (std::int64_t tokens : {0, 1, 2, 37}) {
            for (std::int64_t padding : {0, 5}) {
              differences += use(tokens, columns, padding, dtype, options);
            }
          }
        }
      }
    }
  }
  std::vector<std::thread> callers;  // as ranks that are threads of one process
  std::vector<int> found(3);
  for (int& differences_here : found) {
    callers.emplace_back([&] { differences_here = use(200, 513, 1, 1, {}); });
  }
  for (std::thread& caller : callers) caller.join();
  for (int differences_here : found) differences += differences_here;
  std::printf("%d differences\n", differences);
  return differences > 0;
}
