// What `cpu.cpp` is made of, 2: an input made ready for the products, in floats, bfloat16 or int8, and rows of W times it.
#pragma once

#include <cmath>

#include "cpu_floats.h"

#if HAS_X86

#define VNNI "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"
#define HALVES "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"

namespace {

// How a call is to be computed: the most that may be used of the processor, and whether inputs may be rounded to int8,
// or, where they are bfloat16 anyway, be multiplied as such.
struct How {
    bool wide, int8, halves;
};

bool has_vnni() {
    static const bool found = level() == 2 && __builtin_cpu_supports("avx512vnni");
    return found;
}

bool has_halves() {
    static const bool found = level() == 2 && __builtin_cpu_supports("avx512bf16");
    return found;
}

How how(int32_t at_most, int32_t int8, int32_t kind) {
    const bool wide = level() == 2 && at_most >= 2;
    return {wide, wide && int8 && has_vnni(), wide && kind == BFLOAT16 && has_halves()};
}

// Columns of x that share a step in int8: a group of the weight, or 128 columns of a longer one. 0: the layer is not
// served in int8 or bfloat16, since 32 bytes of codes do not lie within a group.
int64_t step_columns(const Layer& w) {
    if (w.table) return 0;
    const int64_t group = w.columns / w.groups, least = 32 * 8 / w.bits;
    if (w.bits == 3 || group % least || w.row_bytes * 8 != w.columns * w.bits) return 0;
    return group > 128 && group % 128 == 0 ? 128 : group;
}

// `many` rows of x, in the order in which the codes lie in memory.
struct Input {
    std::vector<float> x, sums;       // floats: [many, columns] and, for grids with zero points, [many, groups]
    std::vector<uint16_t> halves;     // bfloat16: [many, columns], and `sums` as for floats
    std::vector<int8_t> codes;        // int8: [many, columns], steps [many, parts], and the codes' sums
    std::vector<float> steps, whole;  // [many, parts]
    int64_t many = 0;
    bool int8 = false, half = false;
};

bool same_input(const Layer& a, const Layer& b) {  // whether what is ready for one is ready for the other
    return a.bits == b.bits && a.groups == b.groups && a.row_bytes == b.row_bytes && !a.zero == !b.zero && !a.table == !b.table;
}

// 32 floats, taken in the order of Wide::place.
__attribute__((target("avx512f"))) void turn_wide(const float* from, int64_t count, int bits, float* to) {
    alignas(64) int32_t order[32];
    for (int i = 0; i < 32; i++) order[i] = Wide::place(bits, i);
    const __m512i first = _mm512_load_si512(order), second = _mm512_load_si512(order + 16);
    for (int64_t c = 0; c < count; c += 32) {
        const __m512 a = _mm512_loadu_ps(from + c), b = _mm512_loadu_ps(from + c + 16);
        _mm512_storeu_ps(to + c, _mm512_permutex2var_ps(a, first, b));
        _mm512_storeu_ps(to + c + 16, _mm512_permutex2var_ps(a, second, b));
    }
}

template <int WAYS>
__attribute__((target(VNNI))) void round_part(const float* x, int64_t count, int8_t* to, float* step, float* whole) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t c = 0; c < count; c += 16) most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(x + c)));
    const float largest = _mm512_reduce_max_ps(most);
    const __m512 by = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    alignas(64) int8_t plain[32 * WAYS];
    for (int64_t c = 0; c < count; c += 32 * WAYS) {
        for (int i = 0; i < 32 * WAYS; i += 16) {
            const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + c + i), by));
            sum = _mm512_add_epi32(sum, codes);
            _mm_store_si128((__m128i*)(plain + i), _mm512_cvtsepi32_epi8(codes));
        }
        for (int way = 0; way < WAYS; way++)
            for (int i = 0; i < 32; i++) to[c + 32 * way + i] = plain[WAYS * i + way];
    }
    *step = largest / 127.0f, *whole = float(_mm512_reduce_add_epi32(sum));
}

