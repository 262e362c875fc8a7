// Copyright (c) torchao_masquant contributors.
// All rights reserved.
//
// This source code is licensed under the BSD 3-Clause license found in the
// LICENSE file in the root directory of this source tree.

// The kernels of cpu_kernels.h for processors without AVX512-VNNI, by portable_vectors.h.
// Methods are those of the AVX512 files, whose comments say more.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu_common.h"
#include "cpu_kernels.h"
#include "portable_vectors.h"

// Products and sums are rounded one by one, as the reference's are: the compiler must
// not contract them (-ffp-contract=off). Where a fused one is wanted, it is written out.

namespace masquant {

const char* const kProcessor = kInstructions;

bool has_processor() { return has_instructions(); }

bool has_tiles() { return false; }

int32_t Weights::offset() const { return packed ? 8 : kByteOffset; }

// ---- activations ----

namespace {

// One stage of a rotation inside of a vector: values whose lanes differ in the bit half.
template <int half>
inline Floats stage(Floats v) {
  if constexpr (half < kLanes) {
    Ints lane, other;
    for (int i = 0; i < kLanes; ++i) {
      lane[i] = i;
      other[i] = i ^ half;
    }
    const Floats swapped = __builtin_shuffle(v, other);
    return (lane & half) != 0 ? swapped - v : v + swapped;
  }
  return v;
}

}  // namespace

void rotate_row(float* v, int64_t in_features, int64_t hadamard_size) {
  if (hadamard_size == 1) return;
  const Floats factor =
      all_lanes(static_cast<float>(1.0 / std::sqrt(static_cast<double>(hadamard_size))));
  for (int64_t i = 0; i < in_features; i += kLanes) {
    const int64_t count = in_features - i;
    Floats block = stage<1>(load<Type::kFloat32>(v, i, count));
    if (hadamard_size > 2) block = stage<2>(block);
    if (hadamard_size > 4) block = stage<4>(block);
    if (hadamard_size <= kLanes) block = block * factor;
    store(v + i, count, block);
  }
  // Larger blocks are of whole vectors.
  for (int64_t start = 0; hadamard_size > kLanes && start < in_features;
       start += hadamard_size) {
    float* block = v + start;
    for (int64_t half = kLanes; half < hadamard_size; half *= 2) {
      const Floats times = 2 * half == hadamard_size ? factor : all_lanes(1.0f);
      for (int64_t pair = 0; pair < hadamard_size; pair += 2 * half) {
        for (int64_t i = pair; i < pair + half; i += kLanes) {
          const Floats a = load_vector<Floats>(block + i);
          const Floats c = load_vector<Floats>(block + i + half);
          store_vector(block + i, (a + c) * times);
          store_vector(block + i + half, (a - c) * times);
        }
      }
    }
  }
}

void quantize_row(const void* x, Type type, const float* pre_scale, const float* shift,
                  int64_t in_features, int64_t hadamard_size, int quant_max,
                  float* scratch, int8_t* q, float* scale) {
  with_type(type, [&](auto t) {
    for (int64_t i = 0; i < in_features; i += kLanes) {
      const int64_t count = in_features - i;
      Floats v = load<t()>(x, i, count) * load<Type::kFloat32>(pre_scale, i, count);
      if (shift != nullptr) v = v - load<Type::kFloat32>(shift, i, count);
      store(scratch + i, count, v);
    }
  });
  rotate_row(scratch, in_features, hadamard_size);
  // As integers: the magnitude of nan is above that of inf, so neither is lost.
  Ints largest = {};
  for (int64_t i = 0; i < in_features; i += kLanes) {
    const Ints bits = (Ints)load<Type::kFloat32>(scratch, i, in_features - i) & 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;
  }
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits = std::max<int32_t>(bits, largest[i]);
  float absmax;
  std::memcpy(&absmax, &bits, sizeof absmax);
  float s = absmax / static_cast<float>(quant_max);
  s = s < FLT_MIN ? FLT_MIN : s;
  *scale = s;

  // No clamping: a quotient is at most quant_max, and nan, of a row whose scale is not
  // finite, becomes 0.
  const Floats divisor = all_lanes(s);
  for (int64_t i = 0; i < in_features; i += kLanes) {
    const int64_t count = in_features - i;
    const Ints rounded = round_to_ints(load<Type::kFloat32>(scratch, i, count) / divisor);
    if (count >= kLanes) {
      narrow(rounded, q + i);
    } else {
      int8_t last[kLanes];
      narrow(rounded, last);
      std::memcpy(q + i, last, count);
    }
  }
}

void smooth_row(const void* x, Type type, const float* pre_scale, int64_t in_features,
                float* smoothed) {
  with_type(type, [&](auto t) {
    for (int64_t i = 0; i < in_features; i += kLanes) {
      const int64_t count = in_features - i;
      store(smoothed + i, count,
            load<t()>(x, i, count) * load<Type::kFloat32>(pre_scale, i, count));
    }
  });
}

int32_t sum_row(const int8_t* q, int64_t in_features) {
  int32_t sum = 0;
  for (int64_t i = 0; i < in_features; ++i) sum += q[i];
  return sum;
}

void to_float(const int8_t* q, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(q[i]);
}

void split_numbers(const float* v, int64_t length, int count, int8_t* data, Planes* planes) {
  Floats largest = {}, total = {};
  for (int64_t i = 0; i < length; i += kLanes) {
    const Floats x = load<Type::kFloat32>(v, i, length - i);
    const Floats size = (Floats)((Ints)x & 0x7FFFFFFF);
    largest = size > largest ? size : largest;
    total += x;
  }
  float absmax = 0.0f;
  for (int i = 0; i < kLanes; ++i) absmax = std::max<float>(absmax, largest[i]);
  // A maximum drops a nan, a sum keeps it.
  const bool finite = std::isfinite(absmax) && !std::isnan(sum_lanes(total));
  // Planes of 127 each, less what a product with a reciprocal may be too large by.
  constexpr float kMost[] = {127.0f, 32638.0f, 8355000.0f};
  const float s = absmax / kMost[count - 1];
  // What is so small that its steps would be subnormal is zero beside any rounding.
  const Floats reciprocal = all_lanes(!finite || s < 1e-36f ? 0.0f : 1.0f / s);
  Ints sums[3] = {};
  for (int64_t i = 0; i < length; i += kLanes) {
    const Floats x = load<Type::kFloat32>(v, i, length - i);
    Ints value = finite ? round_to_ints(x * reciprocal) : Ints{};
    // From the last plane on, each leaves a multiple of 256 to those before it.
    for (int p = count - 1; p >= 0; --p) {
      const Ints low = value << 24 >> 24;
      int8_t bytes[kLanes];
      narrow(low, bytes);
      std::memcpy(data + p * length + i, bytes, std::min<int64_t>(kLanes, length - i));
      value = (value - low) >> 8;
      sums[p] += low;
    }
  }
  *planes = {data, length, count, {}, finite ? s : NAN};
  for (int p = 0; p < count; ++p) planes->sums[p] = sum_lanes(sums[p]);
}

// ---- weights, unpacked ----

namespace {

//: of a vector's 32 bits, those of each byte's low half
constexpr uint8_t kLow = 0xF;

// The first count bytes, at most 8 or 16 of them, zeros behind them.
template <int most>
inline Bytes16 load_bytes(const void* from, int64_t count) {
  if (count < most) {
    Bytes16 v = {};
    std::memcpy(&v, from, count);
    return v;
  }
  if constexpr (most == 16) return load_vector<Bytes16>(from);
  typedef int64_t Longs __attribute__((vector_size(16)));
  return (Bytes16)Longs{load_vector<int64_t>(from), 0};
}

//: bytes of weights of 8 bits that fill 4 steps
constexpr int kWidened = 4 * kChannelsOfLane;

inline Bytes16 shifted_down(Bytes16 v) {
  typedef uint16_t Halves __attribute__((vector_size(16)));
  return (Bytes16)((Halves)v >> 4) & kLow;
}

// Rows of 16 bytes of 4 columns, as 4 steps of [kColumns][4] from out on.
template <class Change>
inline void store_steps(Ints4 r[4], int64_t stride, uint8_t* out, const Change& change) {
  transpose(r);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) store_vector(out + j * stride, change((Bytes16)r[j]));
}

// Columns behind the last are the last: their products are not looked at.
struct Columns {
  Columns(const Weights& weights, int64_t n, int64_t k) {
    for (int64_t c = 0; c < kColumns; ++c) {
      const int64_t index = std::min(n + c, weights.out_features - 1);
      at[c] = weights.data + index * weights.row_bytes + (weights.packed ? k / 2 : k);
    }
  }
  const uint8_t* at[kColumns];
};

}  // namespace

