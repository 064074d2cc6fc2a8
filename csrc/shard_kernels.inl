// One row of each function of the contract. Included once per instruction set, after vectors.inl
// and meanings.inl; T is a storage type, Meaning what is done to a stored logit first.

constexpr std::int64_t kChunk = 1024;  // columns between looks at the maximum: 4 KiB, stays in L1

// x log2 e - m log2 e in one operation is as exact as (x - m) log2 e but for the rounding of the
// second term, which is the same for the whole row and taken out of its sums. Beyond this bound it
// is no longer small.
constexpr float kFar = 65536.0f;

static ALWAYS_INLINE bool is_far(float m) { return !(m >= -kFar && m <= kFar) && m != -kInfinity; }

// The exponents t = (x - m) log2 e of one row; `fused` ones are larger by `excess`.
template <bool kFused>
struct Origin {
  explicit Origin(float m) : m(splat(m)) {
    if (kFused) {
      const float scaled = m * kLog2e;
      minus_scaled = splat(-scaled);
      excess = static_cast<double>(m) * kLog2e - scaled;
      // 2^-excess: |excess| <= 2^-8, where three terms have all digits of a float.
      const double u = excess * 0.6931471805599453;
      correction = 1 - u * (1 - u * (0.5 - u / 6));
    }
  }

  ALWAYS_INLINE Vec exponent(Vec x) const {
    return clamp_exponent(kFused ? fused(x, splat(kLog2e), minus_scaled) : (x - m) * kLog2e);
  }

  Vec m, minus_scaled;
  double excess = 0, correction = 1;
};

// Running sums over the columns seen so far, relative to the maximum m seen so far.
template <class Meaning>
struct RowSums {
  explicit RowSums(const Meaning& meaning) : meaning(meaning) {}

  Meaning meaning;
  float m = -kInfinity;
  float tops = 0;       // columns whose logit is m: they stay out of `tail`, which keeps it exact
  Vec tail = {};        // sum of 2^t over the others, t = (x - m) log2 e
  Vec spread = {};      // sum of 2^t (-t)
  double distance = 0;  // sum of m - x over `columns`; only where it is asked for
  double columns = 0;
  double squares = 0;   // sum of 2^2t over the others; only where it is asked for

  void raise_maximum_to(float m_new) {
    if (m != -kInfinity) {
      const float t = (m - m_new) * kLog2e;
      const float s = exp2_of(clamp_exponent(splat(t)))[0];
      if (s > 0) {
        tail[0] += tops;
        squares = (squares + tops) * (static_cast<double>(s) * s);
        spread = (spread - t * tail) * s;
        tail *= s;
      } else {  // t may be -inf here
        spread *= 0.0f;
        tail *= 0.0f;
        squares *= 0.0;
      }
      distance += columns * (static_cast<double>(m_new) - m);
    }
    tops = 0;
    m = m_new;
  }

  // count is a multiple of kPair. Two independent chains of sums hide the latency of adding; the
  // chunk's own sums keep each chain short, which is what bounds the rounding error.
  template <bool kMayHoldTop, class T>
  void add(const T* z, std::int64_t count) {
    Vec tail_a = {}, tail_b = {}, spread_a = {}, spread_b = {};
    IVec tops_a = {}, tops_b = {};
    const Origin<Meaning::kFused> origin(m);
    for (std::int64_t i = 0; i < count; i += kPair) {
      __builtin_prefetch(z + i + kChunk);  // the next chunk arrives while this one is computed
      const Pair pair = load(z + i);
      add_register<kMayHoldTop>(origin, meaning.of(pair.a), tail_a, spread_a, tops_a);
      add_register<kMayHoldTop>(origin, meaning.of(pair.b), tail_b, spread_b, tops_b);
    }
    const float excess = static_cast<float>(origin.excess);
    const float correction = static_cast<float>(origin.correction);
    tail_a += tail_b;
    tail += tail_a * correction;
    spread += (spread_a + spread_b + tail_a * excess) * correction;
    if (kMayHoldTop) tops -= static_cast<float>(sum_of_lanes(tops_a + tops_b));
  }

