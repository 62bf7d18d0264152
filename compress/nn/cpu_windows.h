// What `cpu.cpp` is made of, 2: codes along a trellis (`maths/trellis.py`) to the numbers that they stand for.
//
// What a code stands for is in a table of 256, at the 8 bits of the row's stream that end with it; before the row the
// stream is zeros. With AVX512-VBMI 64 such windows are picked out of the stream at once and the table lies in four
// registers; elsewhere windows are shifted out of words and the table is read by a gather.
#pragma once

#include "cpu_levels.h"

#if HAS_X86

namespace {

#define WITH_VBMI "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2,fma,f16c"
#define VBMI __attribute__((target(WITH_VBMI), always_inline)) inline

bool has_vbmi() {
    static const bool found = level() == 2 && __builtin_cpu_supports("avx512vbmi");
    return found;
}

// 256 bytes in registers.
struct Bytes {
    __m512i parts[4];
    VBMI explicit Bytes(const void* from) {
        for (int i = 0; i < 4; i++) parts[i] = _mm512_loadu_si512((const char*)from + 64 * i);
    }
    VBMI __m512i at(__m512i index) const {
        const __m512i low = _mm512_permutex2var_epi8(parts[0], index, parts[1]);
        const __m512i high = _mm512_permutex2var_epi8(parts[2], index, parts[3]);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
    }
};

// The windows of 64 codes: eight to a word of 64 bits, which has their own bytes and the one before them.
template <int BITS, int UNITS>
struct Places {
    alignas(64) uint8_t bytes[64], shifts[64];
    constexpr Places() : bytes(), shifts() {
        for (int i = 0; i < 64; i++) {
            bytes[i] = uint8_t((63 - 4 * BITS * UNITS + BITS * (i / 8) + i % 8) % 64);
            shifts[i] = uint8_t(BITS * (i % 8 + 1));
        }
    }
};

template <int BITS, int UNITS>
struct Windows {
    static constexpr int columns = 32 * UNITS, bytes_of = 4 * BITS * UNITS, count = 1;
    static constexpr Places<BITS, UNITS> places{};
    __m512i bytes, shifts;
    VBMI Windows() : bytes(_mm512_load_si512(places.bytes)), shifts(_mm512_load_si512(places.shifts)) {}
    // Of 32 * UNITS columns, `into` bytes into the row; with one unit, 32 of the windows mean nothing. What is loaded ends
    // where they do. A mask where there is no need for one takes longer than all else where rows are stored meanwhile.
    VBMI void at(const uint8_t* from, int64_t into, __m512i* to) const {
        const uint8_t* begin = from + bytes_of - 64;
        __m512i loaded;
        if (into == 0 || into < 64 - bytes_of)
            loaded = _mm512_maskz_loadu_epi8(~uint64_t(0) << (into ? 63 - bytes_of : 64 - bytes_of), begin);
        else
            loaded = _mm512_loadu_si512(begin);
        *to = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(bytes, loaded));
    }
};

// The windows of 128 codes of 4 bits, first those of even columns. Those of odd ones are the bytes as they are, and the
// others the halves of two neighbours: shifts take less than picking, which waits for the same part of the processor as
// the table's look-up does.
struct WindowsOfHalfBytes {
    static constexpr int columns = 128, bytes_of = 64, count = 2;
    VBMI void at(const uint8_t* from, int64_t into, __m512i* to) const {
        to[1] = _mm512_loadu_si512(from);
        const __m512i before = into ? _mm512_loadu_si512(from - 1) : _mm512_maskz_loadu_epi8(~uint64_t(1), from - 1);
        const __m512i newer = _mm512_slli_epi16(to[1], 4), older = _mm512_srli_epi16(before, 4);
        to[0] = _mm512_ternarylogic_epi64(_mm512_set1_epi8(char(0xF0)), newer, older, 0xCA);  // by bits: newer or older
    }
};

template <int BITS, int UNITS>
struct WideWindows {
    using Level = Wide;
    static constexpr int bytes = 4 * BITS, once = UNITS;
    Bytes table;
    Windows<BITS, UNITS> windows;
    VBMI explicit WideWindows(const Layer& w) : table(w.table->numbers) {}
    template <int>
    VBMI void read(const uint8_t* from, int64_t into, __m512* to) const {
        __m512i found;
        windows.at(from, into, &found);
        found = table.at(found);
        to[0] = floats(_mm512_castsi512_si128(found)), to[1] = floats(_mm512_extracti32x4_epi32(found, 1));
        if (UNITS == 1) return;
        to[2] = floats(_mm512_extracti32x4_epi32(found, 2)), to[3] = floats(_mm512_extracti32x4_epi32(found, 3));
    }
    template <int>
    VBMI static void in_order(__m512*) {}

  private:
    VBMI static __m512 floats(__m128i sixteen) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen)); }
};

template <int BITS>
struct NarrowWindows {
    using Level = Narrow;
    static constexpr int bytes = 4 * BITS, once = 1;
    const float* table;
    AVX2 explicit NarrowWindows(const Layer& w) : table(w.table->floats) {}
    template <int UNITS>
    AVX2 void read(const uint8_t* from, int64_t into, Pair* to) const {
        for (int i = 0; i < 2 * UNITS; i++, from += 2 * BITS)
            to[i] = {eight(from, into || i ? from[-1] : 0), eight(from + BITS, from[BITS - 1])};
    }
    template <int UNITS>
    AVX2 static void in_order(Pair*) {}

  private:
    AVX2 __m256 eight(const uint8_t* from, uint8_t before) const {
        uint32_t own = 0;
        std::memcpy(&own, from, BITS);
        const uint64_t word = uint64_t(own) << 8 | before;
        const __m128i shifts = _mm_setr_epi32(BITS, 2 * BITS, 3 * BITS, 4 * BITS);
        __m256i index = _mm256_setr_m128i(_mm_set1_epi32(int32_t(word)), _mm_set1_epi32(int32_t(word >> 4 * BITS)));
        index = _mm256_srlv_epi32(index, _mm256_setr_m128i(shifts, shifts));
        return _mm256_i32gather_ps(table, _mm256_and_si256(index, _mm256_set1_epi32(255)), 4);
    }
};

#undef VBMI

}  // namespace

#endif
