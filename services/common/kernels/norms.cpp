// BatchNorm with frozen statistics, the addition of a shortcut, ReLU and fake quantization in one kernel, and all their
// gradients in another. Tensors are N×H×W×C in memory, so that a row holds a value of each channel.
//
//     z = a·x + b  [+ s or a'·s + b']      y = min(max(z, 0), cap), then perhaps on the grid of its sample and channel
//
// In float32 results equal those of PyTorch bit for bit, apart from the order of sums. Its BatchNorm rounds a·x + b once
// where the processor can, and so does this; all else rounds at each step, which takes -ffp-contract=off.

#include "services/common/kernels/values.h"

// What is summed before the ReLU: a tensor, and the BatchNorm behind it. Floats are C each.
struct Branch {
    const void *x;                                    // null: there is no such branch
    const float *inverse, *mean, *weight, *bias;      // of the BatchNorm, 1/√(σ² + ε) first; null: x is added as it is
    float *batch_mean, *batch_variance;               // of x; written forward, read backward
    const float *by_batch_mean, *by_batch_variance;   // gradients; null: there are none
    void *gradient;                                   // by x
};

namespace {

enum Kind { ALONE, PLAIN, AFFINE };  // what the second branch is

INLINE Kind kind_of(const Branch &second) { return !second.x ? ALONE : second.inverse ? AFFINE : PLAIN; }
// So many rows of all channels that they stay in the cache while channels are taken in turn.
INLINE int64_t rows_of_part(int64_t channels) { return channels < 256 ? 256 / channels * ROWS : ROWS; }

// Slope and shift of some channels of a branch, and the gradient by x that its batch statistics add: k·x + d.
struct Line { float slope[LANES], shift[LANES], k[LANES], d[LANES]; };

INLINE Line line_of(const Branch &branch, int64_t channel, int width, int64_t count = 0) {
    Line line;
    for (int j = 0; j < width; j++) {
        const int64_t c = channel + j;
        line.slope[j] = branch.inverse[c] * branch.weight[c];
        line.shift[j] = __builtin_fmaf(-branch.mean[c], line.slope[j], branch.bias[c]);
        line.k[j] = branch.by_batch_variance ? branch.by_batch_variance[c] * (2.0f / float(count)) : 0;
        line.d[j] = branch.by_batch_mean
            ? branch.by_batch_mean[c] / float(count) - line.k[j] * branch.batch_mean[c] : 0;
    }
    return line;
}

// z of one value. ReLU and its cap let NaN through, as PyTorch's do.
INLINE float sum(Kind kind, float x, float s, const Line &first, const Line &second, int j) {
    const float z = __builtin_fmaf(x, first.slope[j], first.shift[j]);
    return kind == ALONE ? z : kind == PLAIN ? z + s : z + __builtin_fmaf(s, second.slope[j], second.shift[j]);
}
INLINE float clipped(float z, float cap) {
    z = z < 0 ? 0 : z;
    return z > cap ? cap : z;
}

// `rows` values of `width` channels; `at` is where the first is.
template <class T>
INLINE bool quantize(const Branch &one, const Branch &two, T *y, int64_t at, int64_t channel, int64_t rows,
                     int64_t channels, float cap, int bits, Kind kind, int width) {
    const T *x = static_cast<const T *>(one.x) + at, *s = kind == ALONE ? x : static_cast<const T *>(two.x) + at;
    const Line first = line_of(one, channel, width), second = line_of(kind == AFFINE ? two : one, channel, width);
    float lo[LANES], hi[LANES], scale[LANES], zero_point[LANES];
    uint32_t top[LANES];
    for (int j = 0; j < width; j++) lo[j] = INFINITY, hi[j] = -INFINITY, top[j] = 0;
    for (int64_t i = 0; i < rows * channels; i += channels)
        for (int j = 0; j < width; j++) {
            const float v = clipped(sum(kind, load(x + i + j), load(s + i + j), first, second, j), cap);
            const uint32_t magnitude = as<uint32_t>(v) << 1;
            lo[j] = least(v, lo[j]), hi[j] = most(v, hi[j]);
            top[j] = magnitude > top[j] ? magnitude : top[j];
        }
    bool finite = true;
    for (int j = 0; j < width; j++) {
        Range range;
        range.lo = lo[j], range.hi = hi[j], range.top = top[j];
        const Grid grid = grid_of(range, bits);
        scale[j] = grid.scale, zero_point[j] = grid.zero_point, finite &= grid.finite;
    }
    y += at;
    for (int64_t i = 0; i < rows * channels; i += channels)
        for (int j = 0; j < width; j++) {
            const float v = clipped(sum(kind, load(x + i + j), load(s + i + j), first, second, j), cap);
            store(y + i + j, rounded(v, scale[j], zero_point[j]));
        }
    return finite;
}

// Also adds x − origin and its square to `sums`, 4 × C: of the first branch, and of the second where it is AFFINE.
// An origin within the values keeps the difference of squares exact.
template <class T>
INLINE void pass(const Branch &one, const Branch &two, T *y, int64_t at, int64_t channel, int64_t rows,
                 int64_t channels, float cap, double *sums, const float *origins, Kind kind, int width) {
    const T *x = static_cast<const T *>(one.x) + at, *s = kind == ALONE ? x : static_cast<const T *>(two.x) + at;
    const Line first = line_of(one, channel, width), second = line_of(kind == AFFINE ? two : one, channel, width);
    float total[4][LANES], origin[2][LANES];
    for (int j = 0; j < width; j++)
        origin[0][j] = origins[channel + j], origin[1][j] = origins[channels + channel + j];
    y += at;
    for (int64_t begin = 0; begin < rows; begin += ROWS) {
        const int64_t end = (begin + ROWS < rows ? begin + ROWS : rows) * channels;
        for (int j = 0; j < width; j++) total[0][j] = total[1][j] = total[2][j] = total[3][j] = 0;
        for (int64_t i = begin * channels; i < end; i += channels)
            for (int j = 0; j < width; j++) {
                const float u = load(x + i + j), v = load(s + i + j);
                store(y + i + j, clipped(sum(kind, u, v, first, second, j), cap));
                total[0][j] += u - origin[0][j], total[1][j] += (u - origin[0][j]) * (u - origin[0][j]);
                if (kind == AFFINE)
                    total[2][j] += v - origin[1][j], total[3][j] += (v - origin[1][j]) * (v - origin[1][j]);
            }
        for (int t = 0; t < (kind == AFFINE ? 4 : 2); t++)
            for (int j = 0; j < width; j++) sums[t * channels + channel + j] += total[t][j];
    }
}

// Gradients, and sums for those of the affines: of g, g·(x − mean) and g·(s − mean') of what passes the ReLU.
template <class T>
INLINE void differentiate(const Branch &one, const Branch &two, const T *g, const T *h, int64_t at, int64_t channel,
                          int64_t rows, int64_t channels, int64_t count, float cap, double *sums, Kind kind, int width) {
    const T *x = static_cast<const T *>(one.x) + at, *s = kind == ALONE ? x : static_cast<const T *>(two.x) + at;
    T *by_x = static_cast<T *>(one.gradient) + at, *by_s = kind == ALONE ? by_x : static_cast<T *>(two.gradient) + at;
    const Line first = line_of(one, channel, width, count);
    const Line second = line_of(kind == AFFINE ? two : one, channel, width, count);
    float total[3][LANES], mean[2][LANES];
    for (int j = 0; j < width; j++)
        mean[0][j] = one.mean[channel + j], mean[1][j] = kind == AFFINE ? two.mean[channel + j] : 0;
    g += at, h += h ? at : 0;
    for (int64_t begin = 0; begin < rows; begin += ROWS) {
        const int64_t end = (begin + ROWS < rows ? begin + ROWS : rows) * channels;
        for (int j = 0; j < width; j++) total[0][j] = total[1][j] = total[2][j] = 0;
        for (int64_t i = begin * channels; i < end; i += channels) {
            float gradient[LANES];
            for (int j = 0; j < width; j++) gradient[j] = load(g + i + j);
            if (h)
                for (int j = 0; j < width; j++) gradient[j] += load(h + i + j);
            for (int j = 0; j < width; j++) {
                const float u = load(x + i + j), v = load(s + i + j);
                const float z = sum(kind, u, v, first, second, j);
                const float through = (z > 0) & (z < cap) ? gradient[j] : 0.0f;
                total[0][j] += through, total[1][j] += through * (u - mean[0][j]);
                store(by_x + i + j, through * first.slope[j] + (first.k[j] * u + first.d[j]));
                if (kind == PLAIN) store(by_s + i + j, through);
                if (kind == AFFINE) {
                    total[2][j] += through * (v - mean[1][j]);
                    store(by_s + i + j, through * second.slope[j] + (second.k[j] * v + second.d[j]));
                }
            }
        }
        for (int t = 0; t < 3; t++)
            for (int j = 0; j < width; j++) sums[t * channels + channel + j] += total[t][j];
    }
}

// Channels in blocks that fit in registers, and the second branch known when it is compiled.
#define EACH_BLOCK(CALL, ...)                                                                      \
    int64_t c = 0;                                                                                 \
    for (; c + LANES <= channels; c += LANES) CALL(__VA_ARGS__, LANES);                            \
    for (; c + 16 <= channels; c += 16) CALL(__VA_ARGS__, 16);                                     \
    for (; c + 8 <= channels; c += 8) CALL(__VA_ARGS__, 8);                                        \
    if (c < channels) CALL(__VA_ARGS__, int(channels - c));
#define EACH_KIND(BODY)            \
    switch (kind_of(two)) {        \
        case ALONE: BODY(ALONE)    \
        case PLAIN: BODY(PLAIN)    \
        case AFFINE: BODY(AFFINE)  \
    }
#define QUANTIZE(KIND) { EACH_BLOCK(finite &= quantize, one, two, y, at + c, c, rows, channels, cap, bits, KIND) break; }
#define PASS(KIND) { EACH_BLOCK(pass, one, two, y, at + c, c, rows, channels, cap, sums, origins, KIND) break; }
#define DIFFERENTIATE(KIND) \
    { EACH_BLOCK(differentiate, one, two, g, h, at + c, c, rows, channels, count, cap, sums, KIND) break; }
#define FOR_TYPE(T)                                                                                                \
    CLONES bool quantize_part(const Branch &one, const Branch &two, T *y, int64_t at, int64_t rows,                \
                              int64_t channels, float cap, int bits) {                                             \
        bool finite = true;                                                                                        \
        EACH_KIND(QUANTIZE)                                                                                        \
        return finite;                                                                                             \
    }                                                                                                              \
    CLONES void pass_part(const Branch &one, const Branch &two, T *y, int64_t at, int64_t rows, int64_t channels,  \
                          float cap, double *sums, const float *origins) {                                         \
        EACH_KIND(PASS)                                                                                            \
    }                                                                                                              \
    CLONES void differentiate_part(const Branch &one, const Branch &two, const T *g, const T *h, int64_t at,       \
                                   int64_t rows, int64_t channels, int64_t count, float cap, double *sums) {       \
        EACH_KIND(DIFFERENTIATE)                                                                                   \
    }
FOR_TYPE(float)
FOR_TYPE(bfloat16)

template <class T>
void origin_of(const Branch &branch, int64_t rows, int64_t channels, float *origin) {
    const int64_t few = rows < ROWS ? rows : ROWS;
    for (int64_t c = 0; c < channels; c++) origin[c] = 0;
    for (int64_t r = 0; r < few; r++)
        for (int64_t c = 0; c < channels; c++)
            origin[c] += load(static_cast<const T *>(branch.x) + r * channels + c) / float(few);
}

void moments(const Branch &branch, const double *sums, const float *origin, int64_t rows, int64_t channels) {
    for (int64_t c = 0; c < channels; c++) {
        const double offset = sums[c] / double(rows), square = sums[channels + c] / double(rows) - offset * offset;
        branch.batch_mean[c] = float(origin[c] + offset);
        branch.batch_variance[c] = square > 0 ? float(square) : 0;
    }
}

template <class T>
bool forward(const Branch &one, const Branch &two, T *y, float *origins, int64_t samples, int64_t pixels,
             int64_t channels, float cap, int bits, int threads) {
    const int64_t rows = samples * pixels, size = rows_of_part(channels), count = parts(rows, size);
    bool finite = true;
    if (bits) {
#pragma omp parallel for num_threads(threads) if (rows * channels >= GRAIN) reduction(& : finite)
        for (int64_t i = 0; i < samples; i++)
            finite &= quantize_part(one, two, y, i * pixels * channels, pixels, channels, cap, bits);
        return finite;
    }
    Sums sums(count, 4 * channels);
    origin_of<T>(one, rows, channels, origins);
    if (kind_of(two) == AFFINE) origin_of<T>(two, rows, channels, origins + channels);
#pragma omp parallel for num_threads(threads) if (rows * channels >= GRAIN)
    for (int64_t i = 0; i < count; i++)
        pass_part(one, two, y, i * size * channels, rest(i, size, rows), channels, cap, sums.part(i), origins);
    sums.add_up();
    moments(one, sums.at, origins, rows, channels);
    if (kind_of(two) == AFFINE) moments(two, sums.at + 2 * channels, origins + channels, rows, channels);
    return finite;
}

template <class T>
void backward(const Branch &one, const Branch &two, const T *g, const T *h, float *affine, int64_t rows,
              int64_t channels, float cap, int threads) {
    const int64_t size = rows_of_part(channels), count = parts(rows, size);
    Sums sums(count, 3 * channels);
#pragma omp parallel for num_threads(threads) if (rows * channels >= GRAIN)
    for (int64_t i = 0; i < count; i++)
        differentiate_part(one, two, g, h, i * size * channels, rest(i, size, rows), channels, rows, cap,
                           sums.part(i));
    if (!affine) return;
    sums.add_up();
    for (int64_t c = 0; c < channels; c++) {
        affine[c] = float(sums.at[c]);
        affine[channels + c] = float(sums.at[channels + c] * one.inverse[c]);
        affine[2 * channels + c] = float(sums.at[2 * channels + c] * (two.inverse ? two.inverse[c] : 0));
    }
}

}  // namespace

