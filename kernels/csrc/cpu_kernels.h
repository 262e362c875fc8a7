// Copyright (c) torchao_masquant contributors.
// All rights reserved.
//
// This source code is licensed under the BSD 3-Clause license found in the
// LICENSE file in the root directory of this source tree.

// Kernels of the masquant:: operators. They know pointers only: what splits the work
// between threads and checks it is cpu_operators.cpp. A library has one set of them: those
// for AVX512-VNNI, or portable_kernels.cpp for lesser processors.
//
// A register tile has up to kRows tokens and kColumns output channels. Weights stay in
// memory as they are stored, (N, K) row by row; a panel of kColumns of them is unpacked
// into scratch memory, [K / 4][kColumns][4], where many tokens share it, and read as it
// is where few do.

#pragma once

#include <cstdint>

namespace masquant {

constexpr int kRows = 6;
constexpr int kColumns = 64;
//: tokens that read the stored weights as they are; of groups, whose sums are scaled lane
//: by lane there; and of float32, which are not multiplied in columns
constexpr int kStoredTokens = 4;
constexpr int kStoredTokensOfGroups = 2;
constexpr int kFewTokens = 16;
//: tokens that AMX gains nothing by: of int8, which few tiles of tokens read as it is
//: stored, and of packed weights, which they unpack; and channels that it multiplies at once
constexpr int kWithoutTiles = 4;
constexpr int kWithoutTilesOfPacked = 7;
constexpr int kTileDepth = 512;
//: channels of packed weights that fill a vector, and of a panel in columns
constexpr int kBlock = 128;

#ifdef __AVX512VNNI__
//: whether there are kernels for AMX, for bfloat16, and for pairs of int8 as integers, which
//: are floats elsewhere
constexpr bool kAllKernels = true;
#else
constexpr bool kAllKernels = false;
#endif
//: what the kernels need, and whether the processor has it
extern const char* const kProcessor;
bool has_processor();

enum class Type { kFloat32, kBFloat16, kFloat16, kInt8 };

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// ---- activations ----

// q = round(v / s), v = H (x * p - o), s = max |v| / quant_max, of one token; H as
// rotate_row has it. scratch holds K floats.
void quantize_row(const void* x, Type type, const float* pre_scale, const float* shift,
                  int64_t in_features, int64_t hadamard_size, int quant_max,
                  float* scratch, int8_t* q, float* scale);

// Rotates blocks of hadamard_size neighbours in place, a power of two that divides K (1:
// nothing), by the additions of hadamard.py in their order.
void rotate_row(float* v, int64_t in_features, int64_t hadamard_size);

// v = x * p of one token.
void smooth_row(const void* x, Type type, const float* pre_scale, int64_t in_features,
                float* smoothed);

// The same, rounded to bfloat16.
void smooth_row_bfloat16(const void* x, Type type, const float* pre_scale,
                         int64_t in_features, uint16_t* smoothed);

void to_bfloat16_row(const float* v, int64_t count, uint16_t* out);

int32_t sum_row(const int8_t* q, int64_t in_features);

void to_float(const int8_t* q, int64_t count, float* out);

// ---- weights ----

struct Weights {
  const uint8_t* data;  // (N, K) int8, or (N, ceil(K / 2)) of two nibbles
  bool packed;          // two nibbles a byte
  int64_t in_features;
  int64_t out_features;
  int64_t row_bytes;

