// Strips of X Q with AVX2.
#include "turn.h"

#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC target("arch=x86-64-v3,prefer-vector-width=256")
#define FEDLORA_VECTOR_BYTES 32
#define FEDLORA_TURN_SUMS 8

namespace fedlora {
namespace {
typedef char Bytes __attribute__((vector_size(FEDLORA_VECTOR_BYTES)));
inline __attribute__((always_inline)) void stream_store(void *out, Bytes v) { _mm256_stream_si256((__m256i *)out, (__m256i)v); }
#include "turn.hpp"
}  // namespace

const Turn &turn_v3() {
    static constexpr Turn variant{{rows<float>, columns<float>}, {rows<double>, columns<double>}};
    return variant;
}

}  // namespace fedlora
#endif
