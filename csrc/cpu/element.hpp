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

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline double widen(float x) { return x; }
inline double widen(double x) { return x; }
inline double widen(Bfloat16 x) { return as_float((uint32_t)x.bits << 16); }
inline double widen(Float16 x) {
    const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    // exponents move by a multiplication, which is exact and gets subnormals right; 31 stands for Inf and NaN
    const float finite = as_float(rest << 13) * as_float((254 - 15) << 23);
    const uint32_t special = 0x7f800000u | (rest << 13);
    return as_float((rest >= 0x7c00 ? special : as_bits(finite)) | sign);
}

inline void narrow(double x, float &out) { out = (float)x; }
inline void narrow(double x, double &out) { out = x; }
inline void narrow(double x, Bfloat16 &out) {
    const uint32_t bits = as_bits((float)x);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    out.bits = nan ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(double x, Float16 &out) {
    const uint32_t bits = as_bits((float)x), sign = (bits >> 16) & 0x8000;
    uint32_t rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) {
        out.bits = (uint16_t)(sign | 0x7e00);
    } else if (rest >= 0x477ff000) {  // 65520 and more round to infinity
        out.bits = (uint16_t)(sign | 0x7c00);
    } else if (rest < 0x38800000) {  // below the normal range: adding 1/2 rounds at the last subnormal bit
        const float shifted = as_float(rest) + 0.5f;
        out.bits = (uint16_t)(sign | (as_bits(shifted) - as_bits(0.5f)));
    } else {
        rest += 0xfff + ((rest >> 13) & 1);
        out.bits = (uint16_t)(sign | ((rest - (112u << 23)) >> 13));
    }
}

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

inline int64_t size_of(int64_t dtype) {
    switch (dtype) {
        case FEDLORA_FLOAT64: return 8;
        case FEDLORA_FLOAT32: return 4;
        default: return 2;
    }
}

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
