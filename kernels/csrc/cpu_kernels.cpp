// Copyright (c) torchao_masquant contributors.
// All rights reserved.
//
// This source code is licensed under the BSD 3-Clause license found in the
// LICENSE file in the root directory of this source tree.

#include <immintrin.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "cpu_common.h"
#include "cpu_kernels.h"
#include "cpu_vectors.h"

// Products and sums are rounded one by one, as the reference's are: the compiler must
// not contract them (-ffp-contract=off). Where a fused one is wanted, it is written out.

namespace masquant {

const char* const kProcessor = "AVX512-VNNI";

bool has_processor() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

int32_t Weights::offset() const { return packed ? 8 : 128; }

namespace {

// Round to nearest even, by integers: vcvtneps2bf16 would flush subnormal numbers.
inline __m256i to_bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded =
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline void store(void* out, Type type, int64_t i, __mmask16 mask, __m512 value) {
  switch (type) {
    case Type::kFloat32:
      _mm512_mask_storeu_ps(static_cast<float*>(out) + i, mask, value);
      break;
    case Type::kBFloat16:
      _mm256_mask_storeu_epi16(static_cast<int16_t*>(out) + i, mask, to_bfloat16(value));
      break;
    default:
      _mm256_mask_storeu_epi16(
          static_cast<int16_t*>(out) + i, mask,
          _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

}  // namespace

// ---- activations ----

namespace {

// One stage of a rotation inside of a vector: values whose lanes differ in the bit half.
template <int half>
inline __m512 stage(__m512 v) {
  constexpr __mmask16 subtracts = half == 1   ? 0xAAAA
                                  : half == 2 ? 0xCCCC
                                  : half == 4 ? 0xF0F0
                                              : 0xFF00;
  __m512 other;
  if constexpr (half == 1) {
    other = _mm512_permute_ps(v, 0xB1);
  } else if constexpr (half == 2) {
    other = _mm512_permute_ps(v, 0x4E);
  } else if constexpr (half == 4) {
    other = _mm512_shuffle_f32x4(v, v, 0xB1);
  } else {
    other = _mm512_shuffle_f32x4(v, v, 0x4E);
  }
  return _mm512_mask_sub_ps(_mm512_add_ps(v, other), subtracts, other, v);
}

}  // namespace

void rotate_row(float* v, int64_t in_features, int64_t hadamard_size) {
  if (hadamard_size == 1) return;
  const __m512 factor =
      _mm512_set1_ps(static_cast<float>(1.0 / std::sqrt(static_cast<double>(hadamard_size))));
  for (int64_t i = 0; i < in_features; i += 16) {
    const __mmask16 mask = mask16(in_features - i);
    __m512 block = stage<1>(_mm512_maskz_loadu_ps(mask, v + i));
    if (hadamard_size > 2) block = stage<2>(block);
    if (hadamard_size > 4) block = stage<4>(block);
    if (hadamard_size > 8) block = stage<8>(block);
    if (hadamard_size <= 16) block = _mm512_mul_ps(block, factor);
    _mm512_mask_storeu_ps(v + i, mask, block);
  }
  // Larger blocks are of whole vectors.
  for (int64_t start = 0; hadamard_size > 16 && start < in_features; start += hadamard_size) {
    float* block = v + start;
    for (int64_t half = 16; half < hadamard_size; half *= 2) {
      const bool last = 2 * half == hadamard_size;
      for (int64_t pair = 0; pair < hadamard_size; pair += 2 * half) {
        for (int64_t i = pair; i < pair + half; i += 16) {
          const __m512 a = _mm512_loadu_ps(block + i), c = _mm512_loadu_ps(block + i + half);
          __m512 sum = _mm512_add_ps(a, c), difference = _mm512_sub_ps(a, c);
          if (last) {
            sum = _mm512_mul_ps(sum, factor);
            difference = _mm512_mul_ps(difference, factor);
          }
          _mm512_storeu_ps(block + i, sum);
          _mm512_storeu_ps(block + i + half, difference);
        }
      }
    }
  }
}

void quantize_row(const void* x, Type type, const float* pre_scale, const float* shift,
                  int64_t in_features, int64_t hadamard_size, int quant_max,
                  float* scratch, int8_t* q, float* scale) {
  // As integers: the magnitude of nan is above that of inf, so neither is lost.
  __m512i largest = _mm512_setzero_si512();
  const auto look_at = [&](__m512 v) __attribute__((always_inline)) {
    largest = _mm512_max_epi32(
        largest, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF)));
  };
  with_type(type, [&](auto t) {
    const auto step = [&](int64_t i, __mmask16 mask) __attribute__((always_inline)) {
      __m512 v = _mm512_mul_ps(load<t()>(x, i, mask),
                               _mm512_maskz_loadu_ps(mask, pre_scale + i));
      if (shift != nullptr) {
        v = _mm512_sub_ps(v, _mm512_maskz_loadu_ps(mask, shift + i));
      }
      _mm512_mask_storeu_ps(scratch + i, mask, v);
      look_at(v);
    };
    int64_t i = 0;
    for (; i + 16 <= in_features; i += 16) step(i, 0xFFFF);
    if (i < in_features) step(i, mask16(in_features - i));
  });
  if (hadamard_size > 1) {
    rotate_row(scratch, in_features, hadamard_size);
    largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < in_features; i += 16) {
      look_at(_mm512_maskz_loadu_ps(mask16(in_features - i), scratch + i));
    }
  }
  const int32_t bits = _mm512_reduce_max_epi32(largest);
  float absmax;
  std::memcpy(&absmax, &bits, sizeof absmax);
  float s = absmax / static_cast<float>(quant_max);
  s = s < FLT_MIN ? FLT_MIN : s;
  *scale = s;

