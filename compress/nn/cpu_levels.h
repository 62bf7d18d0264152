// What `cpu.cpp` is made of, 1: a layer as it is told of, and what two levels of instructions offer: 16 floats as one
// value, and how to make them of codes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define HAS_X86 1
#endif

enum Kind { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

// What the windows of codes along a trellis stand for, multiples of a layer's `unit`.
struct Table {
    int8_t numbers[256];
    float floats[256];
};

extern "C" struct Layer {
    const uint8_t* packed;  // [rows, row_bytes]
    const void* scale;      // [rows, groups], of scale_kind
    const int8_t* zero;     // [rows, groups], or null
    int64_t rows, columns, groups, row_bytes;
    int32_t bits, scale_kind;
    const Table* table;  // of codes along a trellis, or null: codes are integers
    float unit;
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

// Codes of BITS as a product reads them, the member of a level. read: 32 * UNITS columns as floats, in the order of
// `place`; its second argument is how many bytes into the row. bytes: of 32 columns, and how many of these a product
// reads at once.
#define CODES(LEVEL, TARGET)                                                                             \
    template <int BITS>                                                                                  \
    struct Codes {                                                                                       \
        using Level = LEVEL;                                                                             \
        TARGET explicit Codes(const Layer&) {}                                                           \
        template <int UNITS>                                                                             \
        TARGET void read(const uint8_t* from, int64_t, Vector* to) const {                               \
            for (int u = 0; u < UNITS; u++) codes<BITS>(from + 4 * BITS * u, to[2 * u], to[2 * u + 1]);  \
        }                                                                                                \
        template <int UNITS>                                                                             \
        TARGET static void in_order(Vector* them) {                                                      \
            for (int u = 0; u < UNITS; u++) Level::template in_order<BITS>(them[2 * u], them[2 * u + 1]); \
        }                                                                                                \
        static constexpr int bytes = 4 * BITS, once = 1;                                                 \
    };

// `Codes` of a level are codes that are integers: how the products read them. `cpu_windows.h` has the others.
struct Wide {  // AVX-512
    using Vector = __m512;
    AVX512 static Vector zeros() { return _mm512_setzero_ps(); }
    AVX512 static Vector all(float value) { return _mm512_set1_ps(value); }
    AVX512 static Vector load(const float* from) { return _mm512_loadu_ps(from); }
    AVX512 static void store(float* to, Vector a, Vector b) { _mm512_storeu_ps(to, a), _mm512_storeu_ps(to + 16, b); }
    AVX512 static void store(uint16_t* to, Vector a, Vector b) {  // to bfloat16
        const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                               23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(rounded(a), upper, rounded(b)));
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

    CODES(Wide, AVX512)

  private:
    AVX512 static __m512i rounded(Vector value) {  // bfloat16 in the upper halves: to nearest, ties to even
        const __m512i wide = _mm512_castps_si512(value), odd = _mm512_srli_epi32(wide, 16);
        const __m512i up = _mm512_add_epi32(_mm512_and_si512(odd, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
        return _mm512_add_epi32(wide, up);
    }
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
    AVX2 static void store(float* to, Vector v, Vector w) {
        _mm256_storeu_ps(to, v.a), _mm256_storeu_ps(to + 8, v.b), _mm256_storeu_ps(to + 16, w.a), _mm256_storeu_ps(to + 24, w.b);
    }
    AVX2 static void store(uint16_t* to, Vector v, Vector w) { store(to, v), store(to + 16, w); }
    AVX2 static void store(uint16_t* to, Vector v) {  // to bfloat16
        const __m256i both = _mm256_packus_epi32(rounded(v.a), rounded(v.b));
        _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(both, 0xD8));
    }
    AVX2 static __m256i rounded(__m256 value) {  // to nearest, ties to even
        const __m256i wide = _mm256_castps_si256(value), odd = _mm256_srli_epi32(wide, 16);
        const __m256i up = _mm256_add_epi32(_mm256_and_si256(odd, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
        return _mm256_srli_epi32(_mm256_add_epi32(wide, up), 16);
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

    CODES(Narrow, AVX2)
};

#undef CODES

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

#endif

}  // namespace
