// What `cpu.cpp` is made of, 6: a whole decoder block for one new token, in one call.
//
// RMSNorm, queries, keys and values, rotary positions, attention over the kept keys and values, output, residual,
// RMSNorm, gated MLP, residual. Everything between input and output is float32; keys and values are kept in the dtype of
// the input. One team of threads for all of it, with a barrier between its parts.
#pragma once

#include "cpu_rows.h"

enum { Q = 0, K, V, O, GATE, UP, DOWN, LAYERS };

extern "C" struct Block {
    const Layer* layers[LAYERS];
    const float* biases[LAYERS];  // [rows], or null
    const float *norm_in, *norm_after;  // [hidden]
    const float *norm_q, *norm_k;       // [head_size], or null
    float eps_in, eps_after, eps_q, eps_k, scaling;
    int32_t heads, kept_heads, head_size;
};

// What changes from token to token. keys and values: [kept_heads, room, head_size] in the dtype of x, of which
// `length` - 1 tokens are there; the new one is written behind them. cosine and sine: [head_size].
extern "C" struct Step {
    const void *x, *cosine, *sine;
    void *keys, *values, *out;
    int64_t room, length;
    int32_t kind, threads, at_most, int8;
};

#if HAS_X86

namespace {

#define STEP_TARGET __attribute__((target("avx2,fma,f16c")))

STEP_TARGET __m256 exponential(__m256 x) {  // relative error under 3e-7; 2^n times a polynomial on +-ln(2)/2
    x = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(88.0f)), _mm256_set1_ps(-87.0f));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.0f / 720);
    for (float next : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(next));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)));
}

STEP_TARGET __m256 eight_floats(const void* from, int64_t at, int32_t kind) {
    if (kind == FLOAT32) return _mm256_loadu_ps((const float*)from + at);
    const __m128i half = _mm_loadu_si128((const __m128i*)((const uint16_t*)from + at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

void put(void* to, int64_t at, float value, int32_t kind) {
    if (kind == FLOAT32)
        ((float*)to)[at] = value;
    else
        ((uint16_t*)to)[at] = to_bfloat16(value);
}

STEP_TARGET void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* to) {
    __m256 squares = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) squares = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(x + i), squares);
    float sum = Narrow::sum({squares, _mm256_setzero_ps()});
    for (; i < count; i++) sum += x[i] * x[i];
    const float by = 1.0f / std::sqrt(sum / count + eps);
    for (i = 0; i < count; i++) to[i] = x[i] * by * weight[i];
}

STEP_TARGET void gate_times_up(float* gate, const float* up, int64_t count) {  // silu(gate) * up, over gate
    float padded[8], beside[8];
    for (int64_t i = 0; i < count; i += 8) {
        const int64_t now = count - i < 8 ? count - i : 8;
        std::memcpy(padded, gate + i, now * 4), std::memcpy(beside, up + i, now * 4);
        const __m256 x = _mm256_loadu_ps(padded), one = _mm256_set1_ps(1.0f);
        const __m256 e = exponential(_mm256_sub_ps(_mm256_setzero_ps(), x));
        const __m256 y = _mm256_mul_ps(_mm256_div_ps(x, _mm256_add_ps(one, e)), _mm256_loadu_ps(beside));
        _mm256_storeu_ps(padded, y);
        std::memcpy(gate + i, padded, now * 4);
    }
}

// The head's norm, if it has one, and its turn by the position: x [size] in place.
void norm_and_turn(float* x, const float* weight, float eps, const float* cosine, const float* sine, int64_t size) {
    if (weight) rms_norm(x, weight, size, eps, x);
    for (int64_t i = 0; i < size / 2; i++) {
        const float a = x[i], b = x[i + size / 2];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + size / 2] = b * cosine[i + size / 2] + a * sine[i + size / 2];
    }
}

// One query head over the kept tokens: out [size]. `scores` has room for `length` floats, rounded up to 8.
STEP_TARGET void attend(const float* query, const void* keys, const void* values, int64_t length, int64_t size,
                        float scaling, int32_t kind, float* scores, float* out) {
    float most = -INFINITY;
    for (int64_t t = 0; t < length; t++) {
        __m256 sum = _mm256_setzero_ps();
        for (int64_t i = 0; i < size; i += 8)
            sum = _mm256_fmadd_ps(_mm256_loadu_ps(query + i), eight_floats(keys, t * size + i, kind), sum);
        scores[t] = Narrow::sum({sum, _mm256_setzero_ps()}) * scaling;
        if (!(scores[t] <= most)) most = scores[t];
    }
    float total = 0;
    for (int64_t t = length; t % 8; t++) scores[t] = -INFINITY;
    for (int64_t t = 0; t < length; t += 8)
        _mm256_storeu_ps(scores + t, exponential(_mm256_sub_ps(_mm256_loadu_ps(scores + t), _mm256_set1_ps(most))));
    for (int64_t t = 0; t < length; t++) total += scores[t];
    for (int64_t i = 0; i < size; i += 8) {
        __m256 sum = _mm256_setzero_ps();
        for (int64_t t = 0; t < length; t++)
            sum = _mm256_fmadd_ps(_mm256_set1_ps(scores[t]), eight_floats(values, t * size + i, kind), sum);
        _mm256_storeu_ps(out + i, _mm256_div_ps(sum, _mm256_set1_ps(total)));
    }
}

