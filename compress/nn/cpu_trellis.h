// What `cpu.cpp` is made of, 8: the best path of a row through a trellis (`maths/trellis.py` says what that is).
//
// A window of 8 bits stands for a number, and each new code pushes BITS of them out of it. Here windows are kept with
// their bits in reverse: the newest code is lowest, so that the windows that lead to one node, what is left of a window
// when the oldest code has gone, lie a fixed distance apart and are compared side by side. Plain loops, which the
// compiler turns into vectors, built for each level of instructions; the sums are the same at all of them.
#pragma once

#include <cfloat>

#include "cpu_floats.h"

#if HAS_X86

namespace trellis {

constexpr int WINDOW = 8, WINDOWS = 1 << WINDOW, LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Whole __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
constexpr float FAR = 1e30f;  // what the paths cost that do not begin where they should

inline int reversed(int value, int bits) {
    int result = 0;
    for (int i = 0; i < bits; i++) result |= (value >> i & 1) << (bits - 1 - i);
    return result;
}

// The table with its windows in reverse.
inline void turn(const float* table, float* turned) {
    for (int w = 0; w < WINDOWS; w++) turned[w] = table[reversed(w, WINDOW)];
}

template <int BITS>
inline int8_t code_of(int window) {
    return int8_t(reversed(window & ((1 << BITS) - 1), BITS) - (1 << (BITS - 1)));
}

// Codes of `LANES` rows or fewer from x [many, columns]: least sum of weights[column] (x - table)^2.
template <int BITS>
__attribute__((always_inline)) inline void round_rows(const float* x, const float* weights, int64_t many, int64_t columns,
                                                      const float* table, int8_t* codes, float* values,
                                                      std::vector<uint8_t>& from) {
    constexpr int NODES = WINDOWS >> BITS, BRANCHES = 1 << BITS;
    Floats now[NODES], next[NODES];
    for (int node = 0; node < NODES; node++) now[node] = Floats{} + (node ? FAR : 0.0f);
    for (int64_t c = 0; c < columns; c++) {
        const float weight = weights ? weights[c] : 1.0f;
        Floats minus{};  // (x - t)^2 less x^2, which is the same for all
        for (int j = 0; j < many; j++) minus[j] = -2.0f * x[j * columns + c];
        for (int node = 0; node < NODES; node++) {
            Floats best = Floats{} + FLT_MAX;
            Whole which{};
            for (int old = 0; old < BRANCHES; old++) {
                const int window = old * NODES + node;
                const float value = table[window] * weight, square = table[window] * value;
                const Floats cost = now[window >> BITS] + (square + minus * value);
                const Whole less = cost < best;
                which = less ? Whole{} + old : which;
                best = less ? cost : best;
            }
            next[node] = best;
            const Bytes narrow = __builtin_convertvector(which, Bytes);
            std::memcpy(&from[(c * NODES + node) * LANES], &narrow, LANES);
        }
        const Floats least = next[0];  // only differences count: kept small, they stay exact in long rows
        for (int node = 0; node < NODES; node++) now[node] = next[node] - least;
    }
    for (int j = 0; j < many; j++) {
        int node = 0;
        for (int n = 1; n < NODES; n++)
            if (now[n][j] < now[node][j]) node = n;
        for (int64_t c = columns - 1; c >= 0; c--) {
            const int window = from[(c * NODES + node) * LANES + j] * NODES + node;
            codes[j * columns + c] = code_of<BITS>(window);
            values[j * columns + c] = table[window];
            node = window >> BITS;
        }
    }
}

// What the paths of one row through a stretch of columns are kept in.
struct Paths {
    std::vector<float> now, next;  // [nodes, columns]: the weights as this path has corrected them
    std::vector<uint8_t> from;     // [columns, nodes]
};

// Codes of a stretch of a row with feedback: each path corrects the columns after it for its own errors.
template <int BITS>
__attribute__((always_inline)) inline void settle_row(const float* work, const float* target, const float* scale,
                                                      const float* upper, const float* pivots, int64_t columns,
                                                      const float* table, int32_t* begin, int8_t* codes, float* values,
                                                      Paths& paths) {
    constexpr int NODES = WINDOWS >> BITS, BRANCHES = 1 << BITS;
    const int64_t wide = (columns + LANES - 1) / LANES * LANES;
    paths.now.resize(NODES * wide), paths.next.resize(NODES * wide), paths.from.resize(columns * NODES);
    float costs[NODES], least[NODES], current[WINDOWS], before[WINDOWS], all[WINDOWS];
    for (int node = 0; node < NODES; node++) {
        costs[node] = FAR;
        std::memcpy(&paths.now[node * wide], work, columns * sizeof(float));
    }
    costs[*begin] = 0.0f;
    for (int64_t c = 0; c < columns; c++) {
        for (int node = 0; node < NODES; node++)
            for (int b = 0; b < BRANCHES; b++) {
                current[node * BRANCHES + b] = paths.now[node * wide + c];
                before[node * BRANCHES + b] = costs[node];
            }
        for (int w = 0; w < WINDOWS; w++) {
            const float error = current[w] - scale[c] * table[w];
            all[w] = before[w] + pivots[c] * error * error;
        }
        int32_t which[NODES];
        for (int node = 0; node < NODES; node++) least[node] = all[node], which[node] = 0;
        for (int old = 1; old < BRANCHES; old++)
            for (int node = 0; node < NODES; node++) {
                const float cost = all[old * NODES + node];
                which[node] = cost < least[node] ? old : which[node];
                least[node] = cost < least[node] ? cost : least[node];
            }
        const float* row = upper + c * wide;
        for (int node = 0; node < NODES; node++) {
            const int window = which[node] * NODES + node;
            const float change = target[c] - scale[c] * table[window];
            const float* old = &paths.now[(window >> BITS) * wide];
            float* to = &paths.next[node * wide];
            for (int64_t i = (c + 1) / LANES * LANES; i < wide; i += LANES)
                for (int j = 0; j < LANES; j++) to[i + j] = old[i + j] + change * row[i + j];
            paths.from[c * NODES + node] = uint8_t(which[node]);
            costs[node] = least[node];
        }
        paths.now.swap(paths.next);
    }
    int node = 0;
    for (int n = 1; n < NODES; n++)
        if (costs[n] < costs[node]) node = n;
    *begin = node;
    for (int64_t c = columns - 1; c >= 0; c--) {
        const int window = paths.from[c * NODES + node] * NODES + node;
        codes[c] = code_of<BITS>(window);
        values[c] = table[window];
        node = window >> BITS;
    }
}

#define LEVELS_OF(NAME, TAIL, CALL)                                                                    \
    template <int BITS>                                                                                \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))) void NAME##_wide TAIL { CALL; } \
    template <int BITS>                                                                                \
    __attribute__((target("avx2,fma"))) void NAME##_narrow TAIL { CALL; }

