// Square tiles between memory and lanes: the transpose of as many native vectors as one has elements, by shuffles.
//
// Included once per instruction set after simd.hpp.

template <class T>
constexpr int kWidth = FEDLORA_VECTOR_BYTES / (int)sizeof(T);

// Elements of 16 bytes, the unit within which shuffles are cheap.
template <class T>
constexpr int kPart = 16 / (int)sizeof(T);

// In each part: the lower (kHalf = 0) or upper halves of both, element by element in turn.
template <int kHalf, class T>
FEDLORA_INLINE typename Lane<T>::V interleave(typename Lane<T>::V a, typename Lane<T>::V b) {
    typename Lane<T>::I index{};
    for (int k = 0; k < kWidth<T>; ++k) {
        const int within = k % kPart<T>;
        index[k] = k - within + kHalf * kPart<T> / 2 + within / 2 + within % 2 * kWidth<T>;
    }
    return __builtin_shuffle(a, b, index);
}

// The even (kHalf = 0) or odd parts of a, then those of b.
template <int kHalf, class T>
FEDLORA_INLINE typename Lane<T>::V parts(typename Lane<T>::V a, typename Lane<T>::V b) {
    typename Lane<T>::I index{};
    for (int k = 0; k < kWidth<T>; ++k) index[k] = (2 * (k / kPart<T>) + kHalf) * kPart<T> + k % kPart<T>;
    return __builtin_shuffle(a, b, index);
}

// t[i][k] <-> t[k][i]: first squares of 16 bytes a side within the 16-byte parts, then the parts.
template <class T>
FEDLORA_INLINE void transpose(typename Lane<T>::V (&t)[kWidth<T>]) {
    using V = typename Lane<T>::V;
    constexpr int kParts = kWidth<T> / kPart<T>;
    V u[kWidth<T>];
    for (int first = 0; first < kWidth<T>; first += kPart<T>)
        for (int round = 1; round < kPart<T>; round *= 2) {
            V *s = t + first;
            for (int k = 0; k < kPart<T> / 2; ++k) {
                u[2 * k] = interleave<0, T>(s[k], s[k + kPart<T> / 2]);
                u[2 * k + 1] = interleave<1, T>(s[k], s[k + kPart<T> / 2]);
            }
            for (int k = 0; k < kPart<T>; ++k) s[k] = u[k];
        }
    for (int round = 1; round < kParts; round *= 2) {
        for (int k = 0; k < kWidth<T> / 2; ++k) {
            const int e = k % kPart<T>, pair = k - e;
            u[k] = parts<0, T>(t[2 * pair + e], t[2 * pair + kPart<T> + e]);
            u[k + kWidth<T> / 2] = parts<1, T>(t[2 * pair + e], t[2 * pair + kPart<T> + e]);
        }
        for (int k = 0; k < kWidth<T>; ++k) t[k] = u[k];
    }
}
