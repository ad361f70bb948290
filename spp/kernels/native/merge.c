/* The element-wise work of merging, checking and hashing a weight, in one pass over memory, for x86-64 with AVX2, F16C
   and PCLMULQDQ. The caller: elementwise.py.

   A weight is taken CHUNK entries at a time, which stay in the first cache: W is scaled, rounded and rescued in the
   canonical order (spp/rules/adapter.py), the masks of W and of the result are read from their bits, packed and
   compared, groups are counted, bytes are summed up. Compiled with -ffp-contract=off; nothing is fused.

   Sums over a chunk run in 16 lanes of float, lane l over the entries l, l + 16, ..., and are added up in double, lane
   after lane and chunk after chunk: they do not depend on threads, or on how wide the processor is. */

#define _XOPEN_SOURCE 700

#include <errno.h>
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#define ABI 3
#define CHUNK 4096
#define SLICE 131072 /* bytes that are read from a file at a time, into the second cache; whole chunks */
#define SIZES 5 /* of the groups that are counted: 2, 4, 8, 16, 32 */

typedef int64_t i64;

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* One adapter's part of u = sum (s * beta) * alpha, the relative change of each weight. */
typedef struct {
    const float *alpha;       /* (r, inputs) */
    const float *scaled_beta; /* (outputs,) */
    i64 r;
} term;

/* A matrix as it is stored, (outputs, inputs) or, transposed, (inputs, outputs), and what it becomes. */
typedef struct {
    const term *terms; /* none: it is converted */
    i64 count, rows, cols;
    int32_t transposed, dtype, stored_as;
} plan;

typedef struct {
    i64 kept, rescued, changed; /* entries: not zero; rounded to zero; zero before and not after, or the other way */
    i64 updated, moved;         /* whose update is not zero; of these, that W alone would not have rounded to */
    double inner, square;       /* sums of change * update and update * update */
    float largest;              /* the largest |change| / |W| */
    int32_t finite_before, finite_after;
    int32_t most[SIZES]; /* the largest number of kept entries in an aligned group of each size */
    uint32_t crc;        /* of the bytes of the result, as zlib's */
} findings;

static inline i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 element_size(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

int spp_abi(void) { return ABI; }

/* ---- CRC-32 by carry-less multiplication ------------------------------------------------------------------------ */

/* The message is a polynomial over GF(2), first bit highest, and a register of 128 bits stands for 16 bytes of it. To
   move a register D bits ahead is to multiply it by x^D mod P: its first half by x^(D+64), its last by x^D, each here
   in the mirrored form in which the product of two halves lies one bit off, hence D + 32, D - 32 and the shift. */

static uint32_t byte_table[256];
static __m128i ahead_512, ahead_128;

static uint64_t power_of_x(int n) {
    uint32_t value = 0x80000000u; /* 1: in mirrored form the lowest power is the highest bit */
    for (; n > 0; n--) value = value >> 1 ^ (value & 1 ? 0xedb88320u : 0);
    return (uint64_t)value << 1;
}

__attribute__((constructor)) static void fill_tables(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; bit++) value = value >> 1 ^ (value & 1 ? 0xedb88320u : 0);
        byte_table[byte] = value;
    }
    ahead_512 = _mm_set_epi64x((long long)power_of_x(512 - 32), (long long)power_of_x(512 + 32));
    ahead_128 = _mm_set_epi64x((long long)power_of_x(128 - 32), (long long)power_of_x(128 + 32));
}

static inline __m128i ahead(__m128i value, __m128i by) {
    return _mm_xor_si128(_mm_clmulepi64_si128(value, by, 0x00), _mm_clmulepi64_si128(value, by, 0x11));
}

static inline uint32_t bytewise(uint32_t state, const uint8_t *data, i64 bytes) {
    for (i64 i = 0; i < bytes; i++) state = state >> 8 ^ byte_table[(state ^ data[i]) & 255];
    return state;
}

