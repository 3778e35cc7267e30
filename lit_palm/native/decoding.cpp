// Decoding steps for processors. Of one block what lies between its two matrix products: rotary positions, keys and
// values stored, attention of one token a row, SwiGLU; torch runs a dozen operations for it, each of which passes over
// memory and wakes the threads, and here it is one pass. Where matrix products are ours too, all blocks of a step in
// one go. Sums are float32 whatever the type of what is read. See models/decoding_native.py.

#include <vector>

#include "panels.h"
#include "units.h"

namespace {

// T is the type between matrix products, P that of their factors
template <typename T, typename P>
struct Step {
    const T* fused;  // [rows, (heads + 2 * kv_heads) * head_dim + 2 * inner]
    const float *cos, *sin;  // [rows or 1, head_dim]
    int64_t rope_stride;
    T *keys, *values;  // [rows, kv_heads, slots, head_dim]
    int64_t row_stride, head_stride;
    const T* bias;  // [rows, slots from `start` on] or null
    int64_t bias_stride;
    P* out;  // [rows, heads * head_dim + inner]
    int64_t rows, heads, kv_heads, inner, start, place;
};

// A pair of T's order
template <typename T, typename P>
inline void store_as(P* to, Pair x) {
#ifdef __AVX512BF16__
    if constexpr (sizeof(P) < sizeof(T)) {
        const Floats units = behind(x.first, x.second);
        std::memcpy(to, &units, sizeof units);
    } else
#endif
        store(to, x);
}

// Bytes that are asked for ahead of use: many rows' keys and values are in memory far away, a few kilobytes in a place,
// which is too short for the processor to read ahead by itself
constexpr int64_t AHEAD = 8192;

template <int COUNT, typename T>
inline void ask(const T* from) {
    for (int i = 0; i < COUNT; i += 64 / sizeof(T)) __builtin_prefetch((const char*)(from + i) + AHEAD);
}

// One head of a row, rotated: pairs are (i, i + head_dim / 2), the sine carries the sign
template <typename T, int D, typename S>
inline void rotate(const S& s, int64_t row, const T* from, T* to) {
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
template <typename T, typename P, int D, int G>
void attend(const Step<T, P>& s, int64_t row, int64_t shared, int64_t head, float* scores) {
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
    for (; i + 4 <= past; i += 4) {
        ask<4 * D>(keys + i * D);
        score<T, D, G, 4>(q, keys + i * D, scores + i, padded);
    }
    for (; i < past; i++) score<T, D, G, 1>(q, keys + i * D, scores + i, padded);
    score<T, D, G, 1>(q, own_key, scores + past, padded);
    float norm[G];
    for (int g = 0; g < G; g++) {
        for (int64_t n = 0; n < seen && s.bias; n++) scores[g * padded + n] += number(s.bias + row * s.bias_stride + n);
        norm[g] = 1 / weigh(scores + g * padded, seen, padded);
    }
    constexpr int MOST = REGISTERS / 4 / G > 0 ? REGISTERS / 4 / G : 1;  // pairs whose sums fit half of the registers
    constexpr int TOGETHER = D / (2 * W) < MOST ? D / (2 * W) : MOST;
    P* out = s.out + row * (s.heads * D + s.inner) + head * D;
    for (int first = 0; first < D; first += TOGETHER * 2 * W) {
        Pair found[G][TOGETHER] = {};
        for (int64_t n = 0; n < seen; n++) {
            const T* value = (n == past ? own_value : values + n * D) + first;
            ask<TOGETHER * 2 * W>(value);
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
                store_as<T>(out + g * D + first + v * 2 * W,
                            {found[g][v].first * norm[g], found[g][v].second * norm[g]});
    }
}

#ifdef __AVX512BF16__

// The same by products of bfloat16 numbers, to which the weights are rounded: 16 keys at a time are turned, so that a
// vector has a unit of each, and no sum goes across a vector
template <int D, int G>
void attend_units(const Step<bfloat16, bfloat16>& s, int64_t row, int64_t shared, int64_t head, float* scores) {
    using T = bfloat16;
    constexpr int64_t TOKENS_AHEAD = AHEAD / (sizeof(T) * D);
    const T* fused = s.fused + row * ((s.heads + 2 * s.kv_heads) * D + 2 * s.inner);
    const int64_t past = s.place - s.start, seen = past + 1, padded = (seen + W - 1) / W * W, whole = past / W * W;
    T *keys = s.keys + row * s.row_stride + shared * s.head_stride + s.start * D;
    T *values = s.values + row * s.row_stride + shared * s.head_stride + s.start * D;
    alignas(64) T last[W][D] = {};  // the last keys, this token's among them
    std::memcpy(last, keys + whole * D, (past - whole) * sizeof *last);
    rotate<T, D>(s, row, fused + (s.heads + shared) * D, last[past - whole]);
    const T* own_value = fused + (s.heads + s.kv_heads + shared) * D;
    if (head % (s.heads / s.kv_heads) == 0) {  // once for all heads that share it
        std::memcpy(keys + past * D, last[past - whole], sizeof *last);
        std::memcpy(values + past * D, own_value, sizeof *last);
    }
    alignas(64) T rotated[G][D];
    for (int g = 0; g < G; g++) rotate<T, D>(s, row, fused + (head + g) * D, rotated[g]);
    float q[G][D / 2];
    std::memcpy(q, rotated, sizeof q);
    const float scale = 1 / std::sqrt(float(D));
    for (int64_t n = 0; n < padded; n += W) {
        const T* from = n < whole ? keys + n * D : *last;
        const int64_t at = n + TOKENS_AHEAD;
        const T* later = at < padded ? keys + at * D : values + (at - padded) * D;  // after the keys come the values
        Floats found[G] = {};
        for (int c = 0; c < D / 2; c += W) {
            __m512i x[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                x[i] = _mm512_loadu_si512(from + i * D + 2 * c);
                __builtin_prefetch(later + i * D + 2 * c);
            }
            turn(x);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
#pragma GCC unroll 8
                for (int g = 0; g < G; g++) found[g] = dot<T>(found[g], q[g][c + i], (Floats)x[i]);
        }
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) {
            const Floats x = found[g] * scale;
            std::memcpy(scores + g * padded + n, &x, sizeof x);
        }
    }
    float norm[G];
    for (int g = 0; g < G; g++) {
        float* const own = scores + g * padded;
        for (int64_t n = 0; n < seen && s.bias; n++) own[n] += number(s.bias + row * s.bias_stride + n);
        norm[g] = 1 / weigh(own, seen, padded);
        for (int64_t n = 0; n < padded; n += W) {  // in place: half as wide
            const __m256i x = (__m256i)_mm512_cvtneps_pbh((__m512)vector(own + n));
            std::memcpy((T*)own + n, &x, sizeof x);
        }
    }
    T* out = s.out + row * (s.heads * D + s.inner) + head * D;
    const T none[D] = {};
    for (int d = 0; d < D; d += 2 * W) {
        Floats found[G][2] = {};
        const auto add = [&](int64_t unit, const T* first, const T* second) {
            const __m512i a = _mm512_loadu_si512(first + d), b = _mm512_loadu_si512(second + d);
            const int64_t at = 2 * unit + TOKENS_AHEAD;
            const T* later = (at < seen ? values + at * D : keys + s.row_stride + (at - seen) * D) + d;
            __builtin_prefetch(later);
            __builtin_prefetch(later + D);
            const Floats low = (Floats)_mm512_unpacklo_epi16(a, b), high = (Floats)_mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 8
            for (int g = 0; g < G; g++) {
                const float weights = scores[g * padded + unit];
                found[g][0] = dot<T>(found[g][0], weights, low);
                found[g][1] = dot<T>(found[g][1], weights, high);
            }
        };
        for (int64_t unit = 0; unit < past / 2; unit++) add(unit, values + 2 * unit * D, values + (2 * unit + 1) * D);
        if (past % 2)
            add(past / 2, values + (past - 1) * D, own_value);
        else
            add(past / 2, own_value, none);
        for (int g = 0; g < G; g++) {
            const Floats units = behind(found[g][0] * norm[g], found[g][1] * norm[g]);
            // fours of the low and the high half in turn
            const Floats x = __builtin_shufflevector(units, units, 0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
            std::memcpy(out + g * D + d, &x, sizeof x);
        }
    }
}

#endif

// By all threads that come here; they leave as each is done
template <typename T, typename P, int D>
void between(const Step<T, P>& s, std::vector<float>& scores) {
    constexpr int PIECE = 16 * W, GROUP = REGISTERS / 8;
    const int64_t shared = s.heads / s.kv_heads, before = (s.heads + 2 * s.kv_heads) * D;
    const int64_t pieces = (s.inner + PIECE - 1) / PIECE;
    int64_t at_once = shared % GROUP == 0 ? GROUP : 1;
    auto one = at_once == GROUP ? attend<T, P, D, GROUP> : attend<T, P, D, 1>;
#ifdef __AVX512BF16__
    if constexpr (PER<T> == 2)
        if (at_once > 1) {
            at_once = shared % 8 == 0 ? 8 : 4;
            one = at_once == 8 ? attend_units<D, 8> : attend_units<D, 4>;
        }
#endif
    scores.resize(at_once * (s.place - s.start + 1 + W));
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < s.rows * s.heads / at_once; task++) {
        const int64_t row = task * at_once / s.heads, head = task * at_once % s.heads;
        one(s, row, head / shared, head, scores.data());
    }
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < s.rows * pieces; task++) {
        const int64_t row = task / pieces, first = task % pieces * PIECE;
        const T *gate = s.fused + row * (before + 2 * s.inner) + before, *up = gate + s.inner;
        P* out = s.out + row * (s.heads * D + s.inner) + s.heads * D;
        for (int64_t i = first; i < first + PIECE && i < s.inner; i += 2 * W) {
            const Pair x = load(gate + i), y = load(up + i);
            store_as<T>(out + i, {x.first * sigmoid(x.first) * y.first, x.second * sigmoid(x.second) * y.second});
        }
    }
}

template <typename T, int D>
void run(const Step<T, T>& s) {
    const int64_t seen = s.place - s.start + 1;
#pragma omp parallel if (s.rows * (s.heads * D * seen + 8 * s.inner) > 65536)
    {
        std::vector<float> scores;
        between<T, T, D>(s, scores);
    }
}

template <typename T>
int step(const Step<T, T>* s, int64_t head_dim) {
    switch (head_dim) {
        case 32: run<T, 32>(*s); break;
        case 64: run<T, 64>(*s); break;
        case 128: run<T, 128>(*s); break;
        case 256: run<T, 256>(*s); break;
        default: return 1;
    }
    return 0;
}

#ifdef __AVX512F__

template <typename T>
struct Block {
    const float* norm;            // [width]
    const float *entry, *leave;   // panels of the weights into `fused` and from `out`
    T *keys, *values;
};

// All blocks and the norm after them
template <typename T, typename P>
struct Whole {
    Step<T, P> step;      // save `fused`, keys and values
    T* x;                 // [rows, width], becomes what the last block gives
    T* hidden;            // [rows, width]: the same, normalised
    P* normed;            // [rows, width] to work in
    T* fused;
    const Block<T>* blocks;
    int64_t num_blocks, width;
    const float* norm;
    float eps;
};

// LayerNorm without a bias; by all threads that come here
template <typename T, typename P, typename O>
void normalise(const Whole<T, P>& w, const float* weight, O* to) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < w.step.rows; row++) {
        const T* x = w.x + row * w.width;
        Floats total{}, squares{};
        for (int64_t i = 0; i < w.width; i += 2 * W) total += load(x + i).first + load(x + i).second;
        const float mean = sum(total) / w.width;
        for (int64_t i = 0; i < w.width; i += 2 * W) {
            const Pair y = load(x + i);
            squares += (y.first - mean) * (y.first - mean) + (y.second - mean) * (y.second - mean);
        }
        const float scale = 1 / std::sqrt(sum(squares) / w.width + w.eps);
        for (int64_t i = 0; i < w.width; i += 2 * W) {
            const Pair y = load(x + i), by = ordered(weight + i, x);
            store_as<T>(to + row * w.width + i,
                        {(y.first - mean) * scale * by.first, (y.second - mean) * scale * by.second});
        }
    }
}

