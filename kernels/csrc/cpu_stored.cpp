// Copyright (c) torchao_masquant contributors.
// All rights reserved.
//
// This source code is licensed under the BSD 3-Clause license found in the
// LICENSE file in the root directory of this source tree.

// Products with the weights as they are stored, for few tokens. A row of weights meets a
// row of tokens in vectors along the channels, whose lanes are added up at the end.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu_common.h"
#include "cpu_kernels.h"
#include "cpu_vectors.h"

namespace masquant {
namespace {

// Tokens and rows of weights that are multiplied at once: 16 sums, and what feeds them,
// fill the registers. Fewer tokens leave room for more rows.
constexpr int kTokensAtOnce = 8;
constexpr int rows_at_once(int tokens) { return tokens <= 4 ? 4 : 2; }

inline __m128i fold(__m512i v) {
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

inline __m128 fold(__m512 v) {
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline __m128i pairs(__m128i a, __m128i b) { return _mm_hadd_epi32(a, b); }
inline __m128 pairs(__m128 a, __m128 b) { return _mm_hadd_ps(a, b); }

inline void keep(int32_t* to, __m128i v, int count, bool add) {
  const __mmask8 mask = static_cast<__mmask8>((1 << count) - 1);
  if (add) v = _mm_add_epi32(v, _mm_maskz_loadu_epi32(mask, to));
  _mm_mask_storeu_epi32(to, mask, v);
}

inline void keep(float* to, __m128 v, int count, bool add) {
  const __mmask8 mask = static_cast<__mmask8>((1 << count) - 1);
  if (add) v = _mm_add_ps(v, _mm_maskz_loadu_ps(mask, to));
  _mm_mask_storeu_ps(to, mask, v);
}

// c[token][row] (+)= the sums of the lanes.
template <int streams, int tokens, class Vector, class Number>
inline void keep_sums(const Vector (&sum)[streams][tokens], bool add, Number* c) {
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
    const auto a = pairs(fold(sum[0][t]), fold(sum[1][t]));
    auto b = a;
    if constexpr (streams == 4) b = pairs(fold(sum[2][t]), fold(sum[3][t]));
    keep(c + t * kColumns, pairs(a, b), streams, add);
  }
}

// Rows of weights that are read side by side. Those behind the last are the last: their
// products are not looked at.
template <int streams>
struct Streams {
  Streams(const Weights& weights, int64_t n) {
    const int64_t bytes = streams * weights.row_bytes;
    ahead = std::max<int64_t>(1, 4096 / std::max<int64_t>(bytes, 1)) * bytes;
#pragma GCC unroll 4
    for (int s = 0; s < streams; ++s) {
      index[s] = std::min<int64_t>(n + s, weights.out_features - 1);
      row[s] = weights.data + index[s] * weights.row_bytes;
    }
  }

  // What follows is asked for: the hardware would find each row anew.
  inline __m512i load(int s, int64_t byte) const {
    _mm_prefetch(row[s] + byte + ahead, _MM_HINT_T0);
    return _mm512_loadu_si512(row[s] + byte);
  }

  int64_t ahead, index[streams];
  const uint8_t* row[streams];
};

// The two nibbles of each byte, 8 added: [0, 16).
inline void unpack(__m512i bytes, __m512i& even, __m512i& odd) {
  const __m512i low4 = _mm512_set1_epi8(0xF);
  const __m512i w = _mm512_xor_si512(bytes, _mm512_set1_epi8(-120));  // 0x88
  even = _mm512_and_si512(w, low4);
  odd = _mm512_and_si512(_mm512_srli_epi16(w, 4), low4);
}

template <int streams, int tokens, bool packed>
void multiply_rows(const Weights& weights, int64_t n, int64_t begin, int64_t end,
                   const int8_t* const* token, bool add, int32_t* c) {
  const Streams<streams> stream(weights, n);
  __m512i sum[streams][tokens];
#pragma GCC unroll 4
  for (int s = 0; s < streams; ++s) {
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) sum[s][t] = _mm512_setzero_si512();
  }
  constexpr int64_t kStep = packed ? 128 : 64;
  const auto step = [&](int64_t k, auto whole) __attribute__((always_inline)) {
    const int64_t byte = packed ? k / 2 : k;
    __m512i first[streams], second[streams];
#pragma GCC unroll 4
    for (int s = 0; s < streams; ++s) {
      const __m512i bytes =
          whole() ? stream.load(s, byte)
                  : _mm512_maskz_loadu_epi8(mask64(weights.row_bytes - byte), stream.row[s] + byte);
      if constexpr (packed) {
        unpack(bytes, first[s], second[s]);
      } else {
        first[s] = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      const __m512i a = _mm512_loadu_si512(token[t] + k);
#pragma GCC unroll 4
      for (int s = 0; s < streams; ++s) sum[s][t] = _mm512_dpbusd_epi32(sum[s][t], first[s], a);
      if constexpr (packed) {
        const __m512i b = _mm512_loadu_si512(token[t] + k + 64);
#pragma GCC unroll 4
        for (int s = 0; s < streams; ++s) {
          sum[s][t] = _mm512_dpbusd_epi32(sum[s][t], second[s], b);
        }
      }
    }
  };
  int64_t k = begin;
  const int64_t whole_bytes = weights.row_bytes / 64 * 64;
  const int64_t last = std::min(end, packed ? 2 * whole_bytes : whole_bytes);
  for (; k < last; k += kStep) step(k, std::true_type());
  if (k < end && k < weights.in_features) step(k, std::false_type());
  keep_sums(sum, add, c);
}

template <int streams, int tokens, int planes>
void multiply_blocks(const Weights& weights, int64_t n, const float* scale, int64_t groups,
                     int64_t begin, int64_t end, const BlockedToken* token, bool add,
                     float* c) {
  const Streams<streams> stream(weights, n);
  const int64_t width = weights.in_features / groups;
  __m512 sum[streams][tokens];
#pragma GCC unroll 4
  for (int s = 0; s < streams; ++s) {
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) sum[s][t] = _mm512_setzero_ps();
  }
  int64_t group = begin / width, next = (group + 1) * width;
  for (int64_t k = begin; k < end; k += kBlock) {
    if (k == next) {
      ++group;
      next += width;
    }
    const int64_t block = k / kBlock;
    __m512i even[streams], odd[streams];
    __m512 factor[streams];
#pragma GCC unroll 4
    for (int s = 0; s < streams; ++s) {
      unpack(stream.load(s, k / 2), even[s], odd[s]);
      factor[s] = _mm512_set1_ps(scale[stream.index[s] * groups + group]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      const __m512i start = _mm512_loadu_si512(token[t].start + block * 16);
      __m512i product[streams];
#pragma GCC unroll 4
      for (int s = 0; s < streams; ++s) {
        product[s] = planes == 1 ? start : _mm512_setzero_si512();
        asm("" : "+v"(product[s]));
      }
#pragma GCC unroll 3
      for (int p = 0; p < planes; ++p) {
        const int8_t* at = token[t].planes + p * weights.in_features + k;
        const __m512i a = _mm512_loadu_si512(at), b = _mm512_loadu_si512(at + 64);
#pragma GCC unroll 4
        for (int s = 0; s < streams; ++s) {
          if (p > 0) product[s] = _mm512_slli_epi32(product[s], 8);
          product[s] = _mm512_dpbusd_epi32(product[s], even[s], a);
          product[s] = _mm512_dpbusd_epi32(product[s], odd[s], b);
        }
      }
#pragma GCC unroll 4
      for (int s = 0; s < streams; ++s) {
        if (planes > 1) product[s] = _mm512_add_epi32(product[s], start);
        __m512 exact = _mm512_cvtepi32_ps(product[s]);
        if (planes > 1) exact = _mm512_mul_ps(exact, _mm512_set1_ps(token[t].scale[block]));
        sum[s][t] = _mm512_fmadd_ps(exact, factor[s], sum[s][t]);
      }
    }
  }
  keep_sums(sum, add, c);
}

// c -= scale * zero * (sum of the token), block by block.
void take_zero_points(int columns, const float* scale, const int8_t* zero, int64_t groups,
                      int64_t in_features, const BlockedToken* tokens, int rows, float* c) {
  const int64_t blocks_of_group = in_features / kBlock / groups;
  std::vector<float> factor(round_up(groups, 16)), sums(rows * round_up(groups, 16));
  for (int t = 0; t < rows; ++t) {
    float* sum = sums.data() + t * round_up(groups, 16);
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t b = 0; b < blocks_of_group; ++b) {
        sum[g] += tokens[t].sums[g * blocks_of_group + b];
      }
    }
  }
  for (int s = 0; s < columns; ++s) {
    const float* of_column = scale + s * groups;
    const int8_t* zero_of_column = zero + s * groups;
    for (int64_t g = 0; g < groups; g += 16) {
      const __mmask16 mask = mask16(groups - g);
      const __m512 product = _mm512_mul_ps(load<Type::kFloat32>(of_column, g, mask),
                                           load<Type::kInt8>(zero_of_column, g, mask));
      _mm512_storeu_ps(factor.data() + g, product);
    }
    for (int t = 0; t < rows; ++t) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t g = 0; g < groups; g += 16) {
        const __m512 x = _mm512_loadu_ps(sums.data() + t * round_up(groups, 16) + g);
        sum = _mm512_fmadd_ps(x, _mm512_loadu_ps(factor.data() + g), sum);
      }
      c[t * kColumns + s] -= _mm512_reduce_add_ps(sum);
    }
  }
}

