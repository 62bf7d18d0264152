// Products of activations with weights that stay packed, on the CPU: y[m, rows] = x[m, columns] W^T.
//
// W is stored as `maths/packing.py` has it: a row is one stream of codes of 2, 3, 4 or 8 bits, lowest bit first, plus an
// offset of 2^(bits-1); groups of neighbouring columns share a scale, and a zero point where the grid is not symmetric.
// Along a trellis, what a code stands for is looked up at the 8 bits of the stream that end with it.
// Codes become floats in registers, 32 at a time: with AVX-512 by a look-up among 16 floats, with AVX2 by conversion; with
// inputs in bfloat16 and 2 or 4 bits, bfloat16, where the processor multiplies that (AVX512-BF16), which is as exact.
// With codes along a trellis, where the processor multiplies int8 (AVX512-VNNI) and looks up so large a table
// (AVX512-VBMI), inputs become whole numbers with a step for each 128 columns, of 23 bits, or of 15 for bfloat16: the sums
// of these are exact, and their rounding is below that of float32 sums, or of the result in bfloat16.
// Sums are taken in float32 within a group, times the scale, over the groups in order: results do not depend on the
// number of threads. Activations are rounded to int8 where that is asked for, and never otherwise.
//
// Plain C interface and no dependency: loaded by ctypes. OpenMP's symbols are left open when this is linked, so that
// torch's own threads are used and not a second set of them.

#include "cpu_step.h"
#include "cpu_tokens.h"
#include "cpu_trellis.h"

extern "C" {

// 0: nothing here runs on this processor; 1: AVX2; 2: AVX-512.
int compress_level() {
#if HAS_X86
    return level();
#else
    return 0;
#endif
}

// Whether inputs can be rounded to int8 on this processor.
int compress_int8() {
#if HAS_X86
    return has_vnni();
#else
    return 0;
#endif
}

// Whether codes along a trellis are looked up in registers on this processor, as products with inputs in int8 need it.
int compress_vbmi() {
#if HAS_X86
    return level() && has_vbmi();
#else
    return 0;
#endif
}

#if HAS_X86

// Whether a layer's products can take inputs in int8.
int compress_int8_serves(const Layer* layer) { return step_columns(*layer) != 0; }

// x [many, columns] and out [many, rows], both of `kind` (float32 or bfloat16). Columns and group size are multiples of
// 32. `at_most` bounds the level; `int8`: inputs may be rounded to int8, one step a group, where layer and processor allow.
void compress_product(const Layer* layer, const void* x, int64_t many, void* out, int32_t kind, int32_t threads,
                      int32_t at_most, int32_t int8) {
    const Layer& w = *layer;
    const How way = how(at_most, int8, kind);
    static thread_local std::vector<float> kept;  // room for a call: taken anew each time, it costs as much as the call
    static thread_local Input in;
    const size_t needed = many * (w.columns + w.rows);
    if (kept.size() < needed) kept.resize(needed);
    float* result = (float*)out;
    if (kind == FLOAT32) {
        prepare(w, (const float*)x, many, way, in);
    } else {
        to_floats(x, many * w.columns, kind, kept.data());
        prepare(w, kept.data(), many, way, in);
        result = kept.data() + many * w.columns;
    }
    const Input& ready = in;  // a thread_local is another one in every thread
    const int64_t rows = chunk_rows(w, threads), chunks = (w.rows + rows - 1) / rows;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        multiply_rows(w, ready, chunk * rows, (chunk + 1) * rows < w.rows ? (chunk + 1) * rows : w.rows, way, result);
    if (kind == BFLOAT16) to_halves(result, many * w.rows, (uint16_t*)out);
}

// A decoder block for one new token.
void compress_step(const Block* block, const Step* step) {
    const Block& b = *block;
    static thread_local std::vector<float> kept;
    const size_t needed = 2 * b.layers[Q]->rows + 2 * b.layers[K]->rows + 2 * b.layers[GATE]->rows + 2 * b.layers[O]->rows;
    if (kept.size() < needed) kept.resize(needed);
    float* shared = kept.data();
    const How way = how(step->at_most, step->int8, step->kind);
#pragma omp parallel num_threads(step->threads) if (step->threads > 1)
    {
        static thread_local Own own;
        step_share(b, *step, way, shared, own);
    }
}

// Rows [first, last) of W into out [last - first, columns], float32 or bfloat16.
void compress_expand(const Layer* layer, int64_t first, int64_t last, void* out, int32_t kind, int32_t threads,
                     int32_t at_most) {
    const Layer& w = *layer;
    const Expand run = FOR_LAYER(expansion, w, level() == 2 && at_most >= 2);
    const int64_t size = kind == FLOAT32 ? 4 : 2;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = first; row < last; row++) {
        float few[1024];
        float* scales = w.groups <= 1024 ? few : new float[w.groups];
        row_scales(w, row, 1, scales);
        run(w, row, scales, (char*)out + (row - first) * w.columns * size, kind);
        if (scales != few) delete[] scales;
    }
}