struct Own {  // what a thread keeps from call to call
    Input inputs[3];
    std::vector<float> floats;
};

void add(const float* bias, int64_t first, int64_t last, float* to) {
    if (bias)
        for (int64_t r = first; r < last; r++) to[r] += bias[r];
}

// Rows of up to three layers with one input x, shared out among the threads of the team. No barrier: a thread that is
// done goes on.
void multiply_layers(const Layer* const* layers, const float* const* biases, int count, const float* x, How how, Own& own,
                     float* const* outs, int32_t threads) {
    const Input* ready[3];
    int64_t chunks[3], all = 0;
    for (int i = 0; i < count; i++) {
        if (i && same_input(*layers[i], *layers[i - 1]))
            ready[i] = ready[i - 1];
        else
            prepare(*layers[i], x, 1, how, own.inputs[i]), ready[i] = &own.inputs[i];
        const int64_t rows = chunk_rows(*layers[i], threads);
        chunks[i] = (layers[i]->rows + rows - 1) / rows, all += chunks[i];
    }
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t chunk = 0; chunk < all; chunk++) {
        int i = 0;
        int64_t at = chunk;
        while (at >= chunks[i]) at -= chunks[i++];
        const int64_t rows = chunk_rows(*layers[i], threads), first = at * rows;
        const int64_t last = first + rows < layers[i]->rows ? first + rows : layers[i]->rows;
        multiply_rows(*layers[i], *ready[i], first, last, how, outs[i]);
        add(biases[i], first, last, outs[i]);
    }
}

// silu(gate x) * (up x) over gate: the same rows of both at a time, so that nobody has to wait in between.
void multiply_gated(const Block& b, const float* x, How how, Own& own, float* gate, float* up, int32_t threads) {
    const Layer &g = *b.layers[GATE], &u = *b.layers[UP];
    prepare(g, x, 1, how, own.inputs[0]);
    const bool same = same_input(g, u);
    if (!same) prepare(u, x, 1, how, own.inputs[1]);
    const int64_t half = chunk_rows(g, threads) / 2 / ROWS * ROWS, chunks = (g.rows + half - 1) / half;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t first = chunk * half, last = first + half < g.rows ? first + half : g.rows;
        multiply_rows(g, own.inputs[0], first, last, how, gate);
        multiply_rows(u, own.inputs[same ? 0 : 1], first, last, how, up);
        add(b.biases[GATE], first, last, gate), add(b.biases[UP], first, last, up);
        gate_times_up(gate + first, up + first, last - first);
    }
}

// The share of one thread of the team in a block's step; `shared` is the same for all.
STEP_TARGET void step_share(const Block& b, const Step& s, How how, float* shared, Own& own) {
    const int64_t hidden = b.layers[Q]->columns, inner = b.layers[GATE]->rows, size = b.head_size;
    const int64_t queries = b.heads * size, kept = b.kept_heads * size, bytes = s.kind == FLOAT32 ? 4 : 2;
    float *q = shared, *k = q + queries, *v = k + kept, *attended = v + kept, *o = attended + queries;
    float *gate = o + hidden, *up = gate + inner, *down = up + inner;
    const int64_t needed = 2 * hidden + 2 * size + (s.length + 8);
    if (int64_t(own.floats.size()) < needed) own.floats.resize(needed);
    float *x = own.floats.data(), *normed = x + hidden, *cosine = normed + hidden, *sine = cosine + size, *scores = sine + size;

    to_floats(s.x, hidden, s.kind, x);
    rms_norm(x, b.norm_in, hidden, b.eps_in, normed);
    float* const three[] = {q, k, v};
    multiply_layers(b.layers + Q, b.biases + Q, 3, normed, how, own, three, s.threads);
#pragma omp barrier

    to_floats(s.cosine, size, s.kind, cosine), to_floats(s.sine, size, s.kind, sine);
    const int64_t group = b.heads / b.kept_heads;
#pragma omp for schedule(dynamic, 1)
    for (int64_t h = 0; h < b.kept_heads; h++) {
        const int64_t first = h * s.room * size, at = first + (s.length - 1) * size;
        norm_and_turn(k + h * size, b.norm_k, b.eps_k, cosine, sine, size);
        for (int64_t i = 0; i < size; i++) put(s.keys, at + i, k[h * size + i], s.kind), put(s.values, at + i, v[h * size + i], s.kind);
        for (int64_t g = h * group; g < (h + 1) * group; g++) {
            norm_and_turn(q + g * size, b.norm_q, b.eps_q, cosine, sine, size);
            attend(q + g * size, (char*)s.keys + first * bytes, (char*)s.values + first * bytes, s.length, size, b.scaling, s.kind,
                   scores, attended + g * size);
        }
    }
    float* const one[] = {o};
    multiply_layers(b.layers + O, b.biases + O, 1, attended, how, own, one, s.threads);
#pragma omp barrier

    for (int64_t i = 0; i < hidden; i++) x[i] += o[i];
    rms_norm(x, b.norm_after, hidden, b.eps_after, normed);
    multiply_gated(b, normed, how, own, gate, up, s.threads);
#pragma omp barrier
    float* const last[] = {down};
    multiply_layers(b.layers + DOWN, b.biases + DOWN, 1, gate, how, own, last, s.threads);
#pragma omp barrier
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < hidden; i++) put(s.out, i, x[i] + down[i], s.kind);
}

}  // namespace

#endif
