// What the SVDs share: matrices of descriptors, powers of two, the window of the sign rule.
//
// Included once per instruction set after simd.hpp.

constexpr int kDefaultSweeps = 60;

// Elements of a column from this share of the largest on count as largest: the window of the sign rule.
template <class T>
constexpr T kNearly = T(1) - T(0x1p-20);

// A matrix of a descriptor, seen as columns: transposed where the work is.
template <class T>
struct View {
    T *data;
    int64_t row, col;
    View(const fedlora_block &b, int64_t index, bool transposed)
        : data((T *)b.data + index * b.batch_stride),
          row(transposed ? b.col_stride : b.row_stride),
          col(transposed ? b.row_stride : b.col_stride) {}
    T &operator()(int i, int c) const { return data[i * row + c * col]; }
};

// 2^e, for exponents of normal numbers.
template <class T>
inline T power_of_two(int e) {
    const typename Lane<T>::Int bits = (typename Lane<T>::Int)(e + Lane<T>::bias) << Lane<T>::mantissa;
    T x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

// e with x in [2^(e-1), 2^e), for a finite x > 0, subnormal or not.
template <class T>
inline int exponent_of(T x) {
    const bool subnormal = x < Lane<T>::smallest;
    const T normal = subnormal ? x * power_of_two<T>(Lane<T>::mantissa) : x;
    typename Lane<T>::Int bits;
    __builtin_memcpy(&bits, &normal, sizeof bits);
    return (int)(bits >> Lane<T>::mantissa) - Lane<T>::bias + 1 - (subnormal ? Lane<T>::mantissa : 0);
}