  // No clamping: a quotient is at most quant_max, and nan, of a row whose scale is not
  // finite, becomes 0.
  const __m512 divisor = _mm512_set1_ps(s);
  const __m512 reciprocal = _mm512_set1_ps(1.0f / s);
  const auto step = [&](int64_t i, __mmask16 mask) __attribute__((always_inline)) {
    const __m512 v = _mm512_maskz_loadu_ps(mask, scratch + i);
    const __m512 level = _mm512_mul_ps(v, reciprocal);
    __m512i rounded = _mm512_cvtps_epi32(level);
    const __m512 off = _mm512_abs_ps(_mm512_sub_ps(level, _mm512_cvtepi32_ps(rounded)));
    // The product with the reciprocal is within 127 * 3 * 2 ** -24 of the quotient: it
    // rounds alike but next to a half, where the quotient decides.
    if (__builtin_expect(
            _mm512_cmp_ps_mask(off, _mm512_set1_ps(0.4999f), _CMP_GE_OQ) != 0, 0)) {
      rounded = _mm512_cvtps_epi32(_mm512_div_ps(v, divisor));
    }
    _mm_mask_storeu_epi8(q + i, mask, _mm512_cvtepi32_epi8(rounded));
  };
  int64_t i = 0;
  for (; i + 16 <= in_features; i += 16) step(i, 0xFFFF);
  if (i < in_features) step(i, mask16(in_features - i));
}

void smooth_row(const void* x, Type type, const float* pre_scale, int64_t in_features,
                float* smoothed) {
  with_type(type, [&](auto t) {
    for (int64_t i = 0; i < in_features; i += 16) {
      const __mmask16 mask = mask16(in_features - i);
      _mm512_mask_storeu_ps(smoothed + i, mask,
                            _mm512_mul_ps(load<t()>(x, i, mask),
                                          _mm512_maskz_loadu_ps(mask, pre_scale + i)));
    }
  });
}

void smooth_row_bfloat16(const void* x, Type type, const float* pre_scale,
                         int64_t in_features, uint16_t* smoothed) {
  with_type(type, [&](auto t) {
    for (int64_t i = 0; i < in_features; i += 16) {
      const __mmask16 mask = mask16(in_features - i);
      store(smoothed, Type::kBFloat16, i, mask,
            _mm512_mul_ps(load<t()>(x, i, mask), _mm512_maskz_loadu_ps(mask, pre_scale + i)));
    }
  });
}

void to_bfloat16_row(const float* v, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = mask16(count - i);
    store(out, Type::kBFloat16, i, mask, _mm512_maskz_loadu_ps(mask, v + i));
  }
}

