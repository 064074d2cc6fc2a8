// One row of each function, written once in the compiler's portable vector types and compiled once
// per instruction set: shard_ops_cpu.cpp includes this file several times, each time inside another
// namespace that defines kLanes (floats in a register); INFOENTROPY_AVX2 says which time it is.
// No include guard, on purpose.

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t IVec __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t UVec __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t HVec __attribute__((vector_size(2 * kLanes)));

constexpr std::int64_t kChunk = 1024;  // columns between looks at the maximum: 4 KiB, stays in L1
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;
constexpr float kInfinity = __builtin_inff();

static inline Vec splat(float value) { return value - Vec{}; }

static inline Vec load(const float* from) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

static inline Vec load(const BFloat16* from) {
  HVec half;
  __builtin_memcpy(&half, from, sizeof half);
#if INFOENTROPY_AVX2  // compilers take two instructions and a join where one widens
  return (Vec)((UVec)_mm256_cvtepu16_epi32((__m128i)half) << 16);
#else
  return (Vec)(__builtin_convertvector(half, UVec) << 16);
#endif
}

static inline void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof value); }

static inline HVec to_bfloat16(Vec value) {
  const UVec bits = (UVec)value;
  const UVec nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // ties to even
  const UVec rounded = value == value ? nearest : 0x7fc0u - UVec{};
#if INFOENTROPY_AVX2  // compilers shuffle where one instruction packs
  const __m256i words = (__m256i)rounded;
  return (HVec)_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
  return __builtin_convertvector(rounded, HVec);
#endif
}

static inline void store(BFloat16* to, Vec value) {
  const HVec half = to_bfloat16(value);
  __builtin_memcpy(to, &half, sizeof half);
}

// Writes around the caches; `to` is aligned to what it writes.
#if INFOENTROPY_AVX2
static inline void stream(float* to, Vec value) { _mm256_stream_ps(to, (__m256)value); }
static inline void stream(BFloat16* to, Vec value) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)to_bfloat16(value));
}
#else
template <class T>
static inline void stream(T* to, Vec value) {
  store(to, value);
}
#endif

// b where either is NaN, as the instruction has it.
#if INFOENTROPY_AVX2
static inline Vec maximum(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
#else
static inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
#endif

static inline float horizontal_maximum(Vec value) {
  float result = value[0];
  for (int lane = 1; lane < kLanes; ++lane) result = value[lane] > result ? value[lane] : result;
  return result;
}

static inline double horizontal_sum(Vec value) {
  double result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result += value[lane];
  return result;
}

// 2^t for t <= 0, relative error below 2e-7; exactly 1 at 0, exactly 0 at and below -127; NaN stays.
// Expects clamp_exponent(t).
static inline Vec exp2_of(Vec t) {
  // Adding 1.5 * 2^23 rounds t to an integer n that then stands in the low mantissa bits; adding the
  // exponent bias 127 along makes a shift by 23 yield 2^n, and 0 for n = -127.
  constexpr float kRound = 12582912.0f + 127.0f;
  const Vec shifted = t + kRound;
  const Vec f = t - (shifted - kRound);  // in [-1/2, 1/2]
  const Vec scale = (Vec)((UVec)shifted << 23);
  // Minimax polynomial of 2^f in relative error with p(0) = 1: 9.1e-8.
  Vec p = splat(1.3264727313071489e-3f);
  p = p * f + 9.6715129911899567e-3f;
  p = p * f + 5.5507335811853409e-2f;
  p = p * f + 2.4022242426872253e-1f;
  p = p * f + 6.9314700365066528e-1f;
  p = p * f + 1.0f;
  return p * scale;
}

// Keeps -inf out of the products that follow (0 * inf), where 2^t is exactly 0 anyway.
static inline Vec clamp_exponent(Vec t) { return maximum(splat(-127.0f), t); }

// Running sums over the columns seen so far, relative to the maximum m seen so far.
struct RowSums {
  float m = -kInfinity;
  float tops = 0;   // columns whose logit is m: they stay out of `tail`, which keeps it exact
  Vec tail = {};    // sum of 2^t over the others, t = (x - m) log2 e
  Vec spread = {};  // sum of 2^t (-t)

  void raise_maximum_to(float m_new) {
    if (m != -kInfinity) {
      const float t = (m - m_new) * kLog2e;
      const float s = exp2_of(clamp_exponent(splat(t)))[0];
      if (s > 0) {
        tail[0] += tops;
        spread = (spread - t * tail) * s;
        tail *= s;
      } else {  // t may be -inf here
        spread *= 0.0f;
        tail *= 0.0f;
      }
    }
    tops = 0;
    m = m_new;
  }

  // count is a multiple of kLanes. Two independent chains of sums hide the latency of adding; the
  // chunk's own sums keep each chain short, which is what bounds the rounding error.
  template <bool kMayHoldTop, class T>
  void add(const T* x, std::int64_t count) {
    Vec tail0 = {}, tail1 = {}, spread0 = {}, spread1 = {};
    IVec tops0 = {}, tops1 = {};
    const Vec shift = splat(m);
    std::int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      // The next chunk arrives from memory while this one is being computed.
      __builtin_prefetch(x + i + kChunk);
      add_register<kMayHoldTop>(load(x + i) - shift, tail0, spread0, tops0);
      add_register<kMayHoldTop>(load(x + i + kLanes) - shift, tail1, spread1, tops1);
    }
    if (i < count) add_register<kMayHoldTop>(load(x + i) - shift, tail0, spread0, tops0);
    tail += tail0 + tail1;
    spread += spread0 + spread1;
    if (kMayHoldTop) {
      tops0 += tops1;
      for (int lane = 0; lane < kLanes; ++lane) tops -= static_cast<float>(tops0[lane]);
    }
  }

  template <bool kMayHoldTop>
  static inline void add_register(Vec d, Vec& tail, Vec& spread, IVec& tops) {
    const Vec t = clamp_exponent(d * kLog2e);
    Vec e = exp2_of(t);
    spread -= e * t;
    if (kMayHoldTop) {
      const IVec is_top = d == 0.0f;
      tops += is_top;  // -1 a top
      e = (Vec)((IVec)e & ~is_top);
    }
    tail += e;
  }
};

