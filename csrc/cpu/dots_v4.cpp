// Inner products with AVX-512.
#include "dots.h"

#ifdef __x86_64__
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define FEDLORA_DOTS_ROWS 4
#define FEDLORA_DOTS_COLS 4

namespace fedlora {
namespace {
#include "dots.hpp"
}  // namespace

const Dots &dots_v4() {
    static constexpr Dots variant{add<double>, add<float>};
    return variant;
}

}  // namespace fedlora
#endif