// x [tokens, columns] of `kind` as codes int8 [tokens, columns] and a scale for each token.
void compress_round_tokens(const void* x, int64_t tokens, int64_t columns, int8_t* codes, float* scales, int32_t kind,
                           int32_t threads) {
    const int64_t size = kind == FLOAT32 ? 4 : 2;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8) if (threads > 1 && tokens > 8)
    for (int64_t t = 0; t < tokens; t++) {
        static thread_local std::vector<float> kept;
        if (int64_t(kept.size()) < columns) kept.resize(columns);
        const void* from = (const char*)x + t * columns * size;
        if (kind == FLOAT32)
            round_token<false>(from, columns, codes + t * columns, scales + t, kept.data());
        else
            round_token<true>(from, columns, codes + t * columns, scales + t, kept.data());
    }
}

// out [tokens, rows] of `kind` = sums int32 [tokens, rows] times the tokens' scales and the rows', plus a bias or null.
void compress_scale_sums(const int32_t* sums, int64_t tokens, int64_t rows, const float* by_token, const float* by_row,
                         const float* bias, void* out, int32_t kind, int32_t threads) {
    const int64_t size = kind == FLOAT32 ? 4 : 2;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8) if (threads > 1 && tokens > 8)
    for (int64_t t = 0; t < tokens; t++) {
        void* to = (char*)out + t * rows * size;
        if (kind == FLOAT32)
            scale_token<false>(sums + t * rows, rows, by_token[t], by_row, bias, to);
        else
            scale_token<true>(sums + t * rows, rows, by_token[t], by_row, bias, to);
    }
}

// Codes int8 and the table's numbers of x [rows, columns]: for each row the path of the least sum of
// weights[column] (null: 1) times squared error. table: 256 numbers. bits: 2, 3 or 4.
void compress_trellis_round(const float* x, const float* weights, int64_t rows, int64_t columns, int32_t bits,
                            const float* table, int8_t* codes, float* values, int32_t threads, int32_t at_most) {
    const bool wide = level() == 2 && at_most >= 2;
    const auto run = bits == 2 ? trellis::round<2> : bits == 3 ? trellis::round<3> : trellis::round<4>;
    run(x, weights, rows, columns, table, codes, values, threads, wide);
}

// The same with feedback: work, target, scale [rows, columns], upper [columns, columns], pivots [columns]; begin: the node
// that each row's path starts in, and then ends in.
void compress_trellis_settle(const float* work, const float* target, const float* scale, const float* upper,
                             const float* pivots, int64_t rows, int64_t columns, int32_t bits, const float* table,
                             int32_t* begin, int8_t* codes, float* values, int32_t threads, int32_t at_most) {
    const bool wide = level() == 2 && at_most >= 2;
    const auto run = bits == 2 ? trellis::settle<2> : bits == 3 ? trellis::settle<3> : trellis::settle<4>;
    run(work, target, scale, upper, pivots, rows, columns, table, begin, codes, values, threads, wide);
}

#endif
}
