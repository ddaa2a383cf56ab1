/* Dropout of CPU tensors by masks that follow from a seed and a position, and the softmax's gradient under one.

   Random numbers are those of Philox 4x32-10 (Salmon et al. 2011), 16 bits for an element: a tile of TILE elements takes
   COUNTERS counters, and its element 2 (COUNTERS w + i) + h is the low (h = 0) or high half of word w of counter i. Each
   matrix starts a tile of its own, so that any number of them may be taken at a time. Elements are fp32, fp64, or bf16 as
   uint16_t. Compiled by native.py without fast-math: sums have a fixed order, whatever the number of threads. */

#include <stdint.h>
#include <string.h>

#define COUNTERS 32
#define TILE (8 * COUNTERS)
#define LANES 16
/* Rows of a matrix that a thread takes at a time. */
#define ROWS 32

static inline float load_f32(const float *x) { return *x; }
static inline double load_f64(const double *x) { return *x; }
static inline float load_b16(const uint16_t *x) {
    uint32_t bits = (uint32_t)*x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline float store_f32(float value) { return value; }
static inline double store_f64(double value) { return value; }
static inline uint16_t store_b16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t rounded = (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded;
}
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Which elements stay: those whose 16 bits are not below the threshold. */
typedef struct {
    const uint64_t *seed;
    uint64_t first;
    uint32_t threshold;
} Mask;

static inline int64_t tiles_of(int64_t numel) { return (numel + TILE - 1) / TILE; }

/* 1 for the elements of a tile that stay, 0 for the others. */
static inline void keep_tile(Mask mask, int64_t tile, float *keep) {
    uint32_t words[4][COUNTERS], *c0 = words[0], *c1 = words[1], *c2 = words[2], *c3 = words[3];
    uint64_t counter = mask.first + (uint64_t)tile * COUNTERS;
    for (int i = 0; i < COUNTERS; i++) {
        c0[i] = (uint32_t)(counter + (uint64_t)i);
        c1[i] = (uint32_t)((counter + (uint64_t)i) >> 32);
        c2[i] = c3[i] = 0;
    }
    uint32_t k0 = (uint32_t)*mask.seed, k1 = (uint32_t)(*mask.seed >> 32);
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < COUNTERS; i++) {
            uint64_t a = (uint64_t)0xD2511F53u * c0[i], b = (uint64_t)0xCD9E8D57u * c2[i];
            c0[i] = (uint32_t)(b >> 32) ^ c1[i] ^ k0;
            c1[i] = (uint32_t)b;
            c2[i] = (uint32_t)(a >> 32) ^ c3[i] ^ k1;
            c3[i] = (uint32_t)a;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    uint16_t halves[TILE];
    memcpy(halves, words, sizeof(halves));
    for (int i = 0; i < TILE; i++) keep[i] = halves[i] >= mask.threshold ? 1.0f : 0.0f;
}

/* y = x * scale where the mask keeps x, else 0; both [matrices, numel]. */
#define DEFINE_DROP(T, U, REAL, NAME, LOAD, STORE)                                                             \
    void drop_##NAME(const T *restrict x, U *restrict y, int64_t matrices, int64_t numel, const uint64_t *seed,       \
                     uint64_t first, uint32_t threshold, double scale) {                                       \
        int64_t each = tiles_of(numel);                                                                        \
        Mask mask = {seed, first, threshold};                                                                  \
        _Pragma("omp parallel for if (matrices * numel > 32768)") for (int64_t t = 0; t < matrices * each; t++) { \
            float keep[TILE];                                                                                  \
            int64_t start = t / each * numel + t % each * TILE, n = smaller(TILE, numel - t % each * TILE);    \
            keep_tile(mask, t, keep);                                                                          \
            for (int i = 0; i < n; i++) y[start + i] = STORE(LOAD(x + start + i) * (keep[i] * (REAL)scale));   \
        }                                                                                                      \
    }

