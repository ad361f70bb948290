/* Products with a pruned weight that skip its zeros, for x86-64 with AVX2 and FMA. The maths and the callers: sparse.py.

   Tokens lie along the lanes. X (T, n) is repacked into tiles [tile][n][width] of `width` tokens, and a block of W is
   compressed to its non-zero values and their columns, KEYS columns at a time, so that the part of a tile that these
   columns reach stays in the first cache. One row of the result is `width` accumulators in registers; each non-zero
   costs a broadcast and width / LANES multiply-adds whose other operand comes straight from the tile.

   Every sum runs over the non-zeros in order of their index, token by token, whatever the number of threads, the rows
   that a thread takes or the blocks in which W arrives: results do not depend on any of them. The file is compiled with
   -ffp-contract=off; multiply-adds are fused where they are written so, and nowhere in W_eff. */

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define ABI 5
#define KEYS 64 /* columns a key of one byte tells apart; 64 columns x 12 registers are 24 KB of tile */
#define MAX_VECTORS 12
#define AHEAD 16 /* rows of W that are asked of the memory before they are read */
#define STRETCH 1024 /* columns between two starts of a packed row */

typedef int64_t i64;

#ifdef __AVX512F__
#define LANES 16
typedef __m512 vec;
#define BROADCAST(p) _mm512_set1_ps(*(p))
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define ZERO() _mm512_setzero_ps()
static inline __m256 half_sums(vec a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a),
                         _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)));
}
#else
#define LANES 8
typedef __m256 vec;
#define BROADCAST(p) _mm256_broadcast_ss(p)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MUL(a, b) _mm256_mul_ps(a, b)
#define ZERO() _mm256_setzero_ps()
static inline __m256 half_sums(vec a) { return a; }
#endif

enum { FLOAT32, BFLOAT16, FLOAT16 }; /* dtypes of W, and what W_eff is rounded to */
enum { FROZEN, EFFECTIVE, DELTA };   /* W; W_eff in the canonical order; W_eff - W, not rounded */

/* Rows [first, first + rows) of a weight (all_rows, cols), and the update U of the rule for the whole of it. The rows
   are cut into `parts`, in each of which U has rank `terms`: row i of part g is the sum over k of
   left[i][k] * right[g * terms + k], in order, each product and each sum rounded. */
typedef struct {
    const void *weight; /* W[first, 0]; rows lie `stride` elements apart; or, with codes, the kept values of all rows */
    const float *left;  /* (all_rows, terms) contiguous */
    const float *right; /* (parts * terms, cols) contiguous */
    const uint8_t *codes; /* a mask of all rows (spp.weights.packed.layout), or 0; then first is 0 and rows is all_rows */
    const void *starts;   /* for any pattern: int32, or int64 where wide_starts; 0 for N:M */
    i64 stride, rows, cols, first, all_rows, parts, terms;
    i64 code_bytes, stretches, values, row_values, kept, group; /* of the packed form: `values` in all */
    int32_t dtype, rounded_to, form, wide_starts;
    int32_t adds; /* W_eff is W + U where W is not zero; else W * (1 + U) */
} block;

static inline i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

int spp_abi(void) { return ABI; }
int spp_lanes(void) { return LANES; }

/* ---- W, W_eff or W_eff - W, eight columns at a time ------------------------------------------------------------ */

static inline i64 element_size(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

static inline __m256 load(const void *from, int dtype) {
    if (dtype == FLOAT32) return _mm256_loadu_ps(from);
    __m128i bits = _mm_loadu_si128(from);
    if (dtype == FLOAT16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

static inline __m256 round_to(__m256 value, int dtype) {
    if (dtype == FLOAT32) return value;
    if (dtype == FLOAT16) return _mm256_cvtph_ps(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    __m256i bits = _mm256_castps_si256(value);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256 rounded = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32((int)0xffff0000)));
    return _mm256_blendv_ps(rounded, value, _mm256_cmp_ps(value, value, _CMP_UNORD_Q)); /* NaN stays NaN */
}

static inline __m256i is_zero(__m256 value) {
    __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff));
    return _mm256_cmpeq_epi32(magnitude, _mm256_setzero_si256());
}

