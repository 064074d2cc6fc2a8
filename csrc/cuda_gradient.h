// The gradient of one row, by threads that know nothing of each other: each reads its vectors of
// logits before it writes the same vectors of the gradient, so that may lie over the logits.
//
// Vectors are those of the output row; block c takes the c-th kBatch of them. Columns before the
// first and behind the last whole vector fall to threads of block 0, one each.
#pragma once

#include "cuda_arithmetic.h"

namespace infoentropy::cuda {

// The coefficients of `contract` for one row, with what else dz_i takes.
struct RowCoefficients {
  float shift, scale, slope, target_gradient, offset, quadratic;
  LogitScale logit;
};

template <bool kSoftcap>
INFOENTROPY_DEVICE float gradient_of(float z, const RowCoefficients& row) {
  float slope;
  const float x = row.logit.softcap.template meant<kSoftcap>(z, slope);
  const float d = fmaf(x, row.logit.inverse_temperature, -row.shift);
  const float e = exp2_of<true>(d * kLog2e);  // bf16 reaches as far down as fp32
  // d is bounded where e is 0 anyway: 0 * inf must not be. A NaN passes through e.
  const float sloped = fmaf(row.slope, fmaxf(d, -1e4f), row.scale);
  const float dz = fmaf(e, fmaf(row.quadratic, e, sloped), row.offset);
  return kSoftcap ? dz * slope : dz;
}

// The target's own, of its logit.
template <bool kSoftcap, class T>
INFOENTROPY_DEVICE float own_gradient(const T& logit, const RowCoefficients& row) {
  if constexpr (kSoftcap) {
    float slope;
    row.logit.softcap.template meant<kSoftcap>(to_float(logit), slope);
    return row.target_gradient * slope;
  } else {
    return row.target_gradient;
  }
}

template <class T, bool kSoftcap>
INFOENTROPY_DEVICE Vector gradient_of(const Vector& x, const RowCoefficients& row) {
  Vector result;
  INFOENTROPY_UNROLL
  for (int w = 0; w < 4; ++w) {
    const float first = gradient_of<kSoftcap>(low(x.word[w], T{}), row);
    const float second =
        kPerWord<T> == 2 ? gradient_of<kSoftcap>(high(x.word[w], T{}), row) : 0.0f;
    result.word[w] = pack(first, second, T{});
  }
  return result;
}

// Of [rows, tokens], see `contract`.
INFOENTROPY_DEVICE RowCoefficients row_coefficients(const float* coefficients,
                                                  const ExtraRows& extra, std::int64_t token,
                                                  std::int64_t tokens, const LogitScale& scale) {
  const float* of_token = coefficients + token;
  return {of_token[0],          of_token[tokens],
          of_token[2 * tokens], of_token[3 * tokens],
          extra.distance ? of_token[extra.distance * tokens] : 0.0f,
          extra.squares ? of_token[extra.squares * tokens] : 0.0f, scale};
}

// One row: `columns` of logits, `width` >= columns of output; an ignored row has no columns.
template <class T>
struct GradientRow {
  const T* logits;
  T* out;
  int columns, width;
  int target;  // column, or -1

  // One column by itself, padding or not.
  template <bool kSoftcap>
  INFOENTROPY_DEVICE void write(int column, const RowCoefficients& row) const {
    float dz = 0;
    if (column == target) {
      dz = own_gradient<kSoftcap>(logits[column], row);
    } else if (column < columns) {
      dz = gradient_of<kSoftcap>(to_float(logits[column]), row);
    }
    out[column] = from_float<T>(dz);
  }

  // Logits whose vectors lie otherwise than the output's are read one by one.
  INFOENTROPY_DEVICE Vector read(int column, bool aligned) const {
    if (aligned) return load<Next::kDone>(reinterpret_cast<const Vector*>(logits + column));
    Vector x;
    INFOENTROPY_UNROLL
    for (int w = 0; w < 4; ++w) {
      const T* from = logits + column + w * kPerWord<T>;
      x.word[w] = pack(to_float(from[0]), to_float(from[kPerWord<T> - 1]), T{});
    }
    return x;
  }
};

template <class T>
INFOENTROPY_DEVICE GradientRow<T> gradient_row(const T* logits, T* out, int columns, int width,
                                             const DeviceTargets& targets, std::int64_t token) {
  if (targets.ignored(token)) return {logits, out, 0, width, -1};
  return {logits, out, columns, width, targets.column(token, columns)};
}

// Blocks that share a row.
template <class T>
inline int gradient_blocks(int width) {
  const int vectors = width / kPerVector<T>;
  return vectors > kBatch ? (vectors + kBatch - 1) / kBatch : 1;
}

// What thread `thread` of block `block` writes of a row.
template <class T, bool kSoftcap>
INFOENTROPY_DEVICE void write_gradient(const GradientRow<T>& row,
                                       const RowCoefficients& coefficients, int block,
                                       int thread) {
  constexpr int kEach = kPerVector<T>;
  const Slicing slicing = slice(row.out, row.width);
  const Slicing from = slice(row.logits, row.width);
  const bool aligned = from.head == slicing.head;
  const int whole = row.columns - slicing.head < 0 ? 0 : (row.columns - slicing.head) / kEach;
  const int first = block * kBatch + thread;

  Vector x[kInFlight];
  INFOENTROPY_UNROLL
  for (int i = 0; i < kInFlight; ++i) {
    const int vector = first + i * kThreads;
    if (vector < whole) x[i] = row.read(slicing.head + vector * kEach, aligned);
  }
  INFOENTROPY_UNROLL
  for (int i = 0; i < kInFlight; ++i) {
    const int vector = first + i * kThreads, column = slicing.head + vector * kEach;
    if (vector < whole) {
      const Vector dz = gradient_of<T, kSoftcap>(x[i], coefficients);
      const int own = row.target - column;
      const bool holds_own = own >= 0 && own < kEach;
      T own_dz{};  // of the logit before it may be overwritten
      if (holds_own) {
        own_dz = from_float<T>(own_gradient<kSoftcap>(row.logits[row.target], coefficients));
      }
      store(reinterpret_cast<Vector*>(row.out + column), dz);
      if (holds_own) row.out[row.target] = own_dz;  // again by the same thread: in order
    } else if (vector < slicing.vectors && column >= row.columns) {  // padding
      store(reinterpret_cast<Vector*>(row.out + column), Vector{});
    } else if (vector < slicing.vectors) {  // padding in part
      INFOENTROPY_ROLL
      for (int j = 0; j < kEach; ++j) row.template write<kSoftcap>(column + j, coefficients);
    }
  }
  if (block == 0 && thread < slicing.head + slicing.tail) {
    const int behind = row.width - slicing.tail + (thread - slicing.head);
    row.template write<kSoftcap>(thread < slicing.head ? thread : behind, coefficients);
  }
}

}  // namespace infoentropy::cuda
