// Running experts from their blobs (quantised.h): rows to 8 bits, kernels, and the layers' calls.

#include "quantised.h"

#ifdef _OPENMP
#include <omp.h>
#endif

// A call's rows, sorted by expert, in 8 bits: `values` [rows, width], `scales` and `sums` [rows, width / GROUP].
struct rows8 {
    int8_t *values;
    float *scales;
    int32_t *sums;
    int64_t width;
};

// ---- Rows to 8 bits

// A group with a value that is not finite gets the scale NaN, and so does all that comes of it.
CLONES static void quantise_row(const float *x, int64_t width, int8_t *values, float *scales, int32_t *sums) {
    for (int64_t g = 0; g < width / GROUP; g++, x += GROUP, values += GROUP) {
        uint32_t largest = 0;
        int32_t sum = 0;
        for (int i = 0; i < GROUP; i++) {
            uint32_t bits = as_bits(x[i]) & 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        int is_finite = largest < 0x7f800000;
        float scale = as_float(largest) / 127;
        float inverse = is_finite && scale > 1e-37f ? 1 / scale : 0;
        for (int i = 0; i < GROUP; i++) {
            int32_t q = is_finite ? nearest(x[i] * inverse) : 0;
            values[i] = (int8_t)q;
            sum += q;
        }
        scales[g] = is_finite ? scale : NAN;
        sums[g] = sum;
    }
}

CLONES static void to_float(const void *row, int dtype, int64_t num, int64_t width, float *out) {
    const uint16_t *half = row;
    if (dtype == FLOAT32)
        memcpy(out, row, (size_t)num * 4);
    else if (dtype == BFLOAT16)
        for (int64_t k = 0; k < num; k++) out[k] = as_float((uint32_t)half[k] << 16);
    else
        for (int64_t k = 0; k < num; k++) out[k] = (float)((const _Float16 *)row)[k];
    for (int64_t k = num; k < width; k++) out[k] = 0;
}

CLONES static void from_float(const float *values, int64_t num, int dtype, void *out) {
    if (dtype == FLOAT32)
        memcpy(out, values, (size_t)num * 4);
    else if (dtype == BFLOAT16)
        for (int64_t k = 0; k < num; k++) ((uint16_t *)out)[k] = to_bfloat16(values[k]);
    else
        for (int64_t k = 0; k < num; k++) ((_Float16 *)out)[k] = (_Float16)values[k];
}

// ---- Activation

// exp of what is at most 0, to about 1e-7: 2^n * e^r with |r| <= ln(2) / 2, and e^r by its series up to r^7.
INLINE float exp_negative(float x) {
    float bounded = x < -87.0f ? -87.0f : x;
    float n = bounded * 1.44269504f + 12582912.0f - 12582912.0f;
    float r = fmaf(n, -1.42860677e-6f, fmaf(n, -0.693145752f, bounded));
    float e = fmaf(r, 1.98412698e-4f, 1.38888889e-3f);
    e = fmaf(r, e, 8.33333333e-3f);
    e = fmaf(r, e, 4.16666667e-2f);
    e = fmaf(r, e, 1.66666667e-1f);
    e = fmaf(r, e, 0.5f);
    e = fmaf(r, e, 1.0f);
    e = fmaf(r, e, 1.0f);
    return e * as_float((uint32_t)(nearest(n) + 127) << 23);
}

INLINE float sigmoid(float x) {
    float e = exp_negative(-fabsf(x)), inverse = 1 / (1 + e);
    return x >= 0 ? inverse : e * inverse;
}

// gate, up [LANES] -> out [LANES]. Comparisons are such that NaN stays.
CLONES static void activate(const float *gate, const float *up_, int activation, float *out) {
    if (activation == SILU) {
        for (int l = 0; l < LANES; l++) out[l] = gate[l] * sigmoid(gate[l]) * up_[l];
        return;
    }
    for (int l = 0; l < LANES; l++) {
        float g = gate[l] > 7 ? 7 : gate[l], high = up_[l] > 7 ? 7 : up_[l], u = high < -7 ? -7 : high;
        out[l] = g * sigmoid(1.702f * g) * (u + 1);
    }
}

// ---- One block of 32 channels times up to TILE rows

// What a tile is made of: a block's weights and scales, and rows from number `row` on. `floats`: the rows, unrounded.
struct tile {
    const uint8_t *weights, *scales;
    const struct rows8 *rows;
    const float *floats;
    int64_t row, groups;
    int count, kind;
};

CLONES static void dot_portable(const struct tile *t, float out[TILE][BLOCK]) {
    for (int r = 0; r < t->count; r++) {
        const int8_t *a = t->rows->values + (t->row + r) * t->rows->width;
        const float *sa = t->rows->scales + (t->row + r) * t->groups;
        const int32_t *sums = t->rows->sums + (t->row + r) * t->groups;
        float *f = out[r];
        for (int c = 0; c < BLOCK; c++) f[c] = 0;
        for (int64_t g = 0; g < t->groups; g++) {
            int32_t acc[BLOCK];
            for (int c = 0; c < BLOCK; c++) acc[c] = -(t->kind == INT8 ? 128 : 8) * sums[g];
            for (int s = 0; s < STEPS; s++, a += 4) {
                int64_t step = g * STEPS + s;
                const uint8_t *w = t->weights + (t->kind == INT8 ? step : step / 2) * BLOCK * 4;
                int shift = t->kind == INT8 ? 0 : (int)(step % 2 * 4), mask = t->kind == INT8 ? 255 : 15;
                for (int c = 0; c < BLOCK; c++)
                    for (int j = 0; j < 4; j++) acc[c] += ((w[c * 4 + j] >> shift) & mask) * a[j];
            }
            const uint16_t *sw = (const uint16_t *)t->scales + g * BLOCK;
            for (int c = 0; c < BLOCK; c++) {
                float sum = (float)acc[c];
                if (t->kind == INT4) sum *= as_float((uint32_t)sw[c] << 16);
                f[c] = fmaf(sum, sa[g], f[c]);
            }
        }
        for (int c = 0; c < BLOCK && t->kind == INT8; c++) f[c] *= ((const float *)t->scales)[c];
    }
}

CLONES static void dot_portable16(const struct tile *t, float out[TILE][BLOCK]) {
    int64_t width = t->rows->width;
    for (int r = 0; r < t->count; r++) {
        const float *x = t->floats + (t->row + r) * width;
        const uint16_t *w = (const uint16_t *)t->weights;
        float *f = out[r];
        for (int c = 0; c < BLOCK; c++) f[c] = 0;
        for (int64_t k = 0; k < width; k++, w += BLOCK)
            for (int c = 0; c < BLOCK; c++) f[c] = fmaf(as_float((uint32_t)w[c] << 16), x[k], f[c]);
    }
}

#if defined(__x86_64__)
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define INLINE_VNNI static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512vnni")))

INLINE_VNNI __m512 bfloat16s(const uint8_t *at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16));
}

