// Numbers and memory of one GPU thread: storage types, 16 bytes at a time, 2^t and tanh.
//
// This file, cuda_statistics.h and cuda_gradient.h compile twice: for the GPU, and as plain C++ so
// that tests/kernels/emulate_cuda.cpp can walk all threads of a block on a machine without a GPU.
// Only what is inside `#ifdef __CUDACC__` differs between the two.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define INFOENTROPY_DEVICE __device__ __forceinline__
#define INFOENTROPY_UNROLL _Pragma("unroll")
#define INFOENTROPY_ROLL _Pragma("unroll 1")
#else
#define INFOENTROPY_DEVICE inline
#define INFOENTROPY_UNROLL
#define INFOENTROPY_ROLL
#endif

namespace infoentropy::cuda {

constexpr int kWarp = 32;                     // lanes
constexpr int kThreads = 256;                 // of a block
constexpr int kInFlight = 4;                  // independent 16-byte loads of a thread
constexpr int kBatch = kThreads * kInFlight;  // vectors a block reads at a time

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;
constexpr float kInfinity = __builtin_huge_valf();

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

struct alignas(16) Vector {  // 16 bytes of logits; a word holds one fp32 or two 16-bit values
  std::uint32_t word[4];
};

template <class T>
constexpr int kPerWord = 4 / sizeof(T);
template <class T>
constexpr int kPerVector = 16 / sizeof(T);

template <class To, class From>
INFOENTROPY_DEVICE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "a value keeps its bits");
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

#ifndef __CUDACC__  // what the GPU does in one instruction
inline float half_to_float_on_host(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16, rest = (half & 0x7fffu) << 13;
  if (rest >= 0x7c00u << 13) return bits_as<float>(sign | rest | 0x7f800000u);  // inf, NaN
  return bits_as<float>(sign | bits_as<std::uint32_t>(bits_as<float>(rest) * 0x1p112f));
}

inline std::uint16_t float_to_half_on_host(float value) {
  const std::uint32_t sign = (bits_as<std::uint32_t>(value) >> 16) & 0x8000u;
  const float size = std::fabs(value);
  if (!(size < 65520.0f)) return sign | (value == value ? 0x7c00u : 0x7fffu);
  int exponent;
  std::frexp(size, &exponent);
  const int step = exponent - 11 < -24 ? -24 : exponent - 11;  // exponent of the last place
  const float rounded = std::ldexp(std::nearbyint(std::ldexp(size, -step)), step);  // ties to even
  return sign | (bits_as<std::uint32_t>(rounded * 0x1p-112f) >> 13);
}
#endif

INFOENTROPY_DEVICE float low(std::uint32_t word, float) { return bits_as<float>(word); }
INFOENTROPY_DEVICE float high(std::uint32_t, float) { return 0; }
INFOENTROPY_DEVICE float low(std::uint32_t word, BFloat16) { return bits_as<float>(word << 16); }
INFOENTROPY_DEVICE float high(std::uint32_t word, BFloat16) {
  return bits_as<float>(word & 0xffff0000u);
}
INFOENTROPY_DEVICE float low(std::uint32_t word, Float16) {
#ifdef __CUDACC__
  float value;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(value) : "r"(word));
  return value;
#else
  return half_to_float_on_host(word & 0xffffu);
#endif
}
INFOENTROPY_DEVICE float high(std::uint32_t word, Float16) {
#ifdef __CUDACC__
  float value;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(word));
  return value;
#else
  return half_to_float_on_host(word >> 16);
#endif
}

// Rounds to nearest, ties to even.
INFOENTROPY_DEVICE std::uint32_t pack(float low, float, float) {
  return bits_as<std::uint32_t>(low);
}
INFOENTROPY_DEVICE std::uint32_t pack(float low, float high, BFloat16) {
#ifdef __CUDACC__
  std::uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  const auto nearest = [](float value) {
    const std::uint32_t bits = bits_as<std::uint32_t>(value);
    return value == value ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fffu;
  };
  return nearest(low) | nearest(high) << 16;
#endif
}
INFOENTROPY_DEVICE std::uint32_t pack(float low, float high, Float16) {
#ifdef __CUDACC__
  std::uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return float_to_half_on_host(low) | static_cast<std::uint32_t>(float_to_half_on_host(high)) << 16;
#endif
}

