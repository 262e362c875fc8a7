// Copyright (c) torchao_masquant contributors.
// All rights reserved.
//
// This source code is licensed under the BSD 3-Clause license found in the
// LICENSE file in the root directory of this source tree.

// What the portable kernels need of a processor: AVX2, with AVX-VNNI or without, or NEON
// with dot products. All else is written in the compiler's vectors.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#else
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

#include "cpu_kernels.h"

namespace masquant {

#ifdef __x86_64__
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(4 * kLanes)));
//: 16 of them, of which a transpose sees 4 numbers of 32 bits
typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef int32_t Ints4 __attribute__((vector_size(16)));

template <class Vector>
inline Vector load_vector(const void* data) {
  Vector v;
  std::memcpy(&v, data, sizeof v);
  return v;
}

template <class Vector>
inline void store_vector(void* to, Vector v) {
  std::memcpy(to, &v, sizeof v);
}

// ---- what the processors differ in ----

#ifdef __x86_64__

#ifdef __AVXVNNI__
constexpr const char* kInstructions = "AVX-VNNI";
#else
constexpr const char* kInstructions = "AVX2";
#endif

inline bool has_instructions() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  // Older compilers have no name for AVX-VNNI.
  __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx);
#ifdef __AVXVNNI__
  const bool vnni = (eax >> 4 & 1) != 0;
#else
  const bool vnni = true;
#endif
  return vnni && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

// To the nearest, halves to even.
inline Ints round_to_ints(Floats v) { return (Ints)_mm256_cvtps_epi32(v); }

inline Floats from_float16(const void* data) {
  return _mm256_cvtph_ps(load_vector<__m128i>(data));
}

inline void to_float16(Floats v, void* to) {
  store_vector(to, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Each of 16 bits, shifted into the upper half of 32.
inline Ints upper_halves(const void* data) {
  return (Ints)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_vector<__m128i>(data)), 16);
}

// The last 8 bits of each.
inline void narrow(Ints v, int8_t* to) {
  const __m256i first = _mm256_set1_epi32(0x0C080400);
  const __m256i bytes = _mm256_shuffle_epi8((__m256i)v, first);
  store_vector(to, _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes),
                                      _mm256_extracti128_si256(bytes, 1))[0]);
}

#ifdef __AVXVNNI__
inline Ints dot(Ints sum, Bytes u, Bytes v) {
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)u, (__m256i)v);
}
#endif

#else  // ARM

constexpr const char* kInstructions = "NEON dot products";

inline bool has_instructions() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }

inline Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }

inline Ints round_to_ints(Floats v) { return vcvtnq_s32_f32(v); }

inline Floats from_float16(const void* data) {
  return vcvt_f32_f16(vreinterpret_f16_u16(load_vector<uint16x4_t>(data)));
}

inline void to_float16(Floats v, void* to) { store_vector(to, vcvt_f16_f32(v)); }

inline Ints upper_halves(const void* data) {
  return vreinterpretq_s32_u32(vshll_n_u16(load_vector<uint16x4_t>(data), 15) << 1);
}

inline void narrow(Ints v, int8_t* to) {
  const int16x4_t half = vmovn_s32(v);
  const int8x8_t quarter = vmovn_s16(vcombine_s16(half, half));
  std::memcpy(to, &quarter, 4);
}

inline Ints dot(Ints sum, Bytes u, Bytes v) { return vdotq_s32(sum, u, v); }

#endif

// ---- products of weights of 8 bits ----

#if defined(__x86_64__) && !defined(__AVXVNNI__)
// vpmaddubsw would add two products in 16 bits, which do not hold them: weights and tokens
// are widened, and two products are added in 32.
constexpr int kChannelsOfLane = 2;
constexpr int kByteOffset = 0;

inline Ints dot_bytes(Ints sum, Bytes w, Bytes a) {
  return sum + (Ints)_mm256_madd_epi16((__m256i)w, (__m256i)a);
}

inline Bytes16 widen(Bytes16 v) { return (Bytes16)_mm_cvtepi8_epi16((__m128i)v); }

