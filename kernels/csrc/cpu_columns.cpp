// Copyright (c) torchao_masquant contributors.
// All rights reserved.
//
// This source code is licensed under the BSD 3-Clause license found in the
// LICENSE file in the root directory of this source tree.

// Products of some and of many tokens: lanes lie along the output channels. A panel of
// weights, small enough for the first-level cache, is unpacked for all tokens; sums of a
// group are scaled by one vector for 16 channels.

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu_common.h"
#include "cpu_kernels.h"
#include "cpu_vectors.h"

namespace masquant {
namespace {

constexpr int kVectors = kColumns / 16;

template <int rows, int planes>
void multiply_rows(const ColumnProduct& p, int64_t steps) {
  __m512i sum[rows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      sum[r][j] = planes > 1   ? _mm512_setzero_si512()
                  : p.continues ? _mm512_loadu_si512(p.c + r * kColumns + 16 * j)
                                : _mm512_set1_epi32(p.start[r]);
    }
  }
  const int8_t* token = p.tokens;
  for (int plane = 0; plane < planes; ++plane) {
    if constexpr (planes > 1) {
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[r][j] = _mm512_slli_epi32(sum[r][j], 8);
      }
    }
    const uint8_t* panel = p.panel;
    for (int64_t i = 0; i < steps; ++i, token += 4 * rows, panel += 4 * kColumns) {
      __m512i w[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) w[j] = _mm512_load_si512(panel + 64 * j);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        int32_t four;
        std::memcpy(&four, token + 4 * r, 4);
        const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], w[j], a);
      }
    }
  }
  if (p.sum == nullptr) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        _mm512_storeu_si512(p.c + r * kColumns + 16 * j, sum[r][j]);
      }
    }
    return;
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* at = p.sum + r * kColumns + 16 * j;
      const __m512 scale = _mm512_loadu_ps(p.scale + 16 * j), before = _mm512_loadu_ps(at);
      if constexpr (planes == 1) {
        // Rounded one by one, as the reference's are.
        const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][j]), scale);
        _mm512_storeu_ps(at, _mm512_add_ps(before, product));
      } else {
        const __m512i exact = _mm512_add_epi32(sum[r][j], _mm512_set1_epi32(p.start[r]));
        const __m512 value =
            _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(p.token_scale[r]));
        __m512 after = _mm512_fmadd_ps(value, scale, before);
        if (p.zero != nullptr) {
          after = _mm512_fnmadd_ps(_mm512_set1_ps(p.token_sum[r]),
                                   _mm512_loadu_ps(p.zero + 16 * j), after);
        }
        _mm512_storeu_ps(at, after);
      }
    }
  }
}

// Of 64 channels each 8 with the even ones first, as the nibbles of 4 bytes have them.
inline __m512i even_first(__m512i v) {
  const __m512i order = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  return _mm512_shuffle_epi8(v, order);
}

template <bool packed>
void unpack_columns(const Weights& weights, int64_t n, int64_t k, int64_t width,
                    const uint8_t* next, uint8_t* panel) {
  constexpr int64_t kPerByte = packed ? 2 : 1;
  const __m512i low4 = _mm512_set1_epi8(0xF), eight = _mm512_set1_epi8(8);
  const int64_t quarter = kColumns / 4 * weights.row_bytes;
  // Columns behind the last are the last: their products are not looked at.
  const uint8_t* column[kColumns];
  for (int64_t c = 0; c < kColumns; ++c) {
    const int64_t index = std::min(n + c, weights.out_features - 1);
    column[c] = weights.data + index * weights.row_bytes + k / kPerByte;
  }
  for (int64_t i = 0; i < width; i += 64 * kPerByte) {
    const __mmask64 mask = mask64((width - i + kPerByte - 1) / kPerByte);
    for (int64_t c = 0; c < kColumns; c += 16) {
      __m512i rows[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        const uint8_t* at = column[c + r] + i / kPerByte;
        _mm_prefetch(at + 64, _MM_HINT_T0);
        _mm_prefetch(next + r % 4 * quarter + 16 * (i / kPerByte + c) + 64 * (r / 4), _MM_HINT_T1);
        rows[r] = _mm512_maskz_loadu_epi8(mask, at);
      }
      transpose(rows);
      uint8_t* out = panel + i * kColumns + 4 * c;
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        if constexpr (packed) {
          // (bytes & 15) ^ 8
          _mm512_store_si512(out + 8 * j * kColumns,
                             _mm512_ternarylogic_epi32(rows[j], low4, eight, 0x6A));
          _mm512_store_si512(out + (8 * j + 4) * kColumns,
                             _mm512_ternarylogic_epi32(_mm512_srli_epi16(rows[j], 4), low4,
                                                       eight, 0x6A));
        } else {
          _mm512_store_si512(out + 4 * j * kColumns,
                             _mm512_xor_si512(rows[j], _mm512_set1_epi8(-128)));
        }
      }
    }
  }
}

}  // namespace

void multiply_columns(const ColumnProduct& product, int rows, int planes, int64_t steps) {
  with_count<kRows>(rows, [&](auto r) {
    if (planes == 1) {
      multiply_rows<r(), 1>(product, steps);
    } else {
      multiply_rows<r(), 2>(product, steps);
    }
  });
}

int64_t column_steps(bool packed, int64_t width) {
  return packed ? round_up(width, 8) / 4 : (width + 3) / 4;
}

void interleave(const int8_t* q, int64_t width, bool packed, int rows, int8_t* out) {
  alignas(64) int8_t padded[kBlock];
  const int64_t steps = column_steps(packed, width);
  for (int64_t i = 0; i < width; i += 64) {
    const __m512i v = _mm512_maskz_loadu_epi8(mask64(width - i), q + i);
    _mm512_store_si512(padded + i, packed ? even_first(v) : v);
  }
  for (int64_t i = 0; i < steps; ++i) std::memcpy(out + 4 * rows * i, padded + 4 * i, 4);
}

void column_panel(const Weights& weights, int64_t n, int64_t k, int64_t width,
                  const uint8_t* next, uint8_t* panel) {
  if (!weights.packed) return unpack_columns<false>(weights, n, k, width, next, panel);
  if (k % 2 == 0) return unpack_columns<true>(weights, n, k, width, next, panel);
  unpack_columns_slowly(weights, n, k, width, panel);
}

void transpose_columns(const float* matrix, int64_t stride, int64_t columns, int64_t count,
                       float* out) {
  for (int64_t c = 0; c < kColumns; c += 16) {
    for (int64_t i = 0; i < count; i += 16) {
      __m512i rows[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        rows[r] = c + r < columns
                      ? _mm512_maskz_loadu_epi32(mask16(count - i), matrix + (c + r) * stride + i)
                      : _mm512_setzero_si512();
      }
      transpose(rows);
      for (int j = 0; j < 16 && i + j < count; ++j) {
        _mm512_storeu_si512(out + (i + j) * kColumns + c, rows[j]);
      }
    }
  }
}

}  // namespace masquant
