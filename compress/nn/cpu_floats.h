// What `cpu.cpp` is made of, 1: codes to floats in registers, for two levels of instructions, and products of rows.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define HAS_X86 1
#endif

enum Kind { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

extern "C" struct Layer {
    const uint8_t* packed;  // [rows, row_bytes]
    const void* scale;      // [rows, groups], of scale_kind
    const int8_t* zero;     // [rows, groups], or null
    int64_t rows, columns, groups, row_bytes;
    int32_t bits, scale_kind;
};

namespace {

float from_bfloat16(uint16_t value) {
    uint32_t wide = uint32_t(value) << 16;
    float result;
    std::memcpy(&result, &wide, 4);
    return result;
}

uint16_t to_bfloat16(float value) {  // to nearest, ties to even; NaN stays NaN
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    if ((wide & 0x7fffffff) > 0x7f800000) return uint16_t((wide >> 16) | 64);
    return uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

#if HAS_X86

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"), always_inline)) inline
#define AVX2 __attribute__((target("avx2,fma,f16c"), always_inline)) inline

// What a level of instructions offers: 16 floats as one value, and how to make them. Two classes, one product below.
struct Wide {  // AVX-512
    using Vector = __m512;
    AVX512 static Vector zeros() { return _mm512_setzero_ps(); }
    AVX512 static Vector all(float value) { return _mm512_set1_ps(value); }
    AVX512 static Vector load(const float* from) { return _mm512_loadu_ps(from); }
    AVX512 static void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
    AVX512 static void store(uint16_t* to, Vector value) {  // to bfloat16, to nearest, ties to even
        const __m512i wide = _mm512_castps_si512(value), odd = _mm512_srli_epi32(wide, 16);
        const __m512i up = _mm512_add_epi32(_mm512_and_si512(odd, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
        _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(wide, up), 16)));
    }
    AVX512 static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
    AVX512 static float sum(Vector value) { return _mm512_reduce_add_ps(value); }

    // 32 codes as two vectors, in the order that `place` gives: where one load can serve all lanes, it is not the
    // order of the columns.
    template <int BITS>
    AVX512 static void codes(const uint8_t* from, Vector& first, Vector& second) {
        if (BITS == 8) {
            first = eights(from), second = eights(from + 16);
        } else if (BITS == 4) {
            const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
            const __m512i shift = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
            first = _mm512_permutexvar_ps(_mm512_srlv_epi32(words(from), shift), table);
            second = _mm512_permutexvar_ps(_mm512_srlv_epi32(words(from + 8), shift), table);
        } else if (BITS == 3) {  // 6 bytes each; the look-up sees four bits, of which the last decides nothing
            const __m512 table = _mm512_setr_ps(-4, -3, -2, -1, 0, 1, 2, 3, -4, -3, -2, -1, 0, 1, 2, 3);
            first = _mm512_permutexvar_ps(threes(from), table);
            second = _mm512_permutexvar_ps(threes(from + 6), table);
        } else {
            const __m512 table = _mm512_setr_ps(-2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1);
            const __m512i shift = _mm512_setr_epi32(0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
            const __m512i both = words(from);
            first = _mm512_permutexvar_ps(_mm512_srlv_epi32(both, shift), table);
            second = _mm512_permutexvar_ps(_mm512_srlv_epi32(both, _mm512_add_epi32(shift, _mm512_set1_epi32(16))), table);
        }
    }
    // Two vectors as `codes` gives them, in the order of the columns.
    template <int BITS>
    AVX512 static void in_order(Vector& first, Vector& second) {
        const __m512i turns = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        if (BITS == 4) first = _mm512_permutexvar_ps(turns, first), second = _mm512_permutexvar_ps(turns, second);
        if (BITS == 2) {
            const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            const __m512 low = _mm512_permutex2var_ps(first, even, second);
            second = _mm512_permutex2var_ps(first, _mm512_add_epi32(even, _mm512_set1_epi32(1)), second), first = low;
        }
    }
    // Which of 32 columns stands at a place of the two vectors.
    static int place(int bits, int at) {
        int vector = at / 16, lane = at % 16;
        if (bits == 4) return 16 * vector + 8 * (lane % 2) + lane / 2;
        if (bits == 2) return 16 * (lane % 2) + 8 * vector + lane / 2;
        return at;
    }

  private:
    AVX512 static __m512i words(const uint8_t* from) {  // two words, in turn
        return _mm512_broadcastq_epi64(_mm_loadl_epi64((const __m128i*)from));
    }
    AVX512 static Vector eights(const uint8_t* from) {
        __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(wide, _mm512_set1_epi32(128)));
    }
    AVX512 static __m512i threes(const uint8_t* from) {  // the second load ends with the last of the 6 bytes
        uint32_t low, high;
        std::memcpy(&low, from, 4), std::memcpy(&high, from + 2, 4);
        __m512i index = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
        return _mm512_srlv_epi32(index, _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 8, 11, 14, 17, 20, 23, 26, 29));
    }
};

struct Pair {
    __m256 a, b;
};

struct Narrow {  // AVX2: two registers for 16 floats
    using Vector = Pair;
    AVX2 static Vector zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    AVX2 static Vector all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    AVX2 static Vector load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
    AVX2 static void store(float* to, Vector v) { _mm256_storeu_ps(to, v.a), _mm256_storeu_ps(to + 8, v.b); }
    AVX2 static void store(uint16_t* to, Vector v) {
        alignas(32) float plain[16];
        _mm256_store_ps(plain, v.a), _mm256_store_ps(plain + 8, v.b);
        for (int i = 0; i < 16; i++) to[i] = to_bfloat16(plain[i]);
    }
    AVX2 static Vector fma(Vector x, Vector y, Vector z) {
        return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
    }
    AVX2 static float sum(Vector v) {
        __m256 both = _mm256_add_ps(v.a, v.b);
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    }