/* zlib's crc32 of `data`, going on from `crc`, that of what came before it (0 at the start). */
uint32_t spp_crc32(uint32_t crc, const uint8_t *data, i64 bytes) {
    uint32_t state = ~crc;
    if (bytes >= 64) {
        __m128i lanes[4];
        for (int k = 0; k < 4; k++) lanes[k] = _mm_loadu_si128((const __m128i *)data + k);
        lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128((int)state));
        for (data += 64, bytes -= 64; bytes >= 64; data += 64, bytes -= 64)
            for (int k = 0; k < 4; k++)
                lanes[k] = _mm_xor_si128(ahead(lanes[k], ahead_512), _mm_loadu_si128((const __m128i *)data + k));
        __m128i last = lanes[0];
        for (int k = 1; k < 4; k++) last = _mm_xor_si128(ahead(last, ahead_128), lanes[k]);
        uint8_t rest[16];
        _mm_storeu_si128((__m128i *)rest, last);
        state = bytewise(0, rest, 16);
    }
    return ~bytewise(state, data, bytes);
}

/* Bytes [offset, offset + bytes) of a file. */
static int read_all(int file, i64 offset, i64 bytes, char *into) {
    while (bytes > 0) {
        ssize_t count = pread(file, into, bytes, offset);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return count < 0 ? errno : -1;
        into += count;
        offset += count;
        bytes -= count;
    }
    return 0;
}

int spp_crc32_file(int file, i64 offset, i64 bytes, findings *f) {
    char data[SLICE] __attribute__((aligned(64)));
    for (i64 at = 0; at < bytes; at += SLICE) {
        i64 length = smaller(SLICE, bytes - at);
        int failed = read_all(file, offset + at, length, data);
        if (failed) return failed;
        f->crc = spp_crc32(f->crc, (const uint8_t *)data, length);
    }
    return 0;
}

/* ---- Masks from bits -------------------------------------------------------------------------------------------- */

