// One token a row, drawn from logits through the inverse of the cumulative distribution, and its log-probability, in one
// go: torch runs a dozen operations for it. Sums are float64. See rollout/draw.py.

#include <vector>

#include "vectors.h"

namespace {

typedef double Doubles __attribute__((vector_size(8 * W)));
constexpr int64_t BLOCK = 16 * W;  // numbers that are summed before it is asked whether the token is among them

struct Draw {
    const float *logits, *allowed;  // [rows, size]: that log-probabilities are of, and that tokens are drawn from
    const double* uniforms;         // [rows]
    int64_t* tokens;                // [rows]; one that is not negative is taken
    float *logps, *norms;  // [rows]: of the tokens, and what is taken from logits to make log-probabilities of them
    int64_t rows, size, uniform_stride;
};

// W numbers from `at` on, and beyond the end what counts for nothing
inline Floats some(const float* from, int64_t at, int64_t size) {
    if (at + W <= size) return vector(from + at);
    Floats x = Floats{} - std::numeric_limits<float>::infinity();
    std::memcpy(&x, from + at, (size - at) * sizeof(float));
    return x;
}

struct Sum {
    float peak;
    double total;  // of the exponentials of logits less the peak
};

// Of one row, and of each of its blocks
Sum sum_up(const float* x, int64_t size, double* shares) {
    Floats most = some(x, 0, size);
    for (int64_t i = W; i < size; i += W) most = some(x, i, size) > most ? some(x, i, size) : most;
    Sum sum = {most[0], 0};
    for (int i = 1; i < W; i++) sum.peak = most[i] > sum.peak ? most[i] : sum.peak;
    for (int64_t first = 0; first < size; first += BLOCK) {
        Doubles sums{};
        for (int64_t i = first; i < first + BLOCK && i < size; i += W)
            sums += __builtin_convertvector(exponential(some(x, i, size) - sum.peak), Doubles);
        double share = 0;
        for (int i = 0; i < W; i++) share += sums[i];
        sum.total += shares[first / BLOCK] = share;
    }
    return sum;
}

// The first token at which the sum of the exponentials exceeds its share of the whole
int64_t pick(const float* x, int64_t size, Sum sum, double uniform, const double* shares) {
    const double goal = uniform * sum.total;
    double before = 0;
    int64_t block = 0, token = 0;
    const int64_t last = (size - 1) / BLOCK;
    while (block < last && !(before + shares[block] > goal)) before += shares[block++];
    while (block > 0 && shares[block] == 0) before -= shares[--block];  // rounding led past the end
    bool found = false;
    for (int64_t i = block * BLOCK; i < (block + 1) * BLOCK && i < size && !found; i += W) {
        const Floats weights = exponential(some(x, i, size) - sum.peak);
        for (int j = 0; j < W && !found; j++)
            if (weights[j] > 0) {  // rounding may lead past the last of them, which is then the one
                token = i + j;
                found = (before += weights[j]) > goal;
            }
    }
    return token;
}

void draw(const Draw& d, int64_t row, double* shares) {
    const float *x = d.logits + row * d.size, *allowed = d.allowed + row * d.size;
    int64_t& token = d.tokens[row];
    Sum sum = sum_up(allowed, d.size, shares);
    if (token < 0) token = pick(allowed, d.size, sum, d.uniforms[row * d.uniform_stride], shares);
    if (allowed != x) sum = sum_up(x, d.size, shares);
    const double norm = sum.peak + std::log(sum.total);
    d.norms[row] = float(norm);
    d.logps[row] = float(x[token] - norm);
}

}  // namespace

extern "C" void draw_float32(const void* given) {
    const Draw& d = *(const Draw*)given;
#pragma omp parallel if (d.rows > 1 && d.rows * d.size > 16384)
    {
        std::vector<double> shares((d.size + BLOCK - 1) / BLOCK);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < d.rows; row++) draw(d, row, shares.data());
    }
}
