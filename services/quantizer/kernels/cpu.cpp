// Fused quantization kernels for CPUs: each reads its input from memory once and writes its output once.
//
// Results equal those of eager.py bit for bit, apart from the order of sums. That takes -ffp-contract=off: a fused
// multiply-add rounds once where two operations round twice.

#include "services/common/kernels/values.h"

namespace {

constexpr int64_t CHUNK = 1 << 15;  // values of a long group that one task takes
constexpr int64_t BATCH = 1 << 12;  // values of short groups that are taken together
constexpr int WIDE = 64;            // groups whose ranges and grids are found at once

template <int W>
struct Ranges {
    float lo[W], hi[W];
    uint32_t top[W];

    MEMBER Ranges() {
        for (int j = 0; j < W; j++) lo[j] = INFINITY, hi[j] = -INFINITY, top[j] = 0;
    }
    MEMBER Range operator[](int j) const { return {lo[j], hi[j], top[j]}; }
};

// Ranges of W columns; a column's values are `stride` apart.
template <int W, class T>
INLINE Ranges<W> measure(const T *x, int64_t rows, int64_t stride) {
    Ranges<W> found;
    for (int64_t r = 0; r < rows; r++, x += stride)
        for (int j = 0; j < W; j++) {
            const float v = load(x + j);
            const uint32_t bits = as<uint32_t>(v) << 1;
            found.lo[j] = least(v, found.lo[j]), found.hi[j] = most(v, found.hi[j]);
            found.top[j] = bits > found.top[j] ? bits : found.top[j];
        }
    return found;
}

// Range of all columns. Their halves are joined as vectors.
template <int W>
INLINE Range joined(const Ranges<W> &all) {
    if constexpr (W == 1) {
        return all[0];
    } else {
        Ranges<W / 2> half;
        for (int j = 0; j < W / 2; j++) {
            const int k = j + W / 2;
            half.lo[j] = least(all.lo[k], all.lo[j]), half.hi[j] = most(all.hi[k], all.hi[j]);
            half.top[j] = all.top[k] > all.top[j] ? all.top[k] : all.top[j];
        }
        return joined(half);
    }
}

// Range of `length` values in a row, W at a time.
template <int W, class T>
INLINE Range measure_row(const T *x, int64_t length) {
    Range all = joined(measure<W>(x, length / W, W));
    if constexpr (W > 1)
        if (length % W) all.join(measure_row<W == WIDE ? 8 : 1>(x + length / W * W, length % W));
    return all;
}

// Ranges of groups, and the grids between their ends.
struct Groups : Ranges<WIDE> {
    float scale[WIDE], zero_point[WIDE];

