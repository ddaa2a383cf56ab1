/* The codecs of the CPU path in one pass over the data; equal bit for bit to their torch versions.

   absmax.py, magnitude_table.py and packing.py say what is computed and how codes are laid out. Elements are fp32, or
   bf16 as uint16_t. Compiled by native.py without contraction of a * b + c and without fast-math: rounding is that
   of torch. A plane holds the lowest bits of all codes, the next one the bits above: 8, 6 = 4 + 2, 5 = 4 + 1, 4. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define MAX_GROUP 1024
/* Elements that one call of a table kernel's inner loop takes. */
#define TILE 512

static inline float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static inline float load_f32(const float *x) { return *x; }
static inline float load_b16(const uint16_t *x) { return from_bits((uint32_t)*x << 16); }
static inline float store_f32(float value) { return value; }
static inline uint16_t store_b16(float value) {
    uint32_t bits = to_bits(value);
    uint16_t rounded = (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded;
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Bytes of `n` codes in the plane of that width. */
static inline int64_t plane_bytes(int64_t n, int width) { return (n * width + 7) / 8; }

/* Pack `n` codes, a multiple of 8, into as many bytes as `kept` of them need. */
static inline void pack(const uint8_t *codes, int n, int kept, int shift, int width, uint8_t *plane) {
    uint8_t packed[MAX_GROUP];
    if (width == 4) {
        for (int i = 0; i < n / 2; i++)
            packed[i] = ((codes[2 * i] >> shift) & 15) | (uint8_t)(((codes[2 * i + 1] >> shift) & 15) << 4);
    } else if (width == 2) {
        for (int i = 0; i < n / 4; i++) {
            uint32_t four;
            memcpy(&four, codes + 4 * i, 4);
            four = (four >> shift) & 0x03030303u;
            packed[i] = (uint8_t)((four * 0x01041040u) >> 24);
        }
    } else {
        for (int i = 0; i < n / 8; i++) {
            uint64_t eight;
            memcpy(&eight, codes + 8 * i, 8);
            eight = (eight >> shift) & 0x0101010101010101u;
            packed[i] = (uint8_t)((eight * 0x0102040810204080u) >> 56);
        }
    }
    memcpy(plane, packed, (size_t)plane_bytes(kept, width));
}

/* Add the `n` codes of a plane, shifted, to `codes`; `n` is a multiple of 8, `kept` of them are stored. */
static inline void unpack(const uint8_t *plane, int n, int kept, int shift, int width, uint8_t *codes) {
    uint8_t packed[MAX_GROUP];
    memset(packed, 0, (size_t)plane_bytes(n, width));
    memcpy(packed, plane, (size_t)plane_bytes(kept, width));
    if (width == 4) {
        for (int i = 0; i < n / 2; i++) {
            codes[2 * i] |= (uint8_t)((packed[i] & 15) << shift);
            codes[2 * i + 1] |= (uint8_t)((packed[i] >> 4) << shift);
        }
    } else if (width == 2) {
        for (int i = 0; i < n / 4; i++) {
            uint32_t four = packed[i], have;
            four = (four | four << 6 | four << 12 | four << 18) & 0x03030303u;
            memcpy(&have, codes + 4 * i, 4);
            have |= four << shift;
            memcpy(codes + 4 * i, &have, 4);
        }
    } else {
        for (int i = 0; i < n / 8; i++) {
            /* Bit k alone in byte k; adding 127 to each byte carries into its top bit where it is not zero. */
            uint64_t eight = (packed[i] * 0x0101010101010101u) & 0x8040201008040201u, have;
            eight = ((eight + 0x7F7F7F7F7F7F7F7Fu) >> 7) & 0x0101010101010101u;
            memcpy(&have, codes + 8 * i, 8);
            have |= eight << shift;
            memcpy(codes + 8 * i, &have, 8);
        }
    }
}

static inline void pack_planes(const uint8_t *codes, int n, int kept, int64_t start, int low, int high,
                               uint8_t *low_plane, uint8_t *high_plane) {
    if (low == 8) memcpy(low_plane + start, codes, (size_t)kept);
    else pack(codes, n, kept, 0, low, low_plane + start * low / 8);
    if (high) pack(codes, n, kept, low, high, high_plane + start * high / 8);
}

static inline void unpack_planes(uint8_t *codes, int n, int kept, int64_t start, int low, int high,
                                 const uint8_t *low_plane, const uint8_t *high_plane) {
    memset(codes, 0, (size_t)n);
    if (low == 8) memcpy(codes, low_plane + start, (size_t)kept);
    else unpack(low_plane + start * low / 8, n, kept, 0, low, codes);
    if (high) unpack(high_plane + start * high / 8, n, kept, low, high, codes);
}

/* Codes of groups `zero + round(x / step)`; `low` and `high` are the widths of the planes, `high` may be 0. */
#define DEFINE_ABSMAX(T, NAME, LOAD, STORE)                                                                   \
    void encode_absmax_##NAME(const T *x, int64_t numel, int group, int low, int high, int zero,               \
                              float reciprocal, float tiny_peak, uint8_t *low_plane, uint8_t *high_plane,      \
                              uint16_t *steps) {                                                               \
        int64_t groups = (numel + group - 1) / group;                                                          \
        _Pragma("omp parallel for if (numel > 32768)") for (int64_t g = 0; g < groups; g++) {                  \
            float block[MAX_GROUP];                                                                            \
            uint8_t codes[MAX_GROUP];                                                                          \
            int64_t start = g * group;                                                                         \
            int kept = (int)smaller(group, numel - start);                                                     \
            for (int i = 0; i < kept; i++) block[i] = LOAD(x + start + i);                                     \
            for (int i = kept; i < group; i++) block[i] = 0.0f;                                                \
            /* As integers magnitudes keep their order, with NaN above infinity. */                            \
            int32_t top = 0;                                                                                   \
            for (int i = 0; i < group; i++) {                                                                  \
                int32_t magnitude = (int32_t)(to_bits(block[i]) & 0x7FFFFFFF);                                 \
                top = magnitude > top ? magnitude : top;                                                       \
            }                                                                                                  \
            float peak = from_bits((uint32_t)top);                                                             \
            float step = from_bits((to_bits(peak * reciprocal) + 0xFFFF) & 0xFFFF0000u);                       \
            float inverse = peak < tiny_peak ? 0.0f : 1.0f / step;                                             \
            steps[g] = !(peak < INFINITY) ? 0x7FC0 : peak < tiny_peak ? 0 : (uint16_t)(to_bits(step) >> 16);   \
            for (int i = 0; i < group; i++)                                                                    \
                codes[i] = (uint8_t)(int32_t)(rintf(block[i] * inverse) + (float)zero);                        \
            pack_planes(codes, group, kept, start, low, high, low_plane, high_plane);                          \
        }                                                                                                      \
    }                                                                                                          \
    void decode_absmax_##NAME(T *out, int64_t numel, int group, int low, int high, int zero, int is_signed,    \
                              const uint8_t *low_plane, const uint8_t *high_plane, const uint16_t *steps) {    \
        int64_t groups = (numel + group - 1) / group;                                                          \
        _Pragma("omp parallel for if (numel > 32768)") for (int64_t g = 0; g < groups; g++) {                  \
            uint8_t codes[MAX_GROUP];                                                                          \
            int64_t start = g * group;                                                                         \
            int kept = (int)smaller(group, numel - start);                                                     \
            float step = load_b16(steps + g);                                                                  \
            unpack_planes(codes, group, kept, start, low, high, low_plane, high_plane);                        \
            if (is_signed)                                                                                     \
                for (int i = 0; i < kept; i++) out[start + i] = STORE((float)(int8_t)codes[i] * step);         \
            else                                                                                               \
                for (int i = 0; i < kept; i++) out[start + i] = STORE((float)((int)codes[i] - zero) * step);   \
        }                                                                                                      \
    }

