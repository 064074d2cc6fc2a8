// The statistics of one row, by warps. `Warp` is how 32 lanes run together: on the GPU each thread
// is a lane and lanes talk by shuffles; in the emulation one loop runs all of them.
//
// 1. Block s of `splits` takes the s-th part of the row's vectors, warp w of it every 8th group of
//    32 vectors, four groups at a time (a batch).
// 2. A warp has one maximum m for all its lanes, and all its sums are relative to it. A batch with
//    nothing above m (one vote: nearly all batches) is just added. Another raises m first and is
//    added with its logits equal to m counted apart, in `tops`: that keeps the first of them out of
//    `tail`, and so the contract's TAIL exact. Later ones are part of the mass beside it.
// 3. Sums are folded over lanes, then warps, then blocks, each time by raising all to one maximum
//    and adding in a fixed order: the same bits from run to run.
#pragma once

#include "cuda_arithmetic.h"

namespace infoentropy::cuda {

// Of some columns, relative to the maximum m among them. t = (x - m) log2 e / temperature.
template <bool kExtra>
struct Sums {
  float m = -kInfinity;
  float tops = 0;      // columns whose logit is m, as many as are not in `tail`
  float tail = 0;      // sum of 2^t over all others
  float spread = 0;    // sum of 2^t (-t)
  // Only where kExtra:
  float distance = 0;  // sum of m - x, with 0 for m where it is -inf
  float count = 0;     // columns
  float squares = 0;   // sum of 2^2t over the logits that are in `tail`

  INFOENTROPY_DEVICE float shift() const { return m == -kInfinity ? 0 : m; }

  INFOENTROPY_DEVICE void raise_to(float higher, float exponent) {
    if (!(higher > m)) return;
    // Bounded: from -inf, or to +inf, t is -inf, and 0 * inf must not be.
    const float t = fmaxf((m - higher) * exponent, -150.0f), scale = exp2_of(t);
    tail += tops;
    if (kExtra) squares = (squares + tops) * (scale * scale);
    tops = 0;
    spread = (spread - t * tail) * scale;
    tail *= scale;
    if (kExtra) distance += (higher - shift()) * count;
    m = higher;
  }

  INFOENTROPY_DEVICE void add(const Sums& other) {  // of the same m
    tops += other.tops;
    tail += other.tail;
    spread += other.spread;
    if (kExtra) distance += other.distance;
    if (kExtra) count += other.count;
    if (kExtra) squares += other.squares;
  }
};

template <bool kExtra>
INFOENTROPY_DEVICE Sums<kExtra> of_one_logit(float x) {
  Sums<kExtra> sums;
  const bool mask = x == -kInfinity;
  sums.m = x > -kInfinity ? x : -kInfinity;  // -inf for NaN
  sums.tops = fabsf(x) < kInfinity ? 1 : 0;
  sums.tail = mask ? 0 : x - x;  // NaN where x is +inf or NaN
  sums.distance = mask ? kInfinity : 0;
  sums.count = 1;
  return sums;
}

template <class T, bool kSoftcap, bool kExtra>
struct Lane {
  static constexpr bool kSoftcapped = kSoftcap, kHasExtra = kExtra;
  Sums<kExtra> sums;
  Vector batch[kInFlight];
  int held;  // vectors of the batch that this lane has; the rest of it are logits of -inf
  float batch_maximum;

  // Vectors first, first + kThreads, ... below end.
  template <bool kWhole>
  INFOENTROPY_DEVICE void read(const Vector* body, int first, int end, const LogitScale& scale) {
    const std::uint32_t nothing = pack(-kInfinity, -kInfinity, T{});
    held = 0;
    INFOENTROPY_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const int vector = first + i * kThreads;
      if (kWhole || vector < end) {
        batch[i] = load<Next::kReadAgain>(body + vector);
        ++held;
      } else {
        batch[i] = Vector{{nothing, nothing, nothing, nothing}};
      }
    }
    std::uint32_t most = batch[0].word[0];
    INFOENTROPY_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      INFOENTROPY_UNROLL
      for (int w = i == 0; w < 4; ++w) most = word_maximum(most, batch[i].word[w], T{});
    }
    float z = low(most, T{});
    if (kPerWord<T> == 2) z = fmaxf(z, high(most, T{}));
    batch_maximum = meant(z, scale);
  }

  INFOENTROPY_DEVICE float meant(float z, const LogitScale& scale) const {
    return scale.softcap.template meant<kSoftcap>(z);
  }

  template <bool kWhole, bool kTops>
  INFOENTROPY_DEVICE void add_batch(const LogitScale& scale) {
    Sums<kExtra> part[kInFlight];  // short chains of additions are what bounds the rounding
    INFOENTROPY_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      if (!kWhole && i >= held) continue;
      INFOENTROPY_UNROLL
      for (int w = 0; w < 4; ++w) {
        add_logit<kTops>(part[i], low(batch[i].word[w], T{}), scale);
        if (kPerWord<T> == 2) add_logit<kTops>(part[i], high(batch[i].word[w], T{}), scale);
      }
    }
    part[0].add(part[1]);
    part[2].add(part[3]);
    part[0].add(part[2]);
    sums.add(part[0]);
  }

  template <bool kTops>
  INFOENTROPY_DEVICE void add_logit(Sums<kExtra>& part, float z, const LogitScale& scale) const {
    const float d = meant(z, scale) - sums.shift();
    const float t = d * scale.exponent;
    const float e = exp2_of(t);
    // A logit of -inf: 2^t is 0, and so must be 2^t (-t). A NaN passes through e.
    part.spread = fmaf(-e, fmaxf(t, -150.0f), part.spread);
    if (kTops && d == 0) {
      part.tops += 1;
    } else {
      part.tail += e;
      if (kExtra) part.squares = fmaf(e, e, part.squares);
    }
    if (kExtra) {
      part.distance -= d;
      part.count += 1;
    }
  }
};