void pack_panel(const Weights& weights, int64_t n, int64_t k, int64_t width,
                int8_t* panel) {
  const Columns columns(weights, n, k);
  const Bytes16 pairs = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  for (int64_t c = 0; c < kColumns; c += 4) {
    for (int64_t i = 0; i < width; i += 16) {
      Ints4 r[4];
      for (int j = 0; j < 4; ++j) {
        const uint8_t* at = columns.at[c + j];
        if (weights.packed) {
          const Bytes16 bytes = load_bytes<8>(at + i / 2, (width - i + 1) / 2);
          const Bytes16 low = bytes & kLow, high = shifted_down(bytes);
          r[j] = (Ints4)((__builtin_shuffle(low, high, pairs) ^ 8) - 8);
        } else {
          r[j] = (Ints4)load_bytes<16>(at + i, width - i);
        }
      }
      store_steps(r, 4 * kColumns, reinterpret_cast<uint8_t*>(panel) + i * kColumns + 4 * c,
                  [](Bytes16 v) { return v; });
    }
  }
}

void expand_panel(const int8_t* panel, int64_t k, int64_t width, int64_t group_width,
                  const float* scale, const float* zero, float* out) {
  for (int64_t i = 0; i < width; ++i) {
    const int64_t group = (k + i) / group_width * kColumns;
    for (int64_t c = 0; c < kColumns; c += kLanes) {
      const Ints four = load_vector<Ints>(panel + (i / 4 * kColumns + c) * 4);
      Floats value = to_floats(four << static_cast<int>(24 - 8 * (i % 4)) >> 24);
      if (zero != nullptr) value = value - load_vector<Floats>(zero + group + c);
      store_vector(out + i * kColumns + c, value * load_vector<Floats>(scale + group + c));
    }
  }
}

