// silu(gate) * up of rows that hold both at their end, and its backward pass, each in one pass over memory. See
// models/kernels.py.

#include "vectors.h"

namespace {

template <typename T>
struct Swiglu {
    const T* fused;  // [rows, width], of which the last 2 * inner are gate and up
    T* hidden;       // [rows, inner]
    const T* grad;   // [rows, inner] of hidden, or null: the forward pass
    T* grad_fused;   // [rows, width], of which the last 2 * inner are written
    int64_t rows, width, inner;
};

template <typename T>
void run(const Swiglu<T>& s) {
#pragma omp parallel for schedule(static) if (s.rows * s.inner > 16384)
    for (int64_t row = 0; row < s.rows; row++) {
        const T *gate = s.fused + (row + 1) * s.width - 2 * s.inner, *up = gate + s.inner;
        if (!s.grad) {
            T* hidden = s.hidden + row * s.inner;
            for (int64_t i = 0; i < s.inner; i += 2 * W) {
                const Pair x = load(gate + i), y = load(up + i);
                store(hidden + i, {x.first * sigmoid(x.first) * y.first, x.second * sigmoid(x.second) * y.second});
            }
            continue;
        }
        const T* grad = s.grad + row * s.inner;
        T *to_gate = s.grad_fused + (row + 1) * s.width - 2 * s.inner, *to_up = to_gate + s.inner;
        for (int64_t i = 0; i < s.inner; i += 2 * W) {
            const Pair x = load(gate + i), y = load(up + i), g = load(grad + i);
            const Pair c = {sigmoid(x.first), sigmoid(x.second)};
            store(to_up + i, {g.first * x.first * c.first, g.second * x.second * c.second});
            store(
                to_gate + i, {g.first * y.first * c.first * (1.0f + x.first * (1.0f - c.first)),
                              g.second * y.second * c.second * (1.0f + x.second * (1.0f - c.second))}
            );
        }
    }
}

}  // namespace

extern "C" void swiglu_float32(const void* s) { run(*(const Swiglu<float>*)s); }
extern "C" void swiglu_bfloat16(const void* s) { run(*(const Swiglu<bfloat16>*)s); }