/* Which of 32 entries are not zero, the first in the highest bit of the first byte; `high`: of each magnitude so far. */
static inline uint32_t mask_of_32(const void *values, int dtype, __m256i *high) {
    const __m256i *from = values;
    const __m256i zero = _mm256_setzero_si256();
    __m256i zeros;
    if (dtype == FLOAT32) {
        const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
        __m256i found[4];
        for (int k = 0; k < 4; k++) {
            __m256i bits = _mm256_and_si256(_mm256_loadu_si256(from + k), magnitude);
            *high = _mm256_max_epi32(*high, bits);
            found[k] = _mm256_cmpeq_epi32(bits, zero);
        }
        zeros = _mm256_packs_epi16(_mm256_packs_epi32(found[0], found[1]), _mm256_packs_epi32(found[2], found[3]));
        zeros = _mm256_permutevar8x32_epi32(zeros, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    } else {
        const __m256i magnitude = _mm256_set1_epi16(0x7fff);
        __m256i first = _mm256_and_si256(_mm256_loadu_si256(from), magnitude);
        __m256i second = _mm256_and_si256(_mm256_loadu_si256(from + 1), magnitude);
        *high = _mm256_max_epi16(*high, _mm256_max_epi16(first, second));
        zeros = _mm256_packs_epi16(_mm256_cmpeq_epi16(first, zero), _mm256_cmpeq_epi16(second, zero));
        zeros = _mm256_permute4x64_epi64(zeros, 0xd8);
    }
    const __m256i turned = _mm256_setr_epi8(7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1,
                                            0, 15, 14, 13, 12, 11, 10, 9, 8);
    return ~(uint32_t)_mm256_movemask_epi8(_mm256_shuffle_epi8(zeros, turned));
}

/* Packs the mask of `count` entries, a multiple of 8 but at the end of a tensor; zeros up to a multiple of 32. */
static void masks(const void *values, int dtype, i64 count, uint8_t *bits, __m256i *high) {
    const char *from = values;
    i64 size = element_size(dtype), i = 0;
    for (; i + 32 <= count; i += 32) {
        uint32_t mask = mask_of_32(from + i * size, dtype, high);
        memcpy(bits + i / 8, &mask, 4);
    }
    if (i < count) {
        char rest[128] = {0};
        memcpy(rest, from + i * size, (count - i) * size);
        uint32_t mask = mask_of_32(rest, dtype, high);
        memcpy(bits + i / 8, &mask, 4);
    }
}

static int all_finite(__m256i high, int dtype) {
    int32_t words[8];
    int16_t halves[16];
    memcpy(words, &high, 32);
    memcpy(halves, &high, 32);
    for (int k = 0; k < 8 && dtype == FLOAT32; k++)
        if (words[k] >= 0x7f800000) return 0;
    for (int k = 0; k < 16 && dtype != FLOAT32; k++)
        if (halves[k] >= (dtype == BFLOAT16 ? 0x7f80 : 0x7c00)) return 0;
    return 1;
}

/* Kept entries, and the most in an aligned group of each size; `bytes` is a multiple of 32. */
typedef struct {
    __m256i kept, most[SIZES];
} counts;

static inline void count_groups(const uint8_t *bits, i64 bytes, counts *c) {
    const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
    const __m256i set = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2,
                                         3, 2, 3, 3, 4);
    const __m256i pair = _mm256_setr_epi8(0, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 2, 2, 2, 2, 2, 0, 1, 1, 2, 1, 1, 1, 2, 1, 1,
                                          1, 2, 2, 2, 2, 2);
    for (i64 i = 0; i < bytes; i += 32) {
        __m256i all = _mm256_loadu_si256((const __m256i *)(bits + i));
        __m256i first = _mm256_and_si256(_mm256_srli_epi16(all, 4), low), second = _mm256_and_si256(all, low);
        __m256i a = _mm256_shuffle_epi8(set, first), b = _mm256_shuffle_epi8(set, second);
        __m256i eight = _mm256_add_epi8(a, b), sixteen = _mm256_maddubs_epi16(eight, one);
        __m256i pairs = _mm256_max_epu8(_mm256_shuffle_epi8(pair, first), _mm256_shuffle_epi8(pair, second));
        c->most[0] = _mm256_max_epu8(c->most[0], pairs);
        c->most[1] = _mm256_max_epu8(c->most[1], _mm256_max_epu8(a, b));
        c->most[2] = _mm256_max_epu8(c->most[2], eight);
        c->most[3] = _mm256_max_epi16(c->most[3], sixteen);
        c->most[4] = _mm256_max_epi32(c->most[4], _mm256_madd_epi16(sixteen, ones));
        c->kept = _mm256_add_epi64(c->kept, _mm256_sad_epu8(eight, _mm256_setzero_si256()));
    }
}

static void add_counts(const counts *c, findings *f) {
    i64 kept[4];
    memcpy(kept, &c->kept, 32);
    f->kept += kept[0] + kept[1] + kept[2] + kept[3];
    for (int size = 0; size < SIZES; size++) {
        uint8_t bytes[32]; /* every count is below 256: the other bytes of a wider lane are 0 */
        memcpy(bytes, &c->most[size], 32);
        for (int k = 0; k < 32; k++)
            if (bytes[k] > f->most[size]) f->most[size] = bytes[k];
    }
}

/* Whatever can be told of `count` values as they are. bits: (count + 7) / 8 bytes, or 0 where they are not wanted. */
void spp_scan(const void *values, int dtype, i64 count, uint8_t *bits, findings *f) {
    const char *from = values;
    i64 size = element_size(dtype);
    __m256i high = _mm256_setzero_si256();
    counts c = {0};
    for (i64 at = 0; at < count; at += CHUNK) {
        uint8_t here[CHUNK / 8] = {0};
        i64 length = smaller(CHUNK, count - at);
        masks(from + at * size, dtype, length, here, &high);
        count_groups(here, (length + 255) / 256 * 32, &c);
        if (bits) memcpy(bits + at / 8, here, (length + 7) / 8);
        f->crc = spp_crc32(f->crc, (const uint8_t *)from + at * size, length * size);
    }
    add_counts(&c, f);
    f->finite_before &= all_finite(high, dtype);
    f->finite_after = f->finite_before;
}

