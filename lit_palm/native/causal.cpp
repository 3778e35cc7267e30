// Causal attention of sequences that lie one after the other, with its backward pass, for processors: FlashAttention-2
// (Dao 2023). See models/causal.py.
//
// Query heads that share a key/value head are rows of one matrix, and a block of rows is multiplied with blocks of
// keys. Everything between what is read and what is written is float32. A dimension of a head is, below, a place in the
// order that `load` gives: the same for queries, keys, values and their gradients, and undone by `store`.

#include <omp.h>

#include <algorithm>
#include <memory>
#include <new>

#include "units.h"

namespace {

constexpr int ROWS = REGISTERS / 4;  // of what is multiplied in registers
constexpr int WIDTH = 2 * W;         // two vectors of each
constexpr int64_t QUERIES = 96, KEYS = 256;  // of a block
constexpr int64_t PITCH = KEYS + W;          // from a row of scores to the next: a power of two would crowd the cache

inline int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// c [rows, columns] (+)= a [rows, depth] b [depth, columns], the depth in units of T; rows are multiples of ROWS and
// columns of WIDTH. A row of `a` begins A_ROW units after the one before it, and its units lie A_DEPTH apart. Of `b`
// WIDTH columns are together, in rows that are `ldb` units apart, and the next ones `panel` units further.
template <typename T, bool ADD, int A_ROW, int A_DEPTH>
void multiply(
    const float* a, const float* b, int64_t ldb, int64_t panel, float* c, int64_t ldc, int64_t rows, int64_t columns,
    int64_t depth
) {
    for (int64_t j = 0; j < columns; j += WIDTH)
        for (int64_t i = 0; i < rows; i += ROWS) {
            // GCC keeps sums in registers only if each is set by a line of its own
            float* to = c + i * ldc + j;
            const float *left = a + i * A_ROW, *right = b + j / WIDTH * panel;
            Floats sums[ROWS][2];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                sums[r][0] = ADD ? vector(to + r * ldc) : dot<T>(Floats{}, left[r * A_ROW], vector(right));
                sums[r][1] = ADD ? vector(to + r * ldc + W) : dot<T>(Floats{}, left[r * A_ROW], vector(right + W));
            }
            for (int64_t k = ADD ? 0 : 1; k < depth; k++) {
                const Floats first = vector(right + k * ldb), second = vector(right + k * ldb + W);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const float x = left[r * A_ROW + k * A_DEPTH];
                    sums[r][0] = dot<T>(sums[r][0], x, first);
                    sums[r][1] = dot<T>(sums[r][1], x, second);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) store(to + r * ldc, {sums[r][0], sums[r][1]});
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

// A row as units
template <typename T, int D>
inline void along(const T* from, float* to) {
    if constexpr (PER<T> == 2)
        std::memcpy(to, from, D * sizeof(T));
    else
        for (int i = 0; i < D; i += 2 * W) store(to + i, load(from + i));
}

// One row, or as many as a unit has numbers of which the second may be missing, as units over rows
template <typename T, int D>
inline void across(const T* from, [[maybe_unused]] const T* second, float* to) {
#ifdef __AVX512BF16__
    if constexpr (PER<T> == 2) {
        for (int i = 0; i < D; i += W) {
            const Floats x = over(halves(from + i), second ? halves(second + i) : Ints{});
            std::memcpy(to + i, &x, sizeof x);
        }
        return;
    }
#endif
    along<T, D>(from, to);
}

// Two vectors of a row as units
template <typename T>
inline void store_units(float* to, Floats first, Floats second) {
#ifdef __AVX512BF16__
    if constexpr (PER<T> == 2) {
        const Floats units = behind(first, second);
        std::memcpy(to, &units, sizeof units);
        return;
    }
#endif
    store(to, {first, second});
}

template <typename T, int D>
inline void narrow(const float* from, T* to, float scale) {
    for (int i = 0; i < D; i += 2 * W) {
        const Pair x = {vector(from + i) * scale, vector(from + i + W) * scale};
        if constexpr (PER<T> == 2)
            store_units<T>((float*)(to + i), x.first, x.second);
        else
            store(to + i, x);
    }
}

// Two vectors of each of a unit's rows as units over rows
template <typename T>
inline void store_over(float* to, const Floats (&x)[PER<T>][2]) {
#ifdef __AVX512BF16__
    if constexpr (PER<T> == 2) {
        store(to, {over(halves(x[0][0]), halves(x[1][0])), over(halves(x[0][1]), halves(x[1][1]))});
        return;
    }
#endif
    store(to, {x[0][0], x[0][1]});
}

// One sequence's keys or values of one head, by columns of which WIDTH are together: as units over tokens
// [D / WIDTH, padded / PER, WIDTH], and transposed, as units over dimensions [padded / WIDTH, D / PER, WIDTH]
template <typename T, int D>
void unfold(const T* from, int64_t stride, int64_t length, float* rows, float* columns) {
    const int64_t padded = up(length, WIDTH), units = padded / PER<T>;
    if (rows)
        for (int d = 0; d < D; d += WIDTH) {
            float* to = rows + d * units;
            const int64_t count = up(length, PER<T>) / PER<T>;
            for (int64_t u = 0; u < count; u++) {
                const T* token = from + u * PER<T> * stride + d;
                across<T, WIDTH>(token, u * PER<T> + 1 < length ? token + stride : nullptr, to + u * WIDTH);
            }
            std::fill(to + count * WIDTH, to + units * WIDTH, 0.0f);
        }
    if (columns)
        for (int64_t t = 0; t < padded; t++) {
            float token[D] = {};
            if (t < length) along<T, D>(from + t * stride, token);
            for (int u = 0; u < D / PER<T>; u++)
                columns[(t / WIDTH * D / PER<T> + u) * WIDTH + t % WIDTH] = token[u];
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

    // rows of queries or of gradients as units, and where `over_rows` is, as units over rows
    void take(const Attention<T>& a, const T* all, int64_t stride, float* to, float* over_rows = nullptr) const {
        const int64_t group = a.heads / a.kv_heads;
        const auto from = [&](int64_t row) {
            return all + (a.starts[sequence] + token(a, row)) * stride + (head * group + row % group) * D;
        };
        for (int64_t row = 0; row < rows; row++) along<T, D>(from(row), to + row * D / PER<T>);
        std::fill(to + rows * D / PER<T>, to + padded * D / PER<T>, 0.0f);
        if (!over_rows || PER<T> == 1) return;
        for (int64_t row = 0; row < rows; row += PER<T>)
            across<T, D>(from(row), row + 1 < rows ? from(row + 1) : nullptr, over_rows + row / PER<T> * D);
    }
};

template <typename T, int D>
void forward_block(
    const Attention<T>& a, const Block<T, D>& block, const float* keys, const float* values, float* memory
) {
    constexpr int UNITS = D / PER<T>;
    const int64_t width = up(a.lengths[block.sequence], WIDTH), seen = up(block.first + block.count, WIDTH);
    float *queries = memory, *sums = queries + block.padded * D, *scores = sums + block.padded * D;
    float *most = scores + block.padded * PITCH, *norm = most + block.padded;
    const float scale = 1 / std::sqrt(float(D));
    block.take(a, a.q, a.q_stride, queries);
    std::memset(sums, 0, block.padded * D * sizeof(float));
    std::fill(most, most + block.rows, -std::numeric_limits<float>::infinity());
    std::fill(norm, norm + block.rows, 0.0f);
    for (int64_t first = 0; first < seen; first += KEYS) {
        const int64_t columns = std::min(KEYS, seen - first);
        multiply<T, false, UNITS, 1>(
            queries, keys + first * UNITS, WIDTH, UNITS * WIDTH, scores, PITCH, block.padded, columns, UNITS
        );
        for (int64_t row = 0; row < block.rows; row++) {
            float* mine = scores + row * PITCH;
            cut(mine, block.token(a, row), first, columns);
            Floats peaks = vector(mine);
            for (int64_t n = W; n < columns; n += W) peaks = vector(mine + n) > peaks ? vector(mine + n) : peaks;
            float peak = most[row];
            for (int n = 0; n < W; n++) peak = std::max(peak, peaks[n] * scale);
            if (peak > most[row]) {
                const float factor = std::exp(most[row] - peak);
                for (int d = 0; d < D; d++) sums[row * D + d] *= factor;
                norm[row] *= factor;
                most[row] = peak;
            }
            Floats total{};
            for (int64_t n = 0; n < columns; n += 2 * W) {
                const Floats x = exponential(vector(mine + n) * scale - peak);
                const Floats y = exponential(vector(mine + n + W) * scale - peak);
                total += x + y;
                store_units<T>(mine + n / PER<T>, x, y);
            }
            norm[row] += sum(total);
        }
        multiply<T, true, PITCH, 1>(
            scores, values + first / PER<T> * WIDTH, WIDTH, width / PER<T> * WIDTH, sums, D, block.padded, D,
            columns / PER<T>
        );
    }
    for (int64_t row = 0; row < block.rows; row++) {
        narrow<T, D>(sums + row * D, a.out + block.place(a, row) * D, 1 / norm[row]);
        a.log_sums[block.place(a, row)] = most[row] + std::log(norm[row]);
    }
}

// A sequence and a key/value head, and where its keys are in memory for all of them
struct Share {
    int64_t sequence, head, at;
};

template <typename T, int D>
struct Shares {
    const Attention<T>& a;
    std::unique_ptr<int64_t[]> begins;  // of each sequence, in tokens; each has whole vectors
    int64_t count, size;                // of shares; numbers in all

    explicit Shares(const Attention<T>& a)
        : a(a), begins(new int64_t[a.sequences + 1]), count(a.sequences * a.kv_heads) {
        begins[0] = 0;
        for (int64_t s = 0; s < a.sequences; s++) begins[s + 1] = begins[s] + up(a.lengths[s], WIDTH);
        size = begins[a.sequences] * a.kv_heads * D;
    }

    Share operator[](int64_t number) const {
        const int64_t s = number / a.kv_heads, head = number % a.kv_heads;
        return {s, head, (begins[s] * a.kv_heads + head * (begins[s + 1] - begins[s])) * D};
    }

    // keys or values of a share to memory for all of them, or to none
    void take(const Share& share, const T* all, int64_t stride, float* rows, float* columns) const {
        const T* from = all + a.starts[share.sequence] * stride + share.head * D;
        if (rows) rows += share.at;
        if (columns) columns += share.at;
        unfold<T, D>(from, stride, a.lengths[share.sequence], rows, columns);
    }

    // what a thread needs for a block
    int64_t scratch() const {
        const int64_t group = a.heads / a.kv_heads, rows = up(Block<T, D>::tokens(group) * group, ROWS);
        return up(rows * (5 * D + 3 * PITCH + 2), W);
    }
};

template <typename T, int D>
void forward(const Attention<T>& a) {
    const Shares<T, D> shares(a);
    const Floats32 keys = floats(shares.size), values = floats(shares.size);
    const int64_t each = shares.scratch(), size = Block<T, D>::tokens(a.heads / a.kv_heads);
    const Floats32 memory = floats(a.threads * each);
    const int64_t blocks = (*std::max_element(a.lengths, a.lengths + a.sequences) + size - 1) / size;
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < shares.count; i++) {
            shares.take(shares[i], a.k, a.k_stride, nullptr, keys.get());
            shares.take(shares[i], a.v, a.v_stride, values.get(), nullptr);
        }
        // the longest first, so that no thread is left with one at the end
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < blocks * shares.count; task++) {
            const int64_t number = blocks - 1 - task / shares.count;
            const Share share = shares[task % shares.count];
            if (number * size >= a.lengths[share.sequence]) continue;
            const Block<T, D> block(a, share.sequence, share.head, number);
            float* mine = memory.get() + omp_get_thread_num() * each;
            forward_block(a, block, keys.get() + share.at, values.get() + share.at, mine);
        }
    }
}

