// Inner products with AVX2.
#include "dots.h"

#ifdef __x86_64__
#pragma GCC target("arch=x86-64-v3,prefer-vector-width=256")
#define FEDLORA_DOTS_ROWS 2
#define FEDLORA_DOTS_COLS 2

namespace fedlora {
namespace {
#include "dots.hpp"
}  // namespace

const Dots &dots_v3() {
    static constexpr Dots variant{add<double>, add<float>};
    return variant;
}

}  // namespace fedlora
#endif