/* Where in `right` the rows begin that row i of the weight takes. */
static inline i64 right_of(const block *b, i64 i) {
    return ((i + 1) * b->parts - 1) / b->all_rows * b->terms * b->cols;
}

/* Up to eight numbers, and zeros behind the last: nothing is read there. */
static inline __m256 some(const float *from, i64 count) {
    if (count >= 8) return _mm256_loadu_ps(from);
    __m256i places = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return _mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), places));
}

/* Eight columns of a row of W, of which `count` are there -> of W_eff or W_eff - W. */
static inline __m256 computed(__m256 w, const float *left, const float *right, i64 count, const block *b) {
    __m256 u = _mm256_mul_ps(_mm256_broadcast_ss(left), some(right, count));
    for (i64 k = 1; k < b->terms; k++)
        u = _mm256_add_ps(u, _mm256_mul_ps(_mm256_broadcast_ss(left + k), some(right + k * b->cols, count)));
    const __m256 one = _mm256_set1_ps(1.0f);
    if (b->adds) u = _mm256_mul_ps(u, _mm256_andnot_ps(_mm256_castsi256_ps(is_zero(w)), one));
    if (b->form == DELTA) return b->adds ? u : _mm256_mul_ps(w, u);
    __m256 result = b->adds ? _mm256_add_ps(u, w) : _mm256_mul_ps(w, _mm256_add_ps(one, u));
    result = round_to(result, b->dtype);
    __m256i lost = _mm256_andnot_si256(is_zero(w), is_zero(result));
    if (__builtin_expect(!_mm256_testz_si256(lost, lost), 0)) { /* the rescue: W's sign, the smallest kept magnitude */
        __m256 smallest = _mm256_castsi256_ps(_mm256_set1_epi32(b->dtype == FLOAT16 ? 0x33800000 : 0x00800000));
        __m256 sign = _mm256_and_ps(w, _mm256_castsi256_ps(_mm256_set1_epi32((int)0x80000000)));
        result = _mm256_blendv_ps(result, _mm256_or_ps(sign, smallest), _mm256_castsi256_ps(lost));
    }
    return b->rounded_to == b->dtype ? result : round_to(result, b->rounded_to);
}

static uint32_t places_of[256][8] __attribute__((aligned(32))); /* of a mask, highest bit first: which value a lane has */

/* Where the values of row i from column `from`, a multiple of 8, begin. */
static inline i64 first_value(const block *b, i64 i, i64 from) {
    if (!b->starts) return i * b->row_values + from / b->group * b->kept;
    i64 stretch = from / STRETCH, at = i * b->stretches + stretch;
    i64 place = b->wide_starts ? ((const int64_t *)b->starts)[at] : ((const int32_t *)b->starts)[at];
    const uint8_t *codes = b->codes + i * b->code_bytes;
    for (i64 j = stretch * (STRETCH / 8); j < from / 8; j++) place += __builtin_popcount(codes[j]);
    return place;
}

/* Asks the memory for what row i + AHEAD needs of these columns; of a weight without N:M where it is likely to lie.
   Inline by force: a call that only prefetches has no effect that a compiler sees, and it is left out. */
static inline __attribute__((always_inline)) void fetch_packed(const block *b, i64 i, i64 from, i64 count, i64 place) {
    i64 ahead = AHEAD * b->row_values, values = count, size = element_size(b->dtype);
    if (b->starts) {
        i64 at = i * b->stretches + from / STRETCH, then = at + AHEAD * b->stretches;
        ahead = b->wide_starts ? ((const int64_t *)b->starts)[then] - ((const int64_t *)b->starts)[at]
                               : ((const int32_t *)b->starts)[then] - ((const int32_t *)b->starts)[at];
    } else {
        values = count / b->group * b->kept;
    }
    const char *w = (const char *)b->weight + (place + ahead) * size;
    for (i64 k = 0; k < values * size + 64; k += 64) _mm_prefetch(w + k, _MM_HINT_T0); /* they begin within a line */
    _mm_prefetch((const char *)b->codes + (i + AHEAD) * b->code_bytes + from / 8, _MM_HINT_T0);
}

