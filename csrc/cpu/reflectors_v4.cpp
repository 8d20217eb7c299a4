// Householder reflections with AVX-512: vectors of 64 bytes.
#include "reflectors.h"

#ifdef __x86_64__
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define FEDLORA_VECTOR_BYTES 64

namespace fedlora {
namespace {
#include "reflectors.hpp"
}  // namespace

const Reflectors &reflectors_v4() {
    static constexpr Reflectors variant{"x86-64-v4", factor, apply, start, update};
    return variant;
}

}  // namespace fedlora
#endif
