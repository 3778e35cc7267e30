// Causal attention of sequences that lie one after the other, with its backward pass, for processors: FlashAttention-2
// (Dao 2023). See models/causal.py.
//
// Query heads that share a key/value head are rows of one matrix, and a block of rows is multiplied with blocks of keys.
// Everything between what is read and what is written is float32. A dimension of a head is, below, a place in the order
// that `load` gives: the same for queries, keys, values and their gradients, and undone by `store`.

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "vectors.h"

namespace {

constexpr int ROWS = REGISTERS / 4;  // of what is multiplied in registers
constexpr int WIDTH = 2 * W;         // two vectors of each
constexpr int64_t QUERIES = 96, KEYS = 256;  // of a block

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};
using Floats32 = std::unique_ptr<float, Free>;

inline Floats32 floats(int64_t count) {
    auto* memory = static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64));
    if (!memory) throw std::bad_alloc();
    return Floats32(memory);
}

inline int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// c [rows, columns] (+)= a [rows, depth] b [depth, columns]; rows are multiples of ROWS and columns of WIDTH
template <bool ADD>
void multiply(
    const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
    int64_t columns, int64_t depth
) {
    for (int64_t j = 0; j < columns; j += WIDTH)
        for (int64_t i = 0; i < rows; i += ROWS) {
            Floats sums[ROWS][2];
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < 2; v++) sums[r][v] = ADD ? vector(c + (i + r) * ldc + j + v * W) : Floats{};
            const float* left = a + i * a_row;
            for (int64_t k = 0; k < depth; k++) {
                const Floats first = vector(b + k * ldb + j), second = vector(b + k * ldb + j + W);
                for (int r = 0; r < ROWS; r++) {
                    const float x = left[r * a_row + k * a_depth];
                    sums[r][0] += x * first;
                    sums[r][1] += x * second;
                }
            }
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < 2; v++) std::memcpy(c + (i + r) * ldc + j + v * W, &sums[r][v], sizeof(Floats));
        }
}

template <typename T>
struct Attention {
    const T *q, *k, *v;  // [tokens, heads or kv_heads, head_dim] with gaps between tokens
    int64_t q_stride, k_stride, v_stride;
    T* out;              // [tokens, heads, head_dim]
    float* log_sums;     // [tokens, heads]: of the exponentials of a row of scores
    const T* grad;       // [tokens, heads, head_dim]
    T *grad_q, *grad_k, *grad_v;
    const int64_t *starts, *lengths;  // of the sequences
    int64_t sequences, heads, kv_heads, threads;
};

template <typename T, int D>
inline void widen(const T* from, float* to, float scale) {
    for (int i = 0; i < D; i += 2 * W) {
        const Pair x = load(from + i);
        store(to + i, {x.first * scale, x.second * scale});
    }
}

template <typename T, int D>
inline void narrow(const float* from, T* to, float scale) {
    for (int i = 0; i < D; i += 2 * W) store(to + i, {vector(from + i) * scale, vector(from + i + W) * scale});
}

// One sequence's keys or values of one head: [length, D], and transposed [D, padded]
template <typename T, int D>
void unfold(const T* from, int64_t stride, int64_t length, float* rows, float* columns) {
    const int64_t padded = up(length, WIDTH);
    for (int64_t t = 0; t < length; t++) widen<T, D>(from + t * stride, rows + t * D, 1);
    for (int64_t t = length; t < padded; t++) std::memset(rows + t * D, 0, D * sizeof(float));
    if (columns)
        for (int64_t t = 0; t < padded; t += W)
            for (int d = 0; d < D; d++) {
                Floats x;
                for (int i = 0; i < W; i++) x[i] = rows[(t + i) * D + d];
                std::memcpy(columns + d * padded + t, &x, sizeof x);
            }
}

// Scores of a row of queries at `token` by the keys from `first` on: -inf after the token
inline void cut(float* scores, int64_t token, int64_t first, int64_t columns) {
    for (int64_t n = std::max<int64_t>(token + 1 - first, 0); n < columns; n++)
        scores[n] = -std::numeric_limits<float>::infinity();
}

template <typename T, int D>
struct Block {  // of queries that share a key/value head
    int64_t sequence, head, first, count, rows, padded;

