// Numbers of a matrix in a file, by pread: other readers of the file do not matter, and neither does where it stands.
#include "range.h"

#include <cerrno>
#include <unistd.h>

namespace {

int64_t size_of(int64_t dtype) { return dtype == FEDLORA_FLOAT64 ? 8 : dtype == FEDLORA_FLOAT32 ? 4 : 2; }

}  // namespace

namespace fedlora {

bool is_valid(const fedlora_range &range) {
    const bool is_float = range.dtype >= FEDLORA_FLOAT32 && range.dtype <= FEDLORA_FLOAT16 && range.dtype != FEDLORA_INT32;
    if (!is_float || range.file < 0 || range.offset < 0 || range.rows < 0 || range.cols < 0) return false;
    int64_t bytes, end;
    return !__builtin_mul_overflow(range.rows, range.cols, &bytes) && !__builtin_mul_overflow(bytes, size_of(range.dtype), &bytes) &&
           !__builtin_add_overflow(bytes, range.offset, &end);
}

bool read_range(const fedlora_range &range, int64_t first, int64_t count, void *out) {
    const int64_t size = size_of(range.dtype);
    char *to = (char *)out;
    int64_t at = range.offset + first * size, left = count * size;
    while (left > 0) {
        const ssize_t got = pread((int)range.file, to, (size_t)left, (off_t)at);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        to += got, at += got, left -= got;
    }
    return true;
}

}  // namespace fedlora