  template <bool kMayHoldTop, class Origin>
  static ALWAYS_INLINE void add_register(const Origin& origin, Vec x, Vec& tail, Vec& spread,
                                         IVec& tops) {
    const Vec t = origin.exponent(x);
    Vec e = exp2_of(t);
    if (kMayHoldTop) {
      const IVec is_top = x == origin.m;
      tops += is_top;  // -1 a top
      e = (Vec)((IVec)e & ~is_top);
    }
    spread -= e * t;
    tail += e;
  }

  // After `add` of the same columns.
  template <class T>
  void add_distance(const T* z, std::int64_t count) {
    columns += count;
    if (m == -kInfinity) {
      distance = kInfinity;  // of any column that has mass
      return;
    }
    Vec sum = {};
    for (std::int64_t i = 0; i < count; i += kPair) {
      const Pair pair = load(z + i);
      sum += (m - meaning.of(pair.a)) + (m - meaning.of(pair.b));
    }
    distance += horizontal_sum(sum);
  }

  // Of columns that `add` has seen; a padded logit of -inf adds nothing. A function of its own, so
  // that the loop of `add`, which always runs, keeps its registers.
  template <class T>
  [[gnu::noinline]] static double squares_of(const T* z, std::int64_t count, float m,
                                             Meaning meaning) {
    if (m == -kInfinity) return 0;  // no mass yet
    Vec sum = {};
    const Origin<Meaning::kFused> origin(m);
    for (std::int64_t i = 0; i < count; i += kPair) {
      const Pair pair = load(z + i);
      sum += square_of(origin, meaning.of(pair.a)) + square_of(origin, meaning.of(pair.b));
    }
    return horizontal_sum(sum) * (origin.correction * origin.correction);
  }

  template <class Origin>
  static ALWAYS_INLINE Vec square_of(const Origin& origin, Vec x) {
    const Vec e = exp2_of(origin.exponent(x));
    return (Vec)((IVec)(e * e) & ~(x == origin.m));
  }

  template <class T>
  void add_distance_of_one(const T* z) {
    const float x = meaning.of(splat(read_one(z)))[0];
    distance = m == -kInfinity ? kInfinity : distance + (static_cast<double>(m) - x);
    columns += 1;
  }
};

// The maximum of a multiple of kPair columns; may or may not be NaN where one of them is.
static ALWAYS_INLINE float chunk_maximum(const float* z, std::int64_t count) {
  Vec a = splat(-kInfinity), b = a;
  for (std::int64_t i = 0; i < count; i += kPair) {
    const Pair pair = load(z + i);
    a = maximum(pair.a, a);
    b = maximum(pair.b, b);
  }
  return horizontal_maximum(maximum(a, b));
}

// 16-bit floats are a sign and a magnitude: as signed integers the non-negative ones are in order, as
// unsigned ones the negative ones are in reverse. Half the work of widening them first.
template <class T>
static ALWAYS_INLINE float chunk_maximum(const T* z, std::int64_t count) {
  I16Vec top = I16Vec{} - static_cast<std::int16_t>(0x7fff);
  U16Vec low = ~U16Vec{};
  for (std::int64_t i = 0; i < count; i += kPair) {
    const I16Vec bits = (I16Vec)words(z + i);
    top = bits > top ? bits : top;
    low = (U16Vec)bits < low ? (U16Vec)bits : low;
  }
  std::int16_t highest = top[0];
  std::uint16_t lowest = low[0];
  for (int lane = 1; lane < kPair; ++lane) {
    highest = top[lane] > highest ? top[lane] : highest;
    lowest = low[lane] < lowest ? low[lane] : lowest;
  }
  const T result{highest >= 0 ? static_cast<std::uint16_t>(highest) : lowest};
  return read_one(&result);
}

template <class T>
static bool holds_nan(const T* z, std::int64_t count) {
  IVec found = {};
  for (std::int64_t i = 0; i < count; i += kPair) {
    const Pair pair = load(z + i);
    found |= (pair.a != pair.a) | (pair.b != pair.b);
  }
  return any(found);
}

