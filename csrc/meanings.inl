// How a stored logit z becomes the logit x that the model means (Options of the contract), in
// registers. Included once per instruction set, after vectors.inl.

struct Plain {
  static constexpr bool kFused = kHasFused;  // may take x log2 e - m log2 e for (x - m) log2 e
  static constexpr bool kCapped = false;
  explicit Plain(const Options&) {}
  Vec of(Vec z) const { return z; }
};

// Also what is used for logits so large that the fused form would lose digits: a factor of 1.
struct Scaled {
  static constexpr bool kFused = false;
  static constexpr bool kCapped = false;
  explicit Scaled(const Options& options) : factor(1.0f / options.temperature) {}
  Vec of(Vec z) const { return rounded(z * factor); }

  float factor;
};

// tanh |y| = (1 - q) / (1 + q) with q = 2^(-2 log2(e) |y|). 1 - q comes from the power's parts, so
// that small logits keep their relative precision; the slope 4 q / (1 + q)^2 keeps it everywhere.
struct Capped {
  static constexpr bool kFused = false;
  static constexpr bool kCapped = true;
  explicit Capped(const Options& options) {
    const double exact = 2 * 1.44269504088896340736 / options.softcap;
    high = static_cast<float>(exact);
    low = static_cast<float>(exact - high);
    limit = 127.0f / high;
    bound = static_cast<float>(static_cast<double>(options.softcap) / options.temperature);
  }

  Vec of(Vec z) const {
    Vec slope;
    return of(z, slope);
  }

  Vec of(Vec z, Vec& slope) const {
    constexpr std::uint32_t kSign = 0x80000000u;
    const Vec w = maximum(splat(-limit), (Vec)((UVec)z | kSign));
    const Power q = power_of_2(fused(w, splat(high), w * low));
    const Vec difference = (1.0f - q.scale) - q.scale * (q.p * q.f);
    const Vec inverse = 1.0f / (2.0f - difference);
    slope = 4.0f * (1.0f - difference) * inverse * inverse;
    const Vec magnitude = difference * inverse * bound;
    const Vec x = rounded((Vec)((UVec)magnitude | ((UVec)z & kSign)));
    return select(z == -kInfinity, z, x);  // a mask stays a mask
  }

  float high, low;  // 2 log2(e) / softcap as a sum, so that the exponent is rounded once
  float limit;      // |z| beyond which tanh is 1
  float bound;      // softcap / temperature
};
