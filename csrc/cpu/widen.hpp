// Single numbers of any float dtype to float64 and back.
//
// Included once per source file, inside its own anonymous namespace: the options of that file hold for it.

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

inline int64_t size_of(int64_t dtype) {
    switch (dtype) {
        case FEDLORA_FLOAT64: return 8;
        case FEDLORA_FLOAT32: return 4;
        default: return 2;
    }
}
