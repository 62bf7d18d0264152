// What `cpu.cpp` is made of, 3: products of rows in floats, and rows expanded.
#pragma once

#include <vector>

#include "cpu_windows.h"

#if HAS_X86

namespace {

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
    if (w.table)
        for (int64_t i = 0; i < rows * w.groups; i++) to[i] *= w.unit;  // exact: a power of two
}

// How far ahead memory is asked for: whole blocks of rows, since rows are short and the processor's own guess ends with
// each. `block`: bytes of a block.
int64_t bytes_ahead(int64_t block) { return (AHEAD + block - 1) / block * block; }

// ROWS rows of W times MANY rows of x, whose columns stand in the order of LEVEL::place; `scales` float
// [ROWS, groups]; `sums` [MANY, groups]: x summed over each group. UNITS of 32 columns have one scale. For one row of x
// it multiplies sums over UNITS; for several, the codes, which then takes less.
#define PRODUCT(NAME, TARGET)                                                                                          \
    template <class CODES, int UNITS, int ROWS, int MANY>                                                              \
    __attribute__((target(TARGET), always_inline)) inline static void NAME(                                            \
        const Layer& w, const CODES& codes, int64_t row, const float* x, int64_t stride, const float* scales,          \
        const float* sums, float* out, int64_t out_stride) {                                                           \
        using LEVEL = typename CODES::Level;                                                                           \
        const int64_t parts = w.columns / w.groups / (32 * UNITS);                                                     \
        const int64_t ahead = bytes_ahead(ROWS * w.row_bytes);                                                         \
        typename LEVEL::Vector total[ROWS][MANY];                                                                      \
        for (int r = 0; r < ROWS; r++)                                                                                 \
            for (int m = 0; m < MANY; m++) total[r][m] = LEVEL::zeros();                                               \
        const uint8_t *const begin = w.packed + row * w.row_bytes, *from = begin;                                      \
        const float* at = x;                                                                                           \
        constexpr int ONCE = CODES::once;                                                                              \
        typename LEVEL::Vector found[2 * ONCE];                                                                        \
        for (int64_t g = 0; g < w.groups; g++)                                                                         \
            for (int64_t p = 0; p < parts; p++) {                                                                      \
                typename LEVEL::Vector part[ROWS][2];                                                                  \
                for (int r = 0; r < ROWS; r++) part[r][0] = part[r][1] = LEVEL::zeros();                               \
                for (int r = 0; r < ROWS; r++) _mm_prefetch((const char*)from + r * w.row_bytes + ahead, _MM_HINT_T0); \
                _Pragma("GCC unroll 4") for (int u = 0; u < UNITS; u += ONCE, from += CODES::bytes * ONCE, at += 32 * ONCE) { \
                    _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; r++) {                                           \
                        codes.template read<ONCE>(from + r * w.row_bytes, from - begin, found);                        \
                        if (MANY == 1) {                                                                               \
                            _Pragma("GCC unroll 4") for (int v = 0; v < 2 * ONCE; v++)                                 \
                                part[r][v % 2] = LEVEL::fma(found[v], LEVEL::load(at + 16 * v), part[r][v % 2]);       \
                            continue;                                                                                  \
                        }                                                                                              \
                        const typename LEVEL::Vector scale = LEVEL::all(scales[r * w.groups + g]);                     \
                        for (int v = 0; v < 2 * ONCE; v++) found[v] = LEVEL::fma(found[v], scale, LEVEL::zeros());     \
                        _Pragma("GCC unroll 4") for (int v = 0; v < 2 * ONCE; v++)                                     \
                            _Pragma("GCC unroll 8") for (int m = 0; m < MANY; m++)                                     \
                                total[r][m] = LEVEL::fma(found[v], LEVEL::load(at + m * stride + 16 * v), total[r][m]); \
                    }                                                                                                  \
                }                                                                                                      \
                if (MANY == 1)                                                                                         \
                    for (int r = 0; r < ROWS; r++) {                                                                   \
                        const typename LEVEL::Vector scale = LEVEL::all(scales[r * w.groups + g]);                     \
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

constexpr int ROWS = 4;

#define ROW_BLOCK(NAME, PRODUCT_NAME, TARGET)                                                                          \
    template <class CODES, int UNITS>                                                                                  \
    __attribute__((target(TARGET))) void NAME(const Layer& w, int64_t row, int64_t rows, const float* x, int64_t many, \
                                              const float* scales, const float* sums, float* out) {                    \
        const CODES codes(w);                                                                                          \
        for (int64_t m = 0; m < many;) {                                                                               \
            const float *at = x + m * w.columns, *sum = sums ? sums + m * w.groups : nullptr;                          \
            float* to = out + m * w.rows;                                                                              \
            int64_t left = many - m;                                                                                   \
            if (rows == ROWS && left >= 4)                                                                             \
                PRODUCT_NAME<CODES, UNITS, ROWS, 4>(w, codes, row, at, w.columns, scales, sum, to, w.rows), m += 4;    \
            else if (rows == ROWS)                                                                                     \
                PRODUCT_NAME<CODES, UNITS, ROWS, 1>(w, codes, row, at, w.columns, scales, sum, to, w.rows), m += 1;    \
            else {                                                                                                     \
                for (int64_t r = 0; r < rows; r++)                                                                     \
                    PRODUCT_NAME<CODES, UNITS, 1, 1>(w, codes, row + r, at, w.columns, scales + r * w.groups, sum, to, w.rows); \
                m += 1;                                                                                                \
            }                                                                                                          \
        }                                                                                                              \
    }

// One row of W as floats, or as bfloat16, in the order of the columns; `scales` float [groups].
#define EXPAND(NAME, TARGET)                                                                                           \
    template <class CODES, int UNITS>                                                                                  \
    __attribute__((target(TARGET))) void NAME(const Layer& w, int64_t row, const float* scales, void* out,             \
                                              int32_t kind) {                                                          \
        using LEVEL = typename CODES::Level;                                                                           \
        const CODES codes(w);                                                                                          \
        const int64_t group = w.columns / w.groups;                                                                    \
        const uint8_t *const begin = w.packed + row * w.row_bytes, *from = begin;                                      \
        int64_t c = 0;                                                                                                 \
        for (int64_t g = 0; g < w.groups; g++) {                                                                       \
            const float zero = w.zero ? w.zero[row * w.groups + g] : 0.0f;                                             \
            const typename LEVEL::Vector by = LEVEL::all(scales[g]), less = LEVEL::all(-zero * scales[g]);             \
            typename LEVEL::Vector found[2 * UNITS];                                                                   \
            for (const int64_t end = c + group; c < end; from += CODES::bytes * UNITS) {                               \
                codes.template read<UNITS>(from, from - begin, found);                                                 \
                CODES::template in_order<UNITS>(found);                                                                \
                for (int u = 0; u < 2 * UNITS; u++) found[u] = LEVEL::fma(found[u], by, less);                         \
                _Pragma("GCC unroll 2") for (int u = 0; u < 2 * UNITS; u += 2, c += 32) {                              \
                    if (kind == FLOAT32)                                                                               \
                        LEVEL::store((float*)out + c, found[u], found[u + 1]);                                         \
                    else                                                                                               \
                        LEVEL::store((uint16_t*)out + c, found[u], found[u + 1]);                                      \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

#define FLOATS(NAME, TARGET)                       \
    PRODUCT(product_##NAME, TARGET)                \
    ROW_BLOCK(rows_##NAME, product_##NAME, TARGET) \
    EXPAND(expand_##NAME, TARGET)
FLOATS(wide, "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
FLOATS(vbmi, WITH_VBMI)
FLOATS(narrow, "avx2,fma,f16c")

using RowBlock = void (*)(const Layer&, int64_t, int64_t, const float*, int64_t, const float*, const float*, float*);
using Expand = void (*)(const Layer&, int64_t, const float*, void*, int32_t);

template <int BITS, int UNITS>
RowBlock row_block(const Layer& w, bool wide) {
    if constexpr (BITS <= 4)
        if (w.table)
            return wide && has_vbmi() ? rows_vbmi<WideWindows<BITS, UNITS>, UNITS> : rows_narrow<NarrowWindows<BITS>, UNITS>;
    return wide ? rows_wide<Wide::Codes<BITS>, UNITS> : rows_narrow<Narrow::Codes<BITS>, UNITS>;
}

template <int BITS, int UNITS>
Expand expansion(const Layer& w, bool wide) {
    if constexpr (BITS <= 4)
        if (w.table)
            return wide && has_vbmi() ? expand_vbmi<WideWindows<BITS, UNITS>, UNITS> : expand_narrow<NarrowWindows<BITS>, UNITS>;
    return wide ? expand_wide<Wide::Codes<BITS>, UNITS> : expand_narrow<Narrow::Codes<BITS>, UNITS>;
}

// The function of a template of bits and units that serves a layer.
#define FOR_LAYER(NAME, W, ...)                                                                                        \
    (W.columns / W.groups % 64                                                                                         \
         ? W.bits == 2 ? NAME<2, 1>(W, __VA_ARGS__) : W.bits == 3 ? NAME<3, 1>(W, __VA_ARGS__)                         \
           : W.bits == 4 ? NAME<4, 1>(W, __VA_ARGS__) : NAME<8, 1>(W, __VA_ARGS__)                                     \
         : W.bits == 2 ? NAME<2, 2>(W, __VA_ARGS__) : W.bits == 3 ? NAME<3, 2>(W, __VA_ARGS__)                         \
           : W.bits == 4 ? NAME<4, 2>(W, __VA_ARGS__) : NAME<8, 2>(W, __VA_ARGS__))

}  // namespace

#endif