// False where the row is too far from 0 for fused exponents; then nothing was added.
template <class Meaning, class T>
static bool add_chunk(RowSums<Meaning>& sums, const T* z, std::int64_t count) {
  const float z_max = chunk_maximum(z, count);  // may ignore NaN: found below, or in the sums
  if (z_max == -kInfinity) {
    if (holds_nan(z, count)) sums.tail += __builtin_nanf("");
    return true;
  }
  const float chunk_m = sums.meaning.of(splat(z_max))[0];
  if (Meaning::kFused && is_far(chunk_m)) return false;
  if (chunk_m > sums.m) sums.raise_maximum_to(chunk_m);
  if (chunk_m == sums.m) {
    sums.template add<true>(z, count);
  } else {
    sums.template add<false>(z, count);
  }
  return true;
}

// row: MAX, TAIL, SPREAD, TARGET, DISTANCE; `own` is the target's column or -1.
template <class T, class Meaning>
static void row_statistics(const void* logits, std::int64_t columns, std::int64_t own,
                           const Options& options, float* row) {
  const T* z = static_cast<const T*>(logits);
  RowSums<Meaning> sums{Meaning(options)};
  for (std::int64_t i = 0; i < columns;) {
    T last[kPair];
    const T* from = z + i;
    std::int64_t count = columns - i >= kChunk ? kChunk : (columns - i) / kPair * kPair;
    const std::int64_t rest = count > 0 ? 0 : columns - i;
    if (rest > 0) {  // fewer than a pair of registers: pad with logits that carry no mass
      for (T& each : last) each = minus_infinity(T{});
      for (std::int64_t k = 0; k < rest; ++k) last[k] = from[k];
      from = last, count = kPair;
    }
    if (!add_chunk(sums, from, count)) {
      return row_statistics<T, Scaled>(logits, columns, own, options, row);
    }
    if (options.squares) sums.squares += sums.squares_of(from, count, sums.m, sums.meaning);
    if (options.distance && rest == 0) sums.add_distance(from, count);
    if (options.distance) {
      for (std::int64_t k = 0; k < rest; ++k) sums.add_distance_of_one(z + i + k);
    }
    i += rest > 0 ? rest : count;
  }
  row[0] = sums.m;
  row[1] = static_cast<float>(horizontal_sum(sums.tail) + (double(sums.tops) - 1.0));
  if (sums.m == kInfinity) row[1] = __builtin_nanf("");
  row[2] = static_cast<float>(horizontal_sum(sums.spread) * kLn2);
  row[3] = own < 0 ? 0.0f : sums.meaning.of(splat(read_one(z + own)))[0];
  row[4] = sums.m == -kInfinity ? 0.0f : static_cast<float>(sums.distance);
  row[5] = static_cast<float>(sums.squares + (double(sums.tops) - 1.0));
}

// dz = (2^t (scale + t slope + 2^t quadratic) + offset) s with s the softcap's slope. Terms that are 0
// in most trainings are left out.
enum class Terms { kScale, kSlopeAndOffset, kAll };

template <class T, class Meaning, Terms kTerms>
struct RowGradient {
  RowGradient(const Coefficients& c, const Options& options)
      : meaning(options), origin(c.shift), offset(c.offset) {
    scale = static_cast<float>(origin.correction *
                               (c.scale - origin.excess * c.slope * 0.6931471805599453));
    slope = static_cast<float>(origin.correction * c.slope * 0.6931471805599453);
    quadratic = static_cast<float>(origin.correction * origin.correction * c.quadratic);
  }

  ALWAYS_INLINE Pair of(Pair z) const { return {of(z.a), of(z.b)}; }

  ALWAYS_INLINE Vec of(Vec z) const {
    if constexpr (Meaning::kCapped) {
      Vec s;
      const Vec x = meaning.of(z, s);
      return of_meant(x) * s;
    } else {
      return of_meant(meaning.of(z));
    }
  }