// The sums of x over each group; of x as bfloat16 if it is multiplied so.
void sum_groups(const Layer& w, const float* x, int64_t many, Input& in, bool rounded) {
    const int64_t groups = many * w.groups, group = w.columns / w.groups;
    if (int64_t(in.sums.size()) < groups) in.sums.resize(groups);
    for (int64_t i = 0; i < groups; i++) {
        float sum = 0;
        for (int64_t c = i * group; c < (i + 1) * group; c++) sum += rounded ? from_bfloat16(to_bfloat16(x[c])) : x[c];
        in.sums[i] = sum;
    }
}

// x rounded to bfloat16, each 32 * WAYS columns in the order in which bytes of codes, widened and shifted, have them.
template <int WAYS>
__attribute__((target(HALVES))) void turn_halves(const float* x, int64_t count, uint16_t* to) {
    alignas(64) uint16_t plain[32 * WAYS];
    for (int64_t c = 0; c < count; c += 32 * WAYS) {
        for (int i = 0; i < 32 * WAYS; i += 16)
            _mm256_store_si256((__m256i*)(plain + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + c + i)));
        for (int way = 0; way < WAYS; way++)
            for (int i = 0; i < 32; i++) to[c + 32 * way + i] = plain[WAYS * i + way];
    }
}

// x float [many, columns] made ready for products with w.
void prepare(const Layer& w, const float* x, int64_t many, How how, Input& in) {
    const int64_t count = many * w.columns, share = step_columns(w);
    in.many = many, in.int8 = how.int8 && share;
    if (in.int8) {
        const int64_t parts = count / share;
        if (int64_t(in.codes.size()) < count) in.codes.resize(count);
        if (int64_t(in.steps.size()) < parts) in.steps.resize(parts), in.whole.resize(parts);
        for (int64_t p = 0; p < parts; p++) {
            int8_t* to = in.codes.data() + p * share;
            float *step = &in.steps[p], *whole = &in.whole[p];
            if (w.bits == 4) round_part<2>(x + p * share, share, to, step, whole);
            if (w.bits == 2) round_part<4>(x + p * share, share, to, step, whole);
            if (w.bits == 8) round_part<1>(x + p * share, share, to, step, whole);
        }
        in.half = false;
        return;
    }
    in.half = how.halves && share && w.bits <= 4;
    if (in.half) {
        if (int64_t(in.halves.size()) < count) in.halves.resize(count);
        if (w.bits == 4) turn_halves<2>(x, count, in.halves.data());
        if (w.bits == 2) turn_halves<4>(x, count, in.halves.data());
        if (w.zero) sum_groups(w, x, many, in, true);
        return;
    }
    if (int64_t(in.x.size()) < count) in.x.resize(count);
    if (how.wide && !w.table && (w.bits == 4 || w.bits == 2))
        turn_wide(x, count, w.bits, in.x.data());
    else
        std::memcpy(in.x.data(), x, count * 4);
    if (w.zero) sum_groups(w, x, many, in, false);
}

