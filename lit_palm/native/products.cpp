// Matrix products of float32 or bfloat16 numbers with sums in float32, for processors with AVX-512. See
// models/products.py.
//
// All three products of a layer are C = A B of other views of the same matrices. B is packed into panels of 64 columns,
// A is read as it lies where its rows do, and packed where its columns do; one tile of 6 rows and 64 columns is summed
// in registers (Goto and van de Geijn 2008). What is packed are units of 32 bits: a float32 number, or two bfloat16
// numbers that follow each other in the direction of the sum, of which one instruction adds both products.
//
// The order of a sum depends on its length alone, not on threads or on the other rows.

#ifdef __AVX512F__

#include <omp.h>

#include <algorithm>
#include <new>

#include "units.h"

namespace {

constexpr int ROWS = 6, COLUMNS = 64;  // of a tile
constexpr int BLOCK = 96;              // rows that a thread takes at a time, at most
// Units that are summed at a time, of A as it lies and packed: so many of a panel keep to the L2 cache
constexpr int64_t DEPTH = 512, PACKED_DEPTH = 1024;
constexpr int64_t PITCH = PACKED_DEPTH * ROWS + 16;  // from a packed tile to the next: packing writes past its end
constexpr int64_t LIMIT = int64_t(8) << 20;          // units of B that are packed at a time

inline void put(float* to, __m512i x) { std::memcpy(to, &x, sizeof x); }

inline int64_t pieces(int64_t x, int64_t of) { return (x + of - 1) / of; }

inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

struct Product {
    const void* a;  // [m, k]
    const void* b;  // [k, n]
    void* c;        // [m, n]
    const void* add;  // like C, to be added to it, or null
    int64_t m, n, k;
    int64_t a_row, b_row, c_row;     // numbers from one row in memory to the next, of A and B either way round
    int64_t a_turned, b_turned;      // their columns are what is rows in memory
    int64_t b_wide, c_wide;          // they are float32, whatever A is
    int64_t b_packed;                // it is what `pack_all` wrote
};

// The units of 16 columns, summed over rows in memory
template <typename T, typename S>
inline __m512i across(const S* from, [[maybe_unused]] int64_t row, [[maybe_unused]] bool second, __mmask16 mask) {
#ifdef __AVX512BF16__
    if constexpr (PER<T> == 2)
        return (__m512i)over(halves(from, mask), second ? halves(from + row, mask) : Ints{});
    else
#endif
        return _mm512_maskz_loadu_epi32(mask, from);
}

// 16 units of a row, summed along it
template <typename T, typename S>
inline __m512i along(const S* from, int64_t count) {
#ifdef __AVX512BF16__
    if constexpr (sizeof(T) != sizeof(S))
        return (__m512i)behind(
            (Floats)_mm512_maskz_loadu_ps(first(2 * count), from),
            (Floats)_mm512_maskz_loadu_ps(first(2 * count - 16), from + 16)
        );
    else
#endif
        return _mm512_maskz_loadu_epi32(first(count), from);
}

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

// Units [from, to) of the panel of B that begins at a column, to `panel` [to - from, COLUMNS]
template <typename T, typename S>
void pack(const Product& p, int64_t column, int64_t from, int64_t to, float* panel) {
    const S* b = static_cast<const S*>(p.b);
    if (!p.b_turned) {
        for (int64_t u = from; u < to; u++, panel += COLUMNS)
            for (int j = 0; j < COLUMNS; j += 16)
                put(panel + j, across<T>(b + u * PER<T> * p.b_row + column + j, p.b_row, u * PER<T> + 1 < p.k,
                                         first(p.n - column - j)));
        return;
    }
    for (int j = 0; j < COLUMNS; j += 16)
        for (int64_t u = from; u < to; u += 16) {
            __m512i x[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                x[i] = column + j + i < p.n ? along<T>(b + (column + j + i) * p.b_row + u * PER<T>, to - u) : __m512i{};
            turn(x);
            float* out = panel + (u - from) * COLUMNS + j;
            const int64_t count = std::min<int64_t>(16, to - u);
            for (int i = 0; i < count; i++) put(out + i * COLUMNS, x[i]);
        }
}

// Units [from, to) of the rows of A from `row` on, which are columns in memory: tiles [to - from, ROWS]
template <typename T>
void pack_rows(const Product& p, int64_t row, int64_t rows, int64_t from, int64_t to, float* tiles) {
    const T* a = static_cast<const T*>(p.a);
    // the units of 3 vectors are those of 8 tiles
    const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i at[8];
    for (int t = 0; t < 8; t++) at[t] = (__m512i)(((Ints)count + ROWS * t) & 31);
    for (int64_t u = from; u < to; u++)
        for (int64_t i = 0; i < rows; i += 48) {
            const T* at_row = a + u * PER<T> * p.a_row + row + i;
            __m512i x[3];
#pragma GCC unroll 3
            for (int j = 0; j < 3; j++)
                x[j] = across<T>(at_row + 16 * j, p.a_row, u * PER<T> + 1 < p.k, first(rows - i - 16 * j));
            float* to_tile = tiles + i / ROWS * PITCH + (u - from) * ROWS;
            // what is written past the 6 units is written again with the next ones
#pragma GCC unroll 8
            for (int t = 0; t < 8; t++) {
                // the indices of two vectors go on from the second to the first
                const __m512i low = t < 3 ? x[0] : x[2], high = t < 6 ? x[1] : x[2];
                put(to_tile + t * PITCH, _mm512_permutex2var_epi32(low, at[t], high));
            }
        }
}

struct Tile {
    const float* a;
    int64_t a_row;  // units from one row to the next
    const float* b;
    int64_t depth;
    const float* add;  // [R, COLUMNS] to be added, or null
    int64_t add_row;
    void* to;
    int64_t to_row;
    int64_t columns;  // that are written
    bool wide;        // as float32
    const void* residual;  // like `to`, to be added as well, or null
    const float* ahead;    // what will be multiplied next
};

// R rows of a tile; the next unit of a row of A lies STEP units further
template <typename T, int R, int STEP>
void sum_up(const Tile& t) {
    const float *a = t.a, *b = t.b;
    Floats sums[R][4];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = sums[r][2] = sums[r][3] = Floats{};
    const float* rows[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) rows[r] = a + r * t.a_row;
    // by the time that the sums are there, so is the memory that they go to
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
        for (int j = 0; j < COLUMNS; j += t.wide ? 16 : 32)
            __builtin_prefetch((char*)t.to + (r * t.to_row + j) * (t.wide ? 4 : 2), 1);
    for (int64_t u = 0; u < t.depth; u++, b += COLUMNS) {
        if constexpr (STEP == 1) __builtin_prefetch(t.ahead + u * 16, 0, 2);
        const Floats x0 = vector(b), x1 = vector(b + 16), x2 = vector(b + 32), x3 = vector(b + 48);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const float y = rows[r][u * STEP];
            sums[r][0] = dot<T>(sums[r][0], y, x0);
            sums[r][1] = dot<T>(sums[r][1], y, x1);
            sums[r][2] = dot<T>(sums[r][2], y, x2);
            sums[r][3] = dot<T>(sums[r][3], y, x3);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const __mmask16 mask = first(t.columns - 16 * j);
            __m512 x = (__m512)sums[r][j];
            const int64_t at = r * t.to_row + 16 * j;
            if (t.add) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, t.add + r * t.add_row + 16 * j));
            if (t.wide) {
                if (t.residual) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, (const float*)t.residual + at));
                _mm512_mask_storeu_ps((float*)t.to + at, mask, x);
            }