INLINE_VNNI __m512i four(const int8_t *a) {
    int32_t bytes;
    memcpy(&bytes, a, 4);
    return _mm512_set1_epi32(bytes);
}

// `count` and `kind` are constants where this is inlined, so that all of it stays in registers.
INLINE_VNNI void dot_tile(const struct tile *t, const int count, const int kind, float out[TILE][BLOCK]) {
    const struct rows8 *rows = t->rows;
    const uint8_t *w = t->weights;
    const __m512i low = _mm512_set1_epi8(15);
    __m512 f[TILE][2];
    for (int r = 0; r < count; r++) f[r][0] = f[r][1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < t->groups; g++) {
        __m512i acc[TILE][2];
        const int8_t *a = rows->values + t->row * rows->width + g * GROUP;
        for (int r = 0; r < count; r++) {
            int32_t sum = rows->sums[(t->row + r) * t->groups + g];
            acc[r][0] = acc[r][1] = _mm512_set1_epi32(-(kind == INT8 ? 128 : 8) * sum);
        }
        for (int s = 0; s < STEPS; s += kind == INT8 ? 1 : 2, w += 2 * 64) {
            __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
            if (kind == INT4) {
                __m512i high0 = _mm512_and_si512(_mm512_srli_epi16(w0, 4), low);
                __m512i high1 = _mm512_and_si512(_mm512_srli_epi16(w1, 4), low);
                w0 = _mm512_and_si512(w0, low), w1 = _mm512_and_si512(w1, low);
                for (int r = 0; r < count; r++) {
                    __m512i b = four(a + r * rows->width + 4 * s + 4);
                    acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], high0, b);
                    acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], high1, b);
                }
            }
            for (int r = 0; r < count; r++) {
                __m512i b = four(a + r * rows->width + 4 * s);
                acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], w0, b);
                acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], w1, b);
            }
        }
        for (int v = 0; v < 2; v++) {
            __m512 sw = kind == INT4 ? bfloat16s(t->scales + (g * 2 + v) * LANES * 2) : _mm512_setzero_ps();
            for (int r = 0; r < count; r++) {
                __m512 sum = _mm512_cvtepi32_ps(acc[r][v]);
                if (kind == INT4) sum = _mm512_mul_ps(sum, sw);
                f[r][v] = _mm512_fmadd_ps(sum, _mm512_set1_ps(rows->scales[(t->row + r) * t->groups + g]), f[r][v]);
            }
        }
    }
    for (int r = 0; r < count; r++)
        for (int v = 0; v < 2; v++) {
            __m512 scaled = kind == INT4 ? f[r][v] : _mm512_mul_ps(f[r][v], _mm512_loadu_ps(t->scales + v * 64));
            _mm512_storeu_ps(out[r] + v * LANES, scaled);
        }
}