DEFINE_ABSMAX(float, f32, load_f32, store_f32)
DEFINE_ABSMAX(uint16_t, b16, load_b16, store_b16)

/* Codes by the upper 16 bits of the fp32 value; `upper` is those of the first element, `stride` their distance. */
void encode_table(const uint16_t *upper, int stride, int64_t numel, const uint8_t *table, int low, int high,
                  uint8_t *low_plane, uint8_t *high_plane) {
    int64_t tiles = (numel + TILE - 1) / TILE;
#pragma omp parallel for if (numel > 32768)
    for (int64_t t = 0; t < tiles; t++) {
        uint8_t codes[TILE];
        int64_t start = t * TILE;
        int kept = (int)smaller(TILE, numel - start);
        for (int i = 0; i < kept; i++) codes[i] = table[upper[(start + i) * stride]];
        memset(codes + kept, 0, (size_t)(TILE - kept));
        pack_planes(codes, TILE, kept, start, low, high, low_plane, high_plane);
    }
}

#define DEFINE_TABLE(T, NAME)                                                                                  \
    void decode_table_##NAME(T *out, int64_t numel, const T *levels, int low, int high,                        \
                             const uint8_t *low_plane, const uint8_t *high_plane) {                            \
        int64_t tiles = (numel + TILE - 1) / TILE;                                                             \
        _Pragma("omp parallel for if (numel > 32768)") for (int64_t t = 0; t < tiles; t++) {                   \
            uint8_t codes[TILE];                                                                               \
            int64_t start = t * TILE;                                                                          \
            int kept = (int)smaller(TILE, numel - start);                                                      \
            unpack_planes(codes, TILE, kept, start, low, high, low_plane, high_plane);                         \
            for (int i = 0; i < kept; i++) out[start + i] = levels[codes[i]];                                  \
        }                                                                                                      \
    }

DEFINE_TABLE(float, f32)
DEFINE_TABLE(uint16_t, b16)