// ROWS rows of W times one row of x in int8. `by` [ROWS, parts]: scale of the weight times step of x. Codes are taken as
// they lie, from 0 to 2^bits - 1; what that adds, and zero points, is taken off with the sums of x's codes.
template <int BITS, int ROWS_NOW>
__attribute__((target(VNNI))) void product_int8(const Layer& w, int64_t row, const int8_t* x, const float* by,
                                                const float* whole, int64_t share, float* out) {
    constexpr int WAYS = 8 / BITS;
    const int64_t parts = w.columns / share, units = share / (32 * WAYS), group = w.columns / w.groups;
    const __m256i mask = _mm256_set1_epi8(char((1 << BITS) - 1));
    const uint8_t* from = w.packed + row * w.row_bytes;
    const int64_t ahead = bytes_ahead(ROWS_NOW * w.row_bytes);
    __m256 total[ROWS_NOW];
    for (int r = 0; r < ROWS_NOW; r++) total[r] = _mm256_setzero_ps();
    for (int64_t p = 0; p < parts; p++) {
        __m256i sum[ROWS_NOW];
        for (int r = 0; r < ROWS_NOW; r++) sum[r] = _mm256_setzero_si256();
        for (int64_t u = 0; u < units; u++, from += 32, x += 32 * WAYS)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS_NOW; r++) {
                const __m256i codes = _mm256_loadu_si256((const __m256i*)(from + r * w.row_bytes));
                _mm_prefetch((const char*)from + r * w.row_bytes + ahead, _MM_HINT_T0);
#pragma GCC unroll 4
                for (int way = 0; way < WAYS; way++) {
                    const __m256i part = BITS == 8 ? codes : _mm256_and_si256(_mm256_srli_epi16(codes, BITS * way), mask);
                    sum[r] = _mm256_dpbusd_epi32(sum[r], part, _mm256_loadu_si256((const __m256i*)(x + 32 * way)));
                }
            }
        for (int r = 0; r < ROWS_NOW; r++)
            total[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r]), _mm256_set1_ps(by[r * parts + p]), total[r]);
    }
    for (int r = 0; r < ROWS_NOW; r++) {
        float less = 0;
        if (w.zero)
            for (int64_t p = 0; p < parts; p++)
                less += by[r * parts + p] * whole[p] * float((1 << (BITS - 1)) + w.zero[(row + r) * w.groups + p * share / group]);
        else
            for (int64_t p = 0; p < parts; p++) less += by[r * parts + p] * whole[p] * float(1 << (BITS - 1));
        out[r] = Narrow::sum({total[r], _mm256_setzero_ps()}) - less;
    }
}

// The numbers -8 to 7 as bfloat16, and, for grids of fewer bits, the middle ones, over and over: a look-up sees five bits.
template <int BITS>
struct Halves {
    alignas(64) uint16_t table[32];
    constexpr Halves() : table() {
        constexpr uint16_t numbers[16] = {0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80,
                                          0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};
        for (int i = 0; i < 32; i++) table[i] = numbers[8 - (1 << (BITS - 1)) + i % (1 << BITS)];
    }
};

// ROWS rows of W times one row of x in bfloat16: products are exact, sums in float32.
template <int BITS, int ROWS_NOW>
__attribute__((target(HALVES))) void product_halves(const Layer& w, int64_t row, const uint16_t* x, const float* scales,
                                                    const float* sums, float* out) {
    static constexpr Halves<BITS> numbers;
    constexpr int WAYS = 8 / BITS;
    const int64_t units = w.columns / w.groups / (32 * WAYS);
    const __m512i table = _mm512_load_si512(numbers.table);
    const uint8_t* from = w.packed + row * w.row_bytes;
    const int64_t ahead = bytes_ahead(ROWS_NOW * w.row_bytes);
    __m512 total[ROWS_NOW];
    for (int r = 0; r < ROWS_NOW; r++) total[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < w.groups; g++) {
        __m512 part[ROWS_NOW][2];
        for (int r = 0; r < ROWS_NOW; r++) part[r][0] = part[r][1] = _mm512_setzero_ps();
        for (int64_t u = 0; u < units; u++, from += 32, x += 32 * WAYS)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS_NOW; r++) {
                const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(from + r * w.row_bytes)));
                _mm_prefetch((const char*)from + r * w.row_bytes + ahead, _MM_HINT_T0);
#pragma GCC unroll 4
                for (int way = 0; way < WAYS; way++) {
                    const __m512i weights = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, BITS * way), table);
                    part[r][way % 2] = _mm512_dpbf16_ps(part[r][way % 2], (__m512bh)weights,
                                                        (__m512bh)_mm512_loadu_si512(x + 32 * way));
                }
            }
        for (int r = 0; r < ROWS_NOW; r++)
            total[r] = _mm512_fmadd_ps(_mm512_add_ps(part[r][0], part[r][1]), _mm512_set1_ps(scales[r * w.groups + g]), total[r]);
    }
    for (int r = 0; r < ROWS_NOW; r++) {
        float sum = _mm512_reduce_add_ps(total[r]);
        if (w.zero)
            for (int64_t g = 0; g < w.groups; g++) sum -= w.zero[(row + r) * w.groups + g] * scales[r * w.groups + g] * sums[g];
        out[r] = sum;
    }
}