// Of a block of channels, the even ones first.
inline void split_block(__m512i low, __m512i high, int8_t* out) {
  const __m256i even0 = _mm512_cvtepi16_epi8(low), even1 = _mm512_cvtepi16_epi8(high);
  const __m256i odd0 = _mm512_cvtepi16_epi8(_mm512_srli_epi16(low, 8));
  const __m256i odd1 = _mm512_cvtepi16_epi8(_mm512_srli_epi16(high, 8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), even0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), even1);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 64), odd0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 96), odd1);
}

// What 8 added to each weight adds to the lanes of a block's product.
inline __m512i excess_of_block(const int8_t* split) {
  const __m512i eight = _mm512_set1_epi8(8);
  return _mm512_dpbusd_epi32(
      _mm512_dpbusd_epi32(_mm512_setzero_si512(), eight, _mm512_loadu_si512(split)), eight,
      _mm512_loadu_si512(split + 64));
}

}  // namespace

int64_t stored_token_bytes(bool, int64_t in_features) { return round_up(in_features, kBlock); }

void store_token(const int8_t* q, bool packed, int64_t in_features, int8_t* out) {
  if (!packed) {
    std::memcpy(out, q, in_features);
    std::memset(out + in_features, 0, round_up(in_features, kBlock) - in_features);
    return;
  }
  for (int64_t i = 0; i < in_features; i += kBlock) {
    split_block(_mm512_maskz_loadu_epi8(mask64(in_features - i), q + i),
                _mm512_maskz_loadu_epi8(mask64(in_features - i - 64), q + i + 64), out + i);
  }
}

