// Strips of X Q for any processor, and the choice among the variants.
#include "turn.h"

#define FEDLORA_VECTOR_BYTES 16
#define FEDLORA_TURN_SUMS 8

namespace fedlora {
namespace {
typedef char Bytes __attribute__((vector_size(FEDLORA_VECTOR_BYTES)));
inline __attribute__((always_inline)) void stream_store(void *out, Bytes v) { __builtin_memcpy(out, &v, sizeof v); }
#include "turn.hpp"
}  // namespace

const Turn &turn_base() {
    static constexpr Turn variant{{rows<float>, columns<float>}, {rows<double>, columns<double>}};
    return variant;
}

const Turn &turn() {
#ifdef __x86_64__
    static const Turn &chosen = []() -> const Turn & {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return turn_v4();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return turn_v3();
        return turn_base();
    }();
    return chosen;
#else
    return turn_base();
#endif
}

}  // namespace fedlora
