// Copyright (c) torchao_masquant contributors.
// All rights reserved.
//
// This source code is licensed under the BSD 3-Clause license found in the
// LICENSE file in the root directory of this source tree.

// The portable kernels against scalar formulas, without PyTorch, so that an emulator of
// another processor can run them: integers and roundings to the bit.

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu_kernels.h"

using namespace masquant;

namespace {

std::mt19937 generator(1);

int integer(int least, int most) {
  return least + static_cast<int>(generator() % static_cast<unsigned>(most - least + 1));
}

float number() { return static_cast<float>(integer(-10000, 10000)) / 3000.0f; }

int failures = 0;

void expect(bool holds, const char* what, int64_t a = 0, int64_t b = 0, int64_t c = 0) {
  if (holds || ++failures > 20) return;
  std::printf("%s is wrong at %ld, %ld, %ld\n", what, static_cast<long>(a),
              static_cast<long>(b), static_cast<long>(c));
}

struct Matrix {
  Matrix(bool packed, int64_t k, int64_t n) : bytes(n * (packed ? (k + 1) / 2 : k)) {
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator());
    weights = {bytes.data(), packed, k, n, packed ? (k + 1) / 2 : k};
  }

  int at(int64_t n, int64_t k) const {
    const uint8_t* row = bytes.data() + n * weights.row_bytes;
    if (!weights.packed) return static_cast<int8_t>(row[k]);
    return ((row[k / 2] >> (4 * (k % 2)) & 15) ^ 8) - 8;
  }

  std::vector<uint8_t> bytes;
  Weights weights;
};

std::vector<int8_t> token_of(int64_t k) {
  std::vector<int8_t> q(k);
  for (int8_t& value : q) value = static_cast<int8_t>(integer(-128, 127));
  return q;
}

void check_quantize(int k, int rotation, bool shifted) {
  std::vector<float> x(k), factor(k), shift(k), v(k), scratch(k + 16);
  for (int i = 0; i < k; ++i) {
    x[i] = number();
    factor[i] = 0.5f + std::fabs(number());
    shift[i] = number();
    v[i] = x[i] * factor[i];
    if (shifted) v[i] -= shift[i];
  }
  for (int half = 1; half < rotation; half *= 2) {
    const std::vector<float> w = v;
    for (int i = 0; i < k; ++i) v[i] = i & half ? w[i ^ half] - w[i] : w[i] + w[i ^ half];
  }
  float largest = 0.0f;
  const float times = static_cast<float>(1.0 / std::sqrt(static_cast<double>(rotation)));
  for (float& value : v) {
    if (rotation > 1) value *= times;
    largest = std::fmax(largest, std::fabs(value));
  }
  const float step = std::fmax(largest / 127.0f, FLT_MIN);
  std::vector<int8_t> q(k + 1, 99);
  float scale;
  quantize_row(x.data(), Type::kFloat32, factor.data(), shifted ? shift.data() : nullptr, k,
               rotation, 127, scratch.data(), q.data(), &scale);
  expect(scale == step, "a scale", k, rotation);
  for (int i = 0; i < k; ++i) {
    expect(q[i] == static_cast<int>(std::nearbyint(v[i] / step)), "a token", k, rotation, i);
  }
  expect(q[k] == 99, "what follows a token", k);
}

// Both ways to multiply a tile of tokens, at the columns from n.
void check_product(const Matrix& matrix, const std::vector<std::vector<int8_t>>& q, int64_t n) {
  const Weights& weights = matrix.weights;
  const bool packed = weights.packed;
  const int64_t k = weights.in_features;
  const int columns = static_cast<int>(std::min<int64_t>(kColumns, weights.out_features - n));
  const int rows = static_cast<int>(q.size());
  const auto exact = [&](int r, int c) {
    int32_t sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += q[r][i] * matrix.at(n + c, i);
    return sum;
  };
  int32_t start[kRows], products[kRows * kColumns];
  for (int r = 0; r < rows; ++r) start[r] = -weights.offset() * sum_row(q[r].data(), k);
  if (rows <= kStoredTokens) {
    const int64_t size = stored_token_bytes(packed, k);
    std::vector<int8_t> copy(rows * size);
    const int8_t* tokens[kRows];
    for (int r = 0; r < rows; ++r) {
      tokens[r] = copy.data() + r * size;
      store_token(q[r].data(), packed, k, copy.data() + r * size);
    }
    multiply_stored(weights, n, columns, tokens, rows, products);
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; ++c) {
        expect(products[r * kColumns + c] + start[r] == exact(r, c), "a product as stored", k,
               rows, c);
      }
    }
  }
  alignas(64) static uint8_t panel[4 * kBlock * kColumns];
  static int8_t tokens[4 * kBlock * kRows];
  for (int64_t i = 0; i < k; i += kBlock) {
    const int64_t width = std::min<int64_t>(kBlock, k - i);
    column_panel(weights, n, i, width, weights.data, panel);
    for (int r = 0; r < rows; ++r) {
      interleave(q[r].data() + i, width, packed, rows, tokens + 4 * r);
    }
    ColumnProduct product{packed, tokens, panel, start};
    product.continues = i > 0;
    product.c = products;
    multiply_columns(product, rows, 1, column_steps(packed, width));
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      expect(products[r * kColumns + c] == exact(r, c), "a product in columns", k, rows, c);
    }
  }
}

