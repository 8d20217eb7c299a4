// fedlora_mixed_sum and what it shares with the back-transform: the launch of all tiles.
#include "mixed_sum.cuh"

#include "mixed_tile.cuh"

namespace fedlora {

// The blocks that count, for matrices of which those with a zero mixer do not.
struct MixedSieve {
    const fedlora_block *mixers;
    const int32_t *columns; // of each block
    int64_t blocks, most;   // and quads of all blocks
    int32_t *kept;          // (matrix, block)
    Quad *quads;            // (matrix, quad)
    int32_t *counts;        // of quads, per matrix
};

namespace {

constexpr int kThreads = 256;

int64_t shares_of(int64_t whole, int64_t most) { return (whole + most - 1) / most; }

// Whether the numbers of a column lie closer together than those of a row.
bool lies_by_columns(const fedlora_block &b) {
    const int64_t row = b.row_stride < 0 ? -b.row_stride : b.row_stride, col = b.col_stride < 0 ? -b.col_stride : b.col_stride;
    return col > row;
}

// All numbers of a matrix without any, of a tile.
__device__ void spoil_tile(const fedlora_block &sum, int64_t matrix, int64_t row, int64_t column, int64_t columns) {
    with_float(sum.dtype, [&](auto kind) {
        using T = decltype(kind);
        T nan;
        narrow(__longlong_as_double(0x7ff8000000000000ll), nan);
        T *const out = address<T>(sum, matrix) + row * sum.row_stride + column * sum.col_stride;
        const int64_t rows = sum.rows - row < kTileRows ? sum.rows - row : kTileRows;
        const int64_t cols = sum.cols - column < columns ? sum.cols - column : columns;
        for (int64_t e = threadIdx.x; e < rows * cols; e += blockDim.x) out[e / cols * sum.row_stride + e % cols * sum.col_stride] = nan;
    });
}

template <int Columns>
__global__ void __launch_bounds__(kMixThreads, 2) mix(const MixedTiles tiles) {
    FEDLORA_DYNAMIC_SHARED(double, shared);
    const int64_t slot = blockIdx.x, g = slot_group(tiles.first, tiles.count, slot);
    const MixedTable &table = tiles.tables[g];
    const int64_t each = table.row_tiles * table.column_tiles, tile = slot - tiles.first[g];
    const int64_t matrix = tile / each, row_tile = tile % each / table.column_tiles, column = tile % table.column_tiles * Columns;
    int64_t columns = table.sum.cols;
    if (table.ranks) {
        const int32_t rank = table.ranks[matrix];
        if (rank == kNoNumbers) return spoil_tile(table.sum, matrix, row_tile * kTileRows, column, Columns);
        if (rank < columns) columns = rank;
    }
    if (column >= columns) return;
    if (table.by_columns)
        MixedTile<Columns, true>(table, matrix, (int)row_tile, (int)column, columns, shared).run();
    else
        MixedTile<Columns, false>(table, matrix, (int)row_tile, (int)column, columns, shared).run();
}

__device__ int32_t quads_of(int32_t columns) { return (columns + 3) / 4; }

__device__ bool is_zero(const fedlora_block &mixer, int64_t matrix) {
    const double *const x = address<double>(mixer, matrix);
    const int lane = (int)threadIdx.x % kWarp;
    bool zero = true;
    for (int64_t row = 0; row < mixer.rows && __any_sync(kAllLanes, zero); ++row)
        for (int64_t col = lane; col < mixer.cols; col += kWarp) zero &= x[row * mixer.row_stride + col * mixer.col_stride] == 0.0;
    return __all_sync(kAllLanes, zero);
}

// A block of threads per matrix: which mixers are zero, a warp for each; then the quads of the others in order, by one warp.
__global__ void __launch_bounds__(kThreads) sift(const MixedSieve *sieves, const int64_t *first, int64_t count) {
    const int64_t slot = blockIdx.x, g = slot_group(first, count, slot), matrix = slot - first[g];
    const MixedSieve &sieve = sieves[g];
    int32_t *const kept = sieve.kept + matrix * sieve.blocks;
    const int lane = (int)threadIdx.x % kWarp, warp = (int)threadIdx.x / kWarp;
    for (int64_t k = warp; k < sieve.blocks; k += kThreads / kWarp) {
        const bool zero = is_zero(sieve.mixers[k], matrix);
        if (lane == 0) kept[k] = !zero;
    }
    __syncthreads();
    if (warp != 0) return;
    Quad *const quads = sieve.quads + matrix * sieve.most;
    int32_t before = 0, place = 0; // quads written and columns seen
    for (int64_t begin = 0; begin < sieve.blocks; begin += kWarp) {
        const int64_t k = begin + lane;
        const int32_t columns = k < sieve.blocks ? sieve.columns[k] : 0, own = k < sieve.blocks && kept[k] ? quads_of(columns) : 0;
        int32_t quads_here = own, columns_here = columns; // up to this lane
        for (int up = 1; up < kWarp; up *= 2) {
            const int32_t q = __shfl_up_sync(kAllLanes, quads_here, up), c = __shfl_up_sync(kAllLanes, columns_here, up);
            if (lane >= up) quads_here += q, columns_here += c;
        }
        for (int32_t q = 0; q < own; ++q) {
            const int32_t left = columns - 4 * q;
            quads[before + quads_here - own + q] = {(int32_t)k, 4 * q, left < 4 ? left : 4, place + columns_here - columns + 4 * q};
        }
        before += __shfl_sync(kAllLanes, quads_here, kWarp - 1);
        place += __shfl_sync(kAllLanes, columns_here, kWarp - 1);
    }
    if (lane == 0) sieve.counts[matrix] = before;
}

} // namespace

int64_t count_quads(const MixedSum &sum) {
    int64_t quads = 0;
    for (int64_t k = 0; k < sum.count; ++k) quads += shares_of(sum.X[k].cols, 4);
    return quads;
}

std::vector<Quad> all_quads(const MixedSum &sum) {
    std::vector<Quad> quads;
    int32_t place = 0;
    for (int64_t k = 0; k < sum.count; place += (int32_t)sum.X[k++].cols)
        for (int32_t column = 0; column < sum.X[k].cols; column += 4) {
            const int32_t left = (int32_t)sum.X[k].cols - column;
            quads.push_back({(int32_t)k, column, left < 4 ? left : 4, place + column});
        }
    return quads;
}

bool all_narrow(const std::vector<MixedSum> &sums) {
    for (const MixedSum &sum : sums)
        if (sum.sum.cols > kStripColumns) return false;
    return true;
}

MixedTable table_of(const MixedSum &sum, bool narrow, Upload &upload) {
    MixedTable table = {};
    table.X = upload.add(sum.X, sum.count);
    table.mixers = upload.add(sum.mixers, sum.count);
    table.most = count_quads(sum);
    table.scale = sum.scale;
    table.sum = sum.sum;
    table.ranks = sum.ranks;
    table.row_tiles = shares_of(sum.sum.rows, kTileRows);
    table.strips = shares_of(sum.sum.cols, kStripColumns);
    table.column_tiles = narrow ? table.strips : shares_of(sum.sum.cols, 2 * kStripColumns);
    table.by_columns = lies_by_columns(sum.sum);
    return table;
}

MixedTiles tiles_of(const std::vector<MixedTable> &tables, bool narrow, Upload &upload) {
    std::vector<int64_t> first = {0};
    for (const MixedTable &table : tables) first.push_back(first.back() + table.sum.batch * table.row_tiles * table.column_tiles);
    return {upload.add(tables), upload.add(first), (int64_t)tables.size(), first.back(), narrow};
}

void launch_tiles(const MixedTiles &tiles, void *stream) {
    const dim3 grid((unsigned)tiles.tiles), block(kMixThreads);
    if (tiles.narrow)
        launch(mix<kStripColumns>, grid, block, MixedShared<kStripColumns>::kBytes, stream, tiles);
    else
        launch(mix<2 * kStripColumns>, grid, block, MixedShared<2 * kStripColumns>::kBytes, stream, tiles);
}

MixedSums::MixedSums(const std::vector<MixedSum> &sums, const std::vector<SumAnswers> &answers, Workspace &workspace, Upload &upload)
    : count_((int64_t)sums.size()) {
    const bool narrow = all_narrow(sums);
    std::vector<MixedTable> tables;
    std::vector<MixedSieve> sieves;
    std::vector<AnswersGroup> groups;
    std::vector<int64_t> first = {0};
    for (size_t g = 0; g < sums.size(); ++g) {
        const MixedSum &sum = sums[g];
        const int64_t batch = sum.sum.batch;
        MixedTable table = table_of(sum, narrow, upload);
        std::vector<int32_t> columns;
        for (int64_t k = 0; k < sum.count; ++k) columns.push_back((int32_t)sum.X[k].cols);
        const MixedSieve sieve = {table.mixers, upload.add(columns), sum.count, table.most, workspace.take<int32_t>(batch * sum.count),
                                  workspace.take<Quad>(batch * table.most), workspace.take<int32_t>(batch)};
        const int64_t each = table.row_tiles * table.strips;
        table.ranks = nullptr;
        table.quads = sieve.quads, table.quad_stride = table.most, table.counts = sieve.counts;
        table.partials = workspace.take<PartialSum>(batch * each);
        tables.push_back(table);
        sieves.push_back(sieve);
        groups.push_back({answers[g], table.partials, each, batch});
        first.push_back(first.back() + batch);
    }
    tiles_ = tiles_of(tables, narrow, upload);
    sieves_ = upload.add(sieves);
    first_ = upload.add(first);
    matrices_ = first.back();
    answers_ = AnswersPlan(groups, upload);
}

void MixedSums::launch(void *stream) const {
    fedlora::launch(sift, dim3((unsigned)matrices_), dim3(kThreads), 0, stream, sieves_, first_, count_);
    launch_tiles(tiles_, stream);
    answers_.launch(stream);
}

namespace {

int status_of(const MixedSum &sum, const SumAnswers &answers) {
    const fedlora_block &to = sum.sum;
    if (!is_float(to.dtype)) return FEDLORA_BAD_DTYPE;
    if (sum.count < 0 || to.batch < 0 || to.rows < 0 || to.cols < 0) return FEDLORA_BAD_SHAPE;
    for (int64_t k = 0; k < sum.count; ++k) {
        const fedlora_block &X = sum.X[k], &mixer = sum.mixers[k];
        if (!is_float(X.dtype) || mixer.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
        if (X.batch != to.batch || mixer.batch != to.batch || X.rows != to.rows || X.cols < 0) return FEDLORA_BAD_SHAPE;
        if (mixer.rows != X.cols || mixer.cols != to.cols) return FEDLORA_BAD_SHAPE;
    }
    return fit(answers, to.batch) ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

} // namespace
} // namespace fedlora

extern "C" {

int fedlora_mixed_sum_workspace(const fedlora_block *mixers, const int64_t *counts, const fedlora_block *sum, int64_t groups, int64_t,
                                int64_t *bytes) {
    using namespace fedlora;
    if (!mixers || !counts || !sum || !bytes || groups < 0) return FEDLORA_BAD_ARGUMENT;
    std::vector<MixedSum> sums;
    int64_t blocks = 0;
    for (int64_t g = 0; g < groups; ++g) blocks += counts[g];
    // the rows of a mixer are the columns of its block, which is all that the layout asks of it
    std::vector<fedlora_block> X(mixers, mixers + blocks);
    for (fedlora_block &x : X) x.cols = x.rows;
    int64_t at = 0;
    for (int64_t g = 0; g < groups; at += counts[g], ++g) sums.push_back({X.data() + at, mixers + at, counts[g], {}, sum[g], nullptr});
    Workspace counted;
    Upload upload(counted);
    const MixedSums plan(sums, std::vector<SumAnswers>(sums.size()), counted, upload);
    *bytes = counted.bytes();
    return FEDLORA_OK;
}

int fedlora_mixed_sum(const fedlora_block *X, const fedlora_block *mixers, const int64_t *counts, const fedlora_block *sum,
                      const fedlora_block *norm, const fedlora_block *rounding, const fedlora_block *info, const fedlora_block *notes,
                      int64_t groups, void *workspace, int64_t workspace_bytes, int64_t, void *stream) {
    using namespace fedlora;
    if (!X || !mixers || !counts || !sum || !norm || !rounding || !info || !notes || !workspace || groups < 0)
        return FEDLORA_BAD_ARGUMENT;
    std::vector<MixedSum> sums;
    std::vector<SumAnswers> answers;
    int64_t at = 0;
    for (int64_t g = 0; g < groups; at += counts[g], ++g) {
        sums.push_back({X + at, mixers + at, counts[g], {}, sum[g], nullptr});
        answers.push_back({norm[g], rounding[g], info[g], notes[g]});
        if (const int status = status_of(sums[g], answers[g])) return status;
    }
    Workspace memory(workspace, workspace_bytes);
    Upload upload(memory);
    const MixedSums plan(sums, answers, memory, upload);
    if (!memory.fits()) return FEDLORA_BAD_WORKSPACE;
    upload.send(stream);
    plan.launch(stream);
    return finish();
}

} // extern "C"
