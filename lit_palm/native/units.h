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
