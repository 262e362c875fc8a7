// Copyright (c) torchao_masquant contributors.
// All rights reserved.
//
// This source code is licensed under the BSD 3-Clause license found in the
// LICENSE file in the root directory of this source tree.

// What AVX512-BF16 is for, in a file of its own: it is compiled for processors that have
// it, and called on those alone.

#include <immintrin.h>

#include <cstring>

#include "cpu_kernels.h"

namespace masquant {
namespace {

constexpr int kVectors = kColumns / 16;

template <int rows>
void multiply_rows(const uint16_t* const* tokens, const uint16_t* panel, int64_t width,
                   bool add, float* c) {
  __m512 sum[rows][kVectors];
  const uint16_t* token[rows];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    token[r] = tokens[r];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      sum[r][j] = add ? _mm512_loadu_ps(c + r * kColumns + 16 * j) : _mm512_setzero_ps();
    }
  }
  for (int64_t i = 0; i < width; i += 2) {
    __m512bh w[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      w[j] = (__m512bh)_mm512_loadu_si512(panel + i * kColumns + 32 * j);
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      int32_t two;
      std::memcpy(&two, token[r] + i, 4);
      const __m512bh a = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], w[j], a);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) _mm512_storeu_ps(c + r * kColumns + 16 * j, sum[r][j]);
  }
}

}  // namespace

void multiply_bfloat16_panel(const uint16_t* const* tokens, int rows,
                             const uint16_t* panel, int64_t width, bool add, float* c) {
  switch (rows) {
    case 1:
      return multiply_rows<1>(tokens, panel, width, add, c);
    case 2:
      return multiply_rows<2>(tokens, panel, width, add, c);
    case 3:
      return multiply_rows<3>(tokens, panel, width, add, c);
    case 4:
      return multiply_rows<4>(tokens, panel, width, add, c);
    case 5:
      return multiply_rows<5>(tokens, panel, width, add, c);
    case 6:
      return multiply_rows<6>(tokens, panel, width, add, c);
  }
}

}  // namespace masquant
