// Rotary positions of heads, or their gradient, in one pass over memory. See models/rope_native.py.

#include "vectors.h"

namespace {

template <typename T>
struct Rope {
    const T* from;  // [rows, heads, head_dim], with gaps between rows
    T* to;          // the same, with gaps of its own
    const float *cos, *sin;  // [tables, head_dim], the rows' again and again
    int64_t from_row, to_row, rows, heads, head_dim, tables, back;
};

template <typename T>
void run(const Rope<T>& r) {
    const int64_t half = r.head_dim / 2;
#pragma omp parallel for schedule(static) if (r.rows * r.heads * r.head_dim > 16384)
    for (int64_t row = 0; row < r.rows; row++) {
        const float *cos = r.cos + row % r.tables * r.head_dim, *sin = r.sin + row % r.tables * r.head_dim;
        // y_i = cos_i x_i + sin_i x_j of the pair i, j; a gradient goes back the way that its number came
        const float *first = r.back ? sin + half : sin, *second = r.back ? sin : sin + half;
        for (int64_t head = 0; head < r.heads; head++) {
            const T *x = r.from + row * r.from_row + head * r.head_dim, *other = x + half;
            T *y = r.to + row * r.to_row + head * r.head_dim, *to_other = y + half;
#pragma GCC ivdep
            for (int64_t i = 0; i < half; i++) {
                const float a = number(x + i), b = number(other + i);
                store(y + i, a * cos[i] + b * first[i]);
                store(to_other + i, b * cos[half + i] + a * second[i]);
            }
        }
    }
}

}  // namespace

extern "C" void rope_float32(const void* r) { run(*(const Rope<float>*)r); }
extern "C" void rope_bfloat16(const void* r) { run(*(const Rope<bfloat16>*)r); }
