// One block's decoding step between its two matrix products, for processors: rotary positions, keys and values stored,
// attention of one token a row, SwiGLU. torch runs a dozen operations for it, each of which passes over memory and
// wakes the threads; here it is one pass. Sums are float32 whatever the type of what is read. See decoding_native.py.
//
// Vectors are those of GCC and Clang, which turn 16 numbers into one register or several: AVX-512, AVX2, NEON alike.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int W = 16;  // numbers of a vector
typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));

struct bfloat16 {
    uint16_t bits;
};

// Two vectors of consecutive numbers. Those of 16 bits come as the even ones and the odd ones, which costs one operation
// each; sums over them do not mind, and `store` puts them together again.
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
    const Pair x = load(from);
    return {__builtin_shufflevector(x.first, x.second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
            __builtin_shufflevector(x.first, x.second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
}

inline float number(const float* x) { return *x; }

inline float number(const bfloat16* x) {
    uint32_t bits = uint32_t(x->bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
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

inline float sum(Floats x) {
    float total = 0;
    for (int i = 0; i < W; i++) total += x[i];
    return total;
}

// the sums of four vectors
inline void sums(Floats a, Floats b, Floats c, Floats d, float* to) {
#define LOW 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
    Floats ab = __builtin_shufflevector(a, b, LOW) + __builtin_shufflevector(a, b, HIGH);
    Floats cd = __builtin_shufflevector(c, d, LOW) + __builtin_shufflevector(c, d, HIGH);
    Floats x = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    x += __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    for (int i = 0; i < 4; i++) to[i] = x[4 * i];
}

template <typename T>
struct Step {
    const T* fused;  // [rows, (heads + 2 * kv_heads) * head_dim + 2 * inner]
    const float *cos, *sin;  // [rows or 1, head_dim]
    int64_t rope_stride;
    T *keys, *values;  // [rows, kv_heads, slots, head_dim]
    int64_t row_stride, head_stride;
    const T* bias;  // [rows, slots from `start` on] or null
    int64_t bias_stride;
    T* out;  // [rows, heads * head_dim + inner]
    int64_t rows, heads, kv_heads, inner, start, place;
};

// One head of a row, rotated: pairs are (i, i + head_dim / 2), the sine carries the sign
template <typename T, int D>
inline void rotate(const Step<T>& s, int64_t row, const T* from, T* to) {
    const float *cos = s.cos + row * s.rope_stride, *sin = s.sin + row * s.rope_stride;
    T rolled[D];
    std::memcpy(rolled, from + D / 2, sizeof rolled / 2);
    std::memcpy(rolled + D / 2, from, sizeof rolled / 2);
    for (int i = 0; i < D; i += 2 * W) {
        const Pair x = load(from + i), y = load(rolled + i), c = ordered(cos + i, from), t = ordered(sin + i, from);
        store(to + i, {x.first * c.first + y.first * t.first, x.second * c.second + y.second * t.second});
    }
}

// Scores of N keys, [G, padded], by queries
template <typename T, int D, int G, int N>
inline void score(const Pair (&q)[G][D / (2 * W)], const T* keys, float* scores, int64_t padded) {
    Floats found[G][N] = {};
    for (int v = 0; v < D / (2 * W); v++)
        for (int n = 0; n < N; n++) {
            const Pair k = load(keys + n * D + v * 2 * W);
            for (int g = 0; g < G; g++) found[g][n] += q[g][v].first * k.first + q[g][v].second * k.second;
        }
    for (int g = 0; g < G; g++)
        if constexpr (N == 4) {
            sums(found[g][0], found[g][1], found[g][2], found[g][3], scores + g * padded);
        } else {
            for (int n = 0; n < N; n++) scores[g * padded + n] = sum(found[g][n]);
        }
}

// Scores to weights that are yet to be divided by their sum, which is given back
inline float weigh(float* scores, int64_t seen, int64_t padded) {
    for (int64_t n = seen; n < padded; n++) scores[n] = -std::numeric_limits<float>::infinity();
    Floats most = vector(scores), total{};
    for (int64_t n = W; n < padded; n += W) most = vector(scores + n) > most ? vector(scores + n) : most;
    float peak = most[0];
    for (int n = 1; n < W; n++) peak = most[n] > peak ? most[n] : peak;
    for (int64_t n = 0; n < padded; n += W) {
        const Floats weight = exponential(vector(scores + n) - peak);
        std::memcpy(scores + n, &weight, sizeof weight);
        total += weight;
    }
    return sum(total);
}

// G query heads, of those that share a key/value head, of one row
template <typename T, int D, int G>
void attend(const Step<T>& s, int64_t row, int64_t shared, int64_t head, float* scores) {
    const T* fused = s.fused + row * ((s.heads + 2 * s.kv_heads) * D + 2 * s.inner);
    const int64_t past = s.place - s.start, seen = past + 1, padded = (seen + W - 1) / W * W;
    T *keys = s.keys + row * s.row_stride + shared * s.head_stride + s.start * D;
    T *values = s.values + row * s.row_stride + shared * s.head_stride + s.start * D;
    T own_key[D];
    rotate<T, D>(s, row, fused + (s.heads + shared) * D, own_key);
    const T* own_value = fused + (s.heads + s.kv_heads + shared) * D;
    if (head % (s.heads / s.kv_heads) == 0) {  // once for all heads that share it
        std::memcpy(keys + past * D, own_key, sizeof own_key);
        std::memcpy(values + past * D, own_value, sizeof own_key);
    }
    Pair q[G][D / (2 * W)];
    const float scale = 1 / std::sqrt(float(D));
    for (int g = 0; g < G; g++) {
        T rotated[D];
        rotate<T, D>(s, row, fused + (head + g) * D, rotated);
        for (int v = 0; v < D / (2 * W); v++) {
            const Pair x = load(rotated + v * 2 * W);
            q[g][v] = {x.first * scale, x.second * scale};
        }
    }
    int64_t i = 0;
    for (; i + 4 <= past; i += 4) score<T, D, G, 4>(q, keys + i * D, scores + i, padded);
    for (; i < past; i++) score<T, D, G, 1>(q, keys + i * D, scores + i, padded);
    score<T, D, G, 1>(q, own_key, scores + past, padded);
    float norm[G];
    for (int g = 0; g < G; g++) {
        for (int64_t n = 0; n < seen && s.bias; n++) scores[g * padded + n] += number(s.bias + row * s.bias_stride + n);
        norm[g] = 1 / weigh(scores + g * padded, seen, padded);
    }
    constexpr int TOGETHER = D * G <= 16 * W ? D / (2 * W) : 8 / G;  // whose sums fit the registers
    T* out = s.out + row * (s.heads * D + s.inner) + head * D;
    for (int first = 0; first < D; first += TOGETHER * 2 * W) {
        Pair found[G][TOGETHER] = {};
        for (int64_t n = 0; n < seen; n++) {
            const T* value = (n == past ? own_value : values + n * D) + first;
            for (int v = 0; v < TOGETHER; v++) {
                const Pair x = load(value + v * 2 * W);
                for (int g = 0; g < G; g++) {
                    found[g][v].first += scores[g * padded + n] * x.first;
                    found[g][v].second += scores[g * padded + n] * x.second;
                }
            }
        }
        for (int g = 0; g < G; g++)
            for (int v = 0; v < TOGETHER; v++)
                store(out + g * D + first + v * 2 * W, {found[g][v].first * norm[g], found[g][v].second * norm[g]});
    }
}

inline Floats silu(Floats x) { return x / (exponential(-x) + 1.0f); }

template <typename T, int D>
void run(const Step<T>& s) {
    constexpr int PIECE = 16 * W;
    const int64_t shared = s.heads / s.kv_heads, seen = s.place - s.start + 1, before = (s.heads + 2 * s.kv_heads) * D;
    const int64_t at_once = shared % 4 == 0 ? 4 : 1, pieces = (s.inner + PIECE - 1) / PIECE;
#pragma omp parallel if (s.rows * (s.heads * D * seen + 8 * s.inner) > 65536)
    {
        std::vector<float> scores(at_once * (seen + W));
#pragma omp for schedule(static) nowait
        for (int64_t task = 0; task < s.rows * s.heads / at_once; task++) {
            const int64_t row = task * at_once / s.heads, head = task * at_once % s.heads;
            const auto one = at_once == 4 ? attend<T, D, 4> : attend<T, D, 1>;
            one(s, row, head / shared, head, scores.data());
        }
#pragma omp for schedule(static) nowait
        for (int64_t task = 0; task < s.rows * pieces; task++) {
            const int64_t row = task / pieces, first = task % pieces * PIECE;
            const T *gate = s.fused + row * (before + 2 * s.inner) + before, *up = gate + s.inner;
            T* out = s.out + row * (s.heads * D + s.inner) + s.heads * D;
            for (int64_t i = first; i < first + PIECE && i < s.inner; i += 2 * W) {
                const Pair x = load(gate + i), y = load(up + i);
                store(out + i, {silu(x.first) * y.first, silu(x.second) * y.second});
            }
        }
    }
}

template <typename T>
int step(const Step<T>* s, int64_t head_dim) {
    switch (head_dim) {
        case 32: run<T, 32>(*s); break;
        case 64: run<T, 64>(*s); break;
        case 128: run<T, 128>(*s); break;
        case 256: run<T, 256>(*s); break;
        default: return 1;
    }
    return 0;
}

}  // namespace

extern "C" int step_float32(const void* s, int64_t head_dim) { return step((const Step<float>*)s, head_dim); }
extern "C" int step_bfloat16(const void* s, int64_t head_dim) { return step((const Step<bfloat16>*)s, head_dim); }