template <typename T, int D>
void backward_block(
    const Attention<T>& a, const Block<T, D>& block, const float* keys, const float* keys_t, const float* values_t,
    float* grad_k, float* grad_v, float* memory
) {
    constexpr int UNITS = D / PER<T>;
    const float scale = 1 / std::sqrt(float(D));
    const int64_t width = up(a.lengths[block.sequence], WIDTH), seen = up(block.first + block.count, WIDTH);
    float *queries = memory, *grads = queries + block.padded * D, *sums = grads + block.padded * D;
    float *weights = sums + block.padded * D, *slopes = weights + block.padded * PITCH;
    float *along_keys = slopes + block.padded * PITCH, *delta = along_keys + block.padded * PITCH;
    float *norm = delta + block.padded, *queries_over = norm + block.padded;
    float* grads_over = queries_over + block.padded * D;
    if (PER<T> == 1) along_keys = slopes, queries_over = queries, grads_over = grads;  // units of one are the same
    block.take(a, a.q, a.q_stride, queries, queries_over);
    block.take(a, a.grad, a.heads * D, grads, grads_over);
    std::fill(sums, sums + block.padded * D, 0.0f);
    for (int64_t row = 0; row < block.padded; row++) {
        delta[row] = 0, norm[row] = std::numeric_limits<float>::infinity();  // a row that is none weighs nothing
        if (row >= block.rows) continue;
        const int64_t at = block.place(a, row);
        Floats found{};
        for (int d = 0; d < D; d += 2 * W) {
            const Pair x = load(a.out + at * D + d), y = load(a.grad + at * D + d);
            found += x.first * y.first + x.second * y.second;
        }
        delta[row] = sum(found), norm[row] = a.log_sums[at];
    }
    for (int64_t first = 0; first < seen; first += KEYS) {
        const int64_t columns = std::min(KEYS, seen - first), rows = up(block.rows, PER<T>);
        multiply<T, false, UNITS, 1>(
            queries, keys_t + first * UNITS, WIDTH, UNITS * WIDTH, weights, PITCH, block.padded, columns, UNITS
        );
        multiply<T, false, UNITS, 1>(
            grads, values_t + first * UNITS, WIDTH, UNITS * WIDTH, slopes, PITCH, block.padded, columns, UNITS
        );
        for (int64_t row = 0; row < rows; row += PER<T>) {
            float *mine = weights + row * PITCH, *slope = slopes + row * PITCH;
            for (int r = 0; r < PER<T>; r++) cut(mine + r * PITCH, block.token(a, row + r), first, columns);
            for (int64_t n = 0; n < columns; n += 2 * W) {
                Floats weight[PER<T>][2], x[PER<T>][2];
                for (int r = 0; r < PER<T>; r++)
                    for (int j = 0; j < 2; j++) {
                        const int64_t at = r * PITCH + n + j * W;
                        weight[r][j] = exponential(vector(mine + at) * scale - norm[row + r]);
                        x[r][j] = weight[r][j] * (vector(slope + at) - delta[row + r]);
                    }
                store_over<T>(mine + n, weight);
                store_over<T>(slope + n, x);
                if (PER<T> > 1)
                    for (int r = 0; r < PER<T>; r++)
                        store_units<T>(along_keys + (row + r) * PITCH + n / PER<T>, x[r][0], x[r][1]);
            }
        }
        constexpr int OVER = PER<T> * PITCH;  // units over rows are where the first of these was
        multiply<T, true, 1, OVER>(weights, grads_over, D, WIDTH, grad_v + first * D, D, columns, D, rows / PER<T>);
        multiply<T, true, 1, OVER>(slopes, queries_over, D, WIDTH, grad_k + first * D, D, columns, D, rows / PER<T>);
        multiply<T, true, PITCH, 1>(
            along_keys, keys + first / PER<T> * WIDTH, WIDTH, width / PER<T> * WIDTH, sums, D, block.padded, D,
            columns / PER<T>
        );
    }
    for (int64_t row = 0; row < block.rows; row++)
        narrow<T, D>(sums + row * D, a.grad_q + block.place(a, row) * D, scale);
}

