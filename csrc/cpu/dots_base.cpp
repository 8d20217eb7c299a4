// Inner products for any processor, and the choice among the variants.
#include "dots.h"

#define FEDLORA_DOTS_ROWS 2
#define FEDLORA_DOTS_COLS 1

namespace fedlora {
namespace {
#include "dots.hpp"
}  // namespace

const Dots &dots_base() {
    static constexpr Dots variant{add<double>, add<float>};
    return variant;
}

const Dots &dots() {
#ifdef __x86_64__
    static const Dots &chosen = []() -> const Dots & {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return dots_v4();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return dots_v3();
        return dots_base();
    }();
    return chosen;
#else
    return dots_base();
#endif
}

}  // namespace fedlora