// Tokens of floats, in planes, by groups of packed weights with zero points.
void check_planes(int planes, int64_t groups, int rows) {
  constexpr int64_t k = 4 * kBlock, n = 37;
  const Matrix matrix(true, k, n);
  std::vector<float> scale(n * groups), products(kRows * kColumns);
  std::vector<int8_t> zero(n * groups);
  for (float& value : scale) value = 0.01f * (1.0f + std::fabs(number()));
  for (int8_t& value : zero) value = static_cast<int8_t>(integer(-7, 7));
  std::vector<std::vector<float>> v(rows, std::vector<float>(k)), scales(rows, v[0]), sums = scales;
  std::vector<std::vector<int8_t>> bytes(rows, std::vector<int8_t>(planes * k));
  std::vector<std::vector<int32_t>> starts(rows, std::vector<int32_t>(16 * k / kBlock));
  std::vector<BlockedToken> tokens;
  for (int r = 0; r < rows; ++r) {
    for (float& value : v[r]) value = number();
    expect(split_planes(v[r].data(), k, planes, bytes[r].data(), scales[r].data(),
                        sums[r].data(), starts[r].data()),
           "a finite token");
    tokens.push_back({bytes[r].data(), scales[r].data(), sums[r].data(), starts[r].data()});
  }
  multiply_stored_blocks(matrix.weights, 0, n, scale.data(), zero.data(), groups, planes,
                         tokens.data(), rows, products.data());
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < n; ++c) {
      double sum = 0.0, size = 0.0;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t at = c * groups + i / (k / groups);
        sum += static_cast<double>(v[r][i]) * (matrix.at(c, i) - zero[at]) * scale[at];
        size += std::fabs(v[r][i]) * 15 * scale[at];
      }
      const double lost = planes == 2 ? 3e-5 : 2e-6;
      expect(std::fabs(sum - products[r * kColumns + c]) <= lost * size, "planes", planes, r, c);
    }
  }
}

void check_finish(Type type) {
  Finish finish;
  finish.out_type = type;
  finish.columns = 35;
  finish.offset = 8;
  std::vector<int32_t> c(kRows * kColumns);
  std::vector<float> scale(kColumns, 0.001f), bias(kColumns), of_modality(2 * kColumns);
  for (int32_t& value : c) value = integer(-100000, 100000);
  for (float& value : bias) value = number();
  for (float& value : of_modality) value = number();
  finish.scale = scale.data();
  finish.bias = bias.data();
  finish.modality_bias = of_modality.data();
  std::vector<float> out(kRows * kColumns);
  Token tokens[kRows];
  for (int r = 0; r < kRows; ++r) {
    tokens[r] = {0.3f, 5 * r, r % 2, 0, 0, nullptr, out.data() + r * kColumns, nullptr};
  }
  finish_integers(finish, c.data(), tokens, kRows);
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < finish.columns; ++j) {
      float y = static_cast<float>(c[r * kColumns + j] - 40 * r) * scale[j];
      y = y * 0.3f;
      y = y + of_modality[r % 2 * kColumns + j];
      y = y + bias[j];
      uint32_t wanted, found = 0;
      std::memcpy(&wanted, &y, 4);
      const char* row = reinterpret_cast<const char*>(out.data() + r * kColumns);
      if (type == Type::kBFloat16) {
        wanted = (wanted + 0x7FFF + (wanted >> 16 & 1)) >> 16;
        std::memcpy(&found, row + 2 * j, 2);
      } else {
        std::memcpy(&found, row + 4 * j, 4);
      }
      expect(wanted == found, "a result", r, j);
    }
  }
}

}  // namespace

int main() {
  expect(has_processor(), "the processor");
  for (int k : {1, 3, 16, 63, 128, 257}) {
    for (int rotation : {1, 2, 4, 8, 16, 64}) {
      if (k % rotation == 0) check_quantize(k, rotation, k > 16);
    }
  }
  for (bool packed : {false, true}) {
    for (int64_t k : {1, 15, 64, 127, 130, 700, 7000}) {
      const Matrix matrix(packed, k, 67);
      std::vector<std::vector<int8_t>> q;
      while (q.size() < kRows) {
        q.push_back(token_of(k));
        check_product(matrix, q, 0);
        check_product(matrix, q, 64);
      }
    }
  }
  for (int planes : {2, 3}) {
    for (int rows = 1; rows <= 4; ++rows) check_planes(planes, planes == 2 ? 1 : 4, rows);
  }
  for (Type type : {Type::kFloat32, Type::kBFloat16}) check_finish(type);
  std::printf("%s: %d failures\n", kProcessor, failures);
  return failures != 0;
}