void float_panel(const void* matrix, Type type, int64_t stride, int64_t row,
                 int64_t count, int64_t column, int64_t columns, float* out) {
  with_type(type, [&](auto t) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = 0; c < kColumns; c += kLanes) {
        const Floats v = c < columns
                             ? load<t()>(matrix, (row + r) * stride + column + c, columns - c)
                             : Floats{};
        store_vector(out + r * kColumns + c, v);
      }
    }
  });
}

void transpose_columns(const float* matrix, int64_t stride, int64_t columns, int64_t count,
                       float* out) {
  for (int64_t c = 0; c < kColumns; ++c) {
    for (int64_t i = 0; i < count; ++i) {
      out[i * kColumns + c] = c < columns ? matrix[c * stride + i] : 0.0f;
    }
  }
}

int64_t column_steps(bool packed, int64_t width) {
  return packed ? round_up(width, 8) / 4 : (width + kChannelsOfLane - 1) / kChannelsOfLane;
}

namespace {

template <bool packed>
void unpack_columns(const Weights& weights, int64_t n, int64_t k, int64_t width,
                    const uint8_t* next, uint8_t* panel) {
  constexpr int64_t kStep = 4 * kColumns;
  constexpr int kBytes = packed ? 16 : kWidened;
  const Columns columns(weights, n, k);
  const int64_t bytes = packed ? (width + 1) / 2 : width;
  const int64_t quarter = kColumns / 4 * weights.row_bytes;
  // A column's bytes one after the other: columns a power of two apart share few lines of
  // the cache, which the next columns would take.
  for (int64_t c = 0; c < kColumns; c += 4) {
    for (int64_t i = 0; i < bytes; i += kBytes) {
      Ints4 r[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        if (i % 64 == 0) {
          __builtin_prefetch(next + j * quarter + 16 * (i + c / 16 * 16) + 64 * (c % 16 / 4));
        }
        const Bytes16 v = load_bytes<kBytes>(columns.at[c + j] + i, bytes - i);
        r[j] = (Ints4)(packed ? v : widen(v));
      }
      if constexpr (packed) {
        uint8_t* out = panel + i / kBytes * 8 * kStep + 4 * c;
        store_steps(r, 2 * kStep, out, [](Bytes16 v) { return (v & kLow) ^ 8; });
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          store_vector(out + (2 * j + 1) * kStep, shifted_down((Bytes16)r[j]) ^ 8);
        }
      } else {
        store_steps(r, kStep, panel + i / kBytes * 4 * kStep + 4 * c,
                    [](Bytes16 v) { return v; });
      }
    }
  }
}

}  // namespace