#ifdef __AVX512BF16__
            else {
                if (t.residual) x += (__m512)(halves((const bfloat16*)t.residual + at, mask) << 16);
                _mm256_mask_storeu_epi16((bfloat16*)t.to + at, mask, (__m256i)_mm512_cvtneps_pbh(x));
            }
#endif
        }
}

template <typename T, int STEP>
void sum_up(const Tile& t, int64_t rows) {
    switch (rows) {
        case 1: return sum_up<T, 1, STEP>(t);
        case 2: return sum_up<T, 2, STEP>(t);
        case 3: return sum_up<T, 3, STEP>(t);
        case 4: return sum_up<T, 4, STEP>(t);
        case 5: return sum_up<T, 5, STEP>(t);
        default: return sum_up<T, 6, STEP>(t);
    }
}

// Rows [row, end) and the columns of a packed panel of B, which begin at `column`
template <typename T>
void by_panel(const Product& p, int64_t row, int64_t end, int64_t column, const float* panel) {
    const int64_t all = pieces(p.k, PER<T>);
    alignas(64) float partial[BLOCK * COLUMNS];
    for (int64_t from = 0; from < all; from += DEPTH, panel += DEPTH * COLUMNS)
        for (int64_t r = row; r < end; r += ROWS) {
            const int64_t at = r * p.c_row + column, depth = std::min(DEPTH, all - from), number = (r - row) / ROWS;
            const bool done = from + DEPTH >= all, wide = !done || p.c_wide;
            float* const sums = partial + (r - row) * COLUMNS;
            const auto place = [&](const void* c) { return (char*)c + at * (wide ? sizeof(float) : sizeof(T)); };
            sum_up<T, 1>(
                {(const float*)p.a + r * p.a_row / PER<T> + from, p.a_row / PER<T>, panel, depth,
                 from ? sums : nullptr, COLUMNS, done ? place(p.c) : (void*)sums, done ? p.c_row : COLUMNS,
                 done ? p.n - column : COLUMNS, wide, done && p.add ? place(p.add) : nullptr,
                 panel + (number < 4 ? depth * (COLUMNS + number * COLUMNS / 4) : 0)},
                std::min<int64_t>(ROWS, end - r)
            );
        }
}

