// The kernels of csrc against loops in double precision, without Python, so that they can be run on
// processors that only an emulator has. Prints every instruction set it tested; exits with 1 where a
// value is off. Bounds are those of tests/kernels/test_native_options.py, a little coarser.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/shard_ops.h"

using namespace infoentropy;

namespace {

int failures = 0;

void expect_near(double got, double want, double atol, const char* what, long columns, int dtype) {
  const bool same = got == want || (std::isnan(got) && std::isnan(want));
  if (same || std::fabs(got - want) <= atol) return;
  if (++failures < 20) {
    std::printf("%s, %ld columns, dtype %d: got %.9g, expected %.9g (+- %g)\n", what, columns,
                dtype, got, want, atol);
  }
}

double decode(std::uint32_t bits, int dtype) {
  if (dtype < 2) {
    const std::uint32_t word = dtype == 0 ? bits : bits << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

double element(const std::vector<char>& data, std::size_t i, int dtype) {
  std::uint32_t bits = 0;
  const std::size_t size = dtype == 0 ? 4 : 2;
  std::memcpy(&bits, data.data() + i * size, size);
  return decode(bits, dtype);
}

// A logit near `value`, cut off to what the type can hold (float16 between 2^-14 and 2^15 only).
void put(std::vector<char>& data, std::size_t i, int dtype, float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (dtype == 1) bits >>= 16;
  if (dtype == 2) {
    const std::uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    bits = value == -INFINITY ? 0xfc00
                              : sign | (magnitude < 0x38800000 ? 0 : (magnitude - 0x38000000) >> 13);
  }
  std::memcpy(data.data() + i * (dtype == 0 ? 4 : 2), &bits, dtype == 0 ? 4 : 2);
}

struct Meant {
  double x, slope;
};

Meant meant(double z, const Options& options) {
  if (options.softcap == 0) return {z * options.inverse_temperature, 1};
  if (z == -INFINITY) return {z, 0};
  const double tanh = std::tanh(z / options.softcap), cosh = std::cosh(z / options.softcap);
  return {tanh * options.softcap * options.inverse_temperature, 1 / (cosh * cosh)};
}

void test(long columns, int dtype, const Options& options, float masked_share) {
  const long tokens = 3, stride = columns + 5;
  const std::size_t size = dtype == 0 ? 4 : 2;
  std::vector<char> z(tokens * stride * size + 64), out(z.size());
  std::srand(columns + dtype);
  for (long i = 0; i < tokens * stride; ++i) {
    const float value = (std::rand() % 20001 - 10000) * 1e-3f;
    put(z, i, dtype, std::rand() % 1000 < masked_share * 1000 ? -INFINITY : value);
  }
  for (long i = 0; i < tokens; ++i) put(z, i * stride + columns - 1, dtype, 1.0f);
  const std::int64_t target[] = {columns - 1, -100, 0};
  std::vector<float> statistics(6 * tokens), c(6 * tokens, 0.0f);
  const Logits logits{z.data(), static_cast<Dtype>(dtype), stride, tokens, columns};
  const Targets targets{target, 0, -100};
  shard_statistics(logits, targets, options, statistics.data(), 2);

  const double bound = options.softcap != 0 ? options.softcap * options.inverse_temperature : 20;
  const double rounding = 2.4e-7 * bound;
  for (long i = 0; i < tokens; ++i) {
    double m = -INFINITY, mass = 0, spread = 0, distance = 0, squares = 0;
    const bool ignored = target[i] == -100;
    for (long k = 0; k < columns; ++k) {
      m = std::fmax(m, meant(element(z, i * stride + k, dtype), options).x);
    }
    for (long k = 0; k < columns; ++k) {
      const double d = m - meant(element(z, i * stride + k, dtype), options).x;
      mass += std::exp(-d);
      spread += d == INFINITY ? 0 : d * std::exp(-d);
      distance += d;
      squares += std::exp(-2 * d);
    }
    const double x_y =
        ignored ? 0 : meant(element(z, i * stride + target[i], dtype), options).x;
    const double want[] = {m, mass - 1, spread, x_y, distance, squares - 1};
    const double atol[] = {rounding, mass * (2e-7 + 2 * rounding), mass * (1e-6 + 20 * rounding),
                           rounding, columns * (2e-6 + 2 * rounding),
                           squares * (4e-7 + 4 * rounding)};
    const char* names[] = {"MAX", "TAIL", "SPREAD", "TARGET", "DISTANCE", "SQUARES"};
    for (int row = 0, kind = 0; kind < 6; ++kind) {
      if ((kind == 4 && !options.distance) || (kind == 5 && !options.squares)) continue;
      expect_near(statistics[row++ * tokens + i], ignored ? 0 : want[kind], atol[kind],
                  names[kind], columns, dtype);
    }
    c[i] = static_cast<float>(m);
    c[tokens + i] = 0.7f;
    c[2 * tokens + i] = columns % 2 ? 0.3f : 0.0f;
    c[3 * tokens + i] = -0.5f;
    if (options.distance) c[options.distance_row() * tokens + i] = 0.1f;
    if (options.squares) c[options.squares_row() * tokens + i] = 0.2f;
  }

  shard_gradient(logits, targets, options, c.data(), out.data(), stride, stride, 2);
  for (long i = 0; i < tokens; ++i) {
    for (long k = 0; k < stride; ++k) {
      const Meant x = meant(element(z, i * stride + k, dtype), options);
      const double d = x.x - c[i], e = std::exp(d);
      double want = (e * c[tokens + i] + (e == 0 ? 0 : e * d * c[2 * tokens + i]) +
                     (options.squares ? e * e * 0.2f : 0) + (options.distance ? 0.1f : 0)) *
                    x.slope;
      if (k == target[i]) want = -0.5 * x.slope;
      if (k >= columns || target[i] == -100) want = 0;
      const double ulp = dtype == 0 ? 0 : std::fabs(want) * (dtype == 1 ? 0x1p-8 : 0x1p-11) + 6e-8;
      expect_near(element(out, i * stride + k, dtype), want, 2e-7 + 10 * rounding + ulp,
                  "gradient", columns, dtype);
    }
  }
}

}  // namespace

int main() {
  const Options every[] = {{},
                           {0, 1, nullptr, true, false},
                           {0, 1.4f, nullptr, false, true},
                           {30, 1, nullptr, false, false},
                           {5, 2, nullptr, true, true}};
  for (const std::string& name : instruction_sets()) {
    if (!use_instruction_set(name)) return 1;
    for (const Options& options : every) {
      for (int dtype = 0; dtype < 3; ++dtype) {
        for (long columns : {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 1023, 1024, 1025, 3333}) {
          test(columns, dtype, options, columns % 4 == 1 ? 0.5f : 0.0f);
        }
      }
    }
    std::printf("tested %s\n", name.c_str());
  }
  if (failures > 0) std::printf("%d values are off\n", failures);
  return failures > 0;
}
