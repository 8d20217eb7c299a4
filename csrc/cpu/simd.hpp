// Packs: W native vectors side by side, one matrix per lane.
//
// Included once per instruction set, inside that set's own anonymous namespace, after FEDLORA_VECTOR_BYTES is defined:
// a shared inline function would let the linker hand AVX-512 code to a machine without it.

template <class T>
struct Lane;

template <>
struct Lane<float> {
    using Int = int32_t;
    typedef float V __attribute__((vector_size(FEDLORA_VECTOR_BYTES)));
    typedef int32_t I __attribute__((vector_size(FEDLORA_VECTOR_BYTES)));
    static constexpr int mantissa = 23, bias = 127;
    static constexpr Int rsqrt_magic = 0x5f375a86;
    static constexpr float roundoff = 0x1p-24f, flush = 0x1p-96f, smallest = 0x1p-126f;
};

template <>
struct Lane<double> {
    using Int = int64_t;
    typedef double V __attribute__((vector_size(FEDLORA_VECTOR_BYTES)));
    typedef int64_t I __attribute__((vector_size(FEDLORA_VECTOR_BYTES)));
    static constexpr int mantissa = 52, bias = 1023;
    static constexpr Int rsqrt_magic = 0x5fe6eb50c7b537a9;
    static constexpr double roundoff = 0x1p-53, flush = 0x1p-960, smallest = 0x1p-1022;
};

// The operations that GCC's vector arithmetic does not spell well: masks and square roots. The width tells the instruction set:
// `#pragma GCC target` does not define the macros of one. Forms with a mask, as the plain ones read undefined registers.
#if FEDLORA_VECTOR_BYTES == 64

template <class T>
struct Native;

template <>
struct Native<float> {
    using V = Lane<float>::V;
    using M = __mmask16;
    static M greater(V a, V b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
    static V select(M m, V a, V b) { return (V)_mm512_mask_blend_ps(m, (__m512)b, (__m512)a); }
    static V add_where(M m, V t, V y, V x) { return (V)_mm512_mask3_fmadd_ps((__m512)t, (__m512)y, (__m512)x, m); }
    static V subtract_where(M m, V t, V y, V x) { return (V)_mm512_mask3_fnmadd_ps((__m512)t, (__m512)y, (__m512)x, m); }
    static V sqrt(V a) { return (V)_mm512_maskz_sqrt_ps(0xffff, (__m512)a); }
    static bool any(M m) { return m != 0; }
};

template <>
struct Native<double> {
    using V = Lane<double>::V;
    using M = __mmask8;
    static M greater(V a, V b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ); }
    static V select(M m, V a, V b) { return (V)_mm512_mask_blend_pd(m, (__m512d)b, (__m512d)a); }
    static V add_where(M m, V t, V y, V x) { return (V)_mm512_mask3_fmadd_pd((__m512d)t, (__m512d)y, (__m512d)x, m); }
    static V subtract_where(M m, V t, V y, V x) { return (V)_mm512_mask3_fnmadd_pd((__m512d)t, (__m512d)y, (__m512d)x, m); }
    static V sqrt(V a) { return (V)_mm512_maskz_sqrt_pd(0xff, (__m512d)a); }
    static bool any(M m) { return m != 0; }
};

#else

inline float scalar_sqrt(float a) { return __builtin_sqrtf(a); }
inline double scalar_sqrt(double a) { return __builtin_sqrt(a); }

template <class T>
struct Native {
    using V = typename Lane<T>::V;
    using M = typename Lane<T>::I;
    static M greater(V a, V b) { return a > b; }
    static V select(M m, V a, V b) { return m ? a : b; }
    static V add_where(M m, V t, V y, V x) { return m ? x + t * y : x; }
    static V subtract_where(M m, V t, V y, V x) { return m ? x - t * y : x; }
    static V sqrt(V a) {
#if FEDLORA_VECTOR_BYTES == 32
        if constexpr (sizeof(T) == 4)
            return (V)_mm256_sqrt_ps((__m256)a);
        else
            return (V)_mm256_sqrt_pd((__m256d)a);
#else
        V r = a;
        for (unsigned l = 0; l < sizeof(V) / sizeof(T); ++l) r[l] = scalar_sqrt(a[l]);
        return r;
#endif
    }
    static bool any(M m) {
        typedef int64_t Words __attribute__((vector_size(FEDLORA_VECTOR_BYTES)));
        Words words = (Words)m;
        int64_t all = 0;
        for (unsigned l = 0; l < sizeof(M) / 8; ++l) all |= words[l];
        return all != 0;
    }
};

#endif

template <class T, int W>
struct Mask {
    typename Native<T>::M m[W];
};

template <class T, int W>
struct Pack {
    typename Lane<T>::V v[W];
    static constexpr int lanes = W * FEDLORA_VECTOR_BYTES / (int)sizeof(T);
};

#define FEDLORA_EACH for (int w = 0; w < W; ++w)
#ifdef __SANITIZE_ADDRESS__  // instrumented code would take minutes to compile in one piece
#define FEDLORA_INLINE inline
#else
#define FEDLORA_INLINE inline __attribute__((always_inline))
#endif

template <int W, class T>
FEDLORA_INLINE Pack<T, W> broadcast(T x) {
    Pack<T, W> r;
    FEDLORA_EACH r.v[w] = typename Lane<T>::V{} + x;
    return r;
}

template <class T, int W>
FEDLORA_INLINE Pack<T, W> operator+(const Pack<T, W> &a, const Pack<T, W> &b) {
    Pack<T, W> r;
    FEDLORA_EACH r.v[w] = a.v[w] + b.v[w];
    return r;
}

