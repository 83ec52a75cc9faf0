// BatchNorm by the statistics of the batch at hand, with a scale and a shift of all samples or of each, and leaky ReLU.
// Tensors are N×H×W×C in memory, so that a row holds a value of each channel.
//
//     x̂ = (x − mean)·inverse      z = scale·x̂ + shift      y = z where z > 0, else slope·z

#include "services/common/kernels/values.h"

namespace {

// Of all channels; scale and shift are those of one sample.
struct Line { const float *mean, *inverse, *scale, *shift; };

// Adds x − origin and its square, C each. An origin within the values keeps the difference of squares exact.
template <class T>
INLINE void add_moments(const T *x, int64_t rows, int64_t channels, const float *origins, double *sums, int width) {
    float origin[LANES], first[LANES], second[LANES];
    for (int j = 0; j < width; j++) origin[j] = origins[j];
    for (int64_t begin = 0; begin < rows; begin += ROWS) {
        const int64_t end = (begin + ROWS < rows ? begin + ROWS : rows) * channels;
        for (int j = 0; j < width; j++) first[j] = second[j] = 0;
        for (int64_t i = begin * channels; i < end; i += channels)
            for (int j = 0; j < width; j++) {
                const float d = load(x + i + j) - origin[j];
                first[j] += d, second[j] += d * d;
            }
        for (int j = 0; j < width; j++) sums[j] += first[j], sums[channels + j] += second[j];
    }
}

template <class T>
INLINE void apply(const T *x, T *y, int64_t rows, int64_t channels, const Line &line, float slope, int width) {
    float mean[LANES], inverse[LANES], scale[LANES], shift[LANES];
    for (int j = 0; j < width; j++)
        mean[j] = line.mean[j], inverse[j] = line.inverse[j], scale[j] = line.scale[j], shift[j] = line.shift[j];
    for (int64_t i = 0; i < rows * channels; i += channels)
        for (int j = 0; j < width; j++) {
            const float z = (load(x + i + j) - mean[j]) * inverse[j] * scale[j] + shift[j];
            store(y + i + j, z > 0 ? z : slope * z);
        }
}

// Sums of a sample's gradients by z and of these times x̂, C each: those by its shift and its scale.
template <class T>
INLINE void add_gradients(const T *x, const T *g, int64_t rows, int64_t channels, const Line &line, float slope,
                          float *by_shift, float *by_scale, int width) {
    float mean[LANES], inverse[LANES], scale[LANES], shift[LANES], first[LANES], second[LANES];
    double sums[2][LANES];
    for (int j = 0; j < width; j++) {
        mean[j] = line.mean[j], inverse[j] = line.inverse[j], scale[j] = line.scale[j], shift[j] = line.shift[j];
        sums[0][j] = sums[1][j] = 0;
    }
    for (int64_t begin = 0; begin < rows; begin += ROWS) {
        const int64_t end = (begin + ROWS < rows ? begin + ROWS : rows) * channels;
        for (int j = 0; j < width; j++) first[j] = second[j] = 0;
        for (int64_t i = begin * channels; i < end; i += channels)
            for (int j = 0; j < width; j++) {
                const float hat = (load(x + i + j) - mean[j]) * inverse[j], gradient = load(g + i + j);
                const float through = hat * scale[j] + shift[j] > 0 ? gradient : slope * gradient;
                first[j] += through, second[j] += through * hat;
            }
        for (int j = 0; j < width; j++) sums[0][j] += first[j], sums[1][j] += second[j];
    }
    for (int j = 0; j < width; j++) by_shift[j] = float(sums[0][j]), by_scale[j] = float(sums[1][j]);
}

// The gradient by x: inverse·(g·scale − a − b·x̂) with the means a and b of g·scale and g·scale·x̂ over the batch.
template <class T>
INLINE void differentiate(const T *x, const T *g, T *out, int64_t rows, int64_t channels, const Line &line,
                          float slope, const float *a, const float *b, int width) {
    float mean[LANES], inverse[LANES], scale[LANES], shift[LANES], first[LANES], second[LANES];
    for (int j = 0; j < width; j++) {
        mean[j] = line.mean[j], inverse[j] = line.inverse[j], scale[j] = line.scale[j], shift[j] = line.shift[j];
        first[j] = a[j], second[j] = b[j];
    }
    for (int64_t i = 0; i < rows * channels; i += channels)
        for (int j = 0; j < width; j++) {
            const float hat = (load(x + i + j) - mean[j]) * inverse[j], gradient = load(g + i + j);
            const float through = hat * scale[j] + shift[j] > 0 ? gradient : slope * gradient;
            store(out + i + j, inverse[j] * (through * scale[j] - first[j] - hat * second[j]));
        }
}

INLINE Line from(const Line &line, int64_t c) {
    return {line.mean + c, line.inverse + c, line.scale + c, line.shift + c};
}

// Channels in blocks that fit in registers.
#define EACH_BLOCK(STEP)                                           \
    int64_t c = 0;                                                 \
    for (; c + LANES <= channels; c += LANES) STEP(LANES)          \
    for (; c + 16 <= channels; c += 16) STEP(16)                   \
    if (c < channels) STEP(int(channels - c))
#define MOMENTS(W) add_moments(x + c, rows, channels, origins + c, sums + c, W);
#define APPLY(W) apply(x + c, y + c, rows, channels, from(line, c), slope, W);
#define GRADIENTS(W) add_gradients(x + c, g + c, rows, channels, from(line, c), slope, by_shift + c, by_scale + c, W);
#define DIFFERENTIATE(W) differentiate(x + c, g + c, out + c, rows, channels, from(line, c), slope, a + c, b + c, W);
#define FOR_TYPE(T)                                                                                                  \
    CLONES void moments_part(const T *x, int64_t rows, int64_t channels, const float *origins, double *sums) {       \
        EACH_BLOCK(MOMENTS)                                                                                          \
    }                                                                                                                \
    CLONES void apply_part(const T *x, T *y, int64_t rows, int64_t channels, Line line, float slope) {               \
        EACH_BLOCK(APPLY)                                                                                            \
    }                                                                                                                \
    CLONES void gradients_part(const T *x, const T *g, int64_t rows, int64_t channels, Line line, float slope,       \
                               float *by_shift, float *by_scale) {                                                   \
        EACH_BLOCK(GRADIENTS)                                                                                        \
    }                                                                                                                \
    CLONES void differentiate_part(const T *x, const T *g, T *out, int64_t rows, int64_t channels, Line line,        \
                                   float slope, const float *a, const float *b) {                                    \
        EACH_BLOCK(DIFFERENTIATE)                                                                                    \
    }
FOR_TYPE(float)
FOR_TYPE(bfloat16)

struct Batch { int64_t samples, pixels, channels; };

// Mean and biased variance over the batch.
template <class T>
void moments(const T *x, float *mean, float *variance, Batch of, int threads) {
    const int64_t rows = of.samples * of.pixels, few = rows < ROWS ? rows : ROWS;
    for (int64_t c = 0; c < of.channels; c++) mean[c] = 0;
    for (int64_t r = 0; r < few; r++)
        for (int64_t c = 0; c < of.channels; c++) mean[c] += load(x + r * of.channels + c) / float(few);
    Sums sums(of.samples, 2 * of.channels);
#pragma omp parallel for num_threads(threads) if (rows * of.channels >= GRAIN)
    for (int64_t n = 0; n < of.samples; n++)
        moments_part(x + n * of.pixels * of.channels, of.pixels, of.channels, mean, sums.part(n));
    sums.add_up();
    for (int64_t c = 0; c < of.channels; c++) {
        const double offset = sums.at[c] / double(rows);
        const double square = sums.at[of.channels + c] / double(rows) - offset * offset;
        mean[c] = float(mean[c] + offset), variance[c] = square > 0 ? float(square) : 0;
    }
}

template <class T>
void normalize(const T *x, T *y, Line line, int64_t step, Batch of, float slope, int threads) {
    const int64_t size = of.pixels * of.channels;
#pragma omp parallel for num_threads(threads) if (of.samples * size >= GRAIN)
    for (int64_t n = 0; n < of.samples; n++)
        apply_part(x + n * size, y + n * size, of.pixels, of.channels,
                   {line.mean, line.inverse, line.scale + n * step, line.shift + n * step}, slope);
}

// Gradients by each sample's shift and scale, N×C each, whatever their own step is, and by x.
template <class T>
void backward(const T *x, const T *g, T *out, Line line, int64_t step, float *by_shift, float *by_scale, Batch of,
              float slope, int threads) {
    const int64_t size = of.pixels * of.channels, channels = of.channels;
#pragma omp parallel for num_threads(threads) if (of.samples * size >= GRAIN)
    for (int64_t n = 0; n < of.samples; n++)
        gradients_part(x + n * size, g + n * size, of.pixels, channels,
                       {line.mean, line.inverse, line.scale + n * step, line.shift + n * step}, slope,
                       by_shift + n * channels, by_scale + n * channels);
    float *means = static_cast<float *>(calloc(2 * channels, sizeof(float)));
    if (!means) abort();
    for (int64_t n = 0; n < of.samples; n++)
        for (int64_t c = 0; c < channels; c++) {
            const float share = line.scale[n * step + c] / float(of.samples * of.pixels);
            means[c] += share * by_shift[n * channels + c], means[channels + c] += share * by_scale[n * channels + c];
        }
#pragma omp parallel for num_threads(threads) if (of.samples * size >= GRAIN)
    for (int64_t n = 0; n < of.samples; n++)
        differentiate_part(x + n * size, g + n * size, out + n * size, of.pixels, channels,
                           {line.mean, line.inverse, line.scale + n * step, line.shift + n * step}, slope, means,
                           means + channels);
    free(means);
}

}  // namespace