// Rows that are multiplied with a panel at a time, so that they keep to the cache; all blocks of them are as large
template <typename T>
int64_t rows_at_once(const Product& p) {
    const int64_t most = std::clamp<int64_t>(LIMIT / 128 / pieces(p.k, PER<T>), 2 * ROWS, BLOCK);
    return pieces(pieces(p.m, pieces(p.m, most)), ROWS) * ROWS;
}

// A's rows as they lie: of B as many columns as may be packed at a time, for all of the sum
template <typename T, typename S>
void by_rows(const Product& p) {
    const int64_t all = pieces(p.k, PER<T>), rows = rows_at_once<T>(p), blocks = pieces(p.m, rows);
    const int64_t width = std::max<int64_t>(1, std::min(pieces(p.n, COLUMNS), LIMIT / (all * COLUMNS)));  // in panels
    const auto packed = floats(width * all * COLUMNS);
    for (int64_t start = 0; start < p.n; start += width * COLUMNS) {
        const int64_t panels = std::min(width, pieces(p.n - start, COLUMNS)), depths = pieces(all, DEPTH);
        const int64_t groups = std::min(panels, pieces(8 * omp_get_max_threads(), blocks));
        const int64_t group = pieces(panels, groups);
#pragma omp parallel
        {
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < panels * depths; i++) {
                const int64_t panel = i / depths, from = i % depths * DEPTH, to = std::min(all, from + DEPTH);
                pack<T, S>(p, start + panel * COLUMNS, from, to, packed.get() + (panel * all + from) * COLUMNS);
            }
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < blocks * groups; i++) {
                const int64_t row = i / groups * rows, last = std::min(panels, (i % groups + 1) * group);
                for (int64_t panel = i % groups * group; panel < last; panel++)
                    by_panel<T>(p, row, std::min(p.m, row + rows), start + panel * COLUMNS,
                                packed.get() + panel * all * COLUMNS);
            }
        }
    }
}

// All of B as panels, to C
template <typename T, typename S>
void pack_all(const Product& p) {
    const int64_t all = pieces(p.k, PER<T>), panels = pieces(p.n, COLUMNS);
#pragma omp parallel for schedule(dynamic)
    for (int64_t panel = 0; panel < panels; panel++)
        pack<T, S>(p, panel * COLUMNS, 0, all, (float*)p.c + panel * all * COLUMNS);
}