int32_t sum_row(const int8_t* q, int64_t in_features) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < in_features; i += 64) {
    sum = _mm512_dpbusd_epi32(sum, ones,
                              _mm512_maskz_loadu_epi8(mask64(in_features - i), q + i));
  }
  return _mm512_reduce_add_epi32(sum);
}

void to_float(const int8_t* q, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = mask16(count - i);
    _mm512_mask_storeu_ps(out + i, mask, load<Type::kInt8>(q, i, mask));
  }
}

// ---- weights ----

void pack_panel(const Weights& weights, int64_t n, int64_t k, int64_t width,
                int8_t* panel) {
  // Channels behind the width, of the next group, are not to show: they are masked off.
  const __m512i bias = _mm512_set1_epi8(weights.packed ? 8 : 0);
  for (int64_t c = 0; c < kColumns; c += 16) {
    for (int64_t i = 0; i < width; i += 64) {
      __m512i rows[16];
      for (int r = 0; r < 16; ++r) {
        if (n + c + r >= weights.out_features) {
          rows[r] = _mm512_setzero_si512();
          continue;
        }
        const uint8_t* row = weights.data + (n + c + r) * weights.row_bytes;
        // What the next columns will read: the hardware would find each row anew.
        _mm_prefetch(row + (weights.packed ? (k + i) / 2 : k + i) + 16 * weights.row_bytes,
                     _MM_HINT_T1);
        __m512i values;
        if (weights.packed) {
          const __m256i bytes = _mm256_maskz_loadu_epi8(
              static_cast<__mmask32>(mask64((std::min<int64_t>(width - i, 64) + 1) / 2)),
              row + (k + i) / 2);
          const __m512i wide = _mm512_cvtepu8_epi16(bytes);
          values = _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)),
                                    _mm512_set1_epi8(0xF));
        } else {
          values = _mm512_maskz_loadu_epi8(mask64(width - i), row + k + i);
        }
        rows[r] = _mm512_sub_epi8(_mm512_xor_si512(values, bias), bias);
        if (width - i < 64) {
          // Sums of columns are to see zeros behind the width.
          rows[r] = _mm512_maskz_mov_epi8(mask64(width - i), rows[r]);
        }
      }
      transpose(rows);
      int8_t* out = panel + (i * kColumns) + c * 4;
      for (int j = 0; j < 16; ++j) {
        _mm512_store_si512(out + j * kColumns * 4, rows[j]);
      }
    }
  }
}

void sum_columns(const int8_t* panel, int64_t width, int32_t* sums) {
  const __m512i weight = _mm512_set1_epi8(-128);  // 128, unsigned
  for (int c = 0; c < kColumns; c += 16) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < width; i += 4) {
      sum = _mm512_dpbusd_epi32(sum, weight,
                                _mm512_load_si512(panel + i * kColumns + c * 4));
    }
    _mm512_storeu_si512(sums + c, sum);
  }
}

namespace {

// Calls f(i, c, values) for each channel i of a panel and 16 columns from c, channels of
// a column one after the other.
template <class F>
inline void with_expanded(const int8_t* panel, int64_t k, int64_t width,
                          int64_t group_width, const float* scale, const float* zero,
                          F&& f) {
  for (int c = 0; c < kColumns; c += 16) {
    // Where the next group begins: a division for each channel would cost more than all
    // the rest.
    int64_t next = 0;
    __m512 s = _mm512_setzero_ps(), z = s;
    for (int64_t i = 0; i < width; ++i) {
      if (i == next) {
        const int64_t group = (k + i) / group_width;
        next = (group + 1) * group_width - k;
        s = _mm512_loadu_ps(scale + group * kColumns + c);
        z = zero == nullptr ? _mm512_setzero_ps()
                            : _mm512_loadu_ps(zero + group * kColumns + c);
      }
      const __m512i four = _mm512_load_si512(panel + (i / 4 * kColumns + c) * 4);
      const __m512i value = _mm512_srai_epi32(
          _mm512_sll_epi32(four, _mm_cvtsi64_si128(24 - 8 * (i % 4))), 24);
      f(i, c, _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(value), z), s));
    }
  }
}

}  // namespace