template <class T, int W>
FEDLORA_INLINE Pack<T, W> operator-(const Pack<T, W> &a, const Pack<T, W> &b) {
    Pack<T, W> r;
    FEDLORA_EACH r.v[w] = a.v[w] - b.v[w];
    return r;
}

template <class T, int W>
FEDLORA_INLINE Pack<T, W> operator*(const Pack<T, W> &a, const Pack<T, W> &b) {
    Pack<T, W> r;
    FEDLORA_EACH r.v[w] = a.v[w] * b.v[w];
    return r;
}

template <class T, int W>
FEDLORA_INLINE Pack<T, W> operator/(const Pack<T, W> &a, const Pack<T, W> &b) {
    Pack<T, W> r;
    FEDLORA_EACH r.v[w] = a.v[w] / b.v[w];
    return r;
}

template <class T, int W>
FEDLORA_INLINE Pack<T, W> sqrt(const Pack<T, W> &a) {
    Pack<T, W> r;
    FEDLORA_EACH r.v[w] = Native<T>::sqrt(a.v[w]);
    return r;
}

template <class T, int W>
FEDLORA_INLINE Mask<T, W> greater(const Pack<T, W> &a, const Pack<T, W> &b) {
    Mask<T, W> r;
    FEDLORA_EACH r.m[w] = Native<T>::greater(a.v[w], b.v[w]);
    return r;
}

template <class T, int W>
FEDLORA_INLINE Mask<T, W> operator|(const Mask<T, W> &a, const Mask<T, W> &b) {
    Mask<T, W> r;
    FEDLORA_EACH r.m[w] = a.m[w] | b.m[w];
    return r;
}

template <class T, int W>
FEDLORA_INLINE bool any(const Mask<T, W> &a) {
    typename Native<T>::M all = a.m[0];
    for (int w = 1; w < W; ++w) all |= a.m[w];
    return Native<T>::any(all);
}

template <class T, int W>
FEDLORA_INLINE Pack<T, W> select(const Mask<T, W> &m, const Pack<T, W> &a, const Pack<T, W> &b) {
    Pack<T, W> r;
    FEDLORA_EACH r.v[w] = Native<T>::select(m.m[w], a.v[w], b.v[w]);
    return r;
}

// x + t y in the lanes of the mask, x elsewhere: untouched, not multiplied by one.
template <class T, int W>
FEDLORA_INLINE Pack<T, W> add_where(const Mask<T, W> &m, const Pack<T, W> &t, const Pack<T, W> &y, const Pack<T, W> &x) {
    Pack<T, W> r;
    FEDLORA_EACH r.v[w] = Native<T>::add_where(m.m[w], t.v[w], y.v[w], x.v[w]);
    return r;
}

template <class T, int W>
FEDLORA_INLINE Pack<T, W> subtract_where(const Mask<T, W> &m, const Pack<T, W> &t, const Pack<T, W> &y,
                                         const Pack<T, W> &x) {
    Pack<T, W> r;
    FEDLORA_EACH r.v[w] = Native<T>::subtract_where(m.m[w], t.v[w], y.v[w], x.v[w]);
    return r;
}

template <class T, int W>
FEDLORA_INLINE Pack<T, W> max(const Pack<T, W> &a, const Pack<T, W> &b) {
    return select(greater(a, b), a, b);
}

template <class T, int W>
FEDLORA_INLINE Pack<T, W> abs(const Pack<T, W> &a) {
    using I = typename Lane<T>::I;
    constexpr typename Lane<T>::Int sign = typename Lane<T>::Int(1) << (8 * sizeof(T) - 2);
    Pack<T, W> r;
    FEDLORA_EACH r.v[w] = (typename Lane<T>::V)((I)a.v[w] & ((I{} + sign) | (I{} + (sign - 1))));
    return r;
}

// |a| with the sign of b.
template <class T, int W>
FEDLORA_INLINE Pack<T, W> copysign(const Pack<T, W> &a, const Pack<T, W> &b) {
    using I = typename Lane<T>::I;
    constexpr typename Lane<T>::Int top = typename Lane<T>::Int(1) << (8 * sizeof(T) - 2);
    const I magnitude = (I{} + top) | (I{} + (top - 1));
    Pack<T, W> r;
    FEDLORA_EACH r.v[w] = (typename Lane<T>::V)(((I)a.v[w] & magnitude) | ((I)b.v[w] & ~magnitude));
    return r;
}

// 1/sqrt(a) to 4 % for a > 0, finite for a = 0: good enough to compare with a threshold, and never underflows.
template <class T, int W>
FEDLORA_INLINE Pack<T, W> rsqrt_estimate(const Pack<T, W> &a) {
    using I = typename Lane<T>::I;
    Pack<T, W> r;
    FEDLORA_EACH r.v[w] = (typename Lane<T>::V)((I{} + Lane<T>::rsqrt_magic) - ((I)a.v[w] >> 1));
    return r;
}

// The power of two that brings a > 0 (normal) into [1, 2).
template <class T, int W>
FEDLORA_INLINE Pack<T, W> inverse_power(const Pack<T, W> &a) {
    using I = typename Lane<T>::I;
    using Int = typename Lane<T>::Int;
    constexpr Int field = (Int(2 * Lane<T>::bias + 1)) << Lane<T>::mantissa;
    constexpr Int top = Int(2 * Lane<T>::bias) << Lane<T>::mantissa;
    Pack<T, W> r;
    FEDLORA_EACH r.v[w] = (typename Lane<T>::V)((I{} + top) - ((I)a.v[w] & (I{} + field)));
    return r;
}