    template <int W>
    MEMBER void put(int64_t at, const Ranges<W> &found) {
        for (int j = 0; j < W; j++) lo[at + j] = found.lo[j], hi[at + j] = found.hi[j], top[at + j] = found.top[j];
    }
    // Find the grids; return whether all are finite.
    MEMBER bool settle(int64_t count, int bits) {
        int finite = 1;
        for (int64_t j = 0; j < count; j++) {
            const Grid grid = grid_of({lo[j], hi[j], top[j]}, bits);
            scale[j] = grid.scale, zero_point[j] = grid.zero_point, finite &= grid.finite;
        }
        return finite;
    }
};

template <int W, class T>
INLINE void round_columns(const T *__restrict x, T *__restrict y, int64_t rows, int64_t stride, const float *scales,
                          const float *zero_points) {
    float scale[W], zero_point[W];
    for (int j = 0; j < W; j++) scale[j] = scales[j], zero_point[j] = zero_points[j];
    for (int64_t r = 0; r < rows; r++, x += stride, y += stride)
        for (int j = 0; j < W; j++) store(y + j, rounded(load(x + j), scale[j], zero_point[j]));
}

// Codes of W columns, and their gradients. NaN stays NaN.
template <int W>
INLINE void code_columns(const float *__restrict v, float *__restrict q, int64_t rows, int64_t stride,
                         const float *inverses, float lo, float hi) {
    float inverse[W];
    for (int j = 0; j < W; j++) inverse[j] = inverses[j];
    for (int64_t r = 0; r < rows; r++, v += stride, q += stride)
        for (int j = 0; j < W; j++) {
            const float code = std::rint(v[j] * inverse[j]);
            q[j] = least(hi, most(lo, code));
        }
}

template <int W>
INLINE void grad_columns(const float *__restrict g, const float *__restrict v, float *__restrict out, int64_t rows,
                         int64_t stride, const float *inverses, float lo, float hi, double *sums) {
    float inverse[W], sum[W];
    for (int j = 0; j < W; j++) inverse[j] = inverses[j], sum[j] = 0;
    for (int64_t r = 0; r < rows; r++, g += stride, v += stride, out += stride)
        for (int j = 0; j < W; j++) {
            const float scaled = v[j] * inverse[j];
            const float clipped = least(hi, most(lo, scaled));
            const float inside = clipped == scaled ? 1.0f : 0.0f;
            const float error = clipped == scaled ? std::rint(scaled) - scaled : clipped;
            sum[j] += g[j] * error;
            out[j] = g[j] * inverse[j] * inside;
        }
    for (int j = 0; j < W; j++) sums[j] += sum[j];
}

// What is compiled for each instruction set. `width` columns are taken in blocks that fit in registers.
#define IN_BLOCKS(STEP)                                \
    for (; j + LANES <= width; j += LANES) STEP(LANES) \
    for (; j + 16 <= width; j += 16) STEP(16)          \
    for (; j + 8 <= width; j += 8) STEP(8)             \
    for (; j < width; j++) STEP(1)
#define FOR_TYPE(T)                                                                                                \
    CLONES Range range_of_row(const T *x, int64_t length) {                                                        \
        return length < 2 * WIDE ? measure_row<8>(x, length) : measure_row<WIDE>(x, length);                       \
    }                                                                                                              \
    CLONES void rounded_row(const T *__restrict x, T *__restrict y, int64_t length, Grid grid) {                   \
        for (int64_t i = 0; i < length; i++) store(y + i, rounded(load(x + i), grid.scale, grid.zero_point));      \
    }                                                                                                              \
    CLONES bool quantized_rows(const T *x, T *y, int64_t rows, int64_t length, int bits) {                         \
        Groups groups;                                                                                             \
        for (int64_t i = 0; i < rows; i++) {                                                                       \
            const Range range = range_of_row(x + i * length, length);                                              \
            groups.lo[i] = range.lo, groups.hi[i] = range.hi, groups.top[i] = range.top;                           \
        }                                                                                                          \
        const bool finite = groups.settle(rows, bits);                                                             \
        for (int64_t i = 0; i < rows; i++) {                                                                       \
            const Grid grid = {groups.scale[i], groups.zero_point[i], true};                                       \
            rounded_row(x + i * length, y + i * length, length, grid);                                             \
        }                                                                                                          \
        return finite;                                                                                             \
    }                                                                                                              \
    CLONES bool quantized_columns(const T *x, T *y, int64_t rows, int64_t stride, int64_t width, int bits) {       \
        Groups groups;                                                                                             \
        int64_t j = 0;                                                                                             \
        for (; j + WIDE <= width; j += WIDE) MEASURE_STEP(WIDE)                                                    \
        IN_BLOCKS(MEASURE_STEP)                                                                                    \
        const bool finite = groups.settle(width, bits);                                                            \
        j = 0;                                                                                                     \
        for (; j + WIDE <= width; j += WIDE) ROUND_STEP(WIDE)                                                      \
        IN_BLOCKS(ROUND_STEP)                                                                                      \
        return finite;                                                                                             \
    }
#define MEASURE_STEP(W) groups.put(j, measure<W>(x + j, rows, stride));
#define ROUND_STEP(W) round_columns<W>(x + j, y + j, rows, stride, groups.scale + j, groups.zero_point + j);
FOR_TYPE(float)
FOR_TYPE(bfloat16)

CLONES void codes(const float *v, float *q, int64_t rows, int64_t stride, int64_t width, const float *inverses,
                  float lo, float hi) {
    int64_t j = 0;
#define CODES_STEP(W) code_columns<W>(v + j, q + j, rows, stride, inverses + j, lo, hi);
    IN_BLOCKS(CODES_STEP)
}

CLONES void code_grads(const float *g, const float *v, float *out, int64_t rows, int64_t stride, int64_t width,
                       const float *inverses, float lo, float hi, double *sums) {
    int64_t j = 0;
#define GRADS_STEP(W) grad_columns<W>(g + j, v + j, out + j, rows, stride, inverses + j, lo, hi, sums + j);
    IN_BLOCKS(GRADS_STEP)
}

// `outer`·`inner` groups of `length` values that are `inner` apart. Returns whether all ranges are finite.
template <class T>
bool fake_quantize(const T *x, T *y, int64_t outer, int64_t length, int64_t inner, int bits, int threads) {
    bool finite = true;
    if (inner > 1) {
        const int64_t blocks = parts(inner, WIDE);
#pragma omp parallel for num_threads(threads) if (outer * length * inner >= GRAIN) reduction(& : finite)
        for (int64_t i = 0; i < outer * blocks; i++) {
            const int64_t block = i % blocks, at = i / blocks * length * inner + block * WIDE;
            finite &= quantized_columns(x + at, y + at, length, inner, rest(block, WIDE, inner), bits);
        }
    } else if (length < 4 * CHUNK) {
        const int64_t batch = length < BATCH / WIDE ? WIDE : length < BATCH ? BATCH / length : 1;
#pragma omp parallel for num_threads(threads) if (outer * length >= GRAIN) reduction(& : finite)
        for (int64_t k = 0; k < parts(outer, batch); k++) {
            const int64_t at = k * batch * length;
            finite &= quantized_rows(x + at, y + at, rest(k, batch, outer), length, bits);
        }
    } else {
        const int64_t chunks = parts(length, CHUNK);
        for (int64_t i = 0; i < outer; i++, x += length, y += length) {
            Range all;
#pragma omp parallel for num_threads(threads)
            for (int64_t k = 0; k < chunks; k++) {
                const Range range = range_of_row(x + k * CHUNK, rest(k, CHUNK, length));
#pragma omp critical
                all.join(range);
            }
            const Grid grid = grid_of(all, bits);
            finite &= grid.finite;
#pragma omp parallel for num_threads(threads)
            for (int64_t k = 0; k < chunks; k++)
                rounded_row(x + k * CHUNK, y + k * CHUNK, rest(k, CHUNK, length), grid);
        }
    }
    return finite;
}

}  // namespace