void expand_panel(const int8_t* panel, int64_t k, int64_t width, int64_t group_width,
                  const float* scale, const float* zero, float* out) {
  with_expanded(panel, k, width, group_width, scale, zero,
                [&](int64_t i, int c, __m512 v) __attribute__((always_inline)) {
                  _mm512_storeu_ps(out + i * kColumns + c, v);
                });
}

void expand_panel_bfloat16(const int8_t* panel, int64_t k, int64_t width,
                           int64_t group_width, const float* scale, const float* zero,
                           uint16_t* out) {
  // Of pairs of neighbours the first waits for the second. Scales are finite, so no nan
  // is to be looked after.
  const __m512i odd = _mm512_set1_epi32(1), most = _mm512_set1_epi32(0x7FFF);
  __m512i first = _mm512_setzero_si512();
  with_expanded(
      panel, k, width, group_width, scale, zero,
      [&](int64_t i, int c, __m512 v) __attribute__((always_inline)) {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i rounded = _mm512_add_epi32(
            bits,
            _mm512_add_epi32(most, _mm512_and_si512(_mm512_srli_epi32(bits, 16), odd)));
        uint16_t* pair = out + (i / 2 * kColumns + c) * 2;
        if (i % 2 == 0) {
          first = _mm512_srli_epi32(rounded, 16);
          if (i + 1 == width) _mm512_storeu_si512(pair, first);
        } else {
          const __m512i second =
              _mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
          _mm512_storeu_si512(pair, _mm512_or_si512(first, second));
        }
      });
}

void byte_panel(const int8_t* matrix, int64_t stride, int64_t row, int64_t count,
                int64_t column, int64_t columns, uint8_t* out) {
  const __m512i flip = _mm512_set1_epi8(-128);
  const __mmask64 mask = mask64(columns);
  for (int64_t i = 0; i < count; i += 4) {
    __m512i r[4];
    for (int j = 0; j < 4; ++j) {
      r[j] = flip;
      if (i + j < count) {
        r[j] = _mm512_xor_si512(
            _mm512_maskz_loadu_epi8(mask, matrix + (row + i + j) * stride + column), flip);
      }
    }
    // Of each lane of 16 columns: 0 to 3, 4 to 7, 8 to 11, 12 to 15.
    const __m512i low0 = _mm512_unpacklo_epi8(r[0], r[1]), high0 = _mm512_unpackhi_epi8(r[0], r[1]);
    const __m512i low1 = _mm512_unpacklo_epi8(r[2], r[3]), high1 = _mm512_unpackhi_epi8(r[2], r[3]);
    const __m512i a = _mm512_unpacklo_epi16(low0, low1), b = _mm512_unpackhi_epi16(low0, low1);
    const __m512i c = _mm512_unpacklo_epi16(high0, high1), d = _mm512_unpackhi_epi16(high0, high1);
    const __m512i ab0 = _mm512_shuffle_i32x4(a, b, 0x44), ab1 = _mm512_shuffle_i32x4(a, b, 0xEE);
    const __m512i cd0 = _mm512_shuffle_i32x4(c, d, 0x44), cd1 = _mm512_shuffle_i32x4(c, d, 0xEE);
    uint8_t* to = out + i * kColumns;
    _mm512_storeu_si512(to, _mm512_shuffle_i32x4(ab0, cd0, 0x88));
    _mm512_storeu_si512(to + 64, _mm512_shuffle_i32x4(ab0, cd0, 0xDD));
    _mm512_storeu_si512(to + 128, _mm512_shuffle_i32x4(ab1, cd1, 0x88));
    _mm512_storeu_si512(to + 192, _mm512_shuffle_i32x4(ab1, cd1, 0xDD));
  }
}

