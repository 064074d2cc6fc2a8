// Registers of floats in the compiler's portable vector types: reading and writing them as the three
// storage types, and the two functions the kernels need, 2^t and tanh. Compiled once per instruction
// set, inside a namespace that defines kLanes (floats in a register); INFOENTROPY_ISA says which
// time it is. No include guard, on purpose.

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t IVec __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t UVec __attribute__((vector_size(4 * kLanes)));
typedef std::int16_t I16Vec __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t U16Vec __attribute__((vector_size(4 * kLanes)));

// Two registers of neighbouring columns, in an order that only loading and storing know.
struct Pair {
  Vec a, b;
};
constexpr std::int64_t kPair = 2 * kLanes;

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;
constexpr float kInfinity = __builtin_inff();

static ALWAYS_INLINE Vec splat(float value) { return value - Vec{}; }

// maximum: b where either is NaN, or NaN.  fused: a * b + c, rounded once.  stream: a write around
// the caches, to an aligned address.
#if INFOENTROPY_ISA == INFOENTROPY_AVX512
constexpr bool kHasFused = true;
// Masks of ones compile to nothing; GCC 12 warns of its own headers where there is no mask.
constexpr __mmask16 kAll = 0xffff;
static ALWAYS_INLINE Vec maximum(Vec a, Vec b) {
  return (Vec)_mm512_maskz_max_ps(kAll, (__m512)a, (__m512)b);
}
static ALWAYS_INLINE Vec fused(Vec a, Vec b, Vec c) {
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
static ALWAYS_INLINE void stream(void* to, UVec value) {
  _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)value);
}
#elif INFOENTROPY_ISA == INFOENTROPY_AVX2
constexpr bool kHasFused = true;
static ALWAYS_INLINE Vec maximum(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
static ALWAYS_INLINE Vec fused(Vec a, Vec b, Vec c) {
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
static ALWAYS_INLINE void stream(void* to, UVec value) {
  _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)value);
}
#elif defined(__x86_64__)
constexpr bool kHasFused = false;
static ALWAYS_INLINE Vec maximum(Vec a, Vec b) { return (Vec)_mm_max_ps((__m128)a, (__m128)b); }
static ALWAYS_INLINE Vec fused(Vec a, Vec b, Vec c) { return a * b + c; }
static ALWAYS_INLINE void stream(void* to, UVec value) {
  _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)value);
}
#elif defined(__aarch64__)
constexpr bool kHasFused = true;
static ALWAYS_INLINE Vec maximum(Vec a, Vec b) { return (Vec)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
static ALWAYS_INLINE Vec fused(Vec a, Vec b, Vec c) {
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
static ALWAYS_INLINE void stream(void* to, UVec value) { __builtin_memcpy(to, &value, sizeof value); }
#else
constexpr bool kHasFused = false;
static ALWAYS_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
static ALWAYS_INLINE Vec fused(Vec a, Vec b, Vec c) { return a * b + c; }
static ALWAYS_INLINE void stream(void* to, UVec value) { __builtin_memcpy(to, &value, sizeof value); }
#endif

// The compiler may not look through this: keeps it from fusing a product with a later sum where
// several places must round alike.
static ALWAYS_INLINE Vec rounded(Vec value) {
#if defined(__x86_64__)
  __asm__("" : "+v"(value));
#elif defined(__aarch64__)
  __asm__("" : "+w"(value));
#else
  volatile Vec kept = value;
  value = kept;
#endif
  return value;
}

static ALWAYS_INLINE Vec select(IVec condition, Vec yes, Vec no) { return condition ? yes : no; }

static ALWAYS_INLINE float horizontal_maximum(Vec value) {  // NaN if the first lane is, else without NaN
  float result = value[0];
  for (int lane = 1; lane < kLanes; ++lane) result = value[lane] > result ? value[lane] : result;
  return result;
}

static ALWAYS_INLINE std::int32_t sum_of_lanes(IVec value) {
  std::int32_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result += value[lane];
  return result;
}

static ALWAYS_INLINE double horizontal_sum(Vec value) {
  double result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result += value[lane];
  return result;
}

static ALWAYS_INLINE bool any(IVec condition) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (condition[lane]) return true;
  }
  return false;
}