INLINE_VNNI void dot_tile16(const struct tile *t, const int count, float out[TILE][BLOCK]) {
    int64_t width = t->rows->width;
    const float *x = t->floats + t->row * width;
    const uint8_t *w = t->weights;
    __m512 f[TILE][2];
    for (int r = 0; r < count; r++) f[r][0] = f[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < width; k++, w += BLOCK * 2) {
        __m512 w0 = bfloat16s(w), w1 = bfloat16s(w + LANES * 2);
        for (int r = 0; r < count; r++) {
            __m512 value = _mm512_set1_ps(x[r * width + k]);
            f[r][0] = _mm512_fmadd_ps(w0, value, f[r][0]);
            f[r][1] = _mm512_fmadd_ps(w1, value, f[r][1]);
        }
    }
    for (int r = 0; r < count; r++)
        for (int v = 0; v < 2; v++) _mm512_storeu_ps(out[r] + v * LANES, f[r][v]);
}

#define KINDS(count)                                     \
    t->kind == INT8   ? dot_tile(t, count, INT8, out)    \
    : t->kind == INT4 ? dot_tile(t, count, INT4, out)    \
                      : dot_tile16(t, count, out)

VNNI static void dot_vnni(const struct tile *t, float out[TILE][BLOCK]) {
    switch (t->count) {
        case 1: KINDS(1); break;
        case 2: KINDS(2); break;
        case 3: KINDS(3); break;
        default: KINDS(4); break;
    }
}
#endif

static int use_vnni;

// Whether the quick path is there; `allow` 0 turns it off, for tests.
int32_t fm_vnni(int32_t allow) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    use_vnni = allow && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl");
#else
    use_vnni = 0 && allow;
#endif
    return use_vnni;
}

static void dot(const struct tile *t, float out[TILE][BLOCK]) {
#if defined(__x86_64__)
    if (use_vnni) {
        dot_vnni(t, out);
        return;
    }
#endif
    t->kind == BF16 ? dot_portable16(t, out) : dot_portable(t, out);
}

// ---- A layer

struct experts {
    struct shape shape;
    int32_t num_slots, pad;
    const uint8_t *const *blobs;  // by slot
    const uint8_t *kinds;         // INT4, INT8 or BF16, by slot
};

// One expert's rows: sorted rows `begin` to `end`.
struct segment {
    const uint8_t *blob;
    int64_t begin, end;
    int32_t kind, pad;
};

struct layer_call {
    const struct experts *e;
    const struct segment *segments;
    const int32_t *order;  // sorted row -> row of the call
    struct rows8 in, mid;
    float *wide, *inner;  // the same, unrounded: [rows, hidden], [rows, intermediate], padded
    void *out;
    int64_t h, i;  // padded
    int dtype;
};

static void add_bias(float *values, const float *bias) {
    for (int c = 0; c < BLOCK; c++) values[c] += bias[c];
}

static void first_half(const struct layer_call *c, const struct segment *s, int64_t block) {
    struct parts p = parts_of(&c->e->shape, s->kind);
    struct tile t = {.weights = s->blob + p.w13 + block * matrix_bytes(s->kind, BLOCK, c->h),
                     .scales = s->blob + p.s13 + block * scale_bytes(s->kind, BLOCK, c->h),
                     .rows = &c->in, .floats = c->wide, .groups = c->h / GROUP, .kind = s->kind};
    for (t.row = s->begin; t.row < s->end; t.row += TILE) {
        float sums[TILE][BLOCK];
        t.count = (int)(s->end - t.row < TILE ? s->end - t.row : TILE);
        dot(&t, sums);
        for (int r = 0; r < t.count; r++) {
            if (c->e->shape.has_bias) add_bias(sums[r], (const float *)(s->blob + p.b13) + block * BLOCK);
            float *inner = c->inner + (t.row + r) * c->i + block * LANES;
            activate(sums[r], sums[r] + LANES, c->e->shape.activation, inner);
        }
    }
}