void start_blocks(const int8_t* split, int64_t in_features, int32_t* start) {
  for (int64_t k = 0; k < in_features; k += kBlock) {
    _mm512_storeu_si512(start + k / kBlock * 16,
                        _mm512_sub_epi32(_mm512_setzero_si512(), excess_of_block(split + k)));
  }
}

bool split_planes(const float* v, int64_t in_features, int planes, int8_t* out,
                  float* scale, float* sums, int32_t* start) {
  alignas(64) int8_t bytes[3 * kBlock];
  for (int64_t k = 0; k < in_features; k += kBlock) {
    const int64_t block = k / kBlock;
    Planes numbers;
    split_numbers(v + k, kBlock, planes, bytes, &numbers);
    if (std::isnan(numbers.scale)) return false;
    int32_t sum = 0;
    __m512i excess = _mm512_setzero_si512();
    for (int p = 0; p < planes; ++p) {
      int8_t* to = out + p * in_features + k;
      const int8_t* from = bytes + p * kBlock;
      split_block(_mm512_load_si512(from), _mm512_load_si512(from + 64), to);
      excess = _mm512_add_epi32(_mm512_slli_epi32(excess, 8), excess_of_block(to));
      sum = 256 * sum + numbers.sums[p];
    }
    scale[block] = numbers.scale;
    sums[block] = static_cast<float>(sum) * numbers.scale;
    _mm512_storeu_si512(start + block * 16, _mm512_sub_epi32(_mm512_setzero_si512(), excess));
  }
  return true;
}

void multiply_stored(const Weights& weights, int64_t n, int columns,
                     const int8_t* const* tokens, int rows, int32_t* c) {
  with_turns<kTokensAtOnce>(
      1, rows, std::max<int64_t>(weights.in_features, 1),
      [&](auto at_once, int first, int64_t begin, int64_t end) {
        constexpr int streams = rows_at_once(at_once());
        for (int s = 0; s < columns; s += streams) {
          int32_t* to = c + first * kColumns + s;
          if (weights.packed) {
            multiply_rows<streams, at_once(), true>(weights, n + s, begin, end, tokens + first,
                                                    begin > 0, to);
          } else {
            multiply_rows<streams, at_once(), false>(weights, n + s, begin, end,
                                                     tokens + first, begin > 0, to);
          }
        }
      });
}

void multiply_stored_blocks(const Weights& weights, int64_t n, int columns,
                            const float* scale, const int8_t* zero, int64_t groups,
                            int planes, const BlockedToken* tokens, int rows, float* c) {
  with_turns<kTokensAtOnce>(
      planes, rows, weights.in_features,
      [&](auto at_once, int first, int64_t begin, int64_t end) {
        with_count<3>(planes, [&](auto of_each) {
          constexpr int streams = rows_at_once(at_once());
          for (int s = 0; s < columns; s += streams) {
            multiply_blocks<streams, at_once(), of_each()>(
                weights, n + s, scale, groups, begin, end, tokens + first, begin > 0,
                c + first * kColumns + s);
          }
        });
      });
  if (zero != nullptr) {
    take_zero_points(columns, scale + n * groups, zero + n * groups, groups,
                     weights.in_features, tokens, rows, c);
  }
}

}  // namespace masquant