void column_panel(const Weights& weights, int64_t n, int64_t k, int64_t width,
                  const uint8_t* next, uint8_t* panel) {
  if (!weights.packed) return unpack_columns<false>(weights, n, k, width, next, panel);
  if (k % 2 == 0) return unpack_columns<true>(weights, n, k, width, next, panel);
  unpack_columns_slowly(weights, n, k, width, panel);
}

void interleave(const int8_t* q, int64_t width, bool packed, int rows, int8_t* out) {
  // Of each 8 channels the even ones first, as the nibbles of 4 bytes have them.
  const Bytes16 order = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
  const int64_t steps = column_steps(packed, width);
  for (int64_t i = 0, step = 0; i < width; i += packed ? 16 : kWidened) {
    Bytes16 v;
    if (packed) {
      v = __builtin_shuffle(load_bytes<16>(q + i, width - i), order);
    } else {
      v = load_bytes<kWidened>(q + i, width - i);
      if (kChannelsOfLane == 2) v = widen(v);
    }
    for (int j = 0; j < 4 && step < steps; ++j, ++step) {
      std::memcpy(out + 4 * rows * step, reinterpret_cast<const char*>(&v) + 4 * j, 4);
    }
  }
}

// ---- products of panels ----

namespace {

constexpr int kVectors = 16 / kLanes;

inline Bytes broadcast_four(const void* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return (Bytes)all_lanes(four);
}

// Adds what p has of a plane for the columns from c.
template <class Sums, int rows>
inline void multiply_steps(const ColumnProduct& p, int plane, int64_t steps, int c,
                           Ints (&sum)[rows][kVectors]) {
  const int8_t* token = p.tokens + plane * steps * 4 * rows;
  const uint8_t* panel = p.panel + 4 * c;
  for (int64_t i = 0; i < steps;) {
    const int64_t stop = std::min(steps, i + Sums::kProducts);
    typename Sums::Part part[rows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) part[r][j] = Sums::begin(sum[r][j]);
    }
    for (; i < stop; ++i, token += 4 * rows, panel += 4 * kColumns) {
      Bytes w[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) w[j] = load_vector<Bytes>(panel + 4 * kLanes * j);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        const Bytes a = broadcast_four(token + 4 * r);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) part[r][j] = Sums::add(part[r][j], w[j], a);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[r][j] = Sums::end(sum[r][j], part[r][j]);
    }
  }
}

template <class Sums, int rows, int planes>
void multiply_rows(const ColumnProduct& p, int64_t steps) {
  for (int c = 0; c < kColumns; c += kVectors * kLanes) {
    Ints sum[rows][kVectors];
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < kVectors; ++j) {
        sum[r][j] = planes > 1   ? Ints{}
                    : p.continues ? load_vector<Ints>(p.c + r * kColumns + c + kLanes * j)
                                  : all_lanes(p.start[r]);
      }
    }
    for (int plane = 0; plane < planes; ++plane) {
      for (int r = 0; plane > 0 && r < rows; ++r) {
        for (int j = 0; j < kVectors; ++j) sum[r][j] <<= 8;
      }
      multiply_steps<Sums>(p, plane, steps, c, sum);
    }
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < kVectors; ++j) {
        const int64_t column = c + kLanes * j, at = r * kColumns + column;
        if (p.sum == nullptr) {
          store_vector(p.c + at, sum[r][j]);
          continue;
        }
        const Floats scale = load_vector<Floats>(p.scale + column);
        Floats total = load_vector<Floats>(p.sum + at);
        if constexpr (planes == 1) {
          // Rounded one by one, as the reference's are.
          total = total + to_floats(sum[r][j]) * scale;
        } else {
          const Floats exact = to_floats(sum[r][j] + p.start[r]);
          total = fma(exact * p.token_scale[r], scale, total);
          if (p.zero != nullptr) {
            total = fma(all_lanes(-p.token_sum[r]), load_vector<Floats>(p.zero + column), total);
          }
        }
        store_vector(p.sum + at, total);
      }
    }
  }
}

