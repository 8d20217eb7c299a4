// fedlora_gram: X^T X of blocks side by side, tile by tile on the float64 tensor cores.
//
// G is cut into tiles of 64 x 64, those on and above the diagonal, and the rows into leaves, whose number does not depend on the rest
// of the call. The warps of a block share out the rows of a strip, four each for the full tile on the diagonal (both operands are
// the same numbers there, and lie in the same lanes) and two for each half of another tile; at the end of a leaf their sums are added
// up. Leaves are added in runs of eight, and runs from first to last: by the block itself where the call has runs enough to
// fill the device, else by a second kernel, one block having done each leaf. Both add in the same order.
#include "gram.cuh"

#include <algorithm>

#include "slots.cuh"
#include "shares.cuh"

namespace fedlora {

struct GramTask {
    StackReading reading;
    fedlora_block scale, G;
    double *slots;          // of every part of every tile of every matrix
    int64_t rows, leaf;     // leaf: rows of one
    int64_t run;            // leaves that are added up before they meet others
    int64_t parts, leaves;  // parts of the rows, and the leaves of a part: all of a run or one
    int64_t tiles, slot;    // tiles of G, numbers of a slot
};

namespace {

constexpr int kSide = 64;
constexpr int kRun = 8;

// Tiles on the diagonal with 8 V columns: every warp has all of it, for a quarter of the rows.
template <int V>
struct OnDiagonal {
    static constexpr int kLeft = 8 * V, kRight = 0, kTiles = upper_tiles(V), kShares = 4;
    static constexpr int kRows = 2048 / kLeft;

    template <class Value>
    __device__ static void add(double (&c)[kTiles][4], int, const Value &x) {
        multiply_upper<2, V>(c, x);
    }
    __device__ static void place(int tile, int &row, int &col) {
        int m = 0;
        for (; tile >= V - 2 * m; ++m) tile -= V - 2 * m;
        row = 16 * m, col = 8 * (2 * m + tile);
    }
};

// Tiles of 64 x 8 N: two warps have half of the rows of G each, for half of the rows of X.
template <int N>
struct OffDiagonal {
    static constexpr int kLeft = kSide, kRight = 8 * N, kTiles = 2 * N, kShares = 2;
    static constexpr int kRows = 16;

