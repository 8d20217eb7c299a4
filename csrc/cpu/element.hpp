// Numbers of any float dtype to float64 and back, and what a rounded sum says of its matrix.
//
// Included once per source file after partial.h, inside its own anonymous namespace: the options of that file hold for it.

#ifdef __x86_64__
#define FEDLORA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FEDLORA_CLONES
#endif

constexpr int kLanes = 8;

using fedlora::Partial;

#include "widen.hpp"

// out = acc, and what that says of the matrix. Lanes are added up at the end, in order.
template <class T>
inline void store(const double *acc, T *out, int64_t stride, int64_t count, Partial &partial) {
    double squares[kLanes] = {}, lost[kLanes] = {};
    int64_t nonfinite = 0, overflow = 0, nonzero = 0;
    for (int64_t begin = 0; begin < count; begin += kLanes) {
        const int64_t end = count - begin < kLanes ? count - begin : kLanes;
        for (int64_t i = 0; i < end; ++i) {
            const double x = acc[begin + i];
            T &rounded = out[(begin + i) * stride];
            narrow(x, rounded);
            const double kept = widen(rounded), gap = x - kept;
            squares[i] += x * x;
            lost[i] += gap * gap;
            nonfinite |= !(std::fabs(x) <= DBL_MAX);
            overflow |= !(std::fabs(kept) <= DBL_MAX);
            nonzero |= x != 0.0;
        }
    }
    for (int i = 0; i < kLanes; ++i) {
        partial.squares += squares[i];
        partial.lost_squares += lost[i];
    }
    partial.nonfinite |= nonfinite;
    partial.overflow |= overflow;
    partial.nonzero |= nonzero;
}

#define FEDLORA_STORE(name, T) \
    FEDLORA_CLONES void name(const double *acc, T *out, int64_t stride, int64_t count, Partial &partial) { store(acc, out, stride, count, partial); }
FEDLORA_STORE(store_float32, float)
FEDLORA_STORE(store_float64, double)
FEDLORA_STORE(store_bfloat16, Bfloat16)
FEDLORA_STORE(store_float16, Float16)

inline bool is_float(int64_t dtype) { return dtype >= FEDLORA_FLOAT32 && dtype <= FEDLORA_FLOAT16 && dtype != FEDLORA_INT32; }

inline void store_any(const fedlora_block &S, int64_t offset, const double *acc, int64_t stride, int64_t count, Partial &partial) {
    char *out = (char *)S.data + offset * size_of(S.dtype);
    switch (S.dtype) {
        case FEDLORA_FLOAT64: return store_float64(acc, (double *)out, stride, count, partial);
        case FEDLORA_FLOAT32: return store_float32(acc, (float *)out, stride, count, partial);
        case FEDLORA_BFLOAT16: return store_bfloat16(acc, (Bfloat16 *)out, stride, count, partial);
        default: return store_float16(acc, (Float16 *)out, stride, count, partial);
    }
}

template <class T>
T &element(const fedlora_block &b, int64_t i) {
    return ((T *)b.data)[i * b.batch_stride];
}

// What the chunks of matrix i found, in order, to the caller's arrays.
inline void finish(const fedlora_block &norm, const fedlora_block &rounding, const fedlora_block &info,
                   const fedlora_block &notes, int64_t i, const Partial *partials, int64_t chunks) {
    Partial all = {};
    for (int64_t c = 0; c < chunks; ++c) {
        all.squares += partials[c].squares;
        all.lost_squares += partials[c].lost_squares;
        all.nonfinite |= partials[c].nonfinite;
        all.overflow |= partials[c].overflow;
        all.nonzero |= partials[c].nonzero;
    }
    element<double>(norm, i) = std::sqrt(all.squares);
    element<double>(rounding, i) = std::sqrt(all.lost_squares);
    element<int32_t>(info, i) = all.nonfinite ? FEDLORA_INFO_NONFINITE : all.overflow ? FEDLORA_INFO_OVERFLOW : 0;
    element<int32_t>(notes, i) = all.nonzero ? 0 : FEDLORA_NOTE_ZERO;
}

inline bool scalar(const fedlora_block &b, int64_t dtype, int64_t batch) {
    return b.rows == 1 && b.cols == 1 && b.batch == batch && b.dtype == dtype;
}