/* Eight columns of a packed row: the values from `place` on, put where the mask has a bit. */
static inline __m256 expand(const block *b, i64 place, int mask) {
    i64 size = element_size(b->dtype);
    const char *from = (const char *)b->weight + place * size;
    char rest[32];
    if (place + 8 > b->values) { /* nothing is read behind the last value */
        memset(rest, 0, sizeof rest);
        memcpy(rest, from, (b->values - place) * size);
        from = rest;
    }
    __m256 spread = _mm256_permutevar8x32_ps(load(from, b->dtype), _mm256_load_si256((const __m256i *)places_of[mask]));
    __m256i bits = _mm256_and_si256(_mm256_set1_epi32(mask), _mm256_set_epi32(1, 2, 4, 8, 16, 32, 64, 128));
    __m256i none = _mm256_cmpeq_epi32(bits, _mm256_setzero_si256());
    return _mm256_andnot_ps(_mm256_castsi256_ps(none), spread);
}

/* Values of row i (counted in the block), columns [from, from + count), count <= KEYS, zeros up to a multiple of 8. */
static inline void row_values(const block *b, i64 i, i64 from, i64 count, float *out) {
    i64 size = element_size(b->dtype);
    const char *w = (const char *)b->weight + (i * b->stride + from) * size;
    const float *left = 0, *right = 0;
    if (b->form != FROZEN) {
        left = b->left + (b->first + i) * b->terms;
        right = b->right + right_of(b, b->first + i) + from;
    }
    i64 j = 0;
    if (b->codes) {
        i64 place = first_value(b, i, from);
        const uint8_t *codes = b->codes + i * b->code_bytes + from / 8;
        if (i + AHEAD < b->rows) fetch_packed(b, i, from, count, place);
        for (; j < count; j += 8) {
            __m256 value = expand(b, place, codes[j / 8]);
            place += __builtin_popcount(codes[j / 8]);
            if (left) value = computed(value, left, right + j, count - j, b);
            _mm256_storeu_ps(out + j, value);
        }
        return;
    }
    if (i + AHEAD < b->rows) /* rows lie too far apart for the processor to foresee */
        for (i64 k = 0; k < count * size; k += 64) _mm_prefetch(w + AHEAD * b->stride * size + k, _MM_HINT_T0);
    for (; j + 8 <= count; j += 8) {
        __m256 value = load(w + j * size, b->dtype);
        if (left) value = computed(value, left, right + j, 8, b);
        _mm256_storeu_ps(out + j, value);
    }
    if (j < count) {
        char rest[32] = {0};
        memcpy(rest, w + j * size, (count - j) * size);
        __m256 value = load(rest, b->dtype);
        if (left) value = computed(value, left, right + j, count - j, b);
        _mm256_storeu_ps(out + j, value);
    }
}

/* ---- Compression: the non-zeros of up to KEYS values ----------------------------------------------------------- */

static uint32_t lanes_of[256][8] __attribute__((aligned(32))); /* the set bits of a mask, in order */
static uint64_t keys_of[256];                                  /* the same as bytes */

__attribute__((constructor)) static void fill_tables(void) {
    for (int mask = 0; mask < 256; mask++) {
        int count = 0;
        for (int bit = 0; bit < 8; bit++)
            if (mask >> bit & 1) {
                lanes_of[mask][count] = bit;
                keys_of[mask] |= (uint64_t)bit << 8 * count++;
            }
        for (int lane = 0, place = 0; lane < 8; lane++)
            places_of[mask][lane] = mask >> (7 - lane) & 1 ? place++ : 0;
    }
}

