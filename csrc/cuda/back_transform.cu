// The back-transform of fedlora_product_svd: left and right factors of all modules in one launch, their signs in another.
//
// A sign is known only when all of its column is. So the tiles of the left factor leave a record of eight bytes for each of their
// columns, and the second launch, which finds the signs in them, touches only the columns that it turns.
#include <algorithm>

#include "mixed_sum.cuh"
#include "mixed_tile.cuh"

namespace fedlora {

constexpr int kTurnRows = 512, kTurnColumns = 64, kTurnThreads = 256;

// What the second launch has to know of a pair.
struct PairToTurn {
    fedlora_block out[2], info, notes;
    const int32_t *ranks, *overflows[2];
    const SignRecord *records;
    int64_t row_tiles[2], strips, parts[2], chunks; // a part: so many rows of a factor, a chunk: so many columns
};

namespace {

// The columns of a chunk that are to be turned, one after the other. Four threads for each look through the records.
__device__ void find_signs(const PairToTurn &pair, int64_t matrix, int64_t column, int columns, uint8_t *turned) {
    constexpr int kShares = kTurnThreads / kTurnColumns;
    __shared__ uint64_t tops[kShares][kTurnColumns];
    __shared__ int64_t tiles[kShares][kTurnColumns];
    const int c = (int)threadIdx.x % kTurnColumns, share = (int)threadIdx.x / kTurnColumns;
    const int64_t count = pair.row_tiles[0], cols = pair.out[0].cols;
    const SignRecord *const records = pair.records + matrix * count * cols + column + c;
    uint64_t top = 0;
    if (c < columns)
        for (int64_t tile = share; tile < count; tile += kShares) top = max(top, records[tile * cols] >> kSignSteps);
    tops[share][c] = top;
    __syncthreads();
    for (int s = 0; s < kShares; ++s) top = max(top, tops[s][c]);
    const uint64_t least = window_of(top);
    int64_t decides = count;
    if (c < columns)
        for (int64_t tile = share; tile < count && decides == count; tile += kShares)
            if (records[tile * cols] >> kSignSteps >= least) decides = tile;
    tiles[share][c] = decides;
    __syncthreads();
    if (share == 0) {
        for (int s = 1; s < kShares; ++s) decides = min(decides, tiles[s][c]);
        const SignRecord record = decides < count ? records[decides * cols] : 0;
        turned[c] = decides < count && (record >> ((record >> kSignSteps) - least) & 1);
    }
    __syncthreads();
}

__device__ void turn(float &x) { x = -x; }
__device__ void turn(double &x) { x = -x; }
template <class T>
__device__ void turn(T &x) {
    x.bits ^= 0x8000;
}

// Four numbers next to each other, those that a mask names.
template <class T>
__device__ Four turn_four(const Four &four, int mask) {
    Four turned;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        T x;
        take(four, i, x);
        if (mask >> i & 1) turn(x);
        put(turned, i, x);
    }
    return turned;
}

// Four numbers along the fast side, of which the mask says which to turn.
template <class T>
__device__ void turn_run(T *x, int64_t step, int64_t count, int mask) {
    if (!mask || count <= 0) return;
    Four four;
    load_four(four, x, step, count);
    store_four(turn_four<T>(four, mask), x, step, count);
}

// Some rows of a chunk of columns.
template <class T>
__device__ void turn_part(const fedlora_block &out, int64_t matrix, int64_t row, int64_t rows, int64_t column, int columns,
                          const uint8_t *turned) {
    T *const x = address<T>(out, matrix) + row * out.row_stride + column * out.col_stride;
    const bool by_columns = llabs(out.col_stride) > llabs(out.row_stride);
    const int quads = by_columns ? kTurnRows / 4 : kTurnColumns / 4, lines = by_columns ? columns : (int)rows;
    const int64_t across = by_columns ? out.col_stride : out.row_stride, along = by_columns ? out.row_stride : out.col_stride;
    const int64_t length = by_columns ? rows : columns;
    const int quad = (int)threadIdx.x % quads;
    int mask = 0;
    for (int i = 0; i < 4 && !by_columns; ++i) mask |= 4 * quad + i < columns && turned[4 * quad + i] ? 1 << i : 0;
    for (int line = (int)threadIdx.x / quads; line < lines; line += kTurnThreads / quads)
        turn_run(x + line * across + 4 * quad * along, along, length - 4 * quad, by_columns ? (turned[line] ? 15 : 0) : mask);
}

// Infinities in one of the factors.
__device__ void tell_overflow(const PairToTurn &pair, int64_t matrix, int64_t rank) {
    const int64_t strips = (rank + kStripColumns - 1) / kStripColumns;
    bool overflow = false;
    for (int side = 0; side < 2; ++side)
        for (int64_t tile = threadIdx.x; tile < pair.row_tiles[side] * strips; tile += kTurnThreads)
            overflow |= pair.overflows[side][(matrix * pair.row_tiles[side] + tile / strips) * pair.strips + tile % strips] != 0;
    if (!__syncthreads_or(overflow) || threadIdx.x != 0) return;
    *address<int32_t>(pair.info, matrix) |= FEDLORA_INFO_OVERFLOW;
    *address<int32_t>(pair.notes, matrix) = 0;
}

__global__ void __launch_bounds__(kTurnThreads) turn_columns(const PairToTurn *pairs, const int64_t *first, int64_t count) {
    __shared__ uint8_t turned[kTurnColumns];
    const int64_t slot = blockIdx.x, g = slot_group(first, count, slot);
    const PairToTurn &pair = pairs[g];
    const int64_t each = (pair.parts[0] + pair.parts[1]) * pair.chunks, matrix = (slot - first[g]) / each, own = (slot - first[g]) % each;
    const int64_t column = own % pair.chunks * kTurnColumns, part = own / pair.chunks;
    const int64_t rank = pair.ranks ? min((int64_t)pair.ranks[matrix], pair.out[0].cols) : pair.out[0].cols;
    if (own == 0 && rank > 0) tell_overflow(pair, matrix, rank);
    if (column >= rank) return;
    const int columns = (int)min(rank - column, (int64_t)kTurnColumns);
    find_signs(pair, matrix, column, columns, turned);
    const int side = part < pair.parts[0] ? 0 : 1;
    const fedlora_block &out = pair.out[side];
    const int64_t row = (side ? part - pair.parts[0] : part) * kTurnRows, rows = min(out.rows - row, (int64_t)kTurnRows);
    with_float(out.dtype, [&](auto kind) { turn_part<decltype(kind)>(out, matrix, row, rows, column, columns, turned); });
}

} // namespace