int spp_scan_file(int file, i64 offset, int dtype, i64 count, uint8_t *bits, findings *f) {
    char data[SLICE] __attribute__((aligned(64)));
    i64 size = element_size(dtype), step = SLICE / size;
    for (i64 at = 0; at < count; at += step) {
        i64 length = smaller(step, count - at);
        int failed = read_all(file, offset + at * size, length * size, data);
        if (failed) return failed;
        spp_scan(data, dtype, length, bits + at / 8, f);
    }
    return 0;
}

/* ---- W_merged = W * (1 + u) ------------------------------------------------------------------------------------- */

static inline void scaled(const float *vector, float by, i64 count, float *out, int add) {
    if (add)
        for (i64 i = 0; i < count; i++) out[i] = out[i] + by * vector[i];
    else
        for (i64 i = 0; i < count; i++) out[i] = by * vector[i];
}

static inline i64 group_of(i64 output, i64 r, i64 outputs) { return ((output + 1) * r - 1) / outputs; }

/* u for the entries [at, at + count) of the stored matrix. */
static void updates(const plan *p, i64 at, i64 count, float *u) {
    if (!p->count) memset(u, 0, count * sizeof(float));
    for (i64 done = 0; p->count && done < count;) {
        i64 row = (at + done) / p->cols, col = (at + done) % p->cols, span = smaller(count - done, p->cols - col);
        for (i64 k = 0; k < p->count; k++) {
            const term *t = p->terms + k;
            if (!p->transposed) {
                const float *alpha = t->alpha + group_of(row, t->r, p->rows) * p->cols + col;
                scaled(alpha, t->scaled_beta[row], span, u + done, k > 0);
                continue;
            }
            for (i64 from = col, group = group_of(col, t->r, p->cols); from < col + span; group++) {
                i64 to = smaller(col + span, (group + 1) * p->cols / t->r);
                scaled(t->scaled_beta + from, t->alpha[group * p->rows + row], to - from, u + done + from - col, k > 0);
                from = to;
            }
        }
        done += span;
    }
}

static inline __m256 load(const void *from, int dtype) {
    if (dtype == FLOAT32) return _mm256_loadu_ps(from);
    __m128i bits = _mm_loadu_si128(from);
    if (dtype == FLOAT16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

static inline __m256 rounded(__m256 value, int dtype) {
    if (dtype == FLOAT32) return value;
    if (dtype == FLOAT16) return _mm256_cvtph_ps(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    __m256i bits = _mm256_castps_si256(value);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256 near = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32((int)0xffff0000)));
    return _mm256_blendv_ps(near, value, _mm256_cmp_ps(value, value, _CMP_UNORD_Q)); /* NaN stays NaN */
}

static inline void store_16(void *to, const __m256 *values, int dtype) {
    if (dtype == FLOAT32) {
        _mm256_storeu_ps(to, values[0]);
        _mm256_storeu_ps((float *)to + 8, values[1]);
    } else if (dtype == FLOAT16) {
        _mm_storeu_si128(to, _mm256_cvtps_ph(values[0], _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128((__m128i *)to + 1, _mm256_cvtps_ph(values[1], _MM_FROUND_TO_NEAREST_INT));
    } else {
        __m256i first = _mm256_srli_epi32(_mm256_castps_si256(values[0]), 16);
        __m256i second = _mm256_srli_epi32(_mm256_castps_si256(values[1]), 16);
        _mm256_storeu_si256(to, _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xd8));
    }
}

static inline __m256i is_zero(__m256 value) {
    __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff));
    return _mm256_cmpeq_epi32(magnitude, _mm256_setzero_si256());
}

typedef struct {
    __m256 inner[2], square[2];
    __m256i updated, moved; /* counts in 8 lanes */
    float largest;
    i64 rescued;
} sums;

/* Kept entries that came out as zero get W's sign and the smallest magnitude that stays one; returns how many. */
static inline __attribute__((always_inline)) int rescued(__m256 w, int stored_as, __m256 *result) {
    const __m256 sign = _mm256_castsi256_ps(_mm256_set1_epi32((int)0x80000000));
    __m256 lost = _mm256_castsi256_ps(_mm256_andnot_si256(is_zero(w), is_zero(*result)));
    __m256 smallest = _mm256_castsi256_ps(_mm256_set1_epi32(stored_as == FLOAT16 ? 0x33800000 : 0x00800000));
    *result = _mm256_blendv_ps(*result, _mm256_or_ps(_mm256_and_ps(w, sign), smallest), lost);
    return __builtin_popcount(_mm256_movemask_ps(lost));
}