/* Appends to keys and found, and returns how many; writes up to 8 entries past them. */
static inline i64 compress(const float *values, i64 count, uint8_t *keys, float *found) {
    i64 c = 0;
    for (i64 j = 0; j < count; j += 8) {
        __m256 v = _mm256_loadu_ps(values + j);
        int mask = ~_mm256_movemask_ps(_mm256_castsi256_ps(is_zero(v))) & 255;
        __m256i lanes = _mm256_load_si256((const __m256i *)lanes_of[mask]);
        _mm256_storeu_ps(found + c, _mm256_permutevar8x32_ps(v, lanes));
        uint64_t bytes = keys_of[mask] + 0x0101010101010101ULL * (uint64_t)j;
        memcpy(keys + c, &bytes, 8);
        c += __builtin_popcount(mask);
    }
    return c;
}

/* ---- Transposition --------------------------------------------------------------------------------------------- */

static inline void transpose8(const float *from, i64 from_stride, float *to, i64 to_stride) {
    __m256 r[8], a[8];
    for (int k = 0; k < 8; k++) r[k] = _mm256_loadu_ps(from + k * from_stride);
    for (int k = 0; k < 8; k += 2) {
        a[k] = _mm256_unpacklo_ps(r[k], r[k + 1]);
        a[k + 1] = _mm256_unpackhi_ps(r[k], r[k + 1]);
    }
    for (int k = 0; k < 8; k += 4) {
        r[k] = _mm256_shuffle_ps(a[k], a[k + 2], 0x44);
        r[k + 1] = _mm256_shuffle_ps(a[k], a[k + 2], 0xEE);
        r[k + 2] = _mm256_shuffle_ps(a[k + 1], a[k + 3], 0x44);
        r[k + 3] = _mm256_shuffle_ps(a[k + 1], a[k + 3], 0xEE);
    }
    for (int k = 0; k < 4; k++) {
        _mm256_storeu_ps(to + k * to_stride, _mm256_permute2f128_ps(r[k], r[k + 4], 0x20));
        _mm256_storeu_ps(to + (k + 4) * to_stride, _mm256_permute2f128_ps(r[k], r[k + 4], 0x31));
    }
}

