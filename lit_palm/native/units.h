// What is multiplied and summed in one go: a float32 number or, with AVX-512's products of bfloat16 numbers, two of
// these that follow each other in the direction of the sum. Units have 32 bits either way, and lie in memory of floats.

#pragma once

#include "vectors.h"

#ifdef __AVX512F__
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own header begins from registers as they are
#endif
#include <immintrin.h>
#endif

namespace {

template <typename T>
constexpr int PER = 1;  // numbers of a unit

// sum + the products of a unit with those of a vector
template <typename T>
inline Floats dot(Floats sum, float unit, Floats units) {
#ifdef __AVX512BF16__
    if constexpr (PER<T> == 2)
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(unit), (__m512bh)units);
    else
#endif
        return sum + unit * units;
}

#ifdef __AVX512F__

// 16 rows of 16 units turned into columns
inline void turn(__m512i (&x)[16]) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            x[4 * i + 2 * j] = _mm512_unpacklo_epi64(y[4 * i + j], y[4 * i + j + 2]);
            x[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(y[4 * i + j], y[4 * i + j + 2]);
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        y[j] = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88);
        y[4 + j] = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
        y[8 + j] = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
        y[12 + j] = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        x[j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0x88);
        x[8 + j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0xdd);
        x[4 + j] = _mm512_shuffle_i32x4(y[4 + j], y[12 + j], 0x88);
        x[12 + j] = _mm512_shuffle_i32x4(y[4 + j], y[12 + j], 0xdd);
    }
}

#endif

#ifdef __AVX512BF16__

template <>
constexpr int PER<bfloat16> = 2;

// 16 numbers as the lower halves of units
inline Ints halves(const bfloat16* from, __mmask16 mask = 0xffff) {
    return (Ints)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
}

inline Ints halves(const float* from, __mmask16 mask) {
    return (Ints)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from)));
}

inline Ints halves(Floats x) { return (Ints)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); }

// units of the numbers of two vectors: each with its own of the other, and those of one before those of the other
inline Floats over(Ints first, Ints second) { return (Floats)(first | second << 16); }
inline Floats behind(Floats first, Floats second) {
    return (Floats)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

#endif

}  // namespace