    template <class Value>
    __device__ static void add(double (&c)[kTiles][4], int half, const Value &x) {
        double(&tiles)[2][N][4] = reinterpret_cast<double(&)[2][N][4]>(c);
        multiply<2>(
            tiles, [&](int i, int k) { return x(k, 32 * half + i); }, [&](int k, int j) { return x(k, kSide + j); });
    }
    __device__ static void place(int tile, int &row, int &col) { row = 16 * (tile / N), col = 8 * (tile % N); }
};

// Calls f with the shape of the tile of G that so many columns make.
template <class F>
__device__ void with_shape(bool diagonal, int64_t columns, F &&f) {
    if (diagonal) {
        if (columns <= 16) f(OnDiagonal<2>{});
        else if (columns <= 32) f(OnDiagonal<4>{});
        else f(OnDiagonal<8>{});
    } else {
        if (columns <= 16) f(OffDiagonal<2>{});
        else if (columns <= 32) f(OffDiagonal<4>{});
        else f(OffDiagonal<8>{});
    }
}

// Shared memory of a block: strips, what warps hand each other, the columns and their scales.
template <class T, class Shape>
struct Layout {
    static constexpr int kColumns = Shape::kLeft + Shape::kRight, kStrips = kStripsAhead<T>;
    using Strips = Strip<T, kColumns, Shape::kRows>;
    static constexpr int kHanded = kStrips * Strips::kBytes;
    static constexpr int kTable = kHanded + kHandedNumbers<Shape> * (int)sizeof(double);
    static constexpr int kScales = kTable + kColumns * (int)sizeof(StripColumn);
    static constexpr int kBytes = kScales + kColumns * (int)sizeof(double);
};

// Which columns of G a tile has; tiles go from column to column of G.
struct TilePlace {
    int64_t row, col;
    __device__ explicit TilePlace(int64_t tile) : row(tile), col(0) {
        while (row > col) row -= ++col;
        row *= kSide, col *= kSide;
    }
    __device__ bool diagonal() const { return row == col; }
};

struct Part {
    const GramTask &task;
    int64_t matrix, part;
    TilePlace place;
    double *slot;
};

__device__ inline void put(const GramTask &task, int64_t matrix, int64_t row, int64_t col, double value) {
    if (row > col || col >= task.G.cols) return;
    double *const G = address<double>(task.G, matrix);
    G[row * task.G.row_stride + col * task.G.col_stride] = value;
    G[col * task.G.row_stride + row * task.G.col_stride] = value;
}

template <class T, class Shape>
__device__ __forceinline__ void run_part(const Part &p, unsigned char *memory) {
    using Layout = Layout<T, Shape>;
    using Strips = typename Layout::Strips;
    constexpr int kCount = Shape::kTiles * 4, kShares = Shape::kShares, kRows = Shape::kRows, kAhead = Layout::kStrips - 1;
    const GramTask &task = p.task;
    StripColumn *const columns = reinterpret_cast<StripColumn *>(memory + Layout::kTable);
    double *const scales = reinterpret_cast<double *>(memory + Layout::kScales);
    double *const handed = reinterpret_cast<double *>(memory + Layout::kHanded);
    const auto strip = [&](int s) { return reinterpret_cast<T *>(memory + s % Layout::kStrips * Strips::kBytes); };

    const int64_t length = task.leaf * task.leaves, begin = p.part * length;
    const int rows = (int)(task.rows - begin < length ? task.rows - begin : length);
    const bool scaled = task.scale.rows != 0;
    for (int c = (int)threadIdx.x; c < Layout::kColumns; c += kStripThreads) {
        const int64_t column = c < Shape::kLeft ? p.place.row + c : p.place.col + c - Shape::kLeft;
        columns[c] = strip_column(task.reading, column, p.matrix, begin);
        if (scaled) scales[c] = column < task.G.cols ? address<double>(task.scale, p.matrix)[column * task.scale.col_stride] : 1.0;
    }
    __syncthreads();

    const int warp = (int)threadIdx.x / kWarp, share = warp * kShares / kStripWarps, half = warp % (kStripWarps / kShares);
    const int strips = (rows + kRows - 1) / kRows, strips_of_leaf = (int)task.leaf / kRows;
    const bool turned = task.reading.turned != 0;
    const int down = Strips::row_step(turned), right = Strips::col_step(turned);
    double c[Shape::kTiles][4] = {};
    double *const sums = &c[0][0];
    for (int s = 0; s < kAhead; ++s) {
        if (s < strips) Strips::fill(strip(s), task.reading, columns, s * kRows, rows);
        close_group();
    }
    for (int s = 0; s < strips || s == 0; ++s) {
        wait_groups<kAhead - 1>();
        __syncthreads();
        if (s + kAhead < strips) Strips::fill(strip(s + kAhead), task.reading, columns, (s + kAhead) * kRows, rows);
        close_group();
        const T *const numbers = strip(s);
        const int steps = strips ? kRows / (8 * kShares) : 0;
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            const int first = 8 * (step * kShares + share);
            Shape::add(c, half, [&](int k, int j) {
                const double x = widen(numbers[(first + k) * down + j * right]);
                return scaled ? x * scales[j] : x;
            });
        }
        const bool last = s + 1 >= strips;
        if (!last && (s + 1) % strips_of_leaf) continue;
        join<Shape>(sums, handed, p.slot, s < strips_of_leaf);
#pragma unroll
        for (int e = 0; e < kCount; ++e) sums[e] = 0.0;
    }
    if (task.parts > 1) return;
    const LaneOfTile lane;
    for (int tile = 0; tile < Shape::kTiles * kStripWarps / kShares; ++tile) {
        int row, col;
        Shape::place(tile, row, col);
        put(task, p.matrix, p.place.row + row + lane.row(warp), p.place.col + col + lane.col(warp), p.slot[tile * kTile + threadIdx.x]);
    }
}

// A kernel for every dtype: all of them in one would need more registers than there are. `items` are done by those before.
template <class T>
__global__ void __launch_bounds__(kStripThreads, 2) gram_parts(const GramTask *tasks, const int64_t *first, int64_t count, int64_t items) {
    FEDLORA_DYNAMIC_SHARED(unsigned char, memory);
    const int64_t block = items + blockIdx.x, t = slot_group(first, count, block);
    const GramTask &task = tasks[t];
    // All tiles of the same rows in a row: the second one finds them in the second-level cache.
    const uint32_t item = (uint32_t)(block - first[t]), tiles = (uint32_t)task.tiles, parts = (uint32_t)task.parts;
    const int64_t tile = item % tiles, part = item / tiles % parts, matrix = item / tiles / parts;
    double *const slot = task.slots + ((matrix * task.tiles + tile) * task.parts + part) * task.slot;
    const Part p = {task, matrix, part, TilePlace(tile), slot};
    with_shape(p.place.diagonal(), task.G.cols - p.place.col, [&](auto shape) { run_part<T, decltype(shape)>(p, memory); });
}

// One block for every tile of the tensor cores.
__global__ void __launch_bounds__(kTile) gram_sums(const GramTask *tasks, const int64_t *first, int64_t count) {
    const int64_t t = slot_group(first, count, blockIdx.x);
    const GramTask &task = tasks[t];
    const uint32_t item = (uint32_t)(blockIdx.x - first[t]), pieces = (uint32_t)task.slot / (uint32_t)kTile, tiles = (uint32_t)task.tiles;
    const int64_t piece = item % pieces, tile = item / pieces % tiles, matrix = item / pieces / tiles;
    const TilePlace place(tile);
    int row = -1, col = -1;
    with_shape(place.diagonal(), task.G.cols - place.col, [&](auto shape) {
        using Shape = decltype(shape);
        if (piece < Shape::kTiles * (kStripWarps / Shape::kShares)) Shape::place((int)piece, row, col);
    });
    if (row < 0) return;
    const double *const slots = task.slots + (matrix * task.tiles + tile) * task.parts * task.slot + piece * kTile + threadIdx.x;
    const int64_t run = task.leaves == 1 ? task.run : 1;
    double total = 0.0;
    for (int64_t part = 0; part < task.parts; part += run) {
        double values[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) values[i] = i < run && part + i < task.parts ? slots[(part + i) * task.slot] : 0.0;
        double sum = values[0];
#pragma unroll
        for (int i = 1; i < kRun; ++i)
            if (i < run && part + i < task.parts) sum += values[i];
        total = part ? total + sum : sum;
    }
    const LaneOfTile lane;
    const int e = (int)threadIdx.x / kWarp;
    put(task, matrix, place.row + row + lane.row(e), place.col + col + lane.col(e), total);
}

// Rows of a leaf: enough for the sums of its end to weigh little beside its products, and few enough for small calls to fill the device.
int64_t leaf_of(int64_t R) { return R <= 16 ? 1024 : R <= 32 ? 512 : R <= 128 ? 256 : R <= 256 ? 512 : 1024; }

int64_t parts_of(int64_t rows, int64_t length) { return std::max<int64_t>((rows + length - 1) / length, 1); }

// Shared memory of the blocks of a stack: that of the largest tile.
template <class T>
int64_t shared_of(int64_t R) {
    if (R > kSide)
        return std::max({Layout<T, OnDiagonal<2>>::kBytes, Layout<T, OnDiagonal<4>>::kBytes, Layout<T, OnDiagonal<8>>::kBytes,
                         Layout<T, OffDiagonal<2>>::kBytes, Layout<T, OffDiagonal<4>>::kBytes, Layout<T, OffDiagonal<8>>::kBytes});
    return R <= 16 ? Layout<T, OnDiagonal<2>>::kBytes : R <= 32 ? Layout<T, OnDiagonal<4>>::kBytes : Layout<T, OnDiagonal<8>>::kBytes;
}

int64_t shared_of(int64_t R, int64_t dtype) {
    switch (dtype) {
        case FEDLORA_FLOAT32: return shared_of<float>(R);
        case FEDLORA_FLOAT64: return shared_of<double>(R);
        case FEDLORA_BFLOAT16: return shared_of<Bfloat16>(R);
        default: return shared_of<Float16>(R);
    }
}

} // namespace

