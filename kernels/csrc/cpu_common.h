// Copyright (c) torchao_masquant contributors.
// All rights reserved.
//
// This source code is licensed under the BSD 3-Clause license found in the
// LICENSE file in the root directory of this source tree.

// What kernels for every processor share.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu_kernels.h"

namespace masquant {

// Calls f with the type as a constant.
template <class F>
inline void with_type(Type type, F&& f) {
  switch (type) {
    case Type::kFloat32:
      return f(std::integral_constant<Type, Type::kFloat32>());
    case Type::kBFloat16:
      return f(std::integral_constant<Type, Type::kBFloat16>());
    case Type::kFloat16:
      return f(std::integral_constant<Type, Type::kFloat16>());
    case Type::kInt8:
      return f(std::integral_constant<Type, Type::kInt8>());
  }
}

// Calls f with a count of 1 to most as a constant.
template <int most, class F>
inline void with_count(int count, F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    ((count == i + 1 ? f(std::integral_constant<int, i + 1>()) : void()), ...);
  }(std::make_integer_sequence<int, most>());
}

// Calls f(count as a constant, first, begin, end) for a few tokens at a time, at most so
// many, as many as any other time or one more, and for channels after which the next rows
// of weights have their turn, for the tokens to stay in the first-level cache; bytes: of a
// token's channel.
template <int most, class F>
inline void with_turns(int bytes, int tokens, int64_t in_features, F&& f) {
  constexpr int64_t kBytes = 24576;
  const int64_t channels = std::max<int64_t>(
      kBytes / (bytes * std::min(tokens, most)) / kBlock * kBlock, 4 * kBlock);
  const int64_t turns = std::max<int64_t>((in_features + channels - 1) / channels, 1);
  const int64_t step = round_up((in_features + turns - 1) / turns, kBlock);
  const int times = (tokens + most - 1) / most;
  for (int64_t k = 0; k < in_features; k += step) {
    for (int i = 0; i < times; ++i) {
      const int first = tokens * i / times;
      with_count<most>(tokens * (i + 1) / times - first, [&](auto count) {
        f(count, first, k, std::min(in_features, k + step));
      });
    }
  }
}

// column_panel of channels that begin in the middle of a byte: one by one.
inline void unpack_columns_slowly(const Weights& weights, int64_t n, int64_t k, int64_t width,
                                  uint8_t* panel) {
  std::memset(panel, 0, round_up(width, 8) * kColumns);
  const int64_t columns = std::min<int64_t>(kColumns, weights.out_features - n);
  for (int64_t c = 0; c < columns; ++c) {
    const uint8_t* row = weights.data + (n + c) * weights.row_bytes;
    for (int64_t i = 0; i < width; ++i) {
      const int nibble = row[(k + i) / 2] >> (4 * ((k + i) % 2)) & 0xF;
      const int64_t step = i / 8 * 2 + i % 2;
      panel[(step * kColumns + c) * 4 + i % 8 / 2] = static_cast<uint8_t>(nibble ^ 8);
    }
  }
}

}  // namespace masquant