BackTransform::BackTransform(const std::vector<FactorPair> &pairs, Workspace &workspace, Upload &upload) : count_((int64_t)pairs.size()) {
    std::vector<MixedSum> sums;
    for (const FactorPair &pair : pairs) sums.push_back(pair.left), sums.push_back(pair.right);
    const bool narrow = all_narrow(sums);
    std::vector<MixedTable> tables;
    std::vector<PairToTurn> turns;
    std::vector<int64_t> first = {0};
    for (const FactorPair &pair : pairs) {
        PairToTurn to = {};
        to.info = pair.info, to.notes = pair.notes, to.ranks = pair.left.ranks;
        for (int side = 0; side < 2; ++side) {
            const MixedSum &sum = side ? pair.right : pair.left;
            const int64_t batch = sum.sum.batch;
            MixedTable table = table_of(sum, narrow, upload);
            table.quads = upload.add(all_quads(sum));
            table.overflows = workspace.take<int32_t>(batch * table.row_tiles * table.strips);
            if (side == 0) to.records = table.records = workspace.take<SignRecord>(batch * table.row_tiles * sum.sum.cols);
            to.out[side] = sum.sum, to.overflows[side] = table.overflows;
            to.row_tiles[side] = table.row_tiles, to.strips = table.strips;
            to.parts[side] = (sum.sum.rows + kTurnRows - 1) / kTurnRows;
            tables.push_back(table);
        }
        to.chunks = (pair.left.sum.cols + kTurnColumns - 1) / kTurnColumns;
        turns.push_back(to);
        first.push_back(first.back() + pair.left.sum.batch * (to.parts[0] + to.parts[1]) * to.chunks);
    }
    tiles_ = tiles_of(tables, narrow, upload);
    pairs_ = upload.add(turns);
    first_ = upload.add(first);
    parts_ = first.back();
}

void BackTransform::launch(void *stream) const {
    launch_tiles(tiles_, stream);
    fedlora::launch(turn_columns, dim3((unsigned)parts_), dim3(kTurnThreads), 0, stream, pairs_, first_, count_);
}

} // namespace fedlora