void split_numbers(const float* v, int64_t length, int count, int8_t* data, Planes* planes) {
  __m512 largest = _mm512_setzero_ps(), total = _mm512_setzero_ps();
  for (int64_t i = 0; i < length; i += 16) {
    const __m512 x = _mm512_maskz_loadu_ps(mask16(length - i), v + i);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
    total = _mm512_add_ps(total, x);
  }
  const float absmax = _mm512_reduce_max_ps(largest);
  // A maximum drops a nan, a sum keeps it.
  const bool finite = std::isfinite(absmax) && !std::isnan(_mm512_reduce_add_ps(total));
  // Planes of 127 each, less what a product with a reciprocal may be too large by.
  constexpr float kMost[] = {127.0f, 32638.0f, 8355000.0f};
  const float s = absmax / kMost[count - 1];
  // What is so small that its steps would be subnormal is zero beside any rounding.
  const __m512 reciprocal = _mm512_set1_ps(!finite || s < 1e-36f ? 0.0f : 1.0f / s);
  __m512i sums[3] = {};
  for (int64_t i = 0; i < length; i += 16) {
    const __mmask16 mask = mask16(length - i);
    const __m512 x = _mm512_maskz_loadu_ps(mask, v + i);
    __m512i value = finite ? _mm512_cvtps_epi32(_mm512_mul_ps(x, reciprocal)) : sums[2];
    // From the last plane on, each leaves a multiple of 256 to those before it.
    for (int p = count - 1; p >= 0; --p) {
      const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(value, 24), 24);
      _mm_mask_storeu_epi8(data + p * length + i, mask, _mm512_cvtepi32_epi8(low));
      value = _mm512_srai_epi32(_mm512_sub_epi32(value, low), 8);
      sums[p] = _mm512_add_epi32(sums[p], low);
    }
  }
  *planes = {data, length, count, {}, finite ? s : NAN};
  for (int p = 0; p < count; ++p) planes->sums[p] = _mm512_reduce_add_epi32(sums[p]);
}

void float_panel(const void* matrix, Type type, int64_t stride, int64_t row,
                 int64_t count, int64_t column, int64_t columns, float* out) {
  with_type(type, [&](auto t) {
    for (int64_t r = 0; r < count; ++r) {
      for (int c = 0; c < kColumns; c += 16) {
        _mm512_storeu_ps(
            out + r * kColumns + c,
            load<t()>(matrix, (row + r) * stride + column + c, mask16(columns - c)));
      }
    }
  });
}

// ---- products ----

namespace {

template <int rows>
void multiply_panel_rows(const int8_t* const* tokens, const uint8_t* panel,
                         int64_t width, int32_t* c) {
  __m512i sum[rows][4];
  const int8_t* token[rows];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    token[r] = tokens[r];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_setzero_si512();
  }
  for (int64_t i = 0; i < width; i += 4) {
    __m512i w[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) w[j] = _mm512_load_si512(panel + i * kColumns + 64 * j);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      int32_t four;
      std::memcpy(&four, token[r] + i, 4);
      const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], w[j], a);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      _mm512_storeu_si512(c + r * kColumns + 16 * j, sum[r][j]);
    }
  }
}

template <int rows, int vectors>
void multiply_float_panel_rows(const float* const* tokens, const float* panel,
                               int64_t width, bool add, float* c) {
  __m512 sum[rows][vectors];
  const float* token[rows];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    token[r] = tokens[r];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      sum[r][j] = add ? _mm512_loadu_ps(c + r * kColumns + 16 * j) : _mm512_setzero_ps();
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    __m512 w[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) w[j] = _mm512_loadu_ps(panel + i * kColumns + 16 * j);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const __m512 a = _mm512_set1_ps(token[r][i]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sum[r][j] = _mm512_fmadd_ps(a, w[j], sum[r][j]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) _mm512_storeu_ps(c + r * kColumns + 16 * j, sum[r][j]);
  }
}

}  // namespace

void multiply_panel(const int8_t* const* tokens, int rows, const uint8_t* panel,
                    int64_t width, int32_t* c) {
  with_count<kRows>(
      rows, [&](auto r) { multiply_panel_rows<r()>(tokens, panel, width, c); });
}

void multiply_float_panel(const float* const* tokens, int rows, const float* panel,
                          int64_t width, int64_t columns, bool add, float* c) {
  with_count<kRows>(rows, [&](auto r) {
    with_count<kColumns / 16>(
        static_cast<int>((columns + 15) / 16), [&](auto vectors) {
          multiply_float_panel_rows<r(), vectors()>(tokens, panel, width, add, c);
        });
  });
}

// ---- results ----