    template <int BITS>
    AVX2 static __m256 eight(uint32_t word, __m256i shift) {
        __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(word), shift);
        index = _mm256_and_si256(index, _mm256_set1_epi32((1 << BITS) - 1));
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(index, _mm256_set1_epi32(1 << (BITS - 1))));
    }

    template <int BITS>
    AVX2 static Vector sixteen(const uint8_t* from) {
        uint32_t low, high;
        std::memcpy(&low, from, 4);
        if (BITS == 4) {
            std::memcpy(&high, from + 4, 4);
            __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
            return {eight<BITS>(low, shift), eight<BITS>(high, shift)};
        }
        if (BITS == 3) {
            std::memcpy(&high, from + 2, 4);
            return {eight<BITS>(low, _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21)),
                    eight<BITS>(high, _mm256_setr_epi32(8, 11, 14, 17, 20, 23, 26, 29))};
        }
        if (BITS == 2)
            return {eight<BITS>(low, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14)),
                    eight<BITS>(low, _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30))};
        __m256i first = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
        __m256i second = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8)));
        __m256i offset = _mm256_set1_epi32(128);
        return {_mm256_cvtepi32_ps(_mm256_sub_epi32(first, offset)), _mm256_cvtepi32_ps(_mm256_sub_epi32(second, offset))};
    }
    template <int BITS>
    AVX2 static void codes(const uint8_t* from, Vector& first, Vector& second) {
        first = sixteen<BITS>(from), second = sixteen<BITS>(from + 2 * BITS);
    }
    template <int BITS>
    AVX2 static void in_order(Vector&, Vector&) {}
    static int place(int, int at) { return at; }
};

#ifndef AHEAD
#define AHEAD 8192
#endif

// `count` numbers of a kind as floats; where the processor has AVX2, it has the conversion of halves.
__attribute__((target("avx2,f16c"))) void to_floats(const void* from, int64_t count, int32_t kind, float* to) {
    if (kind == FLOAT32) {
        std::memcpy(to, from, count * 4);
        return;
    }
    const uint16_t* narrow = (const uint16_t*)from;
    if (kind == BFLOAT16) {
        for (int64_t i = 0; i < count; i++) to[i] = from_bfloat16(narrow[i]);
        return;
    }
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(narrow + i))));
    for (; i < count; i++) {
        uint16_t last[8] = {narrow[i]};
        float wide[8];
        _mm256_storeu_ps(wide, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)last)));
        to[i] = wide[0];
    }
}

__attribute__((target("avx2"))) void to_halves(const float* from, int64_t count, uint16_t* to) {
    for (int64_t i = 0; i < count; i++) to[i] = to_bfloat16(from[i]);
}

void row_scales(const Layer& w, int64_t row, int64_t rows, float* to) {
    const int64_t size = w.scale_kind == FLOAT32 ? 4 : 2;
    to_floats((const char*)w.scale + row * w.groups * size, rows * w.groups, w.scale_kind, to);
}