static void second_half(const struct layer_call *c, const struct segment *s, int64_t block) {
    struct parts p = parts_of(&c->e->shape, s->kind);
    struct tile t = {.weights = s->blob + p.w2 + block * matrix_bytes(s->kind, BLOCK, c->i),
                     .scales = s->blob + p.s2 + block * scale_bytes(s->kind, BLOCK, c->i),
                     .rows = &c->mid, .floats = c->inner, .groups = c->i / GROUP, .kind = s->kind};
    int64_t hidden = c->e->shape.hidden, at = block * BLOCK, num = hidden - at < BLOCK ? hidden - at : BLOCK;
    int64_t size = c->dtype == FLOAT32 ? 4 : 2;
    for (t.row = s->begin; t.row < s->end; t.row += TILE) {
        float sums[TILE][BLOCK];
        t.count = (int)(s->end - t.row < TILE ? s->end - t.row : TILE);
        dot(&t, sums);
        for (int r = 0; r < t.count; r++) {
            if (c->e->shape.has_bias) add_bias(sums[r], (const float *)(s->blob + p.b2) + at);
            from_float(sums[r], num, c->dtype, (char *)c->out + (c->order[t.row + r] * hidden + at) * size);
        }
    }
}

// Sort rows by slot: `order`, and the segments. Returns their number, or -1 for a slot out of range.
static int64_t sort_rows(const struct experts *e, const int32_t *slots, int64_t rows, int32_t *order,
                         struct segment *segments, int32_t *starts) {
    int64_t num = 0;
    memset(starts, 0, (size_t)(e->num_slots + 1) * 4);
    for (int64_t r = 0; r < rows; r++) {
        if (slots[r] < 0 || slots[r] >= e->num_slots) return -1;
        starts[slots[r] + 1]++;
    }
    for (int32_t n = 0; n < e->num_slots; n++) {
        if (starts[n + 1])
            segments[num++] = (struct segment){e->blobs[n], starts[n], starts[n] + starts[n + 1], e->kinds[n], 0};
        starts[n + 1] += starts[n];
    }
    for (int64_t r = 0; r < rows; r++) order[starts[slots[r]]++] = (int32_t)r;
    return num;
}

static char *take(char **at, int64_t bytes) {
    char *begin = *at;
    *at += up(bytes, ALIGN);
    return begin;
}

static struct rows8 take_rows8(char **at, int64_t rows, int64_t width) {
    int64_t groups = width / GROUP;
    return (struct rows8){(int8_t *)take(at, rows * width), (float *)take(at, rows * groups * 4),
                          (int32_t *)take(at, rows * groups * 4), width};
}

int64_t fm_scratch_bytes(const struct experts *e, int64_t rows) {
    int64_t widths = up(e->shape.hidden, BLOCK) + up(e->shape.intermediate, BLOCK);
    return rows * (6 * widths + 4) + (e->num_slots + 1) * (int64_t)(sizeof(struct segment) + 4) + 16 * ALIGN;
}

// out[r] = expert slots[r] of x[r], rows of `dtype`; `scratch` has fm_scratch_bytes. 0, or -1 for a slot out of range.
int32_t fm_run_experts(const struct experts *e, const void *x, const int32_t *slots, void *out, int64_t rows,
                       int32_t dtype, int32_t threads, char *scratch) {
    char *at = (char *)up((int64_t)(intptr_t)scratch, ALIGN);
    int64_t h = up(e->shape.hidden, BLOCK), i = up(e->shape.intermediate, BLOCK), hidden = e->shape.hidden;
    int32_t *order = (int32_t *)take(&at, rows * 4), *starts = (int32_t *)take(&at, (e->num_slots + 1) * 4);
    struct segment *segments = (struct segment *)take(&at, e->num_slots * (int64_t)sizeof(struct segment));
    struct layer_call c = {.e = e, .segments = segments, .order = order, .out = out, .h = h, .i = i, .dtype = dtype};
    c.in = take_rows8(&at, rows, h);
    c.mid = take_rows8(&at, rows, i);
    c.inner = (float *)take(&at, rows * i * 4);
    c.wide = (float *)take(&at, rows * h * 4);
    int64_t num = sort_rows(e, slots, rows, order, segments, starts), blocks13 = i / LANES, blocks2 = h / BLOCK;
    if (num < 0) return -1;
    int64_t size = dtype == FLOAT32 ? 4 : 2;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            to_float((const char *)x + order[r] * hidden * size, dtype, hidden, h, c.wide + r * h);
            quantise_row(c.wide + r * h, h, c.in.values + r * h, c.in.scales + r * (h / GROUP),
                         c.in.sums + r * (h / GROUP));
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t u = 0; u < num * blocks13; u++) first_half(&c, segments + u / blocks13, u % blocks13);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++)
            quantise_row(c.inner + r * i, i, c.mid.values + r * i, c.mid.scales + r * (i / GROUP),
                         c.mid.sums + r * (i / GROUP));
#pragma omp for schedule(dynamic, 4)
        for (int64_t u = 0; u < num * blocks2; u++) second_half(&c, segments + u / blocks2, u % blocks2);
    }
    return 0;
}