void finish_integers(const Finish& finish, const int32_t* c, const Token* tokens,
                     int rows) {
  alignas(64) float y[kRows * kColumns];
  for (int r = 0; r < rows; ++r) {
    // In 32 bits that wrap around: only the exact product has to fit.
    const __m512i excess = _mm512_set1_epi32(static_cast<int32_t>(
        static_cast<uint32_t>(finish.offset) * static_cast<uint32_t>(tokens[r].sum)));
    for (int j = 0; j < kColumns; j += 16) {
      __m512i exact = _mm512_sub_epi32(_mm512_loadu_si512(c + r * kColumns + j), excess);
      if (finish.column_excess != nullptr) {
        exact = _mm512_sub_epi32(exact, _mm512_loadu_si512(finish.column_excess + j));
      }
      _mm512_store_ps(y + r * kColumns + j,
                      _mm512_mul_ps(_mm512_cvtepi32_ps(exact),
                                    _mm512_loadu_ps(finish.scale + j)));
    }
  }
  finish_floats(finish, y, tokens, rows);
}

namespace {

// up[rows][kColumns] = hidden states of tokens that have one, in planes, by the rows
// [begin, end) of up_bytes.
void up_by_planes(const Finish& finish, const Token* tokens, int rows, int32_t begin,
                  int32_t end, float* up) {
  alignas(64) int32_t c[kRows * kColumns];
  const int8_t* hidden[kRows];
  int with[kRows], count = 0;
  for (int r = 0; r < rows; ++r) {
    if (tokens[r].begin < tokens[r].end) with[count++] = r;
  }
  const int planes = tokens[with[0]].planes->count;
  for (int p = 0; p < planes; ++p) {
    for (int i = 0; i < count; ++i) {
      const Planes& of = *tokens[with[i]].planes;
      hidden[i] = of.data + p * of.length + begin;
    }
    multiply_panel(hidden, count, finish.up_bytes + begin * kColumns, round_up(end - begin, 4), c);
    for (int i = 0; i < count; ++i) {
      const Planes& of = *tokens[with[i]].planes;
      const __m512i excess = _mm512_set1_epi32(128 * of.sums[p]);
      const __m512 factor = _mm512_set1_ps(std::ldexp(of.scale, 8 * (planes - 1 - p)));
      for (int j = 0; j < kColumns; j += 16) {
        float* at = up + with[i] * kColumns + j;
        const __m512i exact = _mm512_sub_epi32(_mm512_load_si512(c + i * kColumns + j), excess);
        const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), factor);
        _mm512_store_ps(at, p == 0 ? product : _mm512_add_ps(_mm512_load_ps(at), product));
      }
    }
  }
}

}  // namespace

void finish_floats(const Finish& finish, float* c, const Token* tokens, int rows) {
  alignas(64) float up[kRows * kColumns];
  int32_t begin = INT32_MAX, end = 0;
  const float* hidden[kRows];
  for (int r = 0; r < rows; ++r) {
    if (tokens[r].begin < tokens[r].end) {
      begin = std::min(begin, tokens[r].begin);
      end = std::max(end, tokens[r].end);
    }
  }
  if (begin < end && finish.up_bytes != nullptr) {
    up_by_planes(finish, tokens, rows, begin / 4 * 4, end, up);
  } else if (begin < end) {
    for (int r = 0; r < rows; ++r) hidden[r] = tokens[r].hidden + begin;
    multiply_float_panel(hidden, rows, finish.up + begin * kColumns, end - begin,
                         finish.columns, false, up);
  }
  for (int r = 0; r < rows; ++r) {
    const Token& token = tokens[r];
    const __m512 scale = _mm512_set1_ps(token.scale);
    for (int j = 0; j < finish.columns; j += 16) {
      __m512 y = _mm512_mul_ps(_mm512_loadu_ps(c + r * kColumns + j), scale);
      if (token.begin < token.end) {
        y = _mm512_add_ps(y, _mm512_load_ps(up + r * kColumns + j));
      }
      if (finish.modality_bias != nullptr) {
        y = _mm512_add_ps(
            y, _mm512_loadu_ps(finish.modality_bias + token.modality * kColumns + j));
      }
      if (finish.bias != nullptr) y = _mm512_add_ps(y, _mm512_loadu_ps(finish.bias + j));
      store(token.out, finish.out_type, j, mask16(finish.columns - j), y);
    }
  }
}

}  // namespace masquant