// The larger of each value of two words; of a number and a NaN, the number.
INFOENTROPY_DEVICE std::uint32_t word_maximum(std::uint32_t a, std::uint32_t b, float) {
  return bits_as<std::uint32_t>(fmaxf(bits_as<float>(a), bits_as<float>(b)));
}
template <class Half>
INFOENTROPY_DEVICE std::uint32_t word_maximum(std::uint32_t a, std::uint32_t b, Half half) {
#ifdef __CUDACC__
  std::uint32_t result;
  if constexpr (std::is_same_v<Half, BFloat16>) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  } else {
    asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  }
  return result;
#else
  return pack(fmaxf(low(a, half), low(b, half)), fmaxf(high(a, half), high(b, half)), half);
#endif
}

template <class T>
INFOENTROPY_DEVICE float to_float(T value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else {
    return low(value.bits, T{});
  }
}

template <class T>
INFOENTROPY_DEVICE T from_float(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else {
    return T{static_cast<std::uint16_t>(pack(value, 0, T{}))};
  }
}

// Logits are read twice: for the statistics, which leave in the second-level cache whatever it can
// hold, and a last time for the gradient. Neither gains from the first-level cache.
enum class Next { kReadAgain, kDone };

#ifndef __CUDACC__  // elsewhere a GPU traps; the emulation reads NaN and writes nothing
inline bool is_aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % sizeof(Vector) == 0;
}
#endif

template <Next kNext>
INFOENTROPY_DEVICE Vector load(const Vector* from) {
  Vector v;
#ifdef __CUDACC__
  if constexpr (kNext == Next::kReadAgain) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(from));
  } else {
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(from));
  }
#else
  memset(&v, is_aligned(from) ? 0 : 0xff, sizeof v);
  if (is_aligned(from)) memcpy(&v, from, sizeof v);
#endif
  return v;
}

INFOENTROPY_DEVICE void store(Vector* to, Vector v) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :: "l"(to), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
#else
  if (is_aligned(to)) memcpy(to, &v, sizeof v);
#endif
}

// 2^t to 2 ulp; exactly 1 at 0; NaN stays. Below 2^-126 it is 0, or with kSubnormal, at the cost of
// three instructions, what fp32 still has there.
template <bool kSubnormal = false>
INFOENTROPY_DEVICE float exp2_of(float t) {
  float e;
#ifdef __CUDACC__
  if constexpr (kSubnormal) {
    asm("ex2.approx.f32 %0, %1;" : "=f"(e) : "f"(t));
  } else {
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));
  }
#else
  e = std::exp2(t);
  if (e < 0x1p-126f) return kSubnormal ? e : 0;
  if (t == 0 || !(e < kInfinity)) return e;
  // Errs by -2 to 2 ulp, differently for every t, so that tests see the instruction's worst.
  const std::uint32_t dice = (bits_as<std::uint32_t>(t) * 2654435761u) >> 16;
  e = bits_as<float>(bits_as<std::uint32_t>(e) + dice % 5 - 2);
#endif
  return e;
}

INFOENTROPY_DEVICE float reciprocal_of(float value) {  // to 1 ulp
  float result;
#ifdef __CUDACC__
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
#else
  result = 1.0f / value;
#endif
  return result;
}

