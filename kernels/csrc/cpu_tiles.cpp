// Copyright (c) torchao_masquant contributors.
// All rights reserved.
//
// This source code is licensed under the BSD 3-Clause license found in the
// LICENSE file in the root directory of this source tree.

// Products by AMX, whose registers are tiles of 16 rows of 64 bytes. Weights are the left
// operand, whose rows lie as they are stored, so that unpacking needs no transposition;
// tokens, which all panels share, are the right one. Sums come out with the tokens side by
// side, and are transposed once.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "cpu_common.h"
#include "cpu_kernels.h"
#include "cpu_vectors.h"

namespace masquant {

bool reads_stored_tiles(const Weights& weights, int64_t n, int64_t tiles) {
  // The last row has nothing behind it that a step may read beyond its end.
  return !weights.packed && tiles <= 2 &&
         n + kColumns + (weights.in_features % 64 != 0) <= weights.out_features;
}

bool has_tiles() {
  // Linux gives a process the tiles' state when it asks, for all of its threads, those to
  // come and those of forks too. It refuses where a thread's stack for signals is too small.
  static const bool has = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
           __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
}

namespace {

// Whole, and all of it there: the compiler is told of the first bytes alone that the
// instruction reads.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Shapes) == 64);
const Shapes kShapes;

}  // namespace

Tiles::Tiles() { _tile_loadconfig(&kShapes); }

Tiles::~Tiles() { _tile_release(); }

namespace {

// Where a panel has a column's first step.
inline int64_t place_of_column(int64_t column, int64_t steps) {
  return column / kTile * steps * kTileBytes + column % kTile * 64;
}

// Asks for the next panel while one is unpacked, line by line: its rows are one piece of
// memory, and a quarter of it beside the other is the order that the hardware reads fastest.
class Next {
 public:
  // byte: of each row, from which on this panel is unpacked.
  Next(const Weights& weights, int64_t n, int64_t byte)
      : quarter_(kColumns / 4 * weights.row_bytes),
        from_(weights.data + (n + kColumns) * weights.row_bytes + kColumns / 4 * byte) {}

  inline void ask() {
    _mm_prefetch(from_ + line_ % 4 * quarter_ + line_ / 4 * 64, _MM_HINT_T1);
    ++line_;
  }

 private:
  int64_t quarter_;
  const uint8_t* from_;
  uint64_t line_ = 0;
};

// Of 64 bytes the even ones first.
inline __m512i even_bytes_first(__m512i v) {
  const __m256i even = _mm512_cvtepi16_epi8(v);
  return _mm512_inserti64x4(_mm512_castsi256_si512(even),
                            _mm512_cvtepi16_epi8(_mm512_srli_epi16(v, 8)), 1);
}

inline void store_tile(const __m512i rows[16], void* out) {
  for (int r = 0; r < 16; ++r) _mm512_store_si512(static_cast<char*>(out) + 64 * r, rows[r]);
}

}  // namespace

void tile_tokens(const int8_t* const* tokens, int rows, bool packed, int64_t in_features,
                 int8_t* out) {
  for (int64_t k = 0; k < in_features; k += 64, out += kTileBytes) {
    const __mmask64 mask = mask64(in_features - k);
    __m512i r[16];
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t) {
      r[t] = t < rows ? _mm512_maskz_loadu_epi8(mask, tokens[t] + k) : _mm512_setzero_si512();
      if (packed) r[t] = even_bytes_first(r[t]);
    }
    transpose(r);
    store_tile(r, out);
  }
}