/* 16 entries; with `rescue`, kept ones that come out as zero are rescued. */
static inline __attribute__((always_inline)) void merge_16(const char *from, const float *u, char *to, int dtype,
                                                           int stored_as, int rescue, sums *s) {
    const __m256 sign = _mm256_castsi256_ps(_mm256_set1_epi32((int)0x80000000));
    __m256 results[2], sizes[2], bases[2];
    int above = 0;
    for (int half = 0; half < 2; half++) {
        __m256 w = load(from + 8 * half * element_size(dtype), dtype), update = _mm256_loadu_ps(u + 8 * half);
        __m256 result = rounded(_mm256_mul_ps(_mm256_add_ps(update, _mm256_set1_ps(1.0f)), w), stored_as);
        __m256 alone = w; /* what is stored without an update */
        if (rescue) s->rescued += rescued(w, stored_as, &result);
        if (stored_as != dtype) {
            alone = rounded(w, stored_as);
            rescued(w, stored_as, &alone);
        }
        results[half] = result;
        update = _mm256_mul_ps(update, w);
        __m256 updated = _mm256_cmp_ps(update, _mm256_setzero_ps(), _CMP_NEQ_UQ);
        __m256 moved = _mm256_and_ps(updated, _mm256_cmp_ps(result, alone, _CMP_NEQ_UQ));
        s->updated = _mm256_sub_epi32(s->updated, _mm256_castps_si256(updated)); /* a mask is -1 */
        s->moved = _mm256_sub_epi32(s->moved, _mm256_castps_si256(moved));
        __m256 change = _mm256_sub_ps(result, w);
        s->inner[half] = _mm256_add_ps(s->inner[half], _mm256_mul_ps(change, update));
        s->square[half] = _mm256_add_ps(s->square[half], _mm256_mul_ps(update, update));
        sizes[half] = _mm256_andnot_ps(sign, change);
        bases[half] = _mm256_andnot_ps(sign, w);
        __m256 least = _mm256_mul_ps(_mm256_set1_ps(s->largest), bases[half]);
        above |= _mm256_movemask_ps(_mm256_cmp_ps(sizes[half], least, _CMP_GT_OQ));
    }
    store_16(to, results, stored_as);
    if (__builtin_expect(above, 0)) { /* few divisions are left */
        float ratios[16];
        for (int half = 0; half < 2; half++) _mm256_storeu_ps(ratios + 8 * half, _mm256_div_ps(sizes[half], bases[half]));
        for (int k = 0; k < 16; k++)
            if (ratios[k] > s->largest) s->largest = ratios[k]; /* not where it is 0 / 0 */
    }
}

static inline __attribute__((always_inline)) void merge_chunk(const char *from, const float *u, char *to, i64 count,
                                                              int dtype, int stored_as, int rescue, sums *into) {
    i64 size = element_size(dtype), stored = element_size(stored_as), i = 0;
    sums s = *into; /* in registers: what is written through `to` could be anything */
    for (; i + 16 <= count; i += 16) merge_16(from + i * size, u + i, to + i * stored, dtype, stored_as, rescue, &s);
    if (i < count) {
        char before[64] = {0}, after[64];
        float factors[16] = {0};
        memcpy(before, from + i * size, (count - i) * size);
        memcpy(factors, u + i, (count - i) * sizeof(float));
        merge_16(before, factors, after, dtype, stored_as, rescue, &s);
        memcpy(to + i * stored, after, (count - i) * stored);
    }
    *into = s;
}

#define CASE(FROM, TO)                                                                                                 \
    case FROM * 3 + TO:                                                                                                \
        if (rescue) merge_chunk(from, u, to, count, FROM, TO, 1, s);                                                   \
        else merge_chunk(from, u, to, count, FROM, TO, 0, s);                                                          \
        break;
