// What `cpu.cpp` is made of, 4: products of rows with one row of x in int8 (VNNI) or bfloat16 (AVX512-BF16).
//
// One loop for all; what a class of codes adds to it is how so many columns are read and multiplied. Codes in int8 are
// taken from 0 upwards, as the instruction wants one side of the product; what that adds, `middle` times the sums of x,
// and zero points are taken off in the end.
#pragma once

#include "cpu_floats.h"

#if HAS_X86

namespace {

#define VNNI "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"
#define HALVES "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"
#define OF(...) __attribute__((target(__VA_ARGS__), always_inline)) inline

bool has_vnni() {
    static const bool found = level() == 2 && __builtin_cpu_supports("avx512vnni");
    return found;
}

bool has_halves() {
    static const bool found = level() == 2 && __builtin_cpu_supports("avx512bf16");
    return found;
}

// Integers times int8: 32 bytes of codes at a time, columns in the order of `Input`.
template <int BITS>
struct IntegersInt8 {
    using X = int8_t;
    using Sum = __m256i;
    using Total = __m256;
    static constexpr int ways = 8 / BITS, columns = 32 * ways, bytes = 32, pieces = 1, middle = 1 << (BITS - 1);
    OF(VNNI) explicit IntegersInt8(const Layer&) {}
    OF(VNNI) static Sum begin(const int32_t*) { return _mm256_setzero_si256(); }
    OF(VNNI) static Total zeros() { return _mm256_setzero_ps(); }
    OF(VNNI) Sum add(const uint8_t* from, int64_t, const X* x, Sum sum) const {
        const __m256i codes = _mm256_loadu_si256((const __m256i*)from), mask = _mm256_set1_epi8(char((1 << BITS) - 1));
#pragma GCC unroll 4
        for (int way = 0; way < ways; way++) {
            const __m256i part = BITS == 8 ? codes : _mm256_and_si256(_mm256_srli_epi16(codes, BITS * way), mask);
            sum = _mm256_dpbusd_epi32(sum, part, _mm256_loadu_si256((const __m256i*)(x + 32 * way)));
        }
        return sum;
    }
    OF(VNNI) static Total scaled(Sum sum, float by, Total to) {
        return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(by), to);
    }
    OF(VNNI) static float sum(Total total) { return Narrow::sum({total, _mm256_setzero_ps()}); }
};

// The numbers of a trellis times whole numbers of PIECES signed bytes, lowest first, [PIECES, columns]; as many columns at
// a time and in the order that WINDOWS has. Sums of bytes are exact, and so is what each begins with: what it is too much.
template <class WINDOWS, int PIECES>
struct WindowsInt8 {
    using X = int8_t;
    using Total = __m512;
    struct Sum {
        __m512i of[PIECES];
    };
    static constexpr int columns = WINDOWS::columns, bytes = WINDOWS::bytes_of, pieces = PIECES, middle = 0;
    Bytes table;
    WINDOWS windows;
    const int64_t plane;
    OF(VNNI ",avx512vbmi") explicit WindowsInt8(const Layer& w) : table(w.table->numbers), plane(w.columns) {
        for (__m512i& part : table.parts) part = _mm512_xor_si512(part, _mm512_set1_epi8(char(128)));
    }
    OF(VNNI) static Sum begin(const int32_t* starts) {
        Sum sum;
        for (int i = 0; i < PIECES; i++) sum.of[i] = _mm512_loadu_si512(starts + 16 * i);
        return sum;
    }
    OF(VNNI) static Total zeros() { return _mm512_setzero_ps(); }
    OF(VNNI ",avx512vbmi") Sum add(const uint8_t* from, int64_t into, const X* x, Sum sum) const {
        __m512i found[WINDOWS::count];
        windows.at(from, into, found);
#pragma GCC unroll 2
        for (int v = 0; v < WINDOWS::count; v++) {
            found[v] = table.at(found[v]);
#pragma GCC unroll 3
            for (int i = 0; i < PIECES; i++) {
                const X* at = x + i * plane + 64 * v;
                const __m256i half = _mm256_loadu_si256((const __m256i*)at);
                const __m512i by = columns == 32 ? _mm512_zextsi256_si512(half) : _mm512_loadu_si512(at);
                sum.of[i] = _mm512_dpbusd_epi32(sum.of[i], found[v], by);
            }
        }
        return sum;
    }
    OF(VNNI) static Total scaled(Sum sum, float by, Total to) {
        __m512 all = _mm512_cvtepi32_ps(sum.of[PIECES - 1]);
        for (int i = PIECES - 2; i >= 0; i--)
            all = _mm512_fmadd_ps(all, _mm512_set1_ps(256), _mm512_cvtepi32_ps(sum.of[i]));
        return _mm512_fmadd_ps(all, _mm512_set1_ps(by), to);
    }
    OF(VNNI) static float sum(Total total) { return _mm512_reduce_add_ps(total); }
};