void tile_tokens(const uint16_t* const* tokens, int rows, bool packed, int64_t in_features,
                 int8_t* out) {
  alignas(64) uint16_t order[64];
  for (int i = 0; i < 64; ++i) order[i] = packed ? 2 * i % 64 + i / 32 : i;
  for (int64_t k = 0; k < in_features; k += 64) {
    __m512i low[16], high[16];
    for (int t = 0; t < 16; ++t) {
      if (t >= rows) {
        low[t] = high[t] = _mm512_setzero_si512();
        continue;
      }
      const auto load = [&](int64_t i) __attribute__((always_inline)) {
        const int64_t count = std::clamp<int64_t>(in_features - i, 0, 32);
        return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask64(count)), tokens[t] + i);
      };
      const __m512i a = load(k), b = load(k + 32);
      low[t] = _mm512_permutex2var_epi16(a, _mm512_load_si512(order), b);
      high[t] = _mm512_permutex2var_epi16(a, _mm512_load_si512(order + 32), b);
    }
    transpose(low);
    transpose(high);
    store_tile(low, out);
    store_tile(high, out + kTileBytes);
    out += 2 * kTileBytes;
  }
}

namespace {

template <bool packed>
void unpack_tiles(const Weights& weights, int64_t n, int64_t k, int64_t width, int8_t* out) {
  const __m512i low4 = _mm512_set1_epi8(0xF), eight = _mm512_set1_epi8(8);
  const int64_t steps = (width + 63) / 64;
  const int64_t begin = packed ? k / 2 : k;
  const int64_t end = std::min(weights.row_bytes, begin + (packed ? 32 : 64) * steps);
  Next next(weights, n, begin);
  for (int64_t c = 0; c < kColumns; ++c) {
    // Columns behind the last are the last: their products are not looked at.
    const int64_t index = std::min(n + c, weights.out_features - 1);
    const uint8_t* row = weights.data + index * weights.row_bytes;
    int8_t* to = out + place_of_column(c, steps);
    const auto unpack = [&](__m512i bytes, int64_t count) __attribute__((always_inline)) {
      if constexpr (!packed) {
        _mm512_store_si512(to, bytes);
        to += kTileBytes;
        return;
      }
      // (bytes & 15) ^ 8, less 8
      const __m512i even = _mm512_sub_epi8(
          _mm512_ternarylogic_epi32(bytes, low4, eight, 0x6A), eight);
      const __m512i odd = _mm512_sub_epi8(
          _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, 4), low4, eight, 0x6A), eight);
      _mm512_store_si512(to, _mm512_inserti64x4(even, _mm512_castsi512_si256(odd), 1));
      if (count > 32) {
        _mm512_store_si512(to + kTileBytes, _mm512_shuffle_i64x2(even, odd, 0xEE));
      }
      to += 2 * kTileBytes;
    };
    int64_t i = begin;
#pragma GCC unroll 4
    for (; i + 64 <= end; i += 64) {
      next.ask();
      unpack(_mm512_loadu_si512(row + i), 64);
    }
    if (i < end) unpack(_mm512_maskz_loadu_epi8(mask64(end - i), row + i), end - i);
  }
}

}  // namespace

void tile_weights(const Weights& weights, int64_t n, int64_t k, int64_t width, int8_t* out) {
  if (weights.packed) {
    unpack_tiles<true>(weights, n, k, width, out);
  } else {
    unpack_tiles<false>(weights, n, k, width, out);
  }
}

namespace {

// Rounded to nearest even, in the lower half of each number.
inline __m512i to_bfloat16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
}

// (value - zero) * scale of each nibble, twice.
inline __m512i values_of_nibbles(__m512 scale, __m512 zero) {
  const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  const __m256i table = _mm512_cvtepi32_epi16(
      to_bfloat16(_mm512_mul_ps(_mm512_sub_ps(values, zero), scale)));
  return _mm512_broadcast_i64x4(table);
}

}  // namespace