DEFINE_DROP(float, float, float, f32, load_f32, store_f32)
DEFINE_DROP(float, uint16_t, float, f32_b16, load_f32, store_b16)
DEFINE_DROP(uint16_t, uint16_t, float, b16, load_b16, store_b16)
DEFINE_DROP(double, double, double, f64, load_f64, store_f64)

/* From probabilities P and the gradient G of dropped ones, both [matrices, rows, columns], with M the mask times `keep_scale`:
   `dropped` = P * M (not if it is NULL), and G becomes scale * P * (G * M - sum of P * G * M over the row). */
#define DEFINE_GRADIENT(P, T, REAL, NAME, LOAD, STORE)                                                         \
    void softmax_gradient_##NAME(const P *restrict p, T *restrict g, T *restrict dropped, int64_t matrices,    \
                                 int64_t rows, int64_t columns, const uint64_t *seed, uint64_t first,                 \
                                 uint32_t threshold, double keep_scale, double scale) {                        \
        int64_t each = tiles_of(rows * columns), blocks = (rows + ROWS - 1) / ROWS;                            \
        Mask mask = {seed, first, threshold};                                                                  \
        _Pragma("omp parallel for if (matrices * rows * columns > 32768)")                                     \
        for (int64_t block = 0; block < matrices * blocks; block++) {                                          \
            int64_t matrix = block / blocks, row = block % blocks * ROWS, stop = smaller(row + ROWS, rows);    \
            int64_t cached = -1;                                                                               \
            float keep[TILE];                                                                                  \
            for (int i = 0; i < TILE; i++) keep[i] = 1.0f;                                                     \
            for (; row < stop; row++) {                                                                        \
                const P *own = p + (matrix * rows + row) * columns;                                            \
                T *change = g + (matrix * rows + row) * columns;                                               \
                T *out = dropped ? dropped + (matrix * rows + row) * columns : 0;                              \
                REAL lanes[LANES] = {0}, sum = 0, factor = (REAL)keep_scale;                                   \
                for (int64_t c = 0, n; c < columns; c += n) {                                                  \
                    int64_t place = row * columns + c, tile = place / TILE, at = place % TILE;                 \
                    n = smaller(TILE - at, columns - c);                                                       \
                    if (threshold && tile != cached) keep_tile(mask, matrix * each + tile, keep);              \
                    cached = tile;                                                                             \
                    const float *stay = keep + at;                                                             \
                    int64_t whole = n / LANES * LANES;                                                         \
                    for (int64_t i = 0; i < whole; i += LANES)                                                 \
                        for (int j = 0; j < LANES; j++) {                                                      \
                            REAL value = LOAD(change + c + i + j) * stay[i + j];                               \
                            lanes[j] += own[c + i + j] * value;                                                \
                            change[c + i + j] = STORE(value);                                                  \
                        }                                                                                      \
                    for (int64_t i = whole; i < n; i++) {                                                      \
                        REAL value = LOAD(change + c + i) * stay[i];                                           \
                        lanes[0] += own[c + i] * value;                                                        \
                        change[c + i] = STORE(value);                                                          \
                    }                                                                                          \
                    if (out)                                                                                   \
                        for (int64_t i = 0; i < n; i++) out[c + i] = STORE(own[c + i] * (stay[i] * factor));   \
                }                                                                                              \
                for (int j = 0; j < LANES; j++) sum += lanes[j];                                               \
                sum *= factor;                                                                                 \
                for (int64_t i = 0; i < columns; i++)                                                          \
                    change[i] = STORE(own[i] * (LOAD(change + i) * factor - sum) * (REAL)scale);               \
            }                                                                                                  \
        }                                                                                                      \
    }

DEFINE_GRADIENT(float, float, float, f32, load_f32, store_f32)
DEFINE_GRADIENT(float, uint16_t, float, b16, load_b16, store_b16)
DEFINE_GRADIENT(double, double, double, f64, load_f64, store_f64)