// How far ahead memory is asked for: whole blocks of rows, since rows are short and the processor's own guess ends with
// each. `block`: bytes of a block.
int64_t bytes_ahead(int64_t block) { return (AHEAD + block - 1) / block * block; }

// ROWS rows of W times MANY rows of x, whose columns stand in the order of LEVEL::place; `scales` float
// [ROWS, groups]; `sums` [MANY, groups]: x summed over each group. UNITS of 32 columns have one scale. For one row of x
// it multiplies sums over UNITS; for several, the codes, which then takes less.
#define PRODUCT(NAME, LEVEL, TARGET)                                                                                   \
    template <int BITS, int UNITS, int ROWS, int MANY>                                                                 \
    TARGET static void NAME(const Layer& w, int64_t row, const float* x, int64_t stride, const float* scales,          \
                            const float* sums, float* out, int64_t out_stride) {                                       \
        const int64_t parts = w.columns / w.groups / (32 * UNITS);                                                     \
        const int64_t ahead = bytes_ahead(ROWS * w.row_bytes);                                                         \
        LEVEL::Vector total[ROWS][MANY];                                                                               \
        for (int r = 0; r < ROWS; r++)                                                                                 \
            for (int m = 0; m < MANY; m++) total[r][m] = LEVEL::zeros();                                               \
        const uint8_t* from = w.packed + row * w.row_bytes;                                                            \
        const float* at = x;                                                                                           \
        LEVEL::Vector first, second;                                                                                   \
        for (int64_t g = 0; g < w.groups; g++)                                                                         \
            for (int64_t p = 0; p < parts; p++) {                                                                      \
                LEVEL::Vector part[ROWS][2];                                                                           \
                for (int r = 0; r < ROWS; r++) part[r][0] = part[r][1] = LEVEL::zeros();                               \
                for (int r = 0; r < ROWS; r++) _mm_prefetch((const char*)from + r * w.row_bytes + ahead, _MM_HINT_T0); \
                _Pragma("GCC unroll 4") for (int u = 0; u < UNITS; u++, from += 4 * BITS, at += 32) {                  \
                    _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; r++) {                                           \
                        LEVEL::codes<BITS>(from + r * w.row_bytes, first, second);                                     \
                        if (MANY == 1) {                                                                               \
                            part[r][0] = LEVEL::fma(first, LEVEL::load(at), part[r][0]);                               \
                            part[r][1] = LEVEL::fma(second, LEVEL::load(at + 16), part[r][1]);                         \
                            continue;                                                                                  \
                        }                                                                                              \
                        const LEVEL::Vector scale = LEVEL::all(scales[r * w.groups + g]);                              \
                        first = LEVEL::fma(first, scale, LEVEL::zeros()), second = LEVEL::fma(second, scale, LEVEL::zeros()); \
                        _Pragma("GCC unroll 8") for (int m = 0; m < MANY; m++)                                         \
                            total[r][m] = LEVEL::fma(first, LEVEL::load(at + m * stride), total[r][m]);                \
                        _Pragma("GCC unroll 8") for (int m = 0; m < MANY; m++)                                         \
                            total[r][m] = LEVEL::fma(second, LEVEL::load(at + m * stride + 16), total[r][m]);          \
                    }                                                                                                  \
                }                                                                                                      \
                if (MANY == 1)                                                                                         \
                    for (int r = 0; r < ROWS; r++) {                                                                   \
                        const LEVEL::Vector scale = LEVEL::all(scales[r * w.groups + g]);                              \
                        total[r][0] = LEVEL::fma(part[r][0], scale, LEVEL::fma(part[r][1], scale, total[r][0]));       \
                    }                                                                                                  \
            }                                                                                                          \
        for (int r = 0; r < ROWS; r++)                                                                                 \
            for (int m = 0; m < MANY; m++) {                                                                           \
                float sum = LEVEL::sum(total[r][m]);                                                                   \
                if (w.zero)                                                                                            \
                    for (int64_t g = 0; g < w.groups; g++)                                                             \
                        sum -= w.zero[(row + r) * w.groups + g] * scales[r * w.groups + g] * sums[m * w.groups + g];   \
                out[m * out_stride + row + r] = sum;                                                                   \
            }                                                                                                          \
    }
PRODUCT(product_wide, Wide, AVX512)
PRODUCT(product_narrow, Narrow, AVX2)

constexpr int ROWS = 4;