static void merge_by_dtype(const plan *p, const char *from, const float *u, char *to, i64 count, int rescue,
                           sums *s) {
    switch (p->dtype * 3 + p->stored_as) {
        CASE(FLOAT32, FLOAT32)
        CASE(FLOAT32, BFLOAT16)
        CASE(FLOAT32, FLOAT16)
        CASE(BFLOAT16, FLOAT32)
        CASE(BFLOAT16, BFLOAT16)
        CASE(BFLOAT16, FLOAT16)
        CASE(FLOAT16, FLOAT32)
        CASE(FLOAT16, BFLOAT16)
        CASE(FLOAT16, FLOAT16)
    }
}

static double total(const __m256 *halves) {
    float lanes[16];
    double sum = 0;
    memcpy(lanes, halves, 64);
    for (int k = 0; k < 16; k++) sum += lanes[k];
    return sum;
}

static i64 counted(__m256i counts) {
    int32_t lanes[8];
    i64 sum = 0;
    memcpy(lanes, &counts, 32);
    for (int k = 0; k < 8; k++) sum += lanes[k];
    return sum;
}

static int lost(const uint8_t *old, const uint8_t *new, i64 bytes) {
    uint8_t found = 0;
    for (i64 i = 0; i < bytes; i++) found |= old[i] & ~new[i];
    return found != 0;
}

/* Entries [begin, end) of a matrix: begin is a multiple of CHUNK, weight and out point at entry `begin`, bits at its
   byte of the packed mask. What is found is added to `f`. */
void spp_merge(const plan *p, const void *weight, void *out, uint8_t *bits, i64 begin, i64 end, findings *f) {
    const char *from = weight;
    char *to = out;
    i64 size = element_size(p->dtype), stored = element_size(p->stored_as);
    __m256i before = _mm256_setzero_si256(), after = _mm256_setzero_si256();
    counts c = {0};
    float u[CHUNK] __attribute__((aligned(32)));
    for (i64 at = begin; at < end; at += CHUNK) {
        i64 count = smaller(CHUNK, end - at), bytes = (count + 7) / 8;
        uint8_t old[CHUNK / 8] = {0}, new[CHUNK / 8] = {0};
        sums s;
        updates(p, at, count, u);
        masks(from, p->dtype, count, old, &before);
        for (int rescue = 0; rescue < 2; rescue++) { /* the second time only where a kept weight came out as zero */
            s = (sums){.largest = f->largest};
            merge_by_dtype(p, from, u, to, count, rescue, &s);
            masks(to, p->stored_as, count, new, &after);
            if (!lost(old, new, bytes)) break;
        }
        if (memcmp(old, new, bytes))
            for (i64 i = 0; i < bytes; i++) f->changed += __builtin_popcount(old[i] ^ new[i]);
        count_groups(new, (count + 255) / 256 * 32, &c);
        memcpy(bits + (at - begin) / 8, old, bytes);
        f->crc = spp_crc32(f->crc, (const uint8_t *)to, count * stored);
        f->inner += total(s.inner);
        f->square += total(s.square);
        f->largest = s.largest;
        f->rescued += s.rescued;
        f->updated += counted(s.updated);
        f->moved += counted(s.moved);
        from += count * size;
        to += count * stored;
    }
    add_counts(&c, f);
    f->finite_before &= all_finite(before, p->dtype);
    f->finite_after &= all_finite(after, p->stored_as);
}

/* The same of a matrix that lies in a file: `offset` is that of entry `begin`. */
int spp_merge_file(const plan *p, int file, i64 offset, void *out, uint8_t *bits, i64 begin, i64 end, findings *f) {
    char data[SLICE] __attribute__((aligned(64)));
    i64 size = element_size(p->dtype), stored = element_size(p->stored_as), step = SLICE / size;
    for (i64 at = begin; at < end; at += step) {
        i64 length = smaller(step, end - at), done = at - begin;
        int failed = read_all(file, offset + done * size, length * size, data);
        if (failed) return failed;
        spp_merge(p, data, (char *)out + done * stored, bits + done / 8, at, at + length, f);
    }
    return 0;
}