// Scale and shift are `step` values apart from sample to sample: C, or 0 where all share them.
#define EXPORT(NAME, T)                                                                                               \
    void granq_moments_##NAME(const T *x, float *mean, float *variance, int64_t samples, int64_t pixels,             \
                              int64_t channels, int threads) {                                                       \
        moments(x, mean, variance, {samples, pixels, channels}, threads);                                            \
    }                                                                                                                 \
    void granq_normalize_##NAME(const T *x, T *y, const float *mean, const float *inverse, const float *scale,       \
                                const float *shift, int64_t step, int64_t samples, int64_t pixels, int64_t channels, \
                                float slope, int threads) {                                                          \
        normalize(x, y, {mean, inverse, scale, shift}, step, {samples, pixels, channels}, slope, threads);           \
    }                                                                                                                 \
    void granq_normalize_backward_##NAME(const T *x, const T *g, T *out, const float *mean, const float *inverse,    \
                                         const float *scale, const float *shift, int64_t step, float *by_shift,      \
                                         float *by_scale, int64_t samples, int64_t pixels, int64_t channels,         \
                                         float slope, int threads) {                                                 \
        backward(x, g, out, {mean, inverse, scale, shift}, step, by_shift, by_scale, {samples, pixels, channels},    \
                 slope, threads);                                                                                    \
    }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
}
