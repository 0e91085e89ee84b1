// Experts of 16, 8 and 4 bits a weight, on any processor; quick where it has AVX-512 VNNI.
//
// A row is quantised in groups of 32 values to 8 bits, each group with a float32 scale of its own. Products of a group
// are summed exactly, in 32-bit integers; the groups' sums are scaled and added in float32, in order. So a row's result
// depends neither on the other rows of a call nor on how the work is cut up, and both paths give the same bits. For
// experts of 16 bits rows stay as they are, in float32, and products are added one input after the other.
//
// An expert is one run of bytes ("blob"): w13 | w13 scales | w2 | w2 scales | w13 bias | w2 bias, each part at a
// multiple of 64. Matrices are cut into blocks of 32 output channels, which lie one after the other; in a block stand,
// for each 4 inputs, 16 channels' 4 bytes and then the other 16 channels'. In w13 the first 16 are gate channels, the
// others the up channels that they are multiplied with. 8 bits: a byte is weight + 128, and each channel has a float32
// scale. 4 bits: the low half of a byte is weight + 8 of one step of 4 inputs, the high half of the next step; each
// channel has a bfloat16 scale a group of 32 inputs, which stand by block, group and channel. 16 bits: bfloat16 weights
// without scales; in a block stand the 32 channels' weights for each input.
//
// quantised_pack.c makes blobs, quantised.c runs them.

#ifndef FOLKMOOT_QUANTISED_H
#define FOLKMOOT_QUANTISED_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))  // else clones call what is not of their own target

enum { GROUP = 32, LANES = 16, BLOCK = 32, TILE = 4, STEPS = GROUP / 4, ALIGN = 64 };
enum { INT4 = 4, INT8 = 8, BF16 = 16 };
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum { SILU = 0, SWIGLUOAI = 1 };

// What every expert of a layer has in common.
struct shape {
    int32_t hidden, intermediate;
    int32_t activation, has_bias;
};

struct parts {
    int64_t w13, s13, w2, s2, b13, b2, end;
};

INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE int64_t matrix_bytes(int kind, int64_t channels, int64_t inputs) { return channels * inputs * kind / 8; }

INLINE int64_t scale_bytes(int kind, int64_t channels, int64_t inputs) {
    if (kind == BF16) return 0;
    return kind == INT8 ? channels * 4 : channels * (inputs / GROUP) * 2;
}

INLINE struct parts parts_of(const struct shape *s, int kind) {
    int64_t h = up(s->hidden, BLOCK), i = up(s->intermediate, BLOCK);
    struct parts p = {0};
    p.s13 = up(matrix_bytes(kind, 2 * i, h), ALIGN);
    p.w2 = p.s13 + up(scale_bytes(kind, 2 * i, h), ALIGN);
    p.s2 = p.w2 + up(matrix_bytes(kind, h, i), ALIGN);
    p.b13 = p.s2 + up(scale_bytes(kind, h, i), ALIGN);
    p.b2 = p.b13 + (s->has_bias ? up(2 * i * 4, ALIGN) : 0);
    p.end = p.b2 + (s->has_bias ? up(h * 4, ALIGN) : 0);
    return p;
}

INLINE float as_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint32_t as_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

INLINE uint16_t to_bfloat16(float f) {
    uint32_t bits = as_bits(f);
    uint32_t is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return is_nan ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The nearest integer, ties to even, of a float within 2^22: the low bits of a sum with 1.5 * 2^23.
INLINE int32_t nearest(float f) { return (int32_t)as_bits(f + 12582912.0f) - 0x4b400000; }

INLINE int32_t clamped(int32_t v, int32_t low, int32_t high) { return v < low ? low : v > high ? high : v; }

#endif
