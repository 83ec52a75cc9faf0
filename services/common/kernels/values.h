// What the CPU kernels of all services have in common: number types, ranges of values, and the grid between their ends.
//
// No header of Python or PyTorch is included, so that one build serves all their versions. OpenMP's symbols are left
// open and found in the library that PyTorch brings, whose threads are then shared. hatch_build.py builds the kernels,
// with a parameter of GCC's that loops over few columns depend on.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
// The widest instructions are chosen when the library is loaded, so that it may be built on another machine.
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), visibility("hidden")))
#else
#define CLONES __attribute__((visibility("hidden")))
#endif
// What a clone calls is part of it, else it would have the instructions that all machines have.
#define MEMBER inline __attribute__((always_inline))
#define INLINE static MEMBER

namespace {

constexpr float SPAN_FLOOR = 1e-8f;           // as in services/quantizer/kernels/eager.py
constexpr float OVERFLOW_RATIO = 1e-35f;      // as there
constexpr uint32_t NOT_FINITE = 0xff000000u;  // such bits of infinity; NaN has more
constexpr int LANES = 32;                     // values that a loop keeps in registers
constexpr int64_t ROWS = 64;                  // values of a channel that are summed in float before they go to a double
constexpr int64_t GRAIN = 1 << 15;            // values below which one thread is faster than several

struct bfloat16 { uint16_t bits; };

template <class To, class From>
INLINE To as(From value) {
    To bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
INLINE float load(const float *at) { return *at; }
INLINE float load(const bfloat16 *at) { return as<float>(uint32_t(at->bits) << 16); }
INLINE void store(float *at, float value) { *at = value; }
INLINE void store(bfloat16 *at, float value) {
    const uint32_t bits = as<uint32_t>(value);
    at->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // half to even
}
INLINE float least(float a, float b) { return a < b ? a : b; }  // b where one of them is NaN
INLINE float most(float a, float b) { return a > b ? a : b; }

struct Range {
    float lo = INFINITY, hi = -INFINITY;
    uint32_t top = 0;  // largest magnitude, as bits without the sign, shifted left by one

    MEMBER void join(const Range &other) {
        lo = least(other.lo, lo), hi = most(other.hi, hi), top = other.top > top ? other.top : top;
    }
};

struct Grid { float scale, zero_point; bool finite; };

INLINE Grid grid_of(const Range &range, int bits) {
    float span = range.hi - range.lo;
    const bool finite = range.top < NOT_FINITE && span <= 3.402823466e38f;
    span = most(span, SPAN_FLOOR);
    span = most(span, most(std::fabs(range.lo), std::fabs(range.hi)) * OVERFLOW_RATIO);
    // PyTorch divides a number by a tensor in this way.
    const float scale = (1.0f / span) * float((1 << bits) - 1);
    return {scale, std::rint(scale * range.lo) + float(1 << (bits - 1)), finite};
}

INLINE float rounded(float v, float scale, float zero_point) {
    return (std::rint(v * scale - zero_point) + zero_point) / scale;
}

INLINE int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }
INLINE int64_t rest(int64_t part, int64_t size, int64_t count) {  // size of a part, the last of which is shorter
    return (part + 1) * size <= count ? size : count - part * size;
}

// Sums of which each task has a part, `size` values, so that their order does not depend on the threads.
struct Sums {
    double *at;
    int64_t count, size;

    Sums(int64_t count_, int64_t size_) : count(count_), size(size_) {
        at = static_cast<double *>(calloc(count * size, sizeof(double)));
        if (!at) abort();
    }
    ~Sums() { free(at); }
    Sums(const Sums &) = delete;

    double *part(int64_t i) { return at + i * size; }
    void add_up() {  // into the first
        for (int64_t i = 1; i < count; i++)
            for (int64_t j = 0; j < size; j++) at[j] += part(i)[j];
    }
};

}  // namespace