// The product as it is rounded to a float: the compiler may not fuse it with a later sum.
INFOENTROPY_DEVICE float rounded_product(float a, float b) {
#ifdef __CUDACC__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// tanh(y) to a few ulp, of t = 2 log2(e) |y| and the sign of `sign`; its derivative stays accurate
// relative to itself where tanh is almost 1.
INFOENTROPY_DEVICE float tanh_of(float t, float sign, float& slope) {
  const float y = t * (0.5f * kLn2), square = y * y;
  const float q = reciprocal_of(1.0f + exp2_of(t));
  slope = 4.0f * q * (1.0f - q);
  // (tanh(y) / y - 1) / y^2 on [0, 1], minimax: relative error of tanh 4e-9.
  float p = -3.62525694072e-4f;
  p = fmaf(p, square, 2.315475372598e-3f);
  p = fmaf(p, square, -7.965227589011e-3f);
  p = fmaf(p, square, 2.1499410271645e-2f);
  p = fmaf(p, square, -5.3884107619524e-2f);
  p = fmaf(p, square, 1.33324116468430e-1f);
  p = fmaf(p, square, -3.33332985639572e-1f);
  return copysignf(y < 1.0f ? fmaf(p * square, y, y) : 1.0f - 2.0f * q, sign);
}

// A logit as `contract.Options` means it, but for the temperature: that scales differences of
// logits, where it costs nothing.
struct Softcap {
  float cap;
  // 2 log2(e) / cap as a sum, so that the exponent is rounded once: it is what the slope's relative
  // error grows with. Both are positive, so that an infinite logit does not become NaN.
  float high, low;

  explicit Softcap(float cap) : cap(cap), high(0), low(0) {
    if (cap == 0) return;
    const double exact = 2 * 1.44269504088896340736 / cap;
    high = static_cast<float>(exact * (1 - 0x1p-23));
    low = static_cast<float>(exact - high);
  }

  template <bool kSoftcap>
  INFOENTROPY_DEVICE float meant(float z, float& slope) const {
    if constexpr (!kSoftcap) {
      slope = 1;
      return z;
    } else {
      const float size = fabsf(z), t = fmaf(size, high, size * low);
      const float x = rounded_product(cap, tanh_of(t, z, slope));
      return z == -kInfinity ? z : x;  // a mask stays a mask
    }
  }
  template <bool kSoftcap>
  INFOENTROPY_DEVICE float meant(float z) const {
    float slope;
    return meant<kSoftcap>(z, slope);
  }
};

struct LogitScale {
  Softcap softcap;
  float inverse_temperature;
  float exponent;  // log2 e / temperature

  LogitScale(float cap, float inverse_temperature)
      : softcap(cap),
        inverse_temperature(inverse_temperature),
        exponent(kLog2e * inverse_temperature) {}

  // Where every token has its own.
  INFOENTROPY_DEVICE LogitScale of(const float* inverse_temperatures, std::int64_t token) const {
    LogitScale scale = *this;
    if (inverse_temperatures) {
      scale.inverse_temperature = inverse_temperatures[token];
      scale.exponent = kLog2e * scale.inverse_temperature;
    }
    return scale;
  }
};

// Which rows statistics and coefficients have beyond the first four; 0 for those that were not asked
// for. (Options of shard_ops.h, for a GPU.)
struct ExtraRows {
  int count, distance, squares;
};

// Where the 16-byte vectors of a row lie, for any alignment and any number of columns:
// `head` columns, then `vectors` whole vectors, then `tail` columns.
struct Slicing {
  int head, vectors, tail;
};

template <class T>
INFOENTROPY_DEVICE Slicing slice(const T* row, int columns) {
  const int past = static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % sizeof(Vector));
  const int ahead = past == 0 ? 0 : (static_cast<int>(sizeof(Vector)) - past) / int(sizeof(T));
  const int head = ahead < columns ? ahead : columns;
  const int vectors = (columns - head) / kPerVector<T>;
  return {head, vectors, columns - head - vectors * kPerVector<T>};
}

// Targets of shard_ops.h, for a GPU to read.
struct DeviceTargets {
  const std::int64_t* data;  // [tokens], vocabulary ids
  std::int64_t vocab_start;  // id of column 0
  std::int64_t ignore_index;

  // The target's column on this shard, or -1 where another shard owns it.
  INFOENTROPY_DEVICE int column(std::int64_t token, int columns) const {
    const std::int64_t column = data[token] - vocab_start;
    return column >= 0 && column < columns ? static_cast<int>(column) : -1;
  }
  INFOENTROPY_DEVICE bool ignored(std::int64_t token) const { return data[token] == ignore_index; }
};

}  // namespace infoentropy::cuda