void tile_weights_bfloat16(const Weights& weights, int64_t n, int64_t k, int64_t width,
                           int64_t groups, const float* scale, const int8_t* zero,
                           int8_t* out) {
  const int64_t steps = (width + 63) / 64 * 2;
  const int64_t group_width = weights.in_features / groups;
  Next next(weights, n, weights.packed ? k / 2 : k);
  for (int64_t c = 0; c < kColumns; ++c) {
    const int64_t index = std::min(n + c, weights.out_features - 1);
    const uint8_t* row = weights.data + index * weights.row_bytes;
    int8_t* to = out + place_of_column(c, steps);
    int64_t group = k / group_width, end_of_group = k;
    __m512 s, z;
    __m512i table;
    for (int64_t i = k; i < k + width; i += 64, to += 2 * kTileBytes) {
      if (i == end_of_group) {
        s = _mm512_set1_ps(scale[index * groups + group]);
        z = _mm512_set1_ps(zero == nullptr ? 0.0f : zero[index * groups + group]);
        if (weights.packed) table = values_of_nibbles(s, z);
        end_of_group = ++group * group_width;
      }
      if (weights.packed) {
        if (i % 128 == 0) next.ask();
        const __m512i two = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(
            static_cast<__mmask32>(mask64(std::min<int64_t>(weights.row_bytes - i / 2, 32))),
            row + i / 2));
        // Five bits of an index count, of which the table ignores the first.
        _mm512_store_si512(to, _mm512_permutexvar_epi16(two, table));
        _mm512_store_si512(to + kTileBytes,
                           _mm512_permutexvar_epi16(_mm512_srli_epi16(two, 4), table));
        continue;
      }
      next.ask();
      for (int j = 0; j < 4; ++j) {
        const __m512 v = load<Type::kInt8>(row, i + 16 * j, mask16(weights.row_bytes - i - 16 * j));
        const __m512i half = to_bfloat16(_mm512_mul_ps(_mm512_sub_ps(v, z), s));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + j / 2 * kTileBytes + j % 2 * 32),
                           _mm512_cvtepi32_epi16(half));
      }
    }
  }
}

namespace {

// The intrinsics take the numbers of registers literally: 0 to 3 hold sums.

// Tiles of weights from which one reads: rows lie stride bytes apart, steps step bytes.
struct Rows {
  const int8_t* data;
  int64_t stride, step;
};

template <bool bfloat16>
inline void multiply_add_two_by_two(const Rows& rows, int64_t next, const int8_t* b,
                                    const int8_t* c, int64_t steps) {
  const int8_t* a = rows.data;
  for (int64_t i = 0; i < steps; ++i, a += rows.step, b += kTileBytes, c += kTileBytes) {
    _tile_loadd(4, a, rows.stride);
    _tile_loadd(6, b, 64);
    _tile_loadd(5, a + next, rows.stride);
    _tile_loadd(7, c, 64);
    if constexpr (bfloat16) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 5, 6);
      _tile_dpbssd(2, 4, 7);
      _tile_dpbssd(3, 5, 7);
    }
  }
}

template <bool bfloat16>
inline void multiply_add_four_by_one(const Rows& rows, int64_t next, const int8_t* b,
                                     int64_t steps) {
  const int8_t* a = rows.data;
  for (int64_t i = 0; i < steps; ++i, a += rows.step, b += kTileBytes) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, rows.stride);
    _tile_loadd(5, a + next, rows.stride);
    if constexpr (bfloat16) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
    } else {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 5, 6);
    }
    _tile_loadd(4, a + 2 * next, rows.stride);
    _tile_loadd(5, a + 3 * next, rows.stride);
    if constexpr (bfloat16) {
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 5, 6);
    } else {
      _tile_dpbssd(2, 4, 6);
      _tile_dpbssd(3, 5, 6);
    }
  }
}

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void load_sums(char* const sums[4]) {
  _tile_loadd(0, sums[0], 64);
  _tile_loadd(1, sums[1], 64);
  _tile_loadd(2, sums[2], 64);
  _tile_loadd(3, sums[3], 64);
}

inline void store_sums(char* const sums[4]) {
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
}

// sum += products * scale, a scale for each row; rounded one by one, as the reference's are.
inline void add_scaled(const char* products, const float* scale, char* sum) {
#pragma GCC unroll 4
  for (int r = 0; r < 16; ++r) {
    const __m512 product = _mm512_mul_ps(
        _mm512_cvtepi32_ps(_mm512_load_si512(products + 64 * r)), _mm512_set1_ps(scale[r]));
    _mm512_store_ps(sum + 64 * r, _mm512_add_ps(_mm512_load_ps(sum + 64 * r), product));
  }
}