// With B packed: a thread reads panels that follow each other, since reading them takes as long as few rows do
template <typename T>
void by_packed(const Product& p) {
    const int64_t size = pieces(p.k, PER<T>) * COLUMNS, rows = rows_at_once<T>(p), blocks = pieces(p.m, rows);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < pieces(p.n, COLUMNS) * blocks; i++) {
        const int64_t row = i % blocks * rows, panel = i / blocks;
        by_panel<T>(p, row, std::min(p.m, row + rows), panel * COLUMNS, (const float*)p.b + panel * size);
    }
}

// A's rows are columns in memory, and C is float32: a part of the sum at a time, added to C
template <typename T>
void by_columns(const Product& p) {
    const int64_t all = pieces(p.k, PER<T>), step = std::min(all, PACKED_DEPTH);
    const int64_t width = std::max<int64_t>(1, std::min(pieces(p.n, COLUMNS), LIMIT / 4 / (step * COLUMNS)));
    constexpr int64_t OWN = (BLOCK / ROWS * PITCH + 31) / 16 * 16;  // packed rows of a thread
    const auto packed = floats(width * step * COLUMNS), all_tiles = floats(omp_get_max_threads() * OWN);
    for (int64_t start = 0; start < p.n; start += width * COLUMNS) {
        const int64_t panels = std::min(width, pieces(p.n - start, COLUMNS)), blocks = pieces(p.m, BLOCK);
        // few panels would not pay for packing the rows that they are multiplied with
        const int64_t groups = std::min(pieces(panels, 4), pieces(8 * omp_get_max_threads(), blocks));
        const int64_t group = pieces(panels, groups);
#pragma omp parallel
        {
            float* const tiles = all_tiles.get() + omp_get_thread_num() * OWN;
            for (int64_t from = 0; from < all; from += PACKED_DEPTH) {
                const int64_t to = std::min(all, from + PACKED_DEPTH);
#pragma omp for schedule(dynamic)
                for (int64_t panel = 0; panel < panels; panel++)
                    pack<T, T>(p, start + panel * COLUMNS, from, to, packed.get() + panel * step * COLUMNS);
#pragma omp for schedule(dynamic)
                for (int64_t i = 0; i < blocks * groups; i++) {
                    const int64_t row = i / groups * BLOCK, rows = std::min<int64_t>(BLOCK, p.m - row);
                    const int64_t last = std::min(panels, (i % groups + 1) * group);
                    pack_rows<T>(p, row, rows, from, to, tiles);
                    for (int64_t panel = i % groups * group; panel < last; panel++)
                        for (int64_t r = 0; r < rows; r += ROWS) {
                            const int64_t column = start + panel * COLUMNS;
                            float* const c = (float*)p.c + (row + r) * p.c_row + column;
                            sum_up<T, ROWS>(
                                {tiles + r / ROWS * PITCH, 1, packed.get() + panel * step * COLUMNS, to - from,
                                 from ? c : nullptr, p.c_row, c, p.c_row, p.n - column, true, nullptr, nullptr},
                                std::min<int64_t>(ROWS, rows - r)
                            );
                        }
                }
            }
        }
    }
}

// 1 where there is no memory for what is packed
template <typename T>
int multiply(const Product& p) {
    try {
        if (p.a_turned) by_columns<T>(p);
        else if (p.b_packed) by_packed<T>(p);
        else if (p.b_wide) by_rows<T, float>(p);
        else by_rows<T, T>(p);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

template <typename T>
void pack_whole(const Product& p) {
    p.b_wide ? pack_all<T, float>(p) : pack_all<T, T>(p);
}

}  // namespace

extern "C" int product_float32(const void* p) { return multiply<float>(*(const Product*)p); }
extern "C" void pack_float32(const void* p) { pack_whole<float>(*(const Product*)p); }

#ifdef __AVX512BF16__
extern "C" int product_bfloat16(const void* p) { return multiply<bfloat16>(*(const Product*)p); }
extern "C" void pack_bfloat16(const void* p) { pack_whole<bfloat16>(*(const Product*)p); }
#endif

#endif
