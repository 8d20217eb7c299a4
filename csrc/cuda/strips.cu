// How a stack of blocks can be read: the widest copies that fit the addresses and strides of all of them.
#include "strips.cuh"

namespace fedlora {
namespace {

bool divides(int64_t width, int64_t bytes) { return bytes % width == 0; }

// Whether copies of so many bytes along the rows (or, turned, the columns) of a block meet its numbers, all blocks before it having
// a number of columns that such copies meet as well.
bool serves(const fedlora_block &block, int64_t width, bool turned) {
    const int64_t size = size_of(block.dtype), numbers = width / size;
    const int64_t along = turned ? block.row_stride : block.col_stride, across = turned ? block.col_stride : block.row_stride;
    const int64_t lines = turned ? block.cols : block.rows, length = turned ? block.rows : block.cols;
    if (along != 1 && length > 1) return false;
    if (!divides(width, block.data) || (lines > 1 && !divides(width, across * size))) return false;
    if (block.batch > 1 && !divides(width, block.batch_stride * size)) return false;
    return turned || block.cols % numbers == 0;
}

} // namespace

StackReading reading_of(const fedlora_block *X, int64_t count, Upload &upload) {
    std::vector<StackPiece> pieces;
    StackReading reading = {nullptr, 0, 0, (int32_t)(count ? X[0].dtype : FEDLORA_FLOAT64), 0, 0, 0};
    const fedlora_block *first = nullptr;
    for (int64_t k = 0; k < count; ++k) {
        if (X[k].cols == 0) continue;
        if (!first) first = X + k, reading.dtype = (int32_t)first->dtype;
        if (X[k].dtype != first->dtype) reading.mixed = 1;
        pieces.push_back({X[k].data, X[k].row_stride, X[k].col_stride, X[k].batch_stride, reading.columns, (int32_t)X[k].dtype});
        reading.columns += (int32_t)X[k].cols;
    }
    if (reading.mixed) reading.dtype = FEDLORA_FLOAT64;
    reading.count = (int32_t)pieces.size();
    reading.pieces = upload.add(pieces);
    reading.width = (int32_t)size_of(reading.dtype);
    if (!first) return reading;
    const auto all = [&](int64_t width, bool turned) {
        for (int64_t k = 0; k < count; ++k)
            if (X[k].cols && !serves(X[k], width, turned)) return false;
        return true;
    };
    const auto distance = [](int64_t stride) { return stride < 0 ? -stride : stride; };
    reading.turned = first->rows > 1 && (first->cols == 1 || distance(first->row_stride) < distance(first->col_stride));
    if (reading.mixed) return reading;
    for (int64_t width = 16; width > reading.width; width /= 2)
        for (const bool turned : {reading.turned != 0, reading.turned == 0})
            if (all(width, turned)) {
                reading.width = (int32_t)width;
                reading.turned = turned;
                return reading;
            }
    return reading;
}

} // namespace fedlora
