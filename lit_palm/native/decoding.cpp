// One block's decoding step between its two matrix products, for processors: rotary positions, keys and values stored,
// attention of one token a row, SwiGLU. torch runs a dozen operations for it, each of which passes over memory and
// wakes the threads; here it is one pass. Sums are float32 whatever the type of what is read. See
// models/decoding_native.py.

#include <vector>

#include "vectors.h"

namespace {

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
    constexpr int MOST = REGISTERS / 4 / G > 0 ? REGISTERS / 4 / G : 1;  // pairs whose sums fit half of the registers
    constexpr int TOGETHER = D / (2 * W) < MOST ? D / (2 * W) : MOST;
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

template <typename T, int D>
void run(const Step<T>& s) {
    constexpr int PIECE = 16 * W;
    const int64_t shared = s.heads / s.kv_heads, seen = s.place - s.start + 1, before = (s.heads + 2 * s.kv_heads) * D;
    constexpr int GROUP = REGISTERS / 8;
    const int64_t at_once = shared % GROUP == 0 ? GROUP : 1, pieces = (s.inner + PIECE - 1) / PIECE;
#pragma omp parallel if (s.rows * (s.heads * D * seen + 8 * s.inner) > 65536)
    {
        std::vector<float> scores(at_once * (seen + W));
#pragma omp for schedule(static) nowait
        for (int64_t task = 0; task < s.rows * s.heads / at_once; task++) {
            const int64_t row = task * at_once / s.heads, head = task * at_once % s.heads;
            const auto one = at_once == GROUP ? attend<T, D, GROUP> : attend<T, D, 1>;
            one(s, row, head / shared, head, scores.data());
        }
#pragma omp for schedule(static) nowait
        for (int64_t task = 0; task < s.rows * pieces; task++) {
            const int64_t row = task / pieces, first = task % pieces * PIECE;
            const T *gate = s.fused + row * (before + 2 * s.inner) + before, *up = gate + s.inner;
            T* out = s.out + row * (s.heads * D + s.inner) + s.heads * D;
            for (int64_t i = first; i < first + PIECE && i < s.inner; i += 2 * W) {
                const Pair x = load(gate + i), y = load(up + i);
                store(out + i, {x.first * sigmoid(x.first) * y.first, x.second * sigmoid(x.second) * y.second});
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
