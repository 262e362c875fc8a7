// Copyright (c) torchao_masquant contributors.
// All rights reserved.
//
// This source code is licensed under the BSD 3-Clause license found in the
// LICENSE file in the root directory of this source tree.

// What the kernels' files share of vectors of 512 bits.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu_kernels.h"

namespace masquant {

inline __mmask16 mask16(int64_t count) {
  return count >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (count < 0 ? 0 : count)) - 1);
}

inline __mmask64 mask64(int64_t count) {
  return count >= 64 ? ~0ull : count <= 0 ? 0ull : (1ull << count) - 1;
}

template <Type type>
inline __m512 load(const void* data, int64_t i, __mmask16 mask) {
  if constexpr (type == Type::kFloat32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + i);
  } else if constexpr (type == Type::kInt8) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
        _mm_maskz_loadu_epi8(mask, static_cast<const int8_t*>(data) + i)));
  } else {
    const __m256i half =
        _mm256_maskz_loadu_epi16(mask, static_cast<const int16_t*>(data) + i);
    if constexpr (type == Type::kFloat16) {
      return _mm512_cvtph_ps(half);
    } else {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
  }
}

// Of 16 rows of 16 numbers of 32 bits.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
  }
}

}  // namespace masquant