struct Two {
    __m512 a, b;
};

// Of products in bfloat16, which are exact: two sums, in float32.
struct InHalves {
    using X = uint16_t;
    using Sum = Two;
    using Total = __m512;
    static constexpr int pieces = 1, middle = 0;
    OF(HALVES) static Sum begin(const int32_t*) { return {_mm512_setzero_ps(), _mm512_setzero_ps()}; }
    OF(HALVES) static Total zeros() { return _mm512_setzero_ps(); }
    OF(HALVES) static Total scaled(Sum sum, float by, Total to) {
        return _mm512_fmadd_ps(_mm512_add_ps(sum.a, sum.b), _mm512_set1_ps(by), to);
    }
    OF(HALVES) static float sum(Total total) { return _mm512_reduce_add_ps(total); }
    OF(HALVES) static __m512 dot(__m512 sum, __m512i weights, const X* x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_loadu_si512(x));
    }
};

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

// Integers times bfloat16: 32 bytes of codes at a time, columns in the order of `Input`.
template <int BITS>
struct IntegersHalves : InHalves {
    static constexpr Halves<BITS> numbers{};
    static constexpr int ways = 8 / BITS, columns = 32 * ways, bytes = 32;
    __m512i table;
    OF(HALVES) explicit IntegersHalves(const Layer&) : table(_mm512_load_si512(numbers.table)) {}
    OF(HALVES) Sum add(const uint8_t* from, int64_t, const X* x, Sum sum) const {
        const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
#pragma GCC unroll 4
        for (int way = 0; way < ways; way++) {
            const __m512i weights = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, BITS * way), table);
            (way % 2 ? sum.b : sum.a) = dot(way % 2 ? sum.b : sum.a, weights, x + 32 * way);
        }
        return sum;
    }
};

