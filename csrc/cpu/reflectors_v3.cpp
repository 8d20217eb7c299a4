// Householder reflections with AVX2: vectors of 32 bytes.
#include "reflectors.h"

#ifdef __x86_64__
#pragma GCC target("arch=x86-64-v3,prefer-vector-width=256")
#define FEDLORA_VECTOR_BYTES 32

namespace fedlora {
namespace {
#include "reflectors.hpp"
}  // namespace

const Reflectors &reflectors_v3() {
    static constexpr Reflectors variant{"x86-64-v3", factor, apply, start, update};
    return variant;
}

}  // namespace fedlora
#endif