template <class T>
static float chunk_maximum(const T* x, std::int64_t count) {  // count is a multiple of kLanes
  Vec m0 = splat(-kInfinity), m1 = m0;
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    m0 = maximum(load(x + i), m0);
    m1 = maximum(load(x + i + kLanes), m1);
  }
  if (i < count) m0 = maximum(load(x + i), m0);
  return horizontal_maximum(maximum(m0, m1));
}

template <class T>
static bool holds_nan(const T* x, std::int64_t count) {
  IVec found = {};
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const Vec value = load(x + i);
    found |= value != value;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (found[lane]) return true;
  }
  return false;
}

template <class T>
static void add_chunk(RowSums& sums, const T* x, std::int64_t count) {
  const float chunk_m = chunk_maximum(x, count);  // ignores NaN: found below, or in the sums
  if (chunk_m == -kInfinity) {
    if (holds_nan(x, count)) sums.tail += __builtin_nanf("");
    return;
  }
  if (chunk_m > sums.m) sums.raise_maximum_to(chunk_m);
  if (chunk_m == sums.m) {
    sums.template add<true>(x, count);
  } else {
    sums.template add<false>(x, count);
  }
}

template <class T>
static void row_statistics(const T* x, std::int64_t columns, float& max, float& tail,
                           float& spread) {
  RowSums sums;
  std::int64_t i = 0;
  for (; i + kChunk <= columns; i += kChunk) add_chunk(sums, x + i, kChunk);
  const std::int64_t whole = (columns - i) / kLanes * kLanes;
  if (whole > 0) add_chunk(sums, x + i, whole);
  i += whole;
  if (i < columns) {  // fewer than one register: pad with logits that carry no mass
    float last[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      last[lane] = i + lane < columns ? to_float(x[i + lane]) : -kInfinity;
    }
    add_chunk(sums, last, kLanes);
  }
  max = sums.m;
  tail = static_cast<float>(horizontal_sum(sums.tail) + (double(sums.tops) - 1.0));
  spread = static_cast<float>(horizontal_sum(sums.spread) * kLn2);
}

struct RowCoefficients {
  float shift, scale, slope;
};

template <class T>
static inline Vec gradient_of(const T* x, const RowCoefficients& c) {
  const Vec t = clamp_exponent((load(x) - c.shift) * kLog2e);
  return exp2_of(t) * (c.scale + t * (c.slope * kLn2));
}

// Fewer columns than one register holds.
template <class T>
static void partial_gradient(const T* x, std::int64_t columns, const RowCoefficients& c, T* out) {
  T from[kLanes], to[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) from[lane] = x[lane < columns ? lane : 0];
  store(to, gradient_of(from, c));
  for (std::int64_t lane = 0; lane < columns; ++lane) out[lane] = to[lane];
}

// stream_out: write around the caches, for outputs far larger than they are.
template <class T>
static void row_gradient(const T* x, std::int64_t columns, const RowCoefficients& c, T* out,
                         bool stream_out) {
  std::int64_t i = 0;
  if (stream_out) {
    const auto address = reinterpret_cast<std::uintptr_t>(out);
    const std::int64_t misaligned = address / sizeof(T) % kLanes;
    if (misaligned != 0) {
      i = kLanes - misaligned < columns ? kLanes - misaligned : columns;
      partial_gradient(x, i, c, out);
    }
    for (; i + kLanes <= columns; i += kLanes) stream(out + i, gradient_of(x + i, c));
  } else {
    for (; i + kLanes <= columns; i += kLanes) store(out + i, gradient_of(x + i, c));
  }
  if (i < columns) partial_gradient(x + i, columns - i, c, out + i);
}