template <int rows>
void multiply_float_rows(const float* const* tokens, const float* panel, int64_t width,
                         int64_t columns, bool add, float* out) {
  for (int64_t c = 0; c < columns; c += kVectors * kLanes) {
    Floats sum[rows][kVectors];
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < kVectors; ++j) {
        sum[r][j] =
            add ? load_vector<Floats>(out + r * kColumns + c + kLanes * j) : Floats{};
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      Floats w[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        w[j] = load_vector<Floats>(panel + i * kColumns + c + kLanes * j);
      }
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        const Floats a = all_lanes(tokens[r][i]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[r][j] = fma(a, w[j], sum[r][j]);
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < kVectors; ++j) {
        store_vector(out + r * kColumns + c + kLanes * j, sum[r][j]);
      }
    }
  }
}

}  // namespace

void multiply_columns(const ColumnProduct& product, int rows, int planes, int64_t steps) {
  with_count<kRows>(rows, [&](auto r) {
    if (planes == 2) {
      multiply_rows<NibbleSums, r(), 2>(product, steps);
    } else if (product.packed) {
      multiply_rows<NibbleSums, r(), 1>(product, steps);
    } else {
      multiply_rows<ByteSums, r(), 1>(product, steps);
    }
  });
}

void multiply_float_panel(const float* const* tokens, int rows, const float* panel,
                          int64_t width, int64_t columns, bool add, float* c) {
  with_count<kRows>(rows, [&](auto r) {
    multiply_float_rows<r()>(tokens, panel, width, columns, add, c);
  });
}

// ---- products with weights as they are stored ----

namespace {

//: bytes of 128 nibbles, which are read at once, and of a vector
constexpr int kBlockBytes = kBlock / 2, kVectorBytes = 4 * kLanes;
//: of weights of 8 bits, channels of a vector, and bytes of a token's channel
constexpr int kChannels = kLanes * kChannelsOfLane, kTokenBytes = kVectorBytes / kChannels;

// Rows of weights that are read side by side. Those behind the last are the last: their
// products are not looked at.
constexpr int kStreams = 4;

struct Streams {
  Streams(const Weights& weights, int64_t n) : row_bytes(weights.row_bytes) {
    for (int s = 0; s < kStreams; ++s) {
      index[s] = std::min<int64_t>(n + s, weights.out_features - 1);
      row[s] = weights.data + index[s] * row_bytes;
    }
    const int64_t bytes = kStreams * row_bytes;
    ahead = std::max<int64_t>(1, 4096 / std::max<int64_t>(bytes, 1)) * bytes;
  }

  // Where a row's bytes are, which the hardware would find anew: what follows is asked
  // for. The last ones are copied to room, with zeros behind them.
  const uint8_t* at(int s, int64_t byte, int64_t count, uint8_t* room) const {
    const uint8_t* from = row[s] + byte;
    __builtin_prefetch(from + ahead);
    if (byte + count <= row_bytes) return from;
    std::memset(room, 0, count);
    std::memcpy(room, from, row_bytes - byte);
    return room;
  }

