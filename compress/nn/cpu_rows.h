// What `cpu.cpp` is made of, 5: an input made ready for the products, in floats, bfloat16 or int8, and rows of W times it.
#pragma once

#include <cmath>

#include "cpu_dots.h"

#if HAS_X86

namespace {

// How a call is to be computed: the most that may be used of the processor, and whether inputs may be rounded to int8,
// or, where they are bfloat16 anyway, be multiplied as such.
struct How {
    bool wide, int8, halves;
    int pieces;  // bytes of the whole numbers that x becomes for products with codes along a trellis; 0: none
};

How how(int32_t at_most, int32_t int8, int32_t kind) {
    const bool wide = level() == 2 && at_most >= 2, bytes = wide && has_vnni();
    const int pieces = !bytes ? 0 : int8 ? 1 : kind == BFLOAT16 ? 2 : 3;
    return {wide, bytes && int8, wide && kind == BFLOAT16 && has_halves(), pieces};
}

// Columns of x that share a step in int8: a group of the weight, or 128 columns of a longer one. 0: the layer is not
// served in int8 or bfloat16, since 32 bytes of codes do not lie within a group, or its table cannot be looked up so.
int64_t step_columns(const Layer& w) {
    const int64_t group = w.columns / w.groups;
    if (w.table) return !has_vbmi() ? 0 : group <= 128 ? group : group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : 32;
    if (w.bits == 3 || group % (32 * 8 / w.bits) || w.row_bytes * 8 != w.columns * w.bits) return 0;
    return group > 128 && group % 128 == 0 ? 128 : group;
}

// Rows of x from which it takes less to make floats of codes along a trellis and multiply several rows with them.
constexpr int64_t MANY_FLOATS = 4;

// `many` rows of x, in the order in which the codes lie in memory.
struct Input {
    std::vector<float> x, sums;       // floats: [many, columns] and, for grids with zero points, [many, groups]
    std::vector<uint16_t> halves;     // bfloat16: [many, columns], and `sums` as for floats
    std::vector<int8_t> codes;        // int8: [many, pieces, columns]
    std::vector<float> steps, whole;  // [many, parts], and the codes' sums, likewise
    std::vector<int32_t> starts;      // along a trellis: [many, parts, pieces, 16], what sums begin with
    int64_t many = 0;
    int pieces = 0;  // of x in int8: bytes of each number
    bool half = false;
};

bool same_input(const Layer& a, const Layer& b) {  // whether what is ready for one is ready for the other
    return a.bits == b.bits && a.groups == b.groups && a.row_bytes == b.row_bytes && !a.zero == !b.zero &&
           !a.table == !b.table;
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

// `count` columns as whole numbers of PIECES signed bytes, each byte in a plane of its own, in the order of the columns or
// even ones first. `starts` [PIECES, 16]: what the offset of 128 adds to each sum of the products, negative.
template <int PIECES>
__attribute__((target(VNNI))) void split_part(const float* x, int64_t count, bool even_first, int8_t* to, int64_t plane,
                                              float* step, int32_t* starts) {
    const __m128i evens = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    constexpr float limit = PIECES == 1 ? 127 : PIECES == 2 ? 127 << 8 : 127 << 16;
    __m512 most = _mm512_setzero_ps();
    __mmask16 none = 0;
    for (int64_t c = 0; c < count; c += 16) {
        const __m512 now = _mm512_loadu_ps(x + c);
        most = _mm512_max_ps(most, _mm512_abs_ps(now)), none |= _mm512_cmp_ps_mask(now, now, _CMP_UNORD_Q);
    }
    const float largest = none ? NAN : _mm512_reduce_max_ps(most);  // NaN, or an infinite number, reaches the result
    const __m512 by = _mm512_set1_ps(largest > 1e-30f ? limit / largest : 0.0f);
    for (int64_t c = 0; c < count; c += 16) {
        __m512i left = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + c), by));
        for (int i = 0; i < PIECES; i++) {
            const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(left, 24), 24);
            const __m128i bytes = _mm512_cvtsepi32_epi8(i == PIECES - 1 ? left : low);
            left = _mm512_srai_epi32(_mm512_sub_epi32(left, low), 8);
            int8_t* at = to + i * plane;
            if (even_first) {
                const __m128i turned = _mm_shuffle_epi8(bytes, evens);
                _mm_storel_epi64((__m128i*)(at + c / 2), turned);
                _mm_storel_epi64((__m128i*)(at + (count + c) / 2), _mm_unpackhi_epi64(turned, turned));
            } else {
                _mm_storeu_si128((__m128i*)(at + c), bytes);
            }
        }
    }
    *step = largest / limit;
    const int64_t once = count % 64 ? 32 : 64;  // columns that one product takes
    const __mmask64 taken = ~uint64_t(0) >> (64 - once);
    for (int i = 0; i < PIECES; i++) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t c = 0; c < count; c += once)
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(char(128)), _mm512_maskz_loadu_epi8(taken, to + i * plane + c));
        _mm512_storeu_si512(starts + 16 * i, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
    }
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
    in.many = many, in.half = false;
    in.pieces = !share ? 0 : how.int8 ? 1 : w.table && many < MANY_FLOATS ? how.pieces : 0;
    if (in.pieces) {
        const int64_t parts = count / share, row = w.columns / share;
        if (int64_t(in.codes.size()) < count * in.pieces) in.codes.resize(count * in.pieces);
        if (int64_t(in.steps.size()) < parts) in.steps.resize(parts), in.whole.resize(parts);
        if (w.table && int64_t(in.starts.size()) < parts * in.pieces * 16) in.starts.resize(parts * in.pieces * 16);
        for (int64_t p = 0; p < parts; p++) {
            const float* from = x + p * share;
            int8_t* to = in.codes.data() + (p / row * in.pieces * row + p % row) * share;
            float *step = &in.steps[p], *whole = &in.whole[p];
            if (w.table)
                (in.pieces == 1 ? split_part<1> : in.pieces == 2 ? split_part<2> : split_part<3>)(
                    from, share, by_half_bytes(w), to, w.columns, step, &in.starts[p * in.pieces * 16]);
            else
                (w.bits == 8 ? round_part<1> : w.bits == 4 ? round_part<2> : round_part<4>)(from, share, to, step, whole);
        }
        return;
    }
    in.half = how.halves && share && w.bits <= 4 && !w.table;
    if (in.half) {
        if (int64_t(in.halves.size()) < count) in.halves.resize(count);
        (w.bits == 4 ? turn_halves<2> : turn_halves<4>)(x, count, in.halves.data());
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

// `rows` rows of W from `row` on, times every row of x in int8 or bfloat16. `scales` [rows, groups]; `by`: room for
// [rows, parts].
void rows_of_dots(const Layer& w, int64_t row, int64_t rows, const Input& in, Dots run, const float* scales, float* by,
                  float* out) {
    const int64_t group = w.columns / w.groups, share = in.pieces ? step_columns(w) : group, parts = w.columns / share;
    for (int64_t m = 0; m < in.many; m++) {
        const float* steps = in.steps.data() + m * parts;
        const float* whole = (in.pieces ? in.whole : in.sums).data() + m * parts;
        const int32_t* starts = in.starts.data() + m * parts * in.pieces * 16;
        if (in.pieces)
            for (int64_t r = 0; r < rows; r++)
                if (parts == w.groups)
                    for (int64_t p = 0; p < parts; p++) by[r * parts + p] = scales[r * parts + p] * steps[p];
                else
                    for (int64_t p = 0; p < parts; p++) by[r * parts + p] = scales[r * w.groups + p * share / group] * steps[p];
        const float* factors = in.pieces ? by : scales;
        const void *bytes = in.codes.data() + m * in.pieces * w.columns, *halves = in.halves.data() + m * w.columns;
        const void* x = in.pieces ? bytes : halves;
        float* to = out + m * w.rows + row;
        if (rows == ROWS)
            run.rows(w, row, x, factors, whole, starts, share, to);
        else
            for (int64_t r = 0; r < rows; r++) run.row(w, row + r, x, factors + r * parts, whole, starts, share, to + r);
    }
}

// Rows [first, last) of W times every row of x: out [many, w.rows], of which it writes those columns. `first` is a
// multiple of ROWS.
void multiply_rows(const Layer& w, const Input& in, int64_t first, int64_t last, How how, float* out) {
    const RowBlock run = FOR_LAYER(row_block, w, how.wide);
    const Dots by_dots = FOR_LAYER(dots, w, in.pieces);
    const int64_t parts = in.pieces ? w.columns / step_columns(w) : 0, needed = ROWS * (w.groups + parts);
    float few[2048];
    std::vector<float> more(needed > 2048 ? needed : 0);
    float *scales = needed > 2048 ? more.data() : few, *by = scales + ROWS * w.groups;
    for (int64_t row = first; row < last; row += ROWS) {
        const int64_t rows = row + ROWS <= last ? ROWS : last - row;
        row_scales(w, row, rows, scales);
        if (in.half || in.pieces)
            rows_of_dots(w, row, rows, in, by_dots, scales, by, out);
        else
            run(w, row, rows, in.x.data(), in.many, scales, w.zero ? in.sums.data() : nullptr, out);
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
