/* The sums of a change of weights that statistics are made of, in one pass over the data.

   Elements are fp32, or bf16 as uint16_t. Compiled by native.py without fast-math: lanes are added up in a fixed order,
   whatever the number of threads. */

#include <float.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
/* Elements between two additions of the fp32 lanes to the fp64 sums. */
#define RUN 4096

static inline float load_f32(const float *x) { return *x; }
static inline float load_b16(const uint16_t *x) {
    uint32_t bits = (uint32_t)*x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline float magnitude(float x) { return __builtin_fabsf(x); }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* |d| / max(|w|, |d|), 0 where both are 0 and NaN where one is NaN. */
static inline float share(float d, float w) {
    float top = d > w ? d : w;
    return d / (top < FLT_MIN ? FLT_MIN : top);
}

#define DEFINE_SUMS(T, NAME, LOAD)                                                                             \
    static inline void add_##NAME(const T *weight, const T *other, int moved, int64_t n, double *sums) {       \
        float shares[LANES] = {0}, changes[LANES] = {0}, weights[LANES] = {0};                                 \
        int64_t whole = n / LANES * LANES;                                                                     \
        for (int64_t i = 0; i < whole; i += LANES)                                                             \
            for (int j = 0; j < LANES; j++) {                                                                  \
                float w = LOAD(weight + i + j), o = LOAD(other + i + j), d = moved ? o - w : o;                \
                shares[j] += share(magnitude(d), magnitude(w));                                                \
                changes[j] += d * d;                                                                           \
                weights[j] += w * w;                                                                           \
            }                                                                                                  \
        for (int64_t i = whole; i < n; i++) {                                                                  \
            float w = LOAD(weight + i), o = LOAD(other + i), d = moved ? o - w : o;                            \
            shares[0] += share(magnitude(d), magnitude(w));                                                    \
            changes[0] += d * d;                                                                               \
            weights[0] += w * w;                                                                               \
        }                                                                                                      \
        for (int j = 0; j < LANES; j++) {                                                                      \
            sums[0] += shares[j];                                                                              \
            sums[1] += changes[j];                                                                             \
            sums[2] += weights[j];                                                                             \
        }                                                                                                      \
    }                                                                                                          \
    /* Sums of each piece of `piece` elements [pieces, 3]; `other` is the change, or the weight after it. */   \
    void change_sums_##NAME(const T *weight, const T *other, int moved, int64_t numel, int64_t piece,          \
                            double *sums) {                                                                    \
        int64_t pieces = (numel + piece - 1) / piece;                                                          \
        _Pragma("omp parallel for if (pieces > 1)") for (int64_t p = 0; p < pieces; p++) {                     \
            int64_t stop = smaller((p + 1) * piece, numel);                                                    \
            double *own = sums + 3 * p;                                                                        \
            own[0] = own[1] = own[2] = 0.0;                                                                    \
            for (int64_t i = p * piece; i < stop; i += RUN)                                                    \
                add_##NAME(weight + i, other + i, moved, smaller(RUN, stop - i), own);                         \
        }                                                                                                      \
    }

DEFINE_SUMS(float, f32, load_f32)
DEFINE_SUMS(uint16_t, b16, load_b16)