  int64_t row_bytes, ahead, index[kStreams];
  const uint8_t* row[kStreams];
};

// Adds the products of a block of packed weights with tokens' bytes, [64 of even channels]
// [64 of odd ones], 8 added to each weight.
template <int tokens>
inline void add_block(const uint8_t* bytes, const int8_t* const* token, Ints (&sum)[tokens]) {
  static_assert(2 * kBlockBytes / kVectorBytes <= NibbleSums::kProducts);
  NibbleSums::Part part[tokens];
#pragma GCC unroll 4
  for (int t = 0; t < tokens; ++t) part[t] = NibbleSums::begin(sum[t]);
#pragma GCC unroll 4
  for (int i = 0; i < kBlockBytes; i += kVectorBytes) {
    const Bytes w = load_vector<Bytes>(bytes + i) ^ static_cast<int8_t>(0x88);
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
    const Bytes even = w & kLow, odd = (Bytes)((Halves)w >> 4) & kLow;
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) {
      part[t] = NibbleSums::add(part[t], even, load_vector<Bytes>(token[t] + i));
      part[t] = NibbleSums::add(part[t], odd, load_vector<Bytes>(token[t] + kBlockBytes + i));
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < tokens; ++t) sum[t] = NibbleSums::end(sum[t], part[t]);
}

// c[token][row] (+)= the sums of the lanes.
template <int tokens, class Sum, class Number>
inline void keep_sums(const Sum (&sum)[kStreams][tokens], int columns, bool add, Number* c) {
  for (int s = 0; s < std::min(columns, kStreams); ++s) {
    for (int t = 0; t < tokens; ++t) {
      Number& at = c[t * kColumns + s];
      at = sum_lanes(sum[s][t]) + (add ? at : 0);
    }
  }
}

template <int tokens, bool packed>
void multiply_stored_rows(const Weights& weights, int64_t n, int columns, int64_t begin,
                          int64_t end, const int8_t* const* token, int32_t* c) {
  const Streams stream(weights, n);
  uint8_t room[kBlock];
  Ints sum[kStreams][tokens];
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) sum[s][t] = Ints{};
  }
  //: channels of 64 bytes
  constexpr int64_t step = packed ? kBlock : kBlockBytes;
  for (int64_t k = begin; k < end; k += step) {
    const int8_t* at[tokens];
    for (int t = 0; t < tokens; ++t) at[t] = token[t] + k * (packed ? 1 : kTokenBytes);
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      if constexpr (packed) {
        add_block(stream.at(s, k / 2, kBlockBytes, room), at, sum[s]);
      } else {
        const uint8_t* bytes = stream.at(s, k, kBlockBytes, room);
#pragma GCC unroll 4
        for (int i = 0; i < kBlockBytes; i += kChannels) {
          const Bytes w = stored_bytes(bytes + i);
#pragma GCC unroll 4
          for (int t = 0; t < tokens; ++t) {
            const Bytes a = load_vector<Bytes>(at[t] + i * kTokenBytes);
            sum[s][t] = dot_bytes(sum[s][t], w, a);
          }
        }
      }
    }
  }
  keep_sums(sum, columns, begin > 0, c);
}

template <int tokens, int planes>
void multiply_blocks(const Weights& weights, int64_t n, int columns, const float* scale,
                     int64_t groups, int64_t begin, int64_t end, const BlockedToken* token,
                     float* c) {
  const Streams stream(weights, n);
  const int64_t in_features = weights.in_features, width = in_features / groups;
  Floats sum[kStreams][tokens];
  for (int s = 0; s < kStreams; ++s) {
    for (int t = 0; t < tokens; ++t) sum[s][t] = Floats{};
  }
  for (int64_t k = begin; k < end; k += kBlock) {
    const int64_t block = k / kBlock, group = k / width;
    for (int s = 0; s < kStreams; ++s) {
      const uint8_t* bytes = stream.at(s, k / 2, kBlockBytes, nullptr);
      Ints product[tokens];
      for (int t = 0; t < tokens; ++t) product[t] = Ints{};
#pragma GCC unroll 3
      for (int p = 0; p < planes; ++p) {
        const int8_t* at[tokens];
        for (int t = 0; t < tokens; ++t) {
          at[t] = token[t].planes + p * in_features + k;
          product[t] <<= 8;
        }
        add_block(bytes, at, product);
      }
      const float factor = scale[stream.index[s] * groups + group];
      for (int t = 0; t < tokens; ++t) {
        const Ints start = load_vector<Ints>(token[t].start + block * 16);
        const float times = planes > 1 ? token[t].scale[block] * factor : factor;
        sum[s][t] = fma(to_floats(product[t] + start), all_lanes(times), sum[s][t]);
      }
    }
  }
  keep_sums(sum, columns, begin > 0, c);
}