template <typename T, typename P, int D>
void run_whole(const Whole<T, P>& w) {
    const Step<T, P>& s = w.step;
    const int64_t inside = s.heads * D + s.inner, wide = (s.heads + 2 * s.kv_heads) * D + 2 * s.inner;
    Product entry{}, leave{};
    entry.a = w.normed, entry.c = w.fused, entry.n = entry.c_row = wide, entry.k = entry.a_row = w.width;
    leave.a = s.out, leave.c = w.x, leave.n = leave.c_row = w.width, leave.k = leave.a_row = inside;
    leave.add = w.x;  // each number is read where it is then written
    entry.m = leave.m = s.rows, entry.c_wide = leave.c_wide = sizeof(T) == 4;
#pragma omp parallel if (s.rows * w.width * (wide + inside) > 1 << 18)
    {
        std::vector<float> scores;
        Step<T, P> own = s;
        own.fused = w.fused;
        for (int64_t i = 0; i < w.num_blocks; i++) {
            const Block<T>& block = w.blocks[i];
            own.keys = block.keys, own.values = block.values;
            normalise(w, block.norm, w.normed);
            by_panels<P>(entry, 0, pieces(entry.n, COLUMNS), block.entry);
            between<T, P, D>(own, scores);
#pragma omp barrier
            by_panels<P>(leave, 0, pieces(leave.n, COLUMNS), block.leave);
        }
        normalise(w, w.norm, w.hidden);
    }
}

template <typename T, typename P>
int step_whole(const Whole<T, P>* w, int64_t head_dim) {
    switch (head_dim) {
        case 32: run_whole<T, P, 32>(*w); break;
        case 64: run_whole<T, P, 64>(*w); break;
        case 128: run_whole<T, P, 128>(*w); break;
        case 256: run_whole<T, P, 256>(*w); break;
        default: return 1;
    }
    return 0;
}

#endif

}  // namespace

extern "C" int step_float32(const void* s, int64_t head_dim) { return step((const Step<float, float>*)s, head_dim); }
extern "C" int step_bfloat16(const void* s, int64_t head_dim) {
    return step((const Step<bfloat16, bfloat16>*)s, head_dim);
}

#ifdef __AVX512F__
extern "C" int whole_float32(const void* w, int64_t head_dim) {
    return step_whole((const Whole<float, float>*)w, head_dim);
}
#endif

#ifdef __AVX512BF16__
extern "C" int whole_bfloat16(const void* w, int64_t head_dim) {
    return step_whole((const Whole<bfloat16, bfloat16>*)w, head_dim);
}
extern "C" int whole_mixed(const void* w, int64_t head_dim) {
    return step_whole((const Whole<float, bfloat16>*)w, head_dim);
}
#endif