    Block(const Attention<T>& a, int64_t sequence, int64_t head, int64_t number) : sequence(sequence), head(head) {
        const int64_t group = a.heads / a.kv_heads, size = tokens(group);
        first = number * size;
        count = std::min(size, a.lengths[sequence] - first);
        rows = count * group;
        padded = up(rows, ROWS);
    }

    static int64_t tokens(int64_t group) { return std::max<int64_t>(1, QUERIES / group); }

    // where a row of the block is in [tokens, heads]
    int64_t place(const Attention<T>& a, int64_t row) const {
        const int64_t group = a.heads / a.kv_heads;
        return (a.starts[sequence] + first + row / group) * a.heads + head * group + row % group;
    }

    int64_t token(const Attention<T>& a, int64_t row) const { return first + row / (a.heads / a.kv_heads); }

    void queries(const Attention<T>& a, float* to) const {
        const int64_t group = a.heads / a.kv_heads;
        for (int64_t row = 0; row < rows; row++) {
            const T* from = a.q + (a.starts[sequence] + token(a, row)) * a.q_stride + (head * group + row % group) * D;
            widen<T, D>(from, to + row * D, 1 / std::sqrt(float(D)));
        }
        std::memset(to + rows * D, 0, (padded - rows) * D * sizeof(float));
    }
};

template <typename T, int D>
void forward_block(const Attention<T>& a, const Block<T, D>& block, const float* keys, const float* values, float* memory) {
    const int64_t width = up(a.lengths[block.sequence], WIDTH), seen = up(block.first + block.count, WIDTH);
    float *queries = memory, *sums = queries + block.padded * D, *scores = sums + block.padded * D;
    float *most = scores + block.padded * KEYS, *norm = most + block.padded;
    block.queries(a, queries);
    std::memset(sums, 0, block.padded * D * sizeof(float));
    std::fill(most, most + block.rows, -std::numeric_limits<float>::infinity());
    std::fill(norm, norm + block.rows, 0.0f);
    for (int64_t first = 0; first < seen; first += KEYS) {
        const int64_t columns = std::min(KEYS, seen - first);
        multiply<false>(queries, D, 1, keys + first, width, scores, KEYS, block.padded, columns, D);
        for (int64_t row = 0; row < block.rows; row++) {
            float* mine = scores + row * KEYS;
            cut(mine, block.token(a, row), first, columns);
            Floats peaks = vector(mine);
            for (int64_t n = W; n < columns; n += W) peaks = vector(mine + n) > peaks ? vector(mine + n) : peaks;
            float peak = most[row];
            for (int n = 0; n < W; n++) peak = std::max(peak, peaks[n]);
            if (peak > most[row]) {
                const float factor = std::exp(most[row] - peak);
                for (int d = 0; d < D; d++) sums[row * D + d] *= factor;
                norm[row] *= factor;
                most[row] = peak;
            }
            Floats total{};
            for (int64_t n = 0; n < columns; n += W) {
                const Floats weight = exponential(vector(mine + n) - peak);
                std::memcpy(mine + n, &weight, sizeof weight);
                total += weight;
            }
            norm[row] += sum(total);
        }
        multiply<true>(scores, KEYS, 1, values + first * D, D, sums, D, block.padded, D, columns);
    }
    for (int64_t row = 0; row < block.rows; row++) {
        narrow<T, D>(sums + row * D, a.out + block.place(a, row) * D, 1 / norm[row]);
        a.log_sums[block.place(a, row)] = most[row] + std::log(norm[row]);
    }
}

template <typename T, int D>
int64_t scratch(const Attention<T>& a) {
    const int64_t rows = up(Block<T, D>::tokens(a.heads / a.kv_heads) * (a.heads / a.kv_heads), ROWS);
    return up(rows * (3 * D + 2 * KEYS + 2), W);
}

// Where each sequence's share of memory for all of them begins, in units of WIDTH tokens
template <typename T>
std::unique_ptr<int64_t[]> places(const Attention<T>& a) {
    std::unique_ptr<int64_t[]> found(new int64_t[a.sequences + 1]);
    found[0] = 0;
    for (int64_t s = 0; s < a.sequences; s++) found[s + 1] = found[s] + up(a.lengths[s], WIDTH);
    return found;
}

