// Runs of numbers of any float dtype, times a weight, onto float64.
//
// Included once per source file after element.hpp, inside the same namespace. Products and sums must round as they are written:
// torch's do, and so do those of every instruction set. The including file says so first: #pragma GCC optimize("fp-contract=off").

// acc[0..count) += w x. The run is asked for where it goes on: the next tile lies there, and meanwhile other blocks are read.
template <class T>
inline void add(double *acc, const T *x, int64_t stride, double w, int64_t count) {
    constexpr int64_t line = 64 / sizeof(T);
    if (stride == 1)
        for (int64_t begin = 0; begin < count; begin += line) {
            __builtin_prefetch(x + begin + count);
            const int64_t end = begin + line < count ? begin + line : count;
            for (int64_t i = begin; i < end; ++i) acc[i] += w * widen(x[i]);
        }
    else
        for (int64_t i = 0; i < count; ++i) acc[i] += w * widen(x[i * stride]);
}

#define FEDLORA_ADD(name, T) \
    FEDLORA_CLONES void name(double *acc, const T *x, int64_t stride, double w, int64_t count) { add(acc, x, stride, w, count); }
FEDLORA_ADD(add_float32, float)
FEDLORA_ADD(add_float64, double)
FEDLORA_ADD(add_bfloat16, Bfloat16)
FEDLORA_ADD(add_float16, Float16)

inline void add_any(int64_t dtype, const void *x, int64_t stride, double *acc, double w, int64_t count) {
    switch (dtype) {
        case FEDLORA_FLOAT64: return add_float64(acc, (const double *)x, stride, w, count);
        case FEDLORA_FLOAT32: return add_float32(acc, (const float *)x, stride, w, count);
        case FEDLORA_BFLOAT16: return add_bfloat16(acc, (const Bfloat16 *)x, stride, w, count);
        default: return add_float16(acc, (const Float16 *)x, stride, w, count);
    }
}

constexpr int64_t kTile = 1024;      // numbers of float64 that a sum is added up in: 8 KiB
constexpr int64_t kChunk = 1 << 16;  // numbers of the sum in one task

inline int64_t rows_of_chunk(const fedlora_block &sum) {
    const int64_t rows = kChunk / (sum.cols > 0 ? sum.cols : 1);
    return rows > 0 ? rows : 1;
}

inline int64_t chunks_of(const fedlora_block &sum) {
    const int64_t step = rows_of_chunk(sum);
    return (sum.rows + step - 1) / step;
}