  ALWAYS_INLINE Vec of_meant(Vec x) const {
    const Vec t = origin.exponent(x);
    const Vec e = exp2_of<std::is_same<T, BFloat16>::value ? 4 : 5>(t);
    if (kTerms == Terms::kScale) return e * scale;
    const Vec sloped = scale + t * slope;
    return e * (kTerms == Terms::kAll ? sloped + e * quadratic : sloped) + offset;
  }

  Meaning meaning;
  Origin<Meaning::kFused> origin;
  float scale, slope, offset, quadratic;
};

// Fewer columns than a pair of registers holds.
template <class T, class Gradient>
static void partial_gradient(const T* z, std::int64_t columns, const Gradient& gradient, T* out) {
  T from[kPair], to[kPair];
  for (std::int64_t k = 0; k < kPair; ++k) from[k] = z[k < columns ? k : 0];
  store(to, gradient.of(load(from)));
  for (std::int64_t k = 0; k < columns; ++k) out[k] = to[k];
}

// stream_out: write around the caches, for outputs far larger than they are.
template <class T, class Gradient>
static void all_gradients(const T* z, std::int64_t columns, const Gradient& gradient, T* out,
                          bool stream_out) {
  std::int64_t i = 0;
  if (stream_out) {
    const auto address = reinterpret_cast<std::uintptr_t>(out);
    const std::int64_t misaligned = address / sizeof(T) % kPair;
    if (misaligned != 0) {
      i = kPair - misaligned < columns ? kPair - misaligned : columns;
      partial_gradient(z, i, gradient, out);
    }
    for (; i + kPair <= columns; i += kPair) stream(out + i, gradient.of(load(z + i)));
  } else {
    for (; i + kPair <= columns; i += kPair) store(out + i, gradient.of(load(z + i)));
  }
  if (i < columns) partial_gradient(z + i, columns - i, gradient, out + i);
}

template <class T, class Meaning>
static void row_gradient(const void* logits, std::int64_t columns, std::int64_t own,
                         const Coefficients& c, const Options& options, void* to,
                         bool stream_out) {
  if (Meaning::kFused && is_far(c.shift)) {
    return row_gradient<T, Scaled>(logits, columns, own, c, options, to, stream_out);
  }
  const T* z = static_cast<const T*>(logits);
  T* out = static_cast<T*>(to);
  float own_gradient = c.target;
  if constexpr (Meaning::kCapped) {  // before `out`, which may lie over the logits, is written
    Vec slope = {};
    if (own >= 0) Meaning(options).of(splat(read_one(z + own)), slope);
    own_gradient *= slope[0];
  }
  const auto write = [&](const auto& gradient) {
    all_gradients(z, columns, gradient, out, stream_out);
  };
  if (c.quadratic != 0) {
    write(RowGradient<T, Meaning, Terms::kAll>(c, options));
  } else if (c.slope != 0 || c.offset != 0) {
    write(RowGradient<T, Meaning, Terms::kSlopeAndOffset>(c, options));
  } else {
    write(RowGradient<T, Meaning, Terms::kScale>(c, options));
  }
  if (own >= 0) write_one(out + own, own_gradient);
}

// By storage type, then by meaning.
constexpr Kernels kKernels = {
    {{row_statistics<float, Plain>, row_statistics<float, Scaled>, row_statistics<float, Capped>},
     {row_statistics<BFloat16, Plain>, row_statistics<BFloat16, Scaled>,
      row_statistics<BFloat16, Capped>},
     {row_statistics<Float16, Plain>, row_statistics<Float16, Scaled>,
      row_statistics<Float16, Capped>}},
    {{row_gradient<float, Plain>, row_gradient<float, Scaled>, row_gradient<float, Capped>},
     {row_gradient<BFloat16, Plain>, row_gradient<BFloat16, Scaled>,
      row_gradient<BFloat16, Capped>},
     {row_gradient<Float16, Plain>, row_gradient<Float16, Scaled>,
      row_gradient<Float16, Capped>}},
};