template <int BITS>
void rows_halves(const Layer& w, int64_t row, int64_t rows, const Input& in, const float* scales, float* out) {
    for (int64_t m = 0; m < in.many; m++) {
        const uint16_t* x = in.halves.data() + m * w.columns;
        const float* sums = w.zero ? in.sums.data() + m * w.groups : nullptr;
        float* to = out + m * w.rows + row;
        if (rows == ROWS)
            product_halves<BITS, ROWS>(w, row, x, scales, sums, to);
        else
            for (int64_t r = 0; r < rows; r++) product_halves<BITS, 1>(w, row + r, x, scales + r * w.groups, sums, to + r);
    }
}

template <int BITS>
void rows_int8(const Layer& w, int64_t row, int64_t rows, const Input& in, const float* scales, float* by, float* out) {
    const int64_t share = step_columns(w), parts = w.columns / share, group = w.columns / w.groups;
    for (int64_t m = 0; m < in.many; m++) {
        const float *steps = in.steps.data() + m * parts, *whole = in.whole.data() + m * parts;
        const int8_t* x = in.codes.data() + m * w.columns;
        for (int64_t r = 0; r < rows; r++)
            if (parts == w.groups)
                for (int64_t p = 0; p < parts; p++) by[r * parts + p] = scales[r * parts + p] * steps[p];
            else
                for (int64_t p = 0; p < parts; p++) by[r * parts + p] = scales[r * w.groups + p * share / group] * steps[p];
        float* to = out + m * w.rows + row;
        if (rows == ROWS)
            product_int8<BITS, ROWS>(w, row, x, by, whole, share, to);
        else
            for (int64_t r = 0; r < rows; r++) product_int8<BITS, 1>(w, row + r, x, by + r * parts, whole, share, to + r);
    }
}

// Rows [first, last) of W times every row of x: out [many, w.rows], of which it writes those columns. `first` is a
// multiple of ROWS.
void multiply_rows(const Layer& w, const Input& in, int64_t first, int64_t last, How how, float* out) {
    const RowBlock run = FOR_LAYER(row_block, w, how.wide);
    const int64_t parts = in.int8 ? w.columns / step_columns(w) : 0, needed = ROWS * (w.groups + parts);
    float few[2048];
    std::vector<float> more(needed > 2048 ? needed : 0);
    float *scales = needed > 2048 ? more.data() : few, *by = scales + ROWS * w.groups;
    for (int64_t row = first; row < last; row += ROWS) {
        const int64_t rows = row + ROWS <= last ? ROWS : last - row;
        row_scales(w, row, rows, scales);
        if (in.half)
            w.bits == 4 ? rows_halves<4>(w, row, rows, in, scales, out) : rows_halves<2>(w, row, rows, in, scales, out);
        else if (!in.int8)
            run(w, row, rows, in.x.data(), in.many, scales, w.zero ? in.sums.data() : nullptr, out);
        else if (w.bits == 4)
            rows_int8<4>(w, row, rows, in, scales, by, out);
        else if (w.bits == 2)
            rows_int8<2>(w, row, rows, in, scales, by, out);
        else
            rows_int8<8>(w, row, rows, in, scales, by, out);
    }
}

// How many rows one thread takes at a time: an eighth of its share, so that threads end together however busy the machine
// is, but 16 kB of codes at least and 256 kB at most. What is asked for ahead at the end of a piece, the other thread gets.
int64_t chunk_rows(const Layer& w, int32_t threads) {
    int64_t bytes = w.rows * w.row_bytes / (8 * threads);
    bytes = bytes < 16384 ? 16384 : bytes > 262144 ? 262144 : bytes;
    const int64_t rows = bytes / w.row_bytes / ROWS * ROWS;
    return rows < 4 * ROWS ? 4 * ROWS : rows;
}

}  // namespace

#endif
