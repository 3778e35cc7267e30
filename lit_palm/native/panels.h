// One product of a matrix whose rows lie in memory with one that is packed into panels of 64 columns: a tile of 6 rows
// and 64 columns is summed in registers (Goto and van de Geijn 2008). What is packed are units of 32 bits: a float32
// number, or two bfloat16 numbers that follow each other in the direction of the sum, of which one instruction adds both
// products.
//
// The order of a sum depends on its length alone, not on threads or on the other rows.

#pragma once

#ifdef __AVX512F__

#include <omp.h>

#include <algorithm>

#include "units.h"

namespace {

constexpr int ROWS = 6, COLUMNS = 64;  // of a tile
constexpr int BLOCK = 96;              // rows that a thread takes at a time, at most
constexpr int64_t DEPTH = 512;         // units that are summed at a time: so many of a panel keep to the L2 cache
constexpr int64_t LIMIT = int64_t(8) << 20;  // units of B that are packed at a time

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

// Rows as they lie times panels that follow each other, of columns from `start` on; by all threads that come here
template <typename T>
void by_panels(const Product& p, int64_t start, int64_t panels, const float* packed) {
    const int64_t size = pieces(p.k, PER<T>) * COLUMNS, rows = rows_at_once<T>(p), blocks = pieces(p.m, rows);
    if (blocks == 1) {  // reading the panels may take as long as all else: each thread reads on
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; panel++)
            by_panel<T>(p, 0, p.m, start + panel * COLUMNS, packed + panel * size);
        return;
    }
    const int64_t groups = std::min(panels, pieces(8 * omp_get_num_threads(), blocks)), group = pieces(panels, groups);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < blocks * groups; i++) {
        const int64_t row = i / groups * rows, last = std::min(panels, (i % groups + 1) * group);
        for (int64_t panel = i % groups * group; panel < last; panel++)
            by_panel<T>(p, row, std::min(p.m, row + rows), start + panel * COLUMNS, packed + panel * size);
    }
}

}  // namespace

#endif