extern "C" {

// Whether the processor multiplies and adds in one instruction; without, plain PyTorch is faster.
int granq_norms_serve() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("fma") != 0;
#else
    return 1;
#endif
}

// With bits 0 nothing is quantized, and the batch's statistics are worked out, for which `origins` has room for two
// lines of C. Returns whether all ranges are finite.
#define FORWARD(NAME, T)                                                                                          \
    int NAME(const Branch *one, const Branch *two, T *y, float *origins, int64_t samples, int64_t pixels,       \
             int64_t channels, float cap, int bits, int threads) {                                               \
        return forward(*one, *two, y, origins, samples, pixels, channels, cap, bits, threads);                   \
    }
FORWARD(granq_norms_forward_float32, float)
FORWARD(granq_norms_forward_bfloat16, bfloat16)

// `g` and, unless null, `h` are gradients by y. Those by bias, weight and second weight go to `affine`, C each, or null.
#define BACKWARD(NAME, T)                                                                                         \
    void NAME(const Branch *one, const Branch *two, const T *g, const T *h, float *affine, int64_t rows,       \
              int64_t channels, float cap, int threads) {                                                        \
        backward(*one, *two, g, h, affine, rows, channels, cap, threads);                                       \
    }
BACKWARD(granq_norms_backward_float32, float)
BACKWARD(granq_norms_backward_bfloat16, bfloat16)

}  // extern "C"