  // What unsigned integers of the panel are too large by.
  int32_t offset() const;
};

// Columns [n, n + kColumns) and channels [k, k + width) as [width / 4][kColumns][4]; k is
// even. Scratch of round_up(width, 64) * kColumns bytes. What lies behind N or width is to
// meet zeros only.
void pack_panel(const Weights& weights, int64_t n, int64_t k, int64_t width,
                int8_t* panel);

// 128 times the sum of each column of a signed panel.
void sum_columns(const int8_t* panel, int64_t width, int32_t* sums);

// A signed panel as floats [width][kColumns]: (value - zero) * scale. Rows of scale and
// zero, [G][kColumns], serve group_width channels each; k is the first channel.
void expand_panel(const int8_t* panel, int64_t k, int64_t width, int64_t group_width,
                  const float* scale, const float* zero, float* out);

// The same, rounded to bfloat16, as [width / 2][kColumns][2]; a zero behind an odd width.
void expand_panel_bfloat16(const int8_t* panel, int64_t k, int64_t width,
                           int64_t group_width, const float* scale, const float* zero,
                           uint16_t* out);

// Rows of a matrix (., stride) of int8 as [round_up(count, 4) / 4][kColumns][4], 128 added:
// rows [row, row + count) and columns [column, column + columns). What lies behind them is
// to meet zeros only.
void byte_panel(const int8_t* matrix, int64_t stride, int64_t row, int64_t count,
                int64_t column, int64_t columns, uint8_t* out);

// Rows [row, row + count) and columns [column, column + columns) of a matrix with row
// length stride, as floats [count][kColumns], zeros behind the columns.
void float_panel(const void* matrix, Type type, int64_t stride, int64_t row,
                 int64_t count, int64_t column, int64_t columns, float* out);

// ---- products ----

// c[rows][kColumns] = rows of tokens (int8) by an unsigned panel; the tokens' channels
// behind the last are to be zeros up to a multiple of 4.
void multiply_panel(const int8_t* const* tokens, int rows, const uint8_t* panel,
                    int64_t width, int32_t* c);

// c[rows][kColumns] (+)= rows of floats by a panel of floats [width][kColumns], of which
// the first columns count, 1 to kColumns.
void multiply_float_panel(const float* const* tokens, int rows, const float* panel,
                          int64_t width, int64_t columns, bool add, float* c);

// The same of bfloat16, by a panel [width / 2][kColumns][2], all columns; width is even.
// cpu_bfloat16.cpp: for processors with AVX512-BF16.
void multiply_bfloat16_panel(const uint16_t* const* tokens, int rows,
                             const uint16_t* panel, int64_t width, bool add, float* c);

// ---- products with weights as they are stored (cpu_stored.cpp) ----

// A token as such products read it, in stored_token_bytes: of packed weights, nibbles of a
// byte meet even and odd channels, so of each block the even ones come first; zeros behind
// K up to a whole block.
int64_t stored_token_bytes(bool packed, int64_t in_features);
void store_token(const int8_t* q, bool packed, int64_t in_features, int8_t* out);

// c[rows][kColumns] = tokens by the columns [n, n + columns) of the stored weights, each
// too large by offset * (sum of the token).
void multiply_stored(const Weights& weights, int64_t n, int columns,
                     const int8_t* const* tokens, int rows, int32_t* c);

// A token in blocks of channels with a scale each. Its integers are of one plane (int8),
// or of two or three, each worth 256 times the next.
struct BlockedToken {
  const int8_t* planes;  // [planes][K], each as store_token leaves it
  const float* scale;    // of each block, of more than one plane
  const float* sums;     // of each block's values, scaled; for zero points alone
  const int32_t* start;  // [blocks][16]: what each block's sums begin with
};

// start of a token of one plane.
void start_blocks(const int8_t* split, int64_t in_features, int32_t* start);

// Makes a token of floats one of two or three planes: its values are within 2 ** -16 or
// 2 ** -24 of a block's largest. False where one is not finite.
bool split_planes(const float* v, int64_t in_features, int planes, int8_t* out,
                  float* scale, float* sums, int32_t* start);

// c[rows][kColumns] = tokens by the columns [n, n + columns) of packed weights,
// (value - zero) * scale. K and the group's width are multiples of kBlock. scale: (N, G);
// zero: (N, G) or null.
void multiply_stored_blocks(const Weights& weights, int64_t n, int columns,
                            const float* scale, const int8_t* zero, int64_t groups,
                            int planes, const BlockedToken* tokens, int rows, float* c);

// ---- products of more tokens (cpu_columns.cpp) ----

// A tile of tokens by a panel.
struct ColumnProduct {
  bool packed;           // whether the weights were
  const int8_t* tokens;  // [planes][steps][rows][4]
  const uint8_t* panel;  // [steps][kColumns][4]
  const int32_t* start;  // [rows]: what is added to a token's sums
  //: sums begin with c, which has start already; of one plane alone
  bool continues = false;
  int32_t* c = nullptr;  // [rows][kColumns]; written where sum is null
  // sum[rows][kColumns] += sums * token_scale * scale - token_sum * zero, the latter and
  // token_scale of two planes.
  float* sum = nullptr;
  const float* scale = nullptr;        // [kColumns]
  const float* zero = nullptr;         // [kColumns], times scale; or null
  const float* token_scale = nullptr;  // [rows]
  const float* token_sum = nullptr;    // [rows]
};

void multiply_columns(const ColumnProduct& product, int rows, int planes, int64_t steps);

// Steps of so many channels.
int64_t column_steps(bool packed, int64_t width);

// A token's channels, kBlock at most, as [steps][.][4] between those of a tile's others.
void interleave(const int8_t* q, int64_t width, bool packed, int rows, int8_t* out);

// Columns [n, n + kColumns) and channels [k, k + width), kBlock at most, unsigned, as
// [steps][kColumns][4]; of packed weights, of each 8 channels the even ones come
// first. Asks for as many bytes from next on.
void column_panel(const Weights& weights, int64_t n, int64_t k, int64_t width,
                  const uint8_t* next, uint8_t* panel);

// Rows of a matrix (columns, stride) as [count][kColumns], zeros behind the columns.
void transpose_columns(const float* matrix, int64_t stride, int64_t columns, int64_t count,
                       float* out);

// ---- products by AMX (cpu_tiles.cpp), on processors that have it ----

//: tokens, or output channels, of a tile, and its bytes
constexpr int kTile = 16;
constexpr int64_t kTileBytes = 1024;

// Whether there are kernels for AMX, it is there, and the process may use it, which is asked.
bool has_tiles();

// A thread's tiles have their shapes as long as it lives. oneDNN sets its own each time.
struct Tiles {
  Tiles();
  ~Tiles();
};

// Up to kTile tokens as tiles [ceil(K / 64)][16][kTile][4], zeros behind K and the last
// token; of packed weights, each 64 channels have the even ones first.
void tile_tokens(const int8_t* const* tokens, int rows, bool packed, int64_t in_features,
                 int8_t* out);
// The same of bfloat16, [ceil(K / 64)][2][16][kTile][2].
void tile_tokens(const uint16_t* const* tokens, int rows, bool packed, int64_t in_features,
                 int8_t* out);

// Columns [n, n + kColumns) and channels [k, k + width), signed, as tiles
// [kColumns / kTile][steps][kTile][64]; k is a multiple of 64, a step is of 64 channels.
void tile_weights(const Weights& weights, int64_t n, int64_t k, int64_t width, int8_t* out);

// The same as (value - zero) * scale in bfloat16, in steps of 32 channels. scale: (N, G);
// zero: (N, G) or null. Of several groups, the width is a multiple of 64.
void tile_weights_bfloat16(const Weights& weights, int64_t n, int64_t k, int64_t width,
                           int64_t groups, const float* scale, const int8_t* zero,
                           int8_t* out);

// Whether few tiles of tokens may multiply the panel of int8 at column n as it is stored.
bool reads_stored_tiles(const Weights& weights, int64_t n, int64_t tiles);

// A panel of weights by tiles of tokens.
struct TileProduct {
  const int8_t* panel;
  int64_t row_bytes = 0;  // of one that is as it is stored
  const int8_t* tokens;  // at the panel's first step
  int64_t token_stride;  // from a tile of tokens to the next
  int64_t steps;
  //: [tiles][kColumns / kTile][kTile columns][kTile tokens]: int32, of bfloat16 or groups float
  void* sums;
  bool add = false;  // to the sums, which groups always do
  const float* scale = nullptr;  // of groups: [groups of the panel][kColumns]
  int64_t steps_of_group = 0;
};

void multiply_tiles(const TileProduct& product, bool bfloat16, int64_t tiles);

// A tile's sums as [kTile][kColumns].
void rows_of_tiles(const void* sums, void* out);

// ---- results ----

// What turns a tile of products into results. Arrays of columns begin at the tile's.
struct Finish {
  const float* scale = nullptr;           // [kColumns]; null: sums are scaled already
  const int32_t* column_excess = nullptr;  // [kColumns]
  int32_t offset = 0;
  const float* up = nullptr;             // [R][kColumns] up-projections
  const uint8_t* up_bytes = nullptr;     // of int8, as byte_panel has them; no floats then
  const float* modality_bias = nullptr;  // [M][kColumns]
  const float* bias = nullptr;           // [kColumns]
  Type out_type = Type::kFloat32;
  int columns = kColumns;
};

struct Planes;

struct Token {
  float scale;
  int32_t sum;
  int32_t modality;
  //: columns of the low-rank pair that are not zero
  int32_t begin, end;
  const float* hidden;
  void* out;
  //: the hidden state beside up_bytes: zeros but in [begin, end)
  const Planes* planes;
};

// Numbers as integers of planes of int8, each worth 256 times the next, and a scale.
struct Planes {
  const int8_t* data;  // [count][length]
  int64_t length;
  int count;
  int32_t sums[3];
  float scale;
};

// Makes numbers planes, 1 to 3. The scale is nan if one of them is not finite.
void split_numbers(const float* v, int64_t length, int count, int8_t* data, Planes* planes);

void finish_integers(const Finish& finish, const int32_t* c, const Token* tokens,
                     int rows);
// c is used as scratch.
void finish_floats(const Finish& finish, float* c, const Token* tokens, int rows);

}  // namespace masquant