// c -= scale * zero * (sum of the token), group by group.
void take_zero_points(int columns, const float* scale, const int8_t* zero, int64_t groups,
                      int64_t in_features, const BlockedToken* tokens, int rows, float* c) {
  const int64_t blocks = in_features / kBlock / groups;
  for (int t = 0; t < rows; ++t) {
    std::vector<float> sums(groups);
    for (int64_t i = 0; i < groups * blocks; ++i) sums[i / blocks] += tokens[t].sums[i];
    for (int s = 0; s < columns; ++s) {
      float sum = 0.0f;
      for (int64_t g = 0; g < groups; ++g) {
        sum += sums[g] * scale[s * groups + g] * static_cast<float>(zero[s * groups + g]);
      }
      c[t * kColumns + s] -= sum;
    }
  }
}

// Of a block of channels, the even ones first.
void split_block(const int8_t* q, int8_t* out) {
  for (int i = 0; i < kBlockBytes; ++i) {
    out[i] = q[2 * i];
    out[kBlockBytes + i] = q[2 * i + 1];
  }
}

// What 8 added to each weight adds to the lanes of a block's product.
Ints excess_of_block(const int8_t* split) {
  uint8_t zeros[kBlockBytes] = {};
  Ints sum[1] = {};
  add_block(zeros, &split, sum);
  return sum[0];
}

}  // namespace

int64_t stored_token_bytes(bool packed, int64_t in_features) {
  return round_up(in_features, kBlock) * (packed ? 1 : kTokenBytes);
}

void store_token(const int8_t* q, bool packed, int64_t in_features, int8_t* out) {
  std::vector<int8_t> padded(round_up(in_features, kBlock));
  std::copy_n(q, in_features, padded.begin());
  for (size_t i = 0; i < padded.size(); i += kBlock) {
    if (packed) {
      split_block(padded.data() + i, out + i);
      continue;
    }
    for (size_t k = i; k < i + kBlock; ++k) {
      const int16_t wide = padded[k];
      std::memcpy(out + k * kTokenBytes, &wide, kTokenBytes);
    }
  }
}

void start_blocks(const int8_t* split, int64_t in_features, int32_t* start) {
  for (int64_t k = 0; k < in_features; k += kBlock) {
    store_vector(start + k / kBlock * 16, -excess_of_block(split + k));
  }
}

bool split_planes(const float* v, int64_t in_features, int planes, int8_t* out,
                  float* scale, float* sums, int32_t* start) {
  int8_t bytes[3 * kBlock];
  for (int64_t k = 0; k < in_features; k += kBlock) {
    const int64_t block = k / kBlock;
    Planes numbers;
    split_numbers(v + k, kBlock, planes, bytes, &numbers);
    if (std::isnan(numbers.scale)) return false;
    int32_t sum = 0;
    Ints excess = {};
    for (int p = 0; p < planes; ++p) {
      int8_t* to = out + p * in_features + k;
      split_block(bytes + p * kBlock, to);
      excess = (excess << 8) + excess_of_block(to);
      sum = 256 * sum + numbers.sums[p];
    }
    scale[block] = numbers.scale;
    sums[block] = static_cast<float>(sum) * numbers.scale;
    store_vector(start + block * 16, -excess);
  }
  return true;
}

void multiply_stored(const Weights& weights, int64_t n, int columns,
                     const int8_t* const* tokens, int rows, int32_t* c) {
  with_turns<kStoredTokens>(
      weights.packed ? 1 : kTokenBytes, rows, std::max<int64_t>(weights.in_features, 1),
      [&](auto at_once, int first, int64_t begin, int64_t end) {
        for (int s = 0; s < columns; s += kStreams) {
          int32_t* to = c + first * kColumns + s;
          if (weights.packed) {
            multiply_stored_rows<at_once(), true>(weights, n + s, columns - s, begin, end,
                                                  tokens + first, to);
          } else {
            multiply_stored_rows<at_once(), false>(weights, n + s, columns - s, begin, end,
                                                   tokens + first, to);
          }
        }
      });
}