#define ROW_BLOCK(NAME, PRODUCT_NAME, TARGET)                                                                          \
    template <int BITS, int UNITS>                                                                                     \
    __attribute__((target(TARGET))) void NAME(const Layer& w, int64_t row, int64_t rows, const float* x, int64_t many, \
                                              const float* scales, const float* sums, float* out) {                    \
        for (int64_t m = 0; m < many;) {                                                                               \
            const float *at = x + m * w.columns, *sum = sums ? sums + m * w.groups : nullptr;                          \
            float* to = out + m * w.rows;                                                                              \
            int64_t left = many - m;                                                                                   \
            if (rows == ROWS && left >= 4)                                                                             \
                PRODUCT_NAME<BITS, UNITS, ROWS, 4>(w, row, at, w.columns, scales, sum, to, w.rows), m += 4;            \
            else if (rows == ROWS)                                                                                     \
                PRODUCT_NAME<BITS, UNITS, ROWS, 1>(w, row, at, w.columns, scales, sum, to, w.rows), m += 1;            \
            else {                                                                                                     \
                for (int64_t r = 0; r < rows; r++)                                                                     \
                    PRODUCT_NAME<BITS, UNITS, 1, 1>(w, row + r, at, w.columns, scales + r * w.groups, sum, to, w.rows);\
                m += 1;                                                                                                \
            }                                                                                                          \
        }                                                                                                              \
    }
ROW_BLOCK(rows_wide, product_wide, "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
ROW_BLOCK(rows_narrow, product_narrow, "avx2,fma,f16c")

// One row of W as floats, or as bfloat16, in the order of the columns; `scales` float [groups].
#define EXPAND(NAME, LEVEL, TARGET)                                                                                    \
    template <int BITS>                                                                                                \
    __attribute__((target(TARGET))) void NAME(const Layer& w, int64_t row, const float* scales, void* out,             \
                                              int32_t kind) {                                                          \
        const int64_t group = w.columns / w.groups;                                                                    \
        const uint8_t* from = w.packed + row * w.row_bytes;                                                            \
        int64_t c = 0;                                                                                                 \
        for (int64_t g = 0; g < w.groups; g++) {                                                                       \
            const float zero = w.zero ? w.zero[row * w.groups + g] : 0.0f;                                             \
            const LEVEL::Vector by = LEVEL::all(scales[g]), less = LEVEL::all(-zero * scales[g]);                      \
            LEVEL::Vector first, second;                                                                               \
            for (const int64_t end = c + group; c < end; c += 32, from += 4 * BITS) {                                  \
                LEVEL::codes<BITS>(from, first, second);                                                               \
                LEVEL::in_order<BITS>(first, second);                                                                  \
                first = LEVEL::fma(first, by, less), second = LEVEL::fma(second, by, less);                            \
                if (kind == FLOAT32)                                                                                   \
                    LEVEL::store((float*)out + c, first), LEVEL::store((float*)out + c + 16, second);                  \
                else                                                                                                   \
                    LEVEL::store((uint16_t*)out + c, first), LEVEL::store((uint16_t*)out + c + 16, second);            \
            }                                                                                                          \
        }                                                                                                              \
    }
EXPAND(expand_wide, Wide, "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
EXPAND(expand_narrow, Narrow, "avx2,fma,f16c")

using RowBlock = void (*)(const Layer&, int64_t, int64_t, const float*, int64_t, const float*, const float*, float*);
using Expand = void (*)(const Layer&, int64_t, const float*, void*, int32_t);

int level() {
    static const int found = [] {
        __builtin_cpu_init();
        bool narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        bool wide = narrow && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        return wide ? 2 : narrow ? 1 : 0;
    }();
    return found;
}

template <int UNITS>
RowBlock row_block(int bits, bool wide) {
    switch (bits) {
        case 2: return wide ? rows_wide<2, UNITS> : rows_narrow<2, UNITS>;
        case 3: return wide ? rows_wide<3, UNITS> : rows_narrow<3, UNITS>;
        case 4: return wide ? rows_wide<4, UNITS> : rows_narrow<4, UNITS>;
        default: return wide ? rows_wide<8, UNITS> : rows_narrow<8, UNITS>;
    }
}

Expand expansion(int bits, bool wide) {
    switch (bits) {
        case 2: return wide ? expand_wide<2> : expand_narrow<2>;
        case 3: return wide ? expand_wide<3> : expand_narrow<3>;
        case 4: return wide ? expand_wide<4> : expand_narrow<4>;
        default: return wide ? expand_wide<8> : expand_narrow<8>;
    }
}

#endif

}  // namespace
