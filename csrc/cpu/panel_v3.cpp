// C += P Q with AVX2: vectors of 32 bytes.
#include "panel.h"

#include <cstring>
#include <utility>

#ifdef __x86_64__
#pragma GCC target("arch=x86-64-v3,prefer-vector-width=256")
#define FEDLORA_VECTOR_BYTES 32
#define FEDLORA_PANEL_ROWS 4
#define FEDLORA_PANEL_VECTORS 3

namespace fedlora {
namespace {
#include "widen.hpp"
#include "panel.hpp"
#include "pack.hpp"
}  // namespace

const Panel &panel_v3() {
    static constexpr Panel variant{"x86-64-v3", add, tile_of, widen_any, narrow_any};
    return variant;
}

}  // namespace fedlora
#endif