template <bool kWhole, class Warp, class Vectors>
INFOENTROPY_DEVICE void add_batch(Warp& warp, const Vectors& read, const LogitScale& scale) {
  using Lane = typename Warp::Lane;
  warp.each(read);
  const auto exceeds = [](const Lane& lane) { return lane.batch_maximum > lane.sums.m; };
  // The second branch is what runs nearly always; where that saves little, there is only the first.
  if (!kWhole || Lane::kSoftcapped || warp.any(exceeds)) {
    const float m = warp.maximum(
        [](const Lane& lane) { return fmaxf(lane.batch_maximum, lane.sums.m); });
    warp.each([&](Lane& lane, int) {
      lane.sums.raise_to(m, scale.exponent);
      lane.template add_batch<kWhole, true>(scale);
    });
  } else {
    warp.each([&](Lane& lane, int) { lane.template add_batch<true, false>(scale); });
  }
}

// The sums of all lanes, in every lane.
template <class Warp>
INFOENTROPY_DEVICE void fold_lanes(Warp& warp, float exponent) {
  using Lane = typename Warp::Lane;
  const float m = warp.maximum([](const Lane& lane) { return lane.sums.m; });
  warp.each([&](Lane& lane, int) { lane.sums.raise_to(m, exponent); });
  warp.sum([](Lane& lane) -> float& { return lane.sums.tops; });
  warp.sum([](Lane& lane) -> float& { return lane.sums.tail; });
  warp.sum([](Lane& lane) -> float& { return lane.sums.spread; });
  if (Lane::kHasExtra) {
    warp.sum([](Lane& lane) -> float& { return lane.sums.distance; });
    warp.sum([](Lane& lane) -> float& { return lane.sums.count; });
    warp.sum([](Lane& lane) -> float& { return lane.sums.squares; });
  }
}

// What warp `index` of block `split` of `splits` finds in a row.
template <class Warp, class T>
INFOENTROPY_DEVICE void sum_up(Warp& warp, int index, const T* row, int columns, int split,
                             int splits, const LogitScale& scale) {
  using Lane = typename Warp::Lane;
  const Slicing slicing = slice(row, columns);
  const Vector* body = reinterpret_cast<const Vector*>(row + slicing.head);
  const int batches = (slicing.vectors + kBatch - 1) / kBatch;
  const int batches_per_split = (batches + splits - 1) / splits;
  const int begin = split * batches_per_split * kBatch;
  const int past = begin + batches_per_split * kBatch;
  const int end = past < slicing.vectors ? past : slicing.vectors;
  int base = begin + index * kWarp;  // the warp's first vector
  for (; base + kBatch - index * kWarp <= end; base += kBatch) {
    add_batch<true>(
        warp, [&](Lane& lane, int i) { lane.template read<true>(body, base + i, end, scale); },
        scale);
  }
  if (base < end) {
    add_batch<false>(
        warp, [&](Lane& lane, int i) { lane.template read<false>(body, base + i, end, scale); },
        scale);
  }
  if (index == 0 && split == 0) {
    warp.each([&](Lane& lane, int i) {
      const int column = i < slicing.head ? i : columns - slicing.tail + (i - slicing.head);
      if (column >= columns) return;
      auto edge = of_one_logit<Lane::kHasExtra>(lane.meant(to_float(row[column]), scale));
      const float m = fmaxf(edge.m, lane.sums.m);
      edge.raise_to(m, scale.exponent);
      lane.sums.raise_to(m, scale.exponent);
      lane.sums.add(edge);
    });
  }
  fold_lanes(warp, scale.exponent);
}

template <bool kSoftcap, class T>
INFOENTROPY_DEVICE float target_logit(const T* row, int column, const LogitScale& scale) {
  if (column < 0) return 0;  // another shard's
  return scale.softcap.template meant<kSoftcap>(to_float(row[column])) * scale.inverse_temperature;
}

// The statistics of `contract`, but for TARGET.
template <bool kExtra>
INFOENTROPY_DEVICE void write_statistics(const Sums<kExtra>& sums, const LogitScale& scale,
                                         float* statistics, const ExtraRows& extra,
                                         std::int64_t token, std::int64_t tokens) {
  statistics[token] = sums.m * scale.inverse_temperature;
  statistics[tokens + token] = sums.tail + (sums.tops - 1.0f);
  statistics[2 * tokens + token] = sums.spread * kLn2;
  const bool empty = sums.m == -kInfinity;
  if (extra.distance) {
    statistics[extra.distance * tokens + token] =
        empty ? 0 : sums.distance * scale.inverse_temperature;
  }
  if (extra.squares) {
    statistics[extra.squares * tokens + token] = sums.squares + (sums.tops - 1.0f);
  }
}

}  // namespace infoentropy::cuda