// ROWS_NOW rows of W times one row of x, into out [ROWS_NOW]. `share`: columns of x with one step. `by` [ROWS_NOW, parts]:
// the scale of the weight, times the step of x if that is int8. `whole` [parts]: x's sums. `starts` [parts, pieces, 16]:
// what sums begin with, of codes along a trellis.
#define DOTS(NAME, TARGET)                                                                                             \
    template <class CODES, int ROWS_NOW>                                                                               \
    __attribute__((target(TARGET))) void NAME(const Layer& w, int64_t row, const void* input, const float* by,         \
                                              const float* whole, const int32_t* starts, int64_t share, float* out) {  \
        const CODES codes(w);                                                                                          \
        const int64_t parts = w.columns / share, units = share / CODES::columns, group = w.columns / w.groups;         \
        const int64_t step = w.row_bytes;                                                                              \
        const uint8_t *const begin = w.packed + row * step, *from = begin, *soon = from + bytes_ahead(ROWS_NOW * step); \
        const auto* x = (const typename CODES::X*)input;                                                               \
        typename CODES::Total total[ROWS_NOW];                                                                         \
        for (int r = 0; r < ROWS_NOW; r++) total[r] = CODES::zeros();                                                  \
        for (int64_t p = 0; p < parts; p++) {                                                                          \
            typename CODES::Sum sum[ROWS_NOW];                                                                         \
            for (int r = 0; r < ROWS_NOW; r++) sum[r] = CODES::begin(starts + p * 16 * CODES::pieces);                 \
            for (int64_t u = 0; u < units; u++, from += CODES::bytes, soon += CODES::bytes, x += CODES::columns)       \
                _Pragma("GCC unroll 4") for (int r = 0; r < ROWS_NOW; r++) {                                           \
                    _mm_prefetch((const char*)soon + r * step, _MM_HINT_T0);                                           \
                    sum[r] = codes.add(from + r * step, from - begin, x, sum[r]);                                      \
                }                                                                                                      \
            _Pragma("GCC unroll 4") for (int r = 0; r < ROWS_NOW; r++)                                                 \
                total[r] = CODES::scaled(sum[r], by[r * parts + p], total[r]);                                         \
        }                                                                                                              \
        _Pragma("GCC unroll 4") for (int r = 0; r < ROWS_NOW; r++) {                                                   \
            float less = 0;                                                                                            \
            if (w.zero || CODES::middle)                                                                               \
                for (int64_t p = 0; p < parts; p++) {                                                                  \
                    const int zero = w.zero ? w.zero[(row + r) * w.groups + p * share / group] : 0;                    \
                    less += by[r * parts + p] * whole[p] * float(CODES::middle + zero);                                \
                }                                                                                                      \
            out[r] = CODES::sum(total[r]) - less;                                                                      \
        }                                                                                                              \
    }
DOTS(dots_vnni, VNNI)
DOTS(dots_vnni_vbmi, VNNI ",avx512vbmi")
DOTS(dots_halves, HALVES)

using Dot = void (*)(const Layer&, int64_t, const void*, const float*, const float*, const int32_t*, int64_t, float*);
struct Dots {  // of ROWS rows, and of one
    Dot rows, row;
};

template <class WINDOWS>
Dots dots_of_windows(int pieces) {
    if (pieces == 1) return {dots_vnni_vbmi<WindowsInt8<WINDOWS, 1>, ROWS>, dots_vnni_vbmi<WindowsInt8<WINDOWS, 1>, 1>};
    if (pieces == 2) return {dots_vnni_vbmi<WindowsInt8<WINDOWS, 2>, ROWS>, dots_vnni_vbmi<WindowsInt8<WINDOWS, 2>, 1>};
    return {dots_vnni_vbmi<WindowsInt8<WINDOWS, 3>, ROWS>, dots_vnni_vbmi<WindowsInt8<WINDOWS, 3>, 1>};
}

// Whether x, in pieces, has the order of `WindowsOfHalfBytes`.
bool by_half_bytes(const Layer& w) { return w.table && w.bits == 4 && w.columns / w.groups % 128 == 0; }

// For x in int8 (with codes along a trellis: in so many pieces), or in bfloat16. UNITS: 2 where what has one step is a
// multiple of 64 columns.
template <int BITS, int UNITS>
Dots dots(const Layer& w, int pieces) {
    if constexpr (BITS <= 4)
        if (w.table) {
            if constexpr (BITS == 4 && UNITS == 2)
                if (by_half_bytes(w)) return dots_of_windows<WindowsOfHalfBytes>(pieces);
            return dots_of_windows<Windows<BITS, UNITS>>(pieces);
        }
    if constexpr (BITS != 3)
        if (pieces) return {dots_vnni<IntegersInt8<BITS>, ROWS>, dots_vnni<IntegersInt8<BITS>, 1>};
    if constexpr (BITS == 2 || BITS == 4)
        return {dots_halves<IntegersHalves<BITS>, ROWS>, dots_halves<IntegersHalves<BITS>, 1>};
    return {};
}

#undef OF

}  // namespace

#endif
