// Strips of X Q with AVX-512.
#include "turn.h"

#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define FEDLORA_VECTOR_BYTES 64
#define FEDLORA_TURN_SUMS 16

namespace fedlora {
namespace {
typedef char Bytes __attribute__((vector_size(FEDLORA_VECTOR_BYTES)));
inline __attribute__((always_inline)) void stream_store(void *out, Bytes v) { _mm512_stream_si512((__m512i *)out, (__m512i)v); }
#include "turn.hpp"
}  // namespace

const Turn &turn_v4() {
    static constexpr Turn variant{{rows<float>, columns<float>}, {rows<double>, columns<double>}};
    return variant;
}

}  // namespace fedlora
#endif
