// C += P Q for any processor, and the choice among the variants.
#include "panel.h"

#include <cstring>
#include <utility>

#define FEDLORA_VECTOR_BYTES 16
#define FEDLORA_PANEL_ROWS 4
#define FEDLORA_PANEL_VECTORS 2

namespace fedlora {
namespace {
#include "widen.hpp"
#include "panel.hpp"
#include "pack.hpp"
}  // namespace

const Panel &panel_base() {
    static constexpr Panel variant{"portable", add, tile_of, widen_any, narrow_any};
    return variant;
}

const Panel &panel() {
#ifdef __x86_64__
    static const Panel &chosen = []() -> const Panel & {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return panel_v4();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return panel_v3();
        return panel_base();
    }();
    return chosen;
#else
    return panel_base();
#endif
}

}  // namespace fedlora