template <typename T, int D>
void forward(const Attention<T>& a) {
    const auto place = places(a);
    const int64_t total = place[a.sequences], pairs = a.sequences * a.kv_heads, size = Block<T, D>::tokens(a.heads / a.kv_heads);
    int64_t longest = 0;
    for (int64_t s = 0; s < a.sequences; s++) longest = std::max(longest, a.lengths[s]);
    const int64_t blocks = (longest + size - 1) / size;
    const Floats32 rows = floats(total * a.kv_heads * D), keys = floats(total * a.kv_heads * D), values = floats(total * a.kv_heads * D);
    const int64_t each = scratch<T, D>(a);
    const Floats32 memory = floats(a.threads * each);
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t pair = 0; pair < pairs; pair++) {
            const int64_t s = pair / a.kv_heads, head = pair % a.kv_heads, at = (place[s] * a.kv_heads + head * up(a.lengths[s], WIDTH)) * D;
            unfold<T, D>(a.k + a.starts[s] * a.k_stride + head * D, a.k_stride, a.lengths[s], rows.get() + at, keys.get() + at);
            unfold<T, D>(a.v + a.starts[s] * a.v_stride + head * D, a.v_stride, a.lengths[s], values.get() + at, nullptr);
        }
        // the longest first, so that no thread is left with one at the end
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < blocks * pairs; task++) {
            const int64_t number = blocks - 1 - task / pairs, pair = task % pairs, s = pair / a.kv_heads, head = pair % a.kv_heads;
            if (number * size >= a.lengths[s]) continue;
            const int64_t at = (place[s] * a.kv_heads + head * up(a.lengths[s], WIDTH)) * D;
            forward_block(a, Block<T, D>(a, s, head, number), keys.get() + at, values.get() + at, memory.get() + omp_get_thread_num() * each);
        }
    }
}

template <typename T, int D>
void backward_block(
    const Attention<T>& a, const Block<T, D>& block, const float* keys, const float* keys_t, const float* values_t,
    float* grad_k, float* grad_v, float* memory
) {
    const int64_t width = up(a.lengths[block.sequence], WIDTH), seen = up(block.first + block.count, WIDTH);
    float *queries = memory, *grads = queries + block.padded * D, *sums = grads + block.padded * D;
    float *weights = sums + block.padded * D, *slopes = weights + block.padded * KEYS, *delta = slopes + block.padded * KEYS;
    block.queries(a, queries);
    std::memset(grads + block.rows * D, 0, (block.padded - block.rows) * D * sizeof(float));
    std::memset(sums, 0, block.padded * D * sizeof(float));
    for (int64_t row = 0; row < block.rows; row++) {
        const int64_t at = block.place(a, row) * D;
        widen<T, D>(a.grad + at, grads + row * D, 1);
        Floats found{};
        for (int d = 0; d < D; d += 2 * W) {
            const Pair x = load(a.out + at + d);
            found += x.first * vector(grads + row * D + d) + x.second * vector(grads + row * D + d + W);
        }
        delta[row] = sum(found);
    }
    for (int64_t first = 0; first < seen; first += KEYS) {
        const int64_t columns = std::min(KEYS, seen - first);
        multiply<false>(queries, D, 1, keys_t + first, width, weights, KEYS, block.padded, columns, D);
        multiply<false>(grads, D, 1, values_t + first, width, slopes, KEYS, block.padded, columns, D);
        for (int64_t row = 0; row < block.rows; row++) {
            float *mine = weights + row * KEYS, *slope = slopes + row * KEYS;
            cut(mine, block.token(a, row), first, columns);
            const float norm = a.log_sums[block.place(a, row)];
            for (int64_t n = 0; n < columns; n += W) {
                const Floats weight = exponential(vector(mine + n) - norm), x = weight * (vector(slope + n) - delta[row]);
                std::memcpy(mine + n, &weight, sizeof weight);
                std::memcpy(slope + n, &x, sizeof x);
            }
        }
        multiply<true>(weights, 1, KEYS, grads, D, grad_v + first * D, D, columns, D, block.rows);
        multiply<true>(slopes, 1, KEYS, queries, D, grad_k + first * D, D, columns, D, block.rows);
        multiply<true>(slopes, KEYS, 1, keys + first * D, D, sums, D, block.padded, D, columns);
    }
    for (int64_t row = 0; row < block.rows; row++)
        narrow<T, D>(sums + row * D, a.grad_q + block.place(a, row) * D, 1 / std::sqrt(float(D)));
}

