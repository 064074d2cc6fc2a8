// How a stored logit z becomes the logit x that the model means (Options of the contract), in
// registers. Included once per instruction set, after vectors.inl.

struct Plain {
  static constexpr bool kFused = kHasFused;  // may take x log2 e - m log2 e for (x - m) log2 e
  static constexpr bool kCapped = false;
  explicit Plain(const Options&) {}
  ALWAYS_INLINE Vec of(Vec z) const { return z; }
};

// Also what is used for logits so large that the fused form would lose digits: a factor of 1.
struct Scaled {
  static constexpr bool kFused = false;
  static constexpr bool kCapped = false;
  explicit Scaled(const Options& options) : factor(options.inverse_temperature) {}
  ALWAYS_INLINE Vec of(Vec z) const { return rounded(z * factor); }

  float factor;
};

// tanh |y| = (1 - q) / (1 + q) = 1 - 2 q / (1 + q) with q = 2^(-2 log2(e) |y|): the first form where
// q is near 1, with 1 - q from the power's parts, so that small logits keep their relative precision;
// the second where the result is near 1. The slope is 4 q / (1 + q)^2.
struct Capped {
  static constexpr bool kFused = false;
  static constexpr bool kCapped = true;
  explicit Capped(const Options& options) {
    const double exact = 2 * 1.44269504088896340736 / options.softcap;
    high = static_cast<float>(exact);
    low = static_cast<float>(exact - high);
    limit = 127.0f / high;
    bound = static_cast<float>(static_cast<double>(options.softcap) * options.inverse_temperature);
  }

  ALWAYS_INLINE Vec of(Vec z) const {
    Vec slope;
    return of(z, slope);
  }

  ALWAYS_INLINE Vec of(Vec z, Vec& slope) const {
    constexpr std::uint32_t kSign = 0x80000000u;
    const Vec w = maximum(splat(-limit), (Vec)((UVec)z | kSign));
    const Power power = power_of_2(fused(w, splat(high), w * low));
    const Vec h = power.p * power.f, q = (h + 1.0f) * power.scale;
    const Vec inverse = 1.0f / (1.0f + q);
    slope = 4.0f * q * inverse * inverse;
    const Vec difference = (1.0f - power.scale) - power.scale * h;
    const Vec magnitude = select(q > 0.25f, difference * inverse * bound,
                                 fused(q * (-2.0f * bound), inverse, splat(bound)));
    const Vec x = rounded((Vec)((UVec)magnitude | ((UVec)z & kSign)));
    return select(z == -kInfinity, z, x);  // a mask stays a mask
  }

  float high, low;  // 2 log2(e) / softcap as a sum, so that the exponent is rounded once
  float limit;      // |z| beyond which tanh is 1
  float bound;      // softcap / temperature
};