void multiply_stored_blocks(const Weights& weights, int64_t n, int columns,
                            const float* scale, const int8_t* zero, int64_t groups,
                            int planes, const BlockedToken* tokens, int rows, float* c) {
  with_turns<kStoredTokens>(
      planes, rows, weights.in_features,
      [&](auto at_once, int first, int64_t begin, int64_t end) {
        with_count<3>(planes, [&](auto of_each) {
          for (int s = 0; s < columns; s += kStreams) {
            multiply_blocks<at_once(), of_each()>(weights, n + s, columns - s, scale, groups,
                                                  begin, end, tokens + first,
                                                  c + first * kColumns + s);
          }
        });
      });
  if (zero != nullptr) {
    take_zero_points(columns, scale + n * groups, zero + n * groups, groups,
                     weights.in_features, tokens, rows, c);
  }
}

// ---- results ----

namespace {

inline void store_result(void* out, Type type, int64_t i, int64_t count, Floats v) {
  count = std::min<int64_t>(count, kLanes);
  if (type == Type::kFloat32) return store(static_cast<float*>(out) + i, count, v);
  uint16_t halves[kLanes];
  if (type == Type::kFloat16) {
    to_float16(v, halves);
  } else {
    // Round to nearest even.
    const Ints bits = (Ints)v;
    const Ints rounded = v == v ? bits + ((bits >> 16 & 1) + 0x7FFF) : all_lanes(0x7FC00000);
    for (int lane = 0; lane < kLanes; ++lane) {
      halves[lane] = static_cast<uint16_t>(static_cast<uint32_t>(rounded[lane]) >> 16);
    }
  }
  std::memcpy(static_cast<uint16_t*>(out) + i, halves, 2 * count);
}

}  // namespace

void finish_integers(const Finish& finish, const int32_t* c, const Token* tokens,
                     int rows) {
  float y[kRows * kColumns];
  for (int r = 0; r < rows; ++r) {
    // In 32 bits that wrap around: only the exact product has to fit.
    const int32_t excess = static_cast<int32_t>(static_cast<uint32_t>(finish.offset) *
                                                static_cast<uint32_t>(tokens[r].sum));
    for (int j = 0; j < kColumns; j += kLanes) {
      const Ints exact = load_vector<Ints>(c + r * kColumns + j) - excess;
      store_vector(y + r * kColumns + j,
                   to_floats(exact) * load_vector<Floats>(finish.scale + j));
    }
  }
  finish_floats(finish, y, tokens, rows);
}

void finish_floats(const Finish& finish, float* c, const Token* tokens, int rows) {
  float up[kRows * kColumns];
  int32_t begin = INT32_MAX, end = 0;
  const float* hidden[kRows];
  for (int r = 0; r < rows; ++r) {
    if (tokens[r].begin < tokens[r].end) {
      begin = std::min(begin, tokens[r].begin);
      end = std::max(end, tokens[r].end);
    }
  }
  if (begin < end) {
    for (int r = 0; r < rows; ++r) hidden[r] = tokens[r].hidden + begin;
    multiply_float_panel(hidden, rows, finish.up + begin * kColumns, end - begin,
                         finish.columns, false, up);
  }
  for (int r = 0; r < rows; ++r) {
    const Token& token = tokens[r];
    for (int j = 0; j < finish.columns; j += kLanes) {
      Floats y = load_vector<Floats>(c + r * kColumns + j) * token.scale;
      if (token.begin < token.end) y = y + load_vector<Floats>(up + r * kColumns + j);
      if (finish.modality_bias != nullptr) {
        y = y + load_vector<Floats>(finish.modality_bias + token.modality * kColumns + j);
      }
      if (finish.bias != nullptr) y = y + load_vector<Floats>(finish.bias + j);
      store_result(token.out, finish.out_type, j, finish.columns - j, y);
    }
  }
}

}  // namespace masquant