static void transpose(const float *from, i64 from_stride, float *to, i64 to_stride, i64 rows, i64 cols) {
    i64 whole_rows = rows & ~7LL, whole_cols = cols & ~7LL;
    for (i64 i = 0; i < whole_rows; i += 8) {
        for (i64 j = 0; j < whole_cols; j += 8)
            transpose8(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
        for (i64 j = whole_cols; j < cols; j++)
            for (i64 k = 0; k < 8; k++) to[j * to_stride + i + k] = from[(i + k) * from_stride + j];
    }
    for (i64 i = whole_rows; i < rows; i++)
        for (i64 j = 0; j < cols; j++) to[j * to_stride + i] = from[i * from_stride + j];
}

static inline i64 pieces(i64 length, i64 step) { return (length + step - 1) / step; }
static inline i64 padded(i64 bytes) { return (bytes + 63) & ~63LL; }

/* X (T, n) with rows `stride` apart -> tiles[tile][n][width]; zeros behind the last token. */
void spp_pack(const float *x, i64 tokens, i64 n, i64 stride, i64 width, float *out, int threads) {
    const i64 span = 256;
    i64 tiles = pieces(tokens, width), spans = pieces(n, span);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (i64 t = 0; t < tiles; t++)
        for (i64 s = 0; s < spans; s++) {
            i64 from = s * span, cols = smaller(n - from, span), live = smaller(tokens - t * width, width);
            float *to = out + (t * n + from) * width;
            if (live < width) memset(to, 0, sizeof(float) * cols * width);
            transpose(x + t * width * stride + from, stride, to, width, live, cols);
        }
}

/* ---- X W^T and X W --------------------------------------------------------------------------------------------- */

/* out[i] (+)= sum over the non-zeros p of row i of found[p] * tile[keys[p]], `vectors` registers a row. */
static inline __attribute__((always_inline)) void multiply(int vectors, const float *tile, const uint8_t *keys,
                                                           const float *found, const int32_t *start, i64 rows,
                                                           float *out, int add) {
    for (i64 i = 0; i < rows; i++) {
        vec sums[MAX_VECTORS], *row = (vec *)(out + i * vectors * LANES);
        for (int v = 0; v < vectors; v++) sums[v] = add ? row[v] : ZERO();
        for (i64 p = start[i]; p < start[i + 1]; p++) {
            const vec *x = (const vec *)(tile + (i64)keys[p] * (vectors * LANES));
            vec w = BROADCAST(found + p);
            for (int v = 0; v < vectors; v++) sums[v] = FMA(w, x[v], sums[v]);
        }
        for (int v = 0; v < vectors; v++) row[v] = sums[v];
    }
}

/* h[p] += sum over the tile's tokens of dy[i] * tile[keys[p]]; lists are padded to multiples of 8. */
static inline __attribute__((always_inline)) void dots(int vectors, const float *tile, const float *dy,
                                                       const uint8_t *keys, const int32_t *start, i64 rows, float *h) {
    for (i64 i = 0; i < rows; i++) {
        const vec *d = (const vec *)(dy + i * vectors * LANES);
        for (i64 p = start[i]; p < start[i + 1]; p += 8) {
            const vec *x[8];
            vec sums[8];
            for (int k = 0; k < 8; k++) x[k] = (const vec *)(tile + (i64)keys[p + k] * (vectors * LANES));
            for (int k = 0; k < 8; k++) sums[k] = MUL(d[0], x[k][0]);
            for (int v = 1; v < vectors; v++) {
                vec e = d[v];
                for (int k = 0; k < 8; k++) sums[k] = FMA(e, x[k][v], sums[k]);
            }
            __m256 a = _mm256_hadd_ps(half_sums(sums[0]), half_sums(sums[1]));
            __m256 b = _mm256_hadd_ps(half_sums(sums[2]), half_sums(sums[3]));
            __m256 c = _mm256_hadd_ps(half_sums(sums[4]), half_sums(sums[5]));
            __m256 e = _mm256_hadd_ps(half_sums(sums[6]), half_sums(sums[7]));
            __m256 low = _mm256_hadd_ps(a, b), high = _mm256_hadd_ps(c, e);
            __m256 total = _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                                         _mm256_permute2f128_ps(low, high, 0x31));
            _mm256_storeu_ps(h + p, _mm256_add_ps(_mm256_loadu_ps(h + p), total));
        }
    }
}

#define FOR_EACH_WIDTH(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12)
#define MULTIPLY(N)                                                                                                    \
    static void multiply_##N(const float *tile, const uint8_t *keys, const float *found, const int32_t *start,         \
                             i64 rows, float *out, int add) {                                                          \
        if (add) multiply(N, tile, keys, found, start, rows, out, 1);                                                  \
        else multiply(N, tile, keys, found, start, rows, out, 0);                                                      \
    }
#define DOTS(N)                                                                                                        \
    static void dots_##N(const float *tile, const float *dy, const uint8_t *keys, const int32_t *start, i64 rows,      \
                         float *h) {                                                                                   \
        dots(N, tile, dy, keys, start, rows, h);                                                                       \
    }
#define NAME_MULTIPLY(N) multiply_##N,
#define NAME_DOTS(N) dots_##N,
FOR_EACH_WIDTH(MULTIPLY)
FOR_EACH_WIDTH(DOTS)
typedef void (*multiply_function)(const float *, const uint8_t *, const float *, const int32_t *, i64, float *, int);
typedef void (*dots_function)(const float *, const float *, const uint8_t *, const int32_t *, i64, float *);
static const multiply_function multiply_by[] = {0, FOR_EACH_WIDTH(NAME_MULTIPLY)};
static const dots_function dots_by[] = {0, FOR_EACH_WIDTH(NAME_DOTS)};