inline Bytes stored_bytes(const void* w) {
  return (Bytes)_mm256_cvtepi8_epi16(load_vector<__m128i>(w));
}
#else
constexpr int kChannelsOfLane = 4;
#ifdef __x86_64__
//: weights are to be unsigned
constexpr int kByteOffset = 128;
#else
constexpr int kByteOffset = 0;
#endif

inline Ints dot_bytes(Ints sum, Bytes w, Bytes a) { return dot(sum, w, a); }

inline Bytes16 widen(Bytes16 v) { return v ^ static_cast<uint8_t>(kByteOffset); }

inline Bytes stored_bytes(const void* w) {
  return load_vector<Bytes>(w) ^ static_cast<int8_t>(kByteOffset);
}
#endif

// ---- sums of products ----

// Of weights of 8 bits. A sum is taken into a part, to which kProducts are added at most.
struct ByteSums {
  static constexpr int64_t kProducts = INT64_MAX / 2;
  typedef Ints Part;

  static Part begin(Ints sum) { return sum; }
  static Part add(Part part, Bytes w, Bytes a) { return dot_bytes(part, w, a); }
  static Ints end(Ints, Part part) { return part; }
};

// Of weights of 4 bits, unsigned.
#if defined(__x86_64__) && !defined(__AVXVNNI__)
// Two products of 15 by 128 fit in 16 bits, and so do eight sums of them.
struct NibbleSums {
  static constexpr int64_t kProducts = 8;
  typedef int16_t Part __attribute__((vector_size(4 * kLanes)));

  static Part begin(Ints) { return Part{}; }
  static Part add(Part part, Bytes w, Bytes a) {
    return part + (Part)_mm256_maddubs_epi16((__m256i)w, (__m256i)a);
  }
  static Ints end(Ints sum, Part part) {
    return sum + (Ints)_mm256_madd_epi16((__m256i)part, _mm256_set1_epi16(1));
  }
};
#else
struct NibbleSums : ByteSums {
  static Part add(Part part, Bytes w, Bytes a) { return dot(part, w, a); }
};
#endif

// ---- the same everywhere ----

inline Floats all_lanes(float v) { return v - Floats{}; }
inline Ints all_lanes(int32_t v) { return v - Ints{}; }
inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

template <class Vector>
inline auto sum_lanes(Vector v) {
  auto sum = v[0];
  for (int i = 1; i < kLanes; ++i) sum += v[i];
  return sum;
}

// The first count of kLanes numbers, 1 or more, zeros behind them.
template <Type type>
inline Floats load(const void* data, int64_t i, int64_t count) {
  constexpr int kBytes = type == Type::kFloat32 ? 4 : type == Type::kInt8 ? 1 : 2;
  alignas(32) char padded[kBytes * kLanes];
  const char* from = static_cast<const char*>(data) + i * kBytes;
  if (count < kLanes) {
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, from, count * kBytes);
    from = padded;
  }
  if constexpr (type == Type::kFloat32) {
    return load_vector<Floats>(from);
  } else if constexpr (type == Type::kFloat16) {
    return from_float16(from);
  } else if constexpr (type == Type::kBFloat16) {
    return (Floats)upper_halves(from);
  } else {
    typedef int8_t Narrow __attribute__((vector_size(kLanes)));
    return __builtin_convertvector(load_vector<Narrow>(from), Floats);
  }
}

inline void store(float* to, int64_t count, Floats v) {
  std::memcpy(to, &v, sizeof(float) * (count < kLanes ? count : kLanes));
}

inline void transpose(Ints4 r[4]) {
  const Ints4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
  const Ints4 first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
  const Ints4 a = __builtin_shuffle(r[0], r[1], low), b = __builtin_shuffle(r[2], r[3], low);
  const Ints4 c = __builtin_shuffle(r[0], r[1], high), d = __builtin_shuffle(r[2], r[3], high);
  r[0] = __builtin_shuffle(a, b, first);
  r[1] = __builtin_shuffle(a, b, second);
  r[2] = __builtin_shuffle(c, d, first);
  r[3] = __builtin_shuffle(c, d, second);
}

}  // namespace masquant