template <typename T, int D>
void backward(const Attention<T>& a) {
    const Shares<T, D> shares(a);
    const int64_t size = Block<T, D>::tokens(a.heads / a.kv_heads), each = shares.scratch(), all = shares.size;
    // each part of a sequence's blocks adds up gradients of its keys and values in memory of its own
    const int64_t parts = shares.count >= 2 * a.threads ? 1 : (2 * a.threads + shares.count - 1) / shares.count;
    const Floats32 keys = floats(all), keys_t = floats(all), values_t = floats(all);
    const Floats32 grads_k = floats(parts * all), grads_v = floats(parts * all), memory = floats(a.threads * each);
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < shares.count; i++) {
            shares.take(shares[i], a.k, a.k_stride, keys.get(), keys_t.get());
            shares.take(shares[i], a.v, a.v_stride, nullptr, values_t.get());
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < parts * shares.count; task++) {
            const int64_t part = task % parts;
            const Share share = shares[task / parts];
            const int64_t length = a.lengths[share.sequence];
            float *grad_k = grads_k.get() + part * all + share.at, *grad_v = grads_v.get() + part * all + share.at;
            std::fill(grad_k, grad_k + up(length, WIDTH) * D, 0.0f);
            std::fill(grad_v, grad_v + up(length, WIDTH) * D, 0.0f);
            for (int64_t number = part; number * size < length; number += parts) {
                const Block<T, D> block(a, share.sequence, share.head, number);
                float* mine = memory.get() + omp_get_thread_num() * each;
                const int64_t at = share.at;
                backward_block(a, block, keys.get() + at, keys_t.get() + at, values_t.get() + at, grad_k, grad_v, mine);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < shares.count; i++) {
            const Share share = shares[i];
            const int64_t length = a.lengths[share.sequence];
            float *grad_k = grads_k.get() + share.at, *grad_v = grads_v.get() + share.at;
            for (int64_t part = 1; part < parts; part++)
                for (int64_t n = 0; n < length * D; n++) {
                    grad_k[n] += grad_k[part * all + n];
                    grad_v[n] += grad_v[part * all + n];
                }
            for (int64_t t = 0; t < length; t++) {
                const int64_t to = ((a.starts[share.sequence] + t) * a.kv_heads + share.head) * D;
                narrow<T, D>(grad_k + t * D, a.grad_k + to, 1 / std::sqrt(float(D)));
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

extern "C" int attend_float32(const void* a, int64_t head_dim) {
    return attend((const Attention<float>*)a, head_dim);
}

extern "C" int attend_bfloat16(const void* a, int64_t head_dim) {
    return attend((const Attention<bfloat16>*)a, head_dim);
}