/* Bytes of scratch a thread needs for `share` rows of a result that sums over `inner` entries. */
i64 spp_product_scratch(i64 share, i64 inner, i64 width) {
    return padded(share * inner * sizeof(float) + 64) + padded(share * inner + 64) +
           padded(pieces(inner, KEYS) * (share + 1) * sizeof(int32_t)) + padded(share * width * sizeof(float)) +
           padded(share * KEYS * sizeof(float));
}

/* Y[:, rows of the block] = X W^T, or, `transposed`, Y = X[:, rows of the block] W; `add`: onto what Y holds.

   tiles: of X, from spp_pack, which has `tile_rows` entries a token, W's columns or all its rows.
   y: (tokens, ...) with rows y_stride apart, its first column that of the block's first result.
   share: results a thread takes at a time; scratch: for each thread spp_product_scratch bytes, 64-aligned. */
void spp_product(const float *tiles, const block *b, int transposed, i64 tokens, i64 width, i64 tile_rows, float *y,
                 i64 y_stride, int add, i64 share, char *scratch, int threads) {
    i64 outs = transposed ? b->cols : b->rows, inner = transposed ? b->rows : b->cols;
    i64 offset = transposed ? b->first : 0, tile_count = pieces(tokens, width), groups = pieces(inner, KEYS);
    multiply_function multiply_rows = multiply_by[width / LANES];
#pragma omp parallel num_threads(threads)
    {
        char *mine = scratch + omp_get_thread_num() * spp_product_scratch(share, inner, width);
        float *found = (float *)mine;
        uint8_t *keys = (uint8_t *)(mine += padded(share * inner * sizeof(float) + 64));
        int32_t *start = (int32_t *)(mine += padded(share * inner + 64));
        float *sums = (float *)(mine += padded(groups * (share + 1) * sizeof(int32_t)));
        float *turned = (float *)(mine + padded(share * width * sizeof(float)));
#pragma omp for schedule(dynamic)
        for (i64 o = 0; o < outs; o += share) {
            i64 rows = smaller(outs - o, share), c = 0;
            for (i64 g = 0; g < groups; g++) {
                i64 from = g * KEYS, count = smaller(inner - from, KEYS);
                int32_t *begin = start + g * (share + 1);
                float values[KEYS] __attribute__((aligned(32)));
                if (transposed) { /* rows from.. of W by columns o..; at most KEYS columns a turn */
                    memset(turned, 0, sizeof(float) * rows * KEYS);
                    for (i64 part = 0; part < rows; part += KEYS) {
                        i64 cols = smaller(rows - part, KEYS);
                        float lines[8][KEYS] __attribute__((aligned(32)));
                        for (i64 i = 0; i < count; i += 8) {
                            i64 high = smaller(count - i, 8);
                            for (i64 k = 0; k < high; k++) row_values(b, from + i + k, o + part, cols, lines[k]);
                            transpose(lines[0], KEYS, turned + part * KEYS + i, KEYS, high, cols);
                        }
                    }
                }
                for (i64 i = 0; i < rows; i++) {
                    begin[i] = (int32_t)c;
                    if (!transposed) row_values(b, o + i, from, count, values);
                    c += compress(transposed ? turned + i * KEYS : values, count, keys + c, found + c);
                }
                begin[rows] = (int32_t)c;
            }
            for (i64 t = 0; t < tile_count; t++) {
                i64 live = smaller(tokens - t * width, width);
                float *result = y + t * width * y_stride + o;
                if (add) {
                    if (live < width) memset(sums, 0, sizeof(float) * rows * width);
                    transpose(result, y_stride, sums, width, live, rows);
                }
                for (i64 g = 0; g < groups; g++)
                    multiply_rows(tiles + (t * tile_rows + offset + g * KEYS) * width, keys, found,
                                  start + g * (share + 1), rows, sums, add || g > 0);
                if (groups == 0 && !add) memset(sums, 0, sizeof(float) * rows * width);
                transpose(sums, width, result, y_stride, rows, live);
            }
        }
    }
}

/* ---- The reduction of H into the gradients of left and right ------------------------------------------------------ */

/* H is dY^T X where W is not zero, times W unless the update is added to it. */

