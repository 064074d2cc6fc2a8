// What this processor can do at best, for comparison with the kernels: read, copy, exponentials.
// Included once per instruction set, after shard_kernels.inl. Sizes are multiples of 256 bytes.

constexpr std::int64_t kWord = sizeof(UVec);

static std::uint32_t read_all(const char* from, std::int64_t bytes) {
  UVec a = {}, b = {}, c = {}, d = {};
  for (std::int64_t i = 0; i < bytes; i += 4 * kWord) {
    __builtin_prefetch(from + i + 4096);
    a ^= words(from + i), b ^= words(from + i + kWord);
    c ^= words(from + i + 2 * kWord), d ^= words(from + i + 3 * kWord);
  }
  const UVec all = a ^ b ^ c ^ d;
  std::uint32_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result ^= all[lane];
  return result;
}

static void copy_all(const char* from, char* to, std::int64_t bytes) {  // around the caches
  for (std::int64_t i = 0; i < bytes; i += 2 * kWord) {
    __builtin_prefetch(from + i + 4096);
    const UVec a = words(from + i), b = words(from + i + kWord);
    stream(to + i, a);
    stream(to + i + kWord, b);
  }
}

// In place: reads a line, writes it back changed.
static void change_all(char* data, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 2 * kWord) {
    __builtin_prefetch(data + i + 4096);
    const UVec a = words(data + i) ^ 0x10001u, b = words(data + i + kWord) ^ 0x10001u;
    __builtin_memcpy(data + i, &a, kWord);
    __builtin_memcpy(data + i + kWord, &b, kWord);
  }
}

// The sum of 2^((x - m) log2 e) over a row that stays in the first-level cache, `rounds` times: the
// least arithmetic that any log-sum-exp with this polynomial does.
template <class T>
static float sum_exponentials(const void* row, std::int64_t count, std::int64_t rounds) {
  const T* z = static_cast<const T*>(row);
  const Origin<kHasFused> origin(0.0f);
  Vec a = {}, b = {};
  for (std::int64_t round = 0; round < rounds; ++round) {
    for (std::int64_t i = 0; i < count; i += kPair) {
      const Pair pair = load(z + i);
      a += exp2_of(origin.exponent(pair.a));
      b += exp2_of(origin.exponent(pair.b));
    }
  }
  return static_cast<float>(horizontal_sum(a + b));
}

constexpr Limits kLimits = {
    read_all, copy_all, change_all,
    {sum_exponentials<float>, sum_exponentials<BFloat16>, sum_exponentials<Float16>}};
