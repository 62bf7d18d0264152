// What `cpu.cpp` is made of, 7: inputs rounded to int8 token by token as compressed-tensors does it, and what comes of
// the integer sums. Every step is that of `maths/activations.py`, in the dtype of the input, to the last bit.
#pragma once

#include "cpu_floats.h"

#if HAS_X86

namespace {

// Without fused multiply-add: torch rounds after each of the two.
#define TOKENS __attribute__((target("avx2,f16c")))

template <bool HALF>
TOKENS inline float as_stored(float value) {  // rounded to the dtype of the input
    if (!HALF) return value;
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    wide = (wide + 0x7fff + ((wide >> 16) & 1)) & 0xffff0000;
    std::memcpy(&value, &wide, 4);
    return value;
}

template <bool HALF>
TOKENS void round_token(const void* from, int64_t columns, int8_t* codes, float* scale, float* x) {
    to_floats(from, columns, HALF ? BFLOAT16 : FLOAT32, x);
    float parts[16] = {0};
    int64_t c = 0;
    for (; c + 16 <= columns; c += 16)
        for (int i = 0; i < 16; i++) {
            const float size = x[c + i] < 0 ? -x[c + i] : x[c + i];
            parts[i] = parts[i] > size ? parts[i] : size;
        }
    float largest = 0;
    for (int i = 0; i < 16; i++) largest = largest > parts[i] ? largest : parts[i];
    for (; c < columns; c++) largest = x[c] > largest ? x[c] : -x[c] > largest ? -x[c] : largest;
    float by = as_stored<HALF>(largest / 127.5f);
    if (by == 0) by = HALF ? 0.0078125f : 1.1920929e-07f;  // the dtype's epsilon
    *scale = by;
    for (c = 0; c + 8 <= columns; c += 8) {
        float eight[8];
        for (int i = 0; i < 8; i++) eight[i] = as_stored<HALF>(x[c + i] / by);
        __m256 value = _mm256_min_ps(_mm256_max_ps(_mm256_loadu_ps(eight), _mm256_set1_ps(-128)), _mm256_set1_ps(127));
        const __m256i whole = _mm256_cvtps_epi32(value);  // to nearest, ties to even
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        _mm_storel_epi64((__m128i*)(codes + c), _mm_packs_epi16(words, words));
    }
    for (; c < columns; c++) {
        float value = as_stored<HALF>(x[c] / by);
        value = value < -128 ? -128 : value > 127 ? 127 : value;
        codes[c] = int8_t(_mm_cvtss_si32(_mm_set_ss(value)));
    }
}

template <bool HALF>
TOKENS void scale_token(const int32_t* sums, int64_t rows, float scale, const float* scales, const float* bias, void* out) {
    if (bias && HALF)
        for (int64_t r = 0; r < rows; r++) ((uint16_t*)out)[r] = to_bfloat16((float(sums[r]) * scale) * scales[r] + bias[r]);
    else if (HALF)
        for (int64_t r = 0; r < rows; r++) ((uint16_t*)out)[r] = to_bfloat16((float(sums[r]) * scale) * scales[r]);
    else if (bias)
        for (int64_t r = 0; r < rows; r++) ((float*)out)[r] = (float(sums[r]) * scale) * scales[r] + bias[r];
    else
        for (int64_t r = 0; r < rows; r++) ((float*)out)[r] = (float(sums[r]) * scale) * scales[r];
}

}  // namespace

#endif