// Four tiles of sums, of which rows[i] are the first of the panel's columns. multiply(first,
// steps) adds so many steps up.
template <class Multiply>
inline void multiply_four(const TileProduct& p, char* const sums[4], const int rows[4],
                          const Multiply& multiply) {
  if (p.scale == nullptr) {
    if (p.add) {
      load_sums(sums);
    } else {
      zero_sums();
    }
    multiply(int64_t{0}, p.steps);
    store_sums(sums);
    return;
  }
  // A group's products are scaled while the next ones are made.
  alignas(64) char products[4 * kTileBytes];
  char* const to[4] = {products, products + kTileBytes, products + 2 * kTileBytes,
                       products + 3 * kTileBytes};
  const auto scale_group = [&](int64_t step) __attribute__((always_inline)) {
    const float* scale = p.scale + step / p.steps_of_group * kColumns;
    for (int i = 0; i < 4; ++i) add_scaled(to[i], scale + rows[i], sums[i]);
  };
  for (int64_t step = 0; step < p.steps; step += p.steps_of_group) {
    zero_sums();
    multiply(step, p.steps_of_group);
    if (step > 0) scale_group(step - p.steps_of_group);
    store_sums(to);
  }
  scale_group(p.steps - p.steps_of_group);
}

template <bool bfloat16>
void multiply(const TileProduct& p, int64_t tiles) {
  // Unpacked, or as they are stored.
  const int64_t stride = p.row_bytes > 0 ? p.row_bytes : 64;
  const int64_t step_bytes = p.row_bytes > 0 ? 64 : kTileBytes;
  const int64_t next = p.row_bytes > 0 ? kTile * p.row_bytes : p.steps * kTileBytes;
  const auto sums_of = [&](int64_t tile, int column) {
    return static_cast<char*>(p.sums) + (4 * tile + column) * kTileBytes;
  };
  int64_t tile = 0;
  // Half of the panel at a time, which the first-level cache keeps.
  for (int first = 0; first < 4; first += 2) {
    const int rows[4] = {16 * first, 16 * first + 16, 16 * first, 16 * first + 16};
    for (tile = 0; tile + 2 <= tiles; tile += 2) {
      const int8_t* b = p.tokens + tile * p.token_stride;
      char* const sums[4] = {sums_of(tile, first), sums_of(tile, first + 1),
                             sums_of(tile + 1, first), sums_of(tile + 1, first + 1)};
      multiply_four(p, sums, rows, [&](int64_t step, int64_t steps) {
        const Rows a{p.panel + first * next + step * step_bytes, stride, step_bytes};
        const int8_t* from = b + step * kTileBytes;
        multiply_add_two_by_two<bfloat16>(a, next, from, from + p.token_stride, steps);
      });
    }
  }
  if (tile == tiles) return;
  const int8_t* b = p.tokens + tile * p.token_stride;
  const int rows[4] = {0, 16, 32, 48};
  char* const sums[4] = {sums_of(tile, 0), sums_of(tile, 1), sums_of(tile, 2), sums_of(tile, 3)};
  multiply_four(p, sums, rows, [&](int64_t step, int64_t steps) {
    const Rows a{p.panel + step * step_bytes, stride, step_bytes};
    multiply_add_four_by_one<bfloat16>(a, next, b + step * kTileBytes, steps);
  });
}

}  // namespace

void multiply_tiles(const TileProduct& product, bool bfloat16, int64_t tiles) {
  if (bfloat16) {
    multiply<true>(product, tiles);
  } else {
    multiply<false>(product, tiles);
  }
}

void rows_of_tiles(const void* sums, void* out) {
  for (int column = 0; column < 4; ++column) {
    __m512i rows[16];
    const char* from = static_cast<const char*>(sums) + column * kTileBytes;
    for (int r = 0; r < 16; ++r) rows[r] = _mm512_load_si512(from + 64 * r);
    transpose(rows);
    for (int r = 0; r < 16; ++r) {
      _mm512_store_si512(static_cast<char*>(out) + 4 * kColumns * r + 64 * column, rows[r]);
    }
  }
}

}  // namespace masquant
