// What some rows of a rounded sum say of their matrix.
#pragma once

#include <cstdint>

namespace fedlora {

struct Partial {
    double squares, lost_squares;
    int64_t nonfinite, overflow, nonzero;
};

}  // namespace fedlora