LEVELS_OF(round, (const float* x, const float* weights, int64_t many, int64_t columns, const float* table, int8_t* codes,
                  float* values, std::vector<uint8_t>& from),
          (round_rows<BITS>(x, weights, many, columns, table, codes, values, from)))
LEVELS_OF(settle, (const float* work, const float* target, const float* scale, const float* upper, const float* pivots,
                   int64_t columns, const float* table, int32_t* begin, int8_t* codes, float* values, Paths& paths),
          (settle_row<BITS>(work, target, scale, upper, pivots, columns, table, begin, codes, values, paths)))
#undef LEVELS_OF

template <int BITS>
void round(const float* x, const float* weights, int64_t rows, int64_t columns, const float* table, int8_t* codes,
           float* values, int32_t threads, bool wide) {
    float turned[WINDOWS];
    turn(table, turned);
    constexpr int NODES = WINDOWS >> BITS;
    const int64_t parts = (rows + LANES - 1) / LANES;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<uint8_t> from(columns * NODES * LANES);
#pragma omp for schedule(dynamic, 1)
        for (int64_t part = 0; part < parts; part++) {
            const int64_t row = part * LANES, many = rows - row < LANES ? rows - row : LANES, at = row * columns;
            (wide ? round_wide<BITS> : round_narrow<BITS>)(x + at, weights, many, columns, turned, codes + at,
                                                           values + at, from);
        }
    }
}

template <int BITS>
void settle(const float* work, const float* target, const float* scale, const float* upper, const float* pivots,
            int64_t rows, int64_t columns, const float* table, int32_t* begin, int8_t* codes, float* values,
            int32_t threads, bool wide) {
    float turned[WINDOWS];
    turn(table, turned);
    const int64_t padded = (columns + LANES - 1) / LANES * LANES;
    std::vector<float> aligned(columns * padded, 0.0f);  // rows of `upper` as long as those of the paths
    for (int64_t c = 0; c < columns; c++)
        std::memcpy(&aligned[c * padded], upper + c * columns, columns * sizeof(float));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Paths paths;
#pragma omp for schedule(dynamic, 8)
        for (int64_t row = 0; row < rows; row++) {
            const int64_t at = row * columns;
            (wide ? settle_wide<BITS> : settle_narrow<BITS>)(work + at, target + at, scale + at, aligned.data(), pivots,
                                                             columns, turned, begin + row, codes + at, values + at, paths);
        }
    }
}

}  // namespace trellis

#endif
