// Householder reflections for any processor, and the choice among the variants.
#include "reflectors.h"

#define FEDLORA_VECTOR_BYTES 16

namespace fedlora {
namespace {
#include "reflectors.hpp"
}  // namespace

const Reflectors &reflectors_base() {
    static constexpr Reflectors variant{"portable", factor, apply, start, update};
    return variant;
}

const Reflectors &reflectors() {
#ifdef __x86_64__
    static const Reflectors &chosen = []() -> const Reflectors & {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return reflectors_v4();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return reflectors_v3();
        return reflectors_base();
    }();
    return chosen;
#else
    return reflectors_base();
#endif
}

}  // namespace fedlora
