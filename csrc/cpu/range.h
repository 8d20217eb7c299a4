// Numbers of a matrix in a file.
#pragma once

#include <cstdint>

#include "../include/fedlora.h"

namespace fedlora {

bool is_valid(const fedlora_range &range);

// Numbers [first, first + count), counted along the rows, to out; false where the file ends before them or cannot be read.
bool read_range(const fedlora_range &range, int64_t first, int64_t count, void *out);

}  // namespace fedlora