static ALWAYS_INLINE UVec words(const void* from) {
  UVec value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

static ALWAYS_INLINE Pair load(const float* from) {
  return {(Vec)words(from), (Vec)words(from + kLanes)};
}

// Two 16-bit columns share a 32-bit word: the even ones become one register, the odd ones another.
static ALWAYS_INLINE Pair load(const BFloat16* from) {
  const UVec both = words(from);
  return {(Vec)(both << 16), (Vec)(both & 0xffff0000u)};
}

// To nearest, ties to even, in the upper halves; the lower ones hold what was cut off. A NaN stays
// one if its lower half is 0. So it is in every NaN here: they come of a bfloat16, of an operation,
// or of a coefficient, whose NaN shard_gradient replaces once a row rather than here once a column.
static ALWAYS_INLINE UVec round_to_bfloat16(Vec value) {
  const UVec bits = (UVec)value;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

static ALWAYS_INLINE UVec pack(Pair value, BFloat16) {
  const UVec a = round_to_bfloat16(value.a) >> 16, b = round_to_bfloat16(value.b);
#if INFOENTROPY_ISA == INFOENTROPY_AVX2
  return (UVec)_mm256_blend_epi16((__m256i)a, (__m256i)b, 0xaa);
#else
  return a | (b & 0xffff0000u);
#endif
}

#if INFOENTROPY_ISA == INFOENTROPY_AVX512
static ALWAYS_INLINE Pair load(const Float16* from) {
  const auto at = reinterpret_cast<const __m256i*>(from);
  return {(Vec)_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(at)),
          (Vec)_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(at + 1))};
}
static ALWAYS_INLINE UVec pack(Pair value, Float16) {
  const __m256i a = _mm512_maskz_cvtps_ph(kAll, (__m512)value.a, _MM_FROUND_TO_NEAREST_INT);
  const __m256i b = _mm512_maskz_cvtps_ph(kAll, (__m512)value.b, _MM_FROUND_TO_NEAREST_INT);
  return (UVec)_mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(a), b, 1);
}
#elif INFOENTROPY_ISA == INFOENTROPY_AVX2
static ALWAYS_INLINE Pair load(const Float16* from) {
  const auto at = reinterpret_cast<const __m128i*>(from);
  return {(Vec)_mm256_cvtph_ps(_mm_loadu_si128(at)), (Vec)_mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
}
static ALWAYS_INLINE UVec pack(Pair value, Float16) {
  const __m128i a = _mm256_cvtps_ph((__m256)value.a, _MM_FROUND_TO_NEAREST_INT);
  const __m128i b = _mm256_cvtps_ph((__m256)value.b, _MM_FROUND_TO_NEAREST_INT);
  return (UVec)_mm256_set_m128i(b, a);
}
#elif defined(__aarch64__)
static ALWAYS_INLINE Pair load(const Float16* from) {
  const auto at = reinterpret_cast<const float16_t*>(from);
  return {(Vec)vcvt_f32_f16(vld1_f16(at)), (Vec)vcvt_f32_f16(vld1_f16(at + 4))};
}
static ALWAYS_INLINE UVec pack(Pair value, Float16) {
  return (UVec)vcombine_f16(vcvt_f16_f32((float32x4_t)value.a), vcvt_f16_f32((float32x4_t)value.b));
}
#else
static ALWAYS_INLINE Vec widen_float16(UVec half) {
  const UVec magnitude = (half & 0x7fffu) << 13;
  const Vec finite = (Vec)magnitude * 0x1p112f;  // moves the exponent's bias; exact, subnormals too
  const IVec special = magnitude >= 0x0f800000u;  // infinity and NaN keep the largest exponent
  return (Vec)((UVec)select(special, (Vec)(magnitude | 0x7f800000u), finite) |
               (half & 0x8000u) << 16);
}

static ALWAYS_INLINE UVec narrow_float16(Vec value) {  // to nearest, ties to even
  const UVec bits = (UVec)value, sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  const UVec normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Below 2^-14: the sum with 1/2 has its last bit where a subnormal float16 has it.
  const UVec subnormal = (UVec)((Vec)magnitude + 0.5f) - 0x3f000000u;
  UVec half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u - UVec{} : half;
  half = magnitude > 0x7f800000u ? 0x7e00u - UVec{} : half;
  return half | sign;
}

static ALWAYS_INLINE Pair load(const Float16* from) {
  const UVec both = words(from);
  return {widen_float16(both & 0xffffu), widen_float16(both >> 16)};
}
static ALWAYS_INLINE UVec pack(Pair value, Float16) {
  return narrow_float16(value.a) | narrow_float16(value.b) << 16;
}
#endif

static ALWAYS_INLINE void store(float* to, Pair value) {
  __builtin_memcpy(to, &value.a, sizeof value.a);  // together they would pass through the stack
  __builtin_memcpy(to + kLanes, &value.b, sizeof value.b);
}

template <class T>
static ALWAYS_INLINE void store(T* to, Pair value) {
  const UVec packed = pack(value, T{});
  __builtin_memcpy(to, &packed, sizeof packed);
}

static ALWAYS_INLINE void stream(float* to, Pair value) {
  stream(static_cast<void*>(to), (UVec)value.a);
  stream(static_cast<void*>(to + kLanes), (UVec)value.b);
}

template <class T>
static ALWAYS_INLINE void stream(T* to, Pair value) {
  stream(static_cast<void*>(to), pack(value, T{}));
}

static ALWAYS_INLINE float minus_infinity(float) { return -kInfinity; }
static ALWAYS_INLINE BFloat16 minus_infinity(BFloat16) { return {0xff80}; }
static ALWAYS_INLINE Float16 minus_infinity(Float16) { return {0xfc00}; }

template <class T>
static ALWAYS_INLINE float read_one(const T* from) {
  T copies[kPair];
  for (T& copy : copies) copy = *from;
  return load(copies).a[0];
}

template <class T>
static ALWAYS_INLINE void write_one(T* to, float value) {
  T copies[kPair];
  store(copies, Pair{splat(value), splat(value)});
  *to = copies[0];
}

// 2^t = scale (1 + p f) for t near or below 0; exactly 1 at 0, exactly 0 at and below -127; NaN
// stays. Expects clamp_exponent(t).
struct Power {
  Vec scale, p, f;  // scale = 2^n, |f| <= 1/2
};

// kDegree 5: relative error below 2e-7. 4: below 3e-6, for bfloat16 gradients: 1 in 3000 rounds to
// the neighbour of what degree 5 gives, which takes 7 to 12 % longer (measured with AVX2 and SSE2).
template <int kDegree = 5>
static ALWAYS_INLINE Power power_of_2(Vec t) {
  // Adding 1.5 * 2^23 rounds t to an integer n that then stands in the low mantissa bits; adding the
  // exponent bias 127 along makes a shift by 23 yield 2^n, and 0 for n = -127.
  constexpr float kRound = 12582912.0f + 127.0f;
  const Vec shifted = t + kRound;
  const Vec f = t - (shifted - kRound);
  // Minimax polynomials of 2^f in relative error with value 1 at 0: 9.1e-8 and 2.8e-6.
  Vec p;
  if constexpr (kDegree == 5) {
    p = splat(1.3264727313071489e-3f);
    p = p * f + 9.6715129911899567e-3f;
    p = p * f + 5.5507335811853409e-2f;
    p = p * f + 2.4022242426872253e-1f;
    p = p * f + 6.9314700365066528e-1f;
  } else {
    p = splat(9.5828550950429400e-3f);
    p = p * f + 5.5906430328652570e-2f;
    p = p * f + 2.4024098610206435e-1f;
    p = p * f + 6.9312419276242931e-1f;
  }
  return {(Vec)((UVec)shifted << 23), p, f};
}

template <int kDegree = 5>
static ALWAYS_INLINE Vec exp2_of(Vec t) {
  const Power power = power_of_2<kDegree>(t);
  return (power.p * power.f + 1.0f) * power.scale;
}

// Keeps -inf out of the products that follow (0 * inf), where 2^t is exactly 0 anyway.
static ALWAYS_INLINE Vec clamp_exponent(Vec t) { return maximum(splat(-127.0f), t); }