i64 spp_reduce_scratch(i64 share) {
    i64 entries = share * KEYS + 64; /* lists are padded to multiples of 8, which KEYS is */
    return 2 * padded(entries * sizeof(float)) + padded(entries) + 2 * padded((share + 1) * sizeof(int32_t));
}

/* d_right += left^T H, part by part; d_left[groups / span] += H right^T, over `span` groups of KEYS columns each.

   tiles, dy_tiles: of X (tokens, cols) and of dY (tokens, all_rows); b: form FROZEN, with the update set.
   across: groups of KEYS columns a thread takes at a time, a multiple of `span`; share: rows it takes at a time.
   d_right: as right; d_left: (ceil(groups / span), all_rows, terms); scratch: for each thread spp_reduce_scratch
   bytes, 64-aligned. */
void spp_reduce(const float *tiles, const float *dy_tiles, const block *b, i64 tokens, i64 width, float *d_right,
                float *d_left, i64 span, i64 share, i64 across, char *scratch, int threads) {
    i64 tile_count = pieces(tokens, width), groups = pieces(b->cols, KEYS);
    dots_function dots_of_rows = dots_by[width / LANES];
#pragma omp parallel num_threads(threads)
    {
        char *mine = scratch + omp_get_thread_num() * spp_reduce_scratch(share);
        i64 entries = share * KEYS + 64;
        float *h = (float *)mine, *found = (float *)(mine += padded(entries * sizeof(float)));
        uint8_t *keys = (uint8_t *)(mine += padded(entries * sizeof(float)));
        int32_t *start = (int32_t *)(mine += padded(entries));
        int32_t *length = (int32_t *)(mine + padded((share + 1) * sizeof(int32_t)));
#pragma omp for schedule(dynamic)
        for (i64 first = 0; first < groups; first += across)
            for (i64 o = 0; o < b->rows; o += share)
                for (i64 g = first; g < smaller(first + across, groups); g++) {
                    i64 from = g * KEYS, count = smaller(b->cols - from, KEYS), c = 0;
                    i64 rows = smaller(b->rows - o, share);
                    float values[KEYS] __attribute__((aligned(32)));
                    for (i64 i = 0; i < rows; i++) {
                        row_values(b, o + i, from, count, values);
                        i64 n = compress(values, count, keys + c, found + c);
                        start[i] = (int32_t)c;
                        length[i] = (int32_t)n;
                        for (; n & 7; n++) keys[c + n] = 0;
                        c += n;
                    }
                    start[rows] = (int32_t)c;
                    memset(h, 0, sizeof(float) * c);
                    for (i64 t = 0; t < tile_count; t++)
                        dots_of_rows(tiles + (t * b->cols + from) * width,
                                     dy_tiles + (t * b->all_rows + b->first + o) * width, keys, start, rows, h);
                    for (i64 i = 0; i < rows; i++) {
                        i64 row = b->first + o + i, offset = right_of(b, row) + from;
                        float *sums = d_left + (g / span * b->all_rows + row) * b->terms;
                        memset(values, 0, sizeof values);
                        for (i64 p = start[i]; p < start[i] + length[i]; p++)
                            values[keys[p]] = b->adds ? h[p] : h[p] * found[p];
                        for (i64 k = 0; k < b->terms; k++, offset += b->cols) {
                            const float *right = b->right + offset;
                            float *target = d_right + offset, scaled = b->left[row * b->terms + k];
                            for (i64 j = 0; j < count; j++) target[j] += scaled * values[j];
                            __m256 total = _mm256_setzero_ps();
                            i64 j = 0;
                            for (; j + 8 <= count; j += 8)
                                total = _mm256_fmadd_ps(_mm256_loadu_ps(values + j), _mm256_loadu_ps(right + j), total);
                            float lanes[8], sum = 0;
                            _mm256_storeu_ps(lanes, total);
                            for (int l = 0; l < 8; l++) sum += lanes[l];
                            for (; j < count; j++) sum += values[j] * right[j];
                            sums[k] += sum;
                        }
                    }
                }
    }
}
