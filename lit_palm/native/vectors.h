// Vectors of float32 numbers, to and from memory of float32 or bfloat16, by the vectors of GCC and Clang: as wide as a
// register where that is AVX-512's or AVX2's, of two registers elsewhere.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

namespace {

#ifdef __AVX512F__
constexpr int W = 16;  // numbers of a vector
#else
constexpr int W = 8;
#endif
constexpr int REGISTERS = 2 * W;  // of them
typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));

struct bfloat16 {
    uint16_t bits;
};

// Two vectors of consecutive numbers. Those of 16 bits come as the even ones and the odd ones, which costs one
// operation each; sums over them do not mind, and `store` puts them together again.
struct Pair {
    Floats first, second;
};

inline Floats vector(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline Pair load(const float* from) { return {vector(from), vector(from + W)}; }

inline Pair load(const bfloat16* from) {
    Ints x;
    std::memcpy(&x, from, sizeof x);
    return {(Floats)(x << 16), (Floats)(x & ~0xffff)};
}

inline void store(float* to, Pair x) {
    std::memcpy(to, &x.first, sizeof x.first);
    std::memcpy(to + W, &x.second, sizeof x.second);
}

inline Ints rounded(Floats x) {  // to the nearest, of two as near to the even one; NaN stays NaN
    const Ints bits = (Ints)x;
    return x != x ? Ints{} + 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);
}

inline void store(bfloat16* to, Pair x) {
    const Ints bits = ((rounded(x.first) >> 16) & 0xffff) | (rounded(x.second) & ~0xffff);
    std::memcpy(to, &bits, sizeof bits);
}

// float32 numbers in the order of a type's pairs
inline Pair ordered(const float* from, const float*) { return load(from); }

inline Pair ordered(const float* from, const bfloat16*) {
    Pair x;
    for (int i = 0; i < W; i++) {
        x.first[i] = from[2 * i];
        x.second[i] = from[2 * i + 1];
    }
    return x;
}

inline float number(const float* x) { return *x; }

inline float number(const bfloat16* x) {
    uint32_t bits = uint32_t(x->bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(float* to, float x) { *to = x; }

inline void store(bfloat16* to, float x) {  // as `rounded` does it
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to->bits = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};
using Floats32 = std::unique_ptr<float, Free>;

inline Floats32 floats(int64_t count) {
    auto* memory = static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64));
    if (!memory) throw std::bad_alloc();
    return Floats32(memory);
}

// e^x within 2 units in the last place (Cephes' polynomial); below -87 it is 0
inline Floats exponential(Floats x) {
    Floats whole = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // rounded to an integer
    Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats y = Floats{} + 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    y *= (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23);
    y = x < -87.0f ? Floats{} : y;
    return x > 88.0f ? Floats{} + std::numeric_limits<float>::infinity() : y;
}

inline Floats sigmoid(Floats x) { return 1.0f / (exponential(-x) + 1.0f); }

inline float sum(Floats x) {
    float total = 0;
    for (int i = 0; i < W; i++) total += x[i];
    return total;
}

// the sums of four vectors
inline void sums(Floats a, Floats b, Floats c, Floats d, float* to) {
#define PICKED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#ifdef __AVX512F__
    const Floats ab = PICKED(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                      PICKED(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    const Floats cd = PICKED(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                      PICKED(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    Floats x = PICKED(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               PICKED(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    x += PICKED(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    x += PICKED(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#else
    const Floats ab = PICKED(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + PICKED(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    const Floats cd = PICKED(c, d, 0, 1, 2, 3, 8, 9, 10, 11) + PICKED(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
    Floats x = PICKED(ab, cd, 0, 1, 4, 5, 8, 9, 12, 13) + PICKED(ab, cd, 2, 3, 6, 7, 10, 11, 14, 15);
    x += PICKED(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
#endif
#undef PICKED
    for (int i = 0; i < 4; i++) to[i] = x[W / 4 * i];
}

}  // namespace