// Tensors are outer × channels × inner, dense: inner is H·W in N×C×H×W, and 1 where channels come last.
extern "C" {

int granq_fake_quantize_float32(const float *x, float *y, int64_t outer, int64_t length, int64_t inner, int bits,
                                int threads) {
    return fake_quantize(x, y, outer, length, inner, bits, threads);
}

int granq_fake_quantize_bfloat16(const bfloat16 *x, bfloat16 *y, int64_t outer, int64_t length, int64_t inner,
                                 int bits, int threads) {
    return fake_quantize(x, y, outer, length, inner, bits, threads);
}

void granq_codes(const float *v, const float *inverses, float *q, int64_t outer, int64_t channels, int64_t inner,
                 float lo, float hi, int threads) {
    if (inner == 1) {
#pragma omp parallel for num_threads(threads) if (outer * channels >= GRAIN)
        for (int64_t i = 0; i < parts(outer, ROWS); i++)
            codes(v + i * ROWS * channels, q + i * ROWS * channels, rest(i, ROWS, outer), channels, channels,
                  inverses, lo, hi);
        return;
    }
#pragma omp parallel for num_threads(threads) if (outer * channels * inner >= GRAIN)
    for (int64_t i = 0; i < outer * channels; i++) {
        float inverse[LANES];
        for (float &value : inverse) value = inverses[i % channels];
        const int64_t full = inner / LANES * LANES;
        codes(v + i * inner, q + i * inner, inner / LANES, LANES, LANES, inverse, lo, hi);
        codes(v + i * inner + full, q + i * inner + full, 1, LANES, inner - full, inverse, lo, hi);
    }
}

// Sums of the gradients by ln s of each part of a channel go to `sums`, granq_code_sums() × channels doubles.
int64_t granq_code_sums(int64_t outer, int64_t inner) { return inner == 1 ? parts(outer, ROWS) : outer; }

void granq_codes_backward(const float *g, const float *v, const float *inverses, float *out, double *sums,
                          int64_t outer, int64_t channels, int64_t inner, float lo, float hi, int threads) {
    memset(sums, 0, sizeof(double) * granq_code_sums(outer, inner) * channels);
    if (inner == 1) {
#pragma omp parallel for num_threads(threads) if (outer * channels >= GRAIN)
        for (int64_t i = 0; i < parts(outer, ROWS); i++) {
            const int64_t at = i * ROWS * channels;
            double *into = sums + i * channels;
            code_grads(g + at, v + at, out + at, rest(i, ROWS, outer), channels, channels, inverses, lo, hi, into);
        }
        return;
    }
#pragma omp parallel for num_threads(threads) if (outer * channels * inner >= GRAIN)
    for (int64_t i = 0; i < outer * channels; i++) {
        float inverse[LANES];
        double lanes[LANES] = {};
        for (float &value : inverse) value = inverses[i % channels];
        const int64_t rows = inner / LANES, base = i * inner;
        for (int64_t k = 0; k < parts(rows, ROWS); k++) {
            const int64_t at = base + k * ROWS * LANES;
            code_grads(g + at, v + at, out + at, rest(k, ROWS, rows), LANES, LANES, inverse, lo, hi, lanes);
        }
        const int64_t at = base + rows * LANES;
        code_grads(g + at, v + at, out + at, 1, LANES, inner - rows * LANES, inverse, lo, hi, lanes);
        for (double lane : lanes) sums[i] += lane;
    }
}

}  // extern "C"
