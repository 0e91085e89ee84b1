// Packing experts into blobs (quantised.h).

#include "quantised.h"

#define CANDIDATES 11

int64_t fm_expert_bytes(const struct shape *s, int32_t kind) { return parts_of(s, kind).end; }

// Four bits for 32 weights: the scale for which the squared error is least, of several around the one at which the
// largest weight is just within reach. For given integers q the best scale is <w, q> / <q, q>.
INLINE float best_scale4(const float *w) {
    float largest = 0, best = 0, best_gain = 0;
    for (int i = 0; i < GROUP; i++)
        if (fabsf(w[i]) > fabsf(largest)) largest = w[i];
    if (largest == 0) return 0;
    for (int c = 0; c < CANDIDATES; c++) {
        float inverse = -(7.3f + 0.15f * (float)c) / largest;
        float wq[LANES] = {0}, qq[LANES] = {0};
        for (int half = 0; half < GROUP; half += LANES)
            for (int l = 0; l < LANES; l++) {
                float q = (float)clamped(nearest(w[half + l] * inverse), -8, 7);
                wq[l] += w[half + l] * q;
                qq[l] += q * q;
            }
        for (int n = LANES / 2; n; n /= 2)
            for (int l = 0; l < n; l++) wq[l] += wq[l + n], qq[l] += qq[l + n];
        float gain = qq[0] > 0 ? wq[0] * wq[0] / qq[0] : 0;
        if (gain > best_gain) best_gain = gain, best = wq[0] / qq[0];
    }
    return best;
}

INLINE void put(uint8_t *block, int kind, int64_t vector, int lane, int64_t input, int32_t q) {
    int64_t step = input / 4;
    if (kind == INT8)
        block[((step * 2 + vector) * LANES + lane) * 4 + input % 4] = (uint8_t)(q + 128);
    else
        block[((step / 2 * 2 + vector) * LANES + lane) * 4 + input % 4] |= (uint8_t)((q + 8) << (step % 2 * 4));
}

// One channel's weights into its block; returns the squared error. `width`: inputs with padding. Without `block` and
// `scales` only the error is computed.
CLONES static double pack_channel(const float *w, int64_t inputs, int64_t width, int kind, int64_t vector, int lane,
                                  uint8_t *block, uint8_t *scales) {
    float largest = 0, scale = 0;
    double error = 0;
    for (int64_t k = 0; k < inputs; k++) largest = fabsf(w[k]) > largest ? fabsf(w[k]) : largest;
    for (int64_t g = 0; g < width; g += GROUP) {
        float group[GROUP] = {0};
        if (g < inputs) memcpy(group, w + g, (size_t)(inputs - g < GROUP ? inputs - g : GROUP) * 4);
        if (kind == INT8) {
            scale = largest / 127;
        } else {
            uint16_t rounded = to_bfloat16(best_scale4(group));
            if (scales) ((uint16_t *)scales)[(g / GROUP * 2 + vector) * LANES + lane] = rounded;
            scale = as_float((uint32_t)rounded << 16);
        }
        float inverse = scale == 0 ? 0 : 1 / scale;
        for (int i = 0; i < GROUP; i++) {
            int32_t q = nearest(group[i] * inverse);
            q = kind == INT8 ? clamped(q, -127, 127) : clamped(q, -8, 7);
            if (block) put(block, kind, vector, lane, g + i, q);
            error += (double)(group[i] - (float)q * scale) * (group[i] - (float)q * scale);
        }
    }
    if (kind == INT8 && scales) ((float *)scales)[vector * LANES + lane] = scale;
    return error;
}

// The same for 16 bits.
CLONES static double pack_channel16(const float *w, int64_t inputs, int64_t vector, int lane, uint16_t *block) {
    double error = 0;
    for (int64_t k = 0; k < inputs; k++) {
        uint16_t rounded = to_bfloat16(w[k]);
        double off = (double)w[k] - (double)as_float((uint32_t)rounded << 16);
        if (block) block[k * BLOCK + vector * LANES + lane] = rounded;
        error += off * off;
    }
    return error;
}

// A matrix whose block b has channels b * stride + 0..15 of `first` and of `second` (of which there are so many).
static double pack_matrix(const float *first, int64_t num_first, const float *second, int64_t num_second,
                          int64_t stride, int64_t blocks, int64_t inputs, int kind, uint8_t *out, uint8_t *scales) {
    int64_t width = up(inputs, GROUP), block_bytes = matrix_bytes(kind, BLOCK, width);
    int64_t block_scales = scale_bytes(kind, BLOCK, width);
    double error = 0;
    memset(out, kind == INT8 ? 0x80 : 0, (size_t)(block_bytes * blocks));
    memset(scales, 0, (size_t)(block_scales * blocks));
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t v = 0; v < 2; v++)
            for (int l = 0; l < LANES; l++) {
                int64_t channel = b * stride + l;
                if (channel >= (v ? num_second : num_first)) continue;
                const float *w = (v ? second : first) + channel * inputs;
                uint8_t *block = out + b * block_bytes;
                error += kind == BF16 ? pack_channel16(w, inputs, v, l, (uint16_t *)block)
                                      : pack_channel(w, inputs, width, kind, v, l, block, scales + b * block_scales);
            }
    return error;
}

// Of some channels [channels, inputs], float32: the squared error that packing them would make.
double fm_squared_error(const float *w, int64_t channels, int64_t inputs, int32_t kind) {
    double error = 0;
    for (int64_t c = 0; c < channels; c++, w += inputs)
        error += kind == BF16 ? pack_channel16(w, inputs, 0, 0, NULL)
                              : pack_channel(w, inputs, up(inputs, GROUP), kind, 0, 0, NULL, NULL);
    return error;
}

static void pack_bias(const float *first, int64_t num_first, const float *second, int64_t num_second, int64_t stride,
                      int64_t blocks, float *out) {
    for (int64_t b = 0; b < blocks; b++)
        for (int l = 0; l < LANES; l++) {
            int64_t channel = b * stride + l;
            out[b * BLOCK + l] = channel < num_first ? first[channel] : 0;
            out[b * BLOCK + LANES + l] = channel < num_second ? second[channel] : 0;
        }
}

// float32: gate and up [intermediate, hidden], down [hidden, intermediate], biases or null. Returns the squared error.
double fm_pack_expert(const struct shape *s, int32_t kind, const float *gate, const float *up_, const float *down,
                      const float *gate_bias, const float *up_bias, const float *down_bias, uint8_t *blob) {
    struct parts p = parts_of(s, kind);
    int64_t h = s->hidden, i = s->intermediate, blocks13 = up(i, BLOCK) / LANES, blocks2 = up(h, BLOCK) / BLOCK;
    memset(blob, 0, (size_t)p.end);
    double error = pack_matrix(gate, i, up_, i, LANES, blocks13, h, kind, blob + p.w13, blob + p.s13);
    error += pack_matrix(down, h, down + LANES * i, h - LANES, BLOCK, blocks2, i, kind, blob + p.w2, blob + p.s2);
    if (s->has_bias) {
        pack_bias(gate_bias, i, up_bias, i, LANES, blocks13, (float *)(blob + p.b13));
        pack_bias(down_bias, h, down_bias + LANES, h - LANES, BLOCK, blocks2, (float *)(blob + p.b2));
    }
    return error;
}
