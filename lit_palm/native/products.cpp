// Matrix products of float32 or bfloat16 numbers with sums in float32, for processors with AVX-512. See
// models/products.py.
//
// All three products of a layer are C = A B of other views of the same matrices. B is packed into panels, A is read as it
// lies where its rows do, and packed where its columns do; panels.h multiplies them.

#ifdef __AVX512F__

#include <new>

#include "panels.h"

namespace {

constexpr int64_t PACKED_DEPTH = 1024;               // as DEPTH, where A is packed too
constexpr int64_t PITCH = PACKED_DEPTH * ROWS + 16;  // from a packed tile to the next: packing writes past its end

inline void put(float* to, __m512i x) { std::memcpy(to, &x, sizeof x); }

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

// Of B as many columns as may be packed at a time, for all of the sum
template <typename T, typename S>
void by_rows(const Product& p) {
    const int64_t all = pieces(p.k, PER<T>), depths = pieces(all, DEPTH);
    const int64_t width = std::max<int64_t>(1, std::min(pieces(p.n, COLUMNS), LIMIT / (all * COLUMNS)));  // in panels
    const auto packed = floats(width * all * COLUMNS);
    for (int64_t start = 0; start < p.n; start += width * COLUMNS) {
        const int64_t panels = std::min(width, pieces(p.n - start, COLUMNS));
#pragma omp parallel
        {
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < panels * depths; i++) {
                const int64_t panel = i / depths, from = i % depths * DEPTH, to = std::min(all, from + DEPTH);
                pack<T, S>(p, start + panel * COLUMNS, from, to, packed.get() + (panel * all + from) * COLUMNS);
            }
            by_panels<T>(p, start, panels, packed.get());
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

// With B packed
template <typename T>
void by_packed(const Product& p) {
#pragma omp parallel
    by_panels<T>(p, 0, pieces(p.n, COLUMNS), (const float*)p.b);
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