template <typename T, int D>
void backward(const Attention<T>& a) {
    const auto place = places(a);
    const int64_t total = place[a.sequences] * a.kv_heads * D, pairs = a.sequences * a.kv_heads;
    const int64_t size = Block<T, D>::tokens(a.heads / a.kv_heads);
    // each part of a sequence's blocks adds up gradients of its keys and values in memory of its own
    const int64_t parts = pairs >= 2 * a.threads ? 1 : (2 * a.threads + pairs - 1) / pairs;
    const Floats32 keys = floats(total), keys_t = floats(total), values = floats(total), values_t = floats(total);
    const Floats32 grads = floats(2 * parts * total);
    const int64_t each = scratch<T, D>(a);
    const Floats32 memory = floats(a.threads * each);
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t pair = 0; pair < pairs; pair++) {
            const int64_t s = pair / a.kv_heads, head = pair % a.kv_heads, at = (place[s] * a.kv_heads + head * up(a.lengths[s], WIDTH)) * D;
            unfold<T, D>(a.k + a.starts[s] * a.k_stride + head * D, a.k_stride, a.lengths[s], keys.get() + at, keys_t.get() + at);
            unfold<T, D>(a.v + a.starts[s] * a.v_stride + head * D, a.v_stride, a.lengths[s], values.get() + at, values_t.get() + at);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < parts * pairs; task++) {
            const int64_t part = task % parts, pair = task / parts, s = pair / a.kv_heads, head = pair % a.kv_heads;
            const int64_t at = (place[s] * a.kv_heads + head * up(a.lengths[s], WIDTH)) * D, blocks = (a.lengths[s] + size - 1) / size;
            float *grad_k = grads.get() + part * 2 * total + at, *grad_v = grad_k + total;
            std::memset(grad_k, 0, up(a.lengths[s], WIDTH) * D * sizeof(float));
            std::memset(grad_v, 0, up(a.lengths[s], WIDTH) * D * sizeof(float));
            for (int64_t number = part; number < blocks; number += parts)
                backward_block(
                    a, Block<T, D>(a, s, head, number), keys.get() + at, keys_t.get() + at, values_t.get() + at, grad_k,
                    grad_v, memory.get() + omp_get_thread_num() * each
                );
        }
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < pairs; pair++) {
            const int64_t s = pair / a.kv_heads, head = pair % a.kv_heads, at = (place[s] * a.kv_heads + head * up(a.lengths[s], WIDTH)) * D;
            float *grad_k = grads.get() + at, *grad_v = grad_k + total;
            for (int64_t part = 1; part < parts; part++)
                for (int64_t i = 0; i < a.lengths[s] * D; i++) {
                    grad_k[i] += grad_k[part * 2 * total + i];
                    grad_v[i] += grad_v[part * 2 * total + i];
                }
            for (int64_t t = 0; t < a.lengths[s]; t++) {
                const int64_t to = ((a.starts[s] + t) * a.kv_heads + head) * D;
                narrow<T, D>(grad_k + t * D, a.grad_k + to, 1);
                narrow<T, D>(grad_v + t * D, a.grad_v + to, 1);
            }
        }
    }
}

template <typename T, int D>
void run(const Attention<T>& a) {
    if (a.grad) backward<T, D>(a);
    else forward<T, D>(a);
}

template <typename T>
int attend(const Attention<T>* a, int64_t head_dim) {
    try {
        switch (head_dim) {
            case 32: run<T, 32>(*a); break;
            case 64: run<T, 64>(*a); break;
            case 128: run<T, 128>(*a); break;
            case 256: run<T, 256>(*a); break;
            default: return 1;
        }
    } catch (const std::bad_alloc&) {
        return 2;
    }
    return 0;
}

}  // namespace

extern "C" int attend_float32(const void* a, int64_t head_dim) { return attend((const Attention<float>*)a, head_dim); }
extern "C" int attend_bfloat16(const void* a, int64_t head_dim) { return attend((const Attention<bfloat16>*)a, head_dim); }