std::vector<GramStack> stacks_of(const fedlora_block *X, const int64_t *counts, const fedlora_block *scale, const fedlora_block *G,
                                 int64_t groups) {
    std::vector<GramStack> stacks;
    for (int64_t g = 0; g < groups; X += counts[g], ++g) stacks.push_back({X, counts[g], scale ? scale[g] : fedlora_block{}, G[g]});
    return stacks;
}

int status_of(const GramStack &stack) {
    const int64_t batch = stack.G.batch, rows = stack.count > 0 ? stack.X[0].rows : 0;
    if (stack.G.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    if (stack.count < 0 || batch < 0 || rows < 0 || stack.G.rows < 0 || stack.G.rows != stack.G.cols) return FEDLORA_BAD_SHAPE;
    int64_t R = 0;
    for (int64_t k = 0; k < stack.count; ++k) {
        if (!is_float(stack.X[k].dtype)) return FEDLORA_BAD_DTYPE;
        if (stack.X[k].batch != batch || stack.X[k].rows != rows || stack.X[k].cols < 0) return FEDLORA_BAD_SHAPE;
        R += stack.X[k].cols;
    }
    if (R != stack.G.cols || R > INT32_MAX) return FEDLORA_BAD_SHAPE;
    if (!stack.scale.rows) return FEDLORA_OK;
    if (stack.scale.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    return stack.scale.rows == 1 && stack.scale.cols == R && stack.scale.batch == batch ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

Grams::Grams(const std::vector<GramStack> &stacks, Workspace &workspace, Upload &upload) {
    std::vector<GramTask> tasks;
    int64_t runs = 0, parts = 0;
    for (const GramStack &stack : stacks) {
        const int64_t R = stack.G.cols, rows = stack.count ? stack.X[0].rows : 0, across = (R + kSide - 1) / kSide;
        if (!R || !stack.G.batch) continue;
        GramTask task = {reading_of(stack.X, stack.count, upload), stack.scale, stack.G, nullptr, rows, leaf_of(R), kRun, 0, 0, 0, 0};
        task.tiles = across * (across + 1) / 2;
        const int64_t narrow = R <= 16 ? upper_tiles(2) : R <= 32 ? upper_tiles(4) : upper_tiles(8);
        task.slot = kTile * (across == 1 ? narrow : kSide * kSide / kTile);
        runs += stack.G.batch * task.tiles * parts_of(rows, task.leaf * kRun);
        tasks.push_back(task);
        shared_bytes_ = std::max(shared_bytes_, shared_of(R, task.reading.dtype));
    }
    // Blocks that do whole runs spare most of the second kernel's reading; four of them for each of the two places on a multiprocessor
    // even out that they are not alike.
    const bool whole = runs >= 8 * limits().processors;
    std::stable_sort(tasks.begin(), tasks.end(), [](const GramTask &a, const GramTask &b) { return a.reading.dtype < b.reading.dtype; });
    std::vector<int64_t> first, first_sum;
    for (GramTask &task : tasks) {
        task.leaves = whole ? kRun : 1;
        task.parts = parts_of(task.rows, task.leaf * task.leaves);
        first.push_back(parts);
        first_sum.push_back(sums_);
        const int64_t tiles = task.G.batch * task.tiles;
        task.slots = workspace.take<double>(tiles * task.parts * task.slot);
        parts_[task.reading.dtype] += tiles * task.parts;
        parts += tiles * task.parts;
        if (task.parts > 1) sums_ += tiles * (task.slot / kTile);
    }
    count_ = (int64_t)tasks.size();
    tasks_ = upload.add(tasks);
    first_ = upload.add(first);
    first_sum_ = upload.add(first_sum);
}

void Grams::launch(void *stream) const {
    const dim3 block(kStripThreads);
    int64_t done = 0;
    for (int64_t dtype = 0; dtype < kDtypes; done += parts_[dtype++]) {
        const dim3 grid((unsigned)parts_[dtype]);
        const auto start = [&](auto kernel) { fedlora::launch(kernel, grid, block, shared_bytes_, stream, tasks_, first_, count_, done); };
        if (dtype == FEDLORA_FLOAT32) start(gram_parts<float>);
        if (dtype == FEDLORA_FLOAT64) start(gram_parts<double>);
        if (dtype == FEDLORA_BFLOAT16) start(gram_parts<Bfloat16>);
        if (dtype == FEDLORA_FLOAT16) start(gram_parts<Float16>);
    }
    fedlora::launch(gram_sums, dim3((unsigned)sums_), dim3((unsigned)kTile), 0, stream, tasks_, first_sum_, count_);
}

} // namespace fedlora

extern "C" {

using namespace fedlora;

int fedlora_gram_workspace(const fedlora_block *X, const int64_t *counts, const fedlora_block *G, int64_t groups, int64_t,
                           int64_t *bytes) {
    if (!X || !counts || !G || !bytes || groups < 0) return FEDLORA_BAD_ARGUMENT;
    Workspace workspace;
    Upload upload(workspace);
    Grams(stacks_of(X, counts, nullptr, G, groups), workspace, upload);
    *bytes = workspace.bytes();
    return FEDLORA_OK;
}

int fedlora_gram(const fedlora_block *X, const int64_t *counts, const fedlora_block *scale, const fedlora_block *G, int64_t groups,
                 void *memory, int64_t memory_bytes, int64_t, void *stream) {
    if (!X || !counts || !scale || !G || !memory || groups < 0) return FEDLORA_BAD_ARGUMENT;
    const std::vector<GramStack> stacks = stacks_of(X, counts, scale, G, groups);
    for (const GramStack &stack : stacks)
        if (const int status = status_of(stack)) return status;
    Workspace workspace(memory, memory_bytes);
    Upload upload(workspace);
    const Grams grams(stacks, workspace, upload);
    if (!workspace.fits()) return FEDLORA_BAD_WORKSPACE;
    upload.send(stream);
    grams.launch(stream);
    return finish();
}

} // extern "C"
