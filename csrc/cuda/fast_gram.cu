// fedlora_fast_gram: X^T X of bfloat16 or float16 blocks on their own tensor cores (docs/cuda.md, Gram).
//
// These add up in float32, and by truncation; so what they have of 64 rows goes to float64 sums before more is added. Blocks share
// out tiles of G and parts of the rows; a second kernel adds the parts up in order and multiplies by the scales.
#include <algorithm>

#include "gram.cuh"
#include "shares.cuh"
#include "slots.cuh"

namespace fedlora {
namespace {

constexpr int kSide = 64;
constexpr int kRowsInFloat = 64;
constexpr int64_t kLength = 1024; // rows of a part

struct FastTask {
    StackReading reading;
    fedlora_block scale, G;
    double *slots;
    int64_t rows;
    int32_t parts, tiles;
};

// G of up to 32 columns: every warp has all of it, for a quarter of the rows.
struct Narrow {
    static constexpr int kColumns = 32, kRows = 64, kTiles = 8, kShares = 4, kSlotTiles = 8;
    static constexpr int kSteps = 1; // of 16 rows for every warp in a strip
};

// Tiles of 64 x 64 of any G: every warp has a quarter, for all rows.
struct Wide {
    static constexpr int kColumns = 2 * kSide, kRows = 32, kTiles = 8, kShares = 1, kSlotTiles = 32;
    static constexpr int kSteps = 2;
};

__host__ __device__ inline int64_t slot_of(int64_t R) { return kTile * (R <= Narrow::kColumns ? Narrow::kSlotTiles : Wide::kSlotTiles); }

// Where a tile of the tensor cores is in the tile of G.
__device__ void place_of(int tile, int &row, int &col) {
    const int warp = tile / 8;
    row = 32 * (warp / 2) + 16 * (tile % 8 / 4), col = 32 * (warp % 2) + 8 * (tile % 4);
}

#ifdef FEDLORA_TENSOR_FLOAT64
__device__ __forceinline__ void multiply_halves(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_halves(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// c += L^T R for 16 rows of 32 columns each, whose numbers are `down` and `right` apart. A lane has the pairs of rows 2 t and 2 t + 8 of
// columns g, g + 8, ... of both: see tile.cuh.
template <class T>
__device__ __forceinline__ void multiply_rows(float (&c)[2][4][4], const T *L, const T *R, int down, int right) {
    const LaneOfTile lane;
#ifdef FEDLORA_TENSOR_FLOAT64
    const auto pair = [&](const T *X, int k, int column) {
        const T *const x = X + k * down + column * right;
        if (down == 1) return *reinterpret_cast<const uint32_t *>(x);
        return (uint32_t)x[0].bits | (uint32_t)x[down].bits << 16;
    };
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = pair(L, 2 * lane.t + 8 * (i >> 1), 16 * m + lane.g + 8 * (i & 1));
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        const uint32_t b[2] = {pair(R, 2 * lane.t, 8 * n + lane.g), pair(R, 2 * lane.t + 8, 8 * n + lane.g)};
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply_halves(c[m][n], a[m], b, T{});
    }
#else
    for (int m = 0; m < 2; ++m)
        for (int n = 0; n < 4; ++n)
            for (int e = 0; e < 4; ++e)
                for (int k = 0; k < 16; ++k) {
                    const T left = L[k * down + (16 * m + lane.row(e)) * right], other = R[k * down + (8 * n + lane.col(e)) * right];
                    c[m][n][e] = fmaf(widen32(left), widen32(other), c[m][n][e]);
                }
#endif
}

template <class T, class Shape>
struct Layout {
    static constexpr int kStrips = kStripsAhead<T>;
    using Strips = Strip<T, Shape::kColumns, Shape::kRows>;
    static constexpr int kHanded = kStrips * Strips::kBytes;
    static constexpr int kTable = kHanded + (Shape::kShares > 1 ? kHandedNumbers<Shape> * (int)sizeof(double) : 0);
    static constexpr int kBytes = kTable + Shape::kColumns * (int)sizeof(StripColumn);
};

template <class T, class Shape>
__device__ __forceinline__ void run_part(const FastTask &task, int64_t matrix, int64_t part, int64_t row, int64_t col, double *slot,
                                         unsigned char *memory) {
    using Layout = Layout<T, Shape>;
    using Strips = typename Layout::Strips;
    constexpr int kRows = Shape::kRows, kAhead = Layout::kStrips - 1, kSums = 32;
    StripColumn *const columns = reinterpret_cast<StripColumn *>(memory + Layout::kTable);
    const auto strip = [&](int s) { return reinterpret_cast<T *>(memory + s % Layout::kStrips * Strips::kBytes); };
    const int64_t begin = part * kLength;
    const int rows = (int)(task.rows - begin < kLength ? task.rows - begin : kLength), strips = (rows + kRows - 1) / kRows;
    for (int c = (int)threadIdx.x; c < Shape::kColumns; c += kStripThreads) {
        const bool second = c >= kSide; // none on the diagonal: both sides are the first there
        const int64_t column = second ? (row == col ? task.reading.columns : col + c - kSide) : row + c;
        columns[c] = strip_column(task.reading, column, matrix, begin);
    }
    __syncthreads();

    const auto fill = [&](int s) {
        if (s < strips) Strips::fill(strip(s), task.reading, columns, s * kRows, rows);
        close_group();
    };
    const bool turned = task.reading.turned != 0;
    const int down = Strips::row_step(turned), right = Strips::col_step(turned), warp = (int)threadIdx.x / kWarp;
    const int first = Shape::kShares > 1 ? 16 * warp : 0; // of the rows of a strip
    const int left = Shape::kShares > 1 ? 0 : 32 * (warp / 2), other = Shape::kShares > 1 ? 0 : 32 * (warp % 2) + (row == col ? 0 : kSide);
    const bool below = Shape::kShares == 1 && row == col && warp == 2; // its quarter is that of warp 1
    float c[2][4][4] = {};
    double sums[kSums] = {};
    const auto promote = [&] {
#pragma unroll
        for (int e = 0; e < kSums; ++e) sums[e] += c[e / 16][e / 4 % 4][e % 4], c[e / 16][e / 4 % 4][e % 4] = 0.0f;
    };
    for (int s = 0; s < kAhead; ++s) fill(s);
    for (int s = 0; s < strips; ++s) {
        wait_groups<kAhead - 1>();
        __syncthreads();
        fill(s + kAhead);
        if (below) continue;
#pragma unroll
        for (int step = 0; step < Shape::kSteps; ++step) {
            const T *const X = strip(s) + (first + 16 * step) * down;
            multiply_rows(c, X + left * right, X + other * right, down, right);
        }
        if ((s + 1) % (kRowsInFloat / (16 * Shape::kSteps)) == 0) promote();
    }
    promote();
    if constexpr (Shape::kShares > 1) {
        join<Shape>(sums, reinterpret_cast<double *>(memory + Layout::kHanded), slot, true);
    } else {
#pragma unroll
        for (int e = 0; e < kSums; ++e) slot[(warp * kSums + e) * kWarp + threadIdx.x % kWarp] = sums[e];
    }
}

// Tiles go from column to column of G.
__device__ void corner_of(int64_t tile, int64_t &row, int64_t &col) {
    for (row = tile, col = 0; row > col;) row -= ++col;
    row *= kSide, col *= kSide;
}

template <class T>
__global__ void __launch_bounds__(kStripThreads, 2) fast_parts(const FastTask *tasks, const int64_t *first, int64_t count, int64_t items) {
    FEDLORA_DYNAMIC_SHARED(unsigned char, memory);
    const int64_t block = items + blockIdx.x, t = slot_group(first, count, block);
    const FastTask &task = tasks[t];
    const uint32_t item = (uint32_t)(block - first[t]), tiles = (uint32_t)task.tiles, parts = (uint32_t)task.parts;
    const int64_t tile = item % tiles, part = item / tiles % parts, matrix = item / tiles / parts;
    int64_t row, col;
    corner_of(tile, row, col);
    double *const slot = task.slots + ((matrix * tiles + tile) * parts + part) * slot_of(task.G.cols);
    if (task.G.cols <= Narrow::kColumns)
        run_part<T, Narrow>(task, matrix, part, row, col, slot, memory);
    else
        run_part<T, Wide>(task, matrix, part, row, col, slot, memory);
}

// One block for every tile of the tensor cores.
__global__ void __launch_bounds__(kTile) fast_sums(const FastTask *tasks, const int64_t *first, int64_t count) {
    const int64_t t = slot_group(first, count, blockIdx.x);
    const FastTask &task = tasks[t];
    const uint32_t slot = (uint32_t)slot_of(task.G.cols), pieces = slot / (uint32_t)kTile, tiles = (uint32_t)task.tiles;
    const uint32_t item = (uint32_t)(blockIdx.x - first[t]);
    const int64_t piece = item % pieces, tile = item / pieces % tiles, matrix = item / pieces / tiles;
    const double *const parts = task.slots + (matrix * tiles + tile) * task.parts * slot + piece * kTile + threadIdx.x;
    double sum = 0.0;
#pragma unroll 8
    for (int part = 0; part < task.parts; ++part) sum += parts[(int64_t)part * slot];
    const LaneOfTile lane;
    const int e = (int)threadIdx.x / kWarp;
    int64_t row, col;
    int down, right;
    corner_of(tile, row, col);
    place_of((int)piece, down, right);
    row += down + lane.row(e), col += right + lane.col(e);
    if (row > col || col >= task.G.cols) return;
    if (task.scale.rows) {
        const double *const scale = address<double>(task.scale, matrix);
        sum = sum * scale[row * task.scale.col_stride] * scale[col * task.scale.col_stride];
    }
    double *const G = address<double>(task.G, matrix);
    G[row * task.G.row_stride + col * task.G.col_stride] = sum;
    G[col * task.G.row_stride + row * task.G.col_stride] = sum;
}

int status_of_fast(const GramStack &stack) {
    if (const int status = status_of(stack)) return status;
    for (int64_t k = 0; k < stack.count; ++k)
        if ((stack.X[k].dtype != FEDLORA_BFLOAT16 && stack.X[k].dtype != FEDLORA_FLOAT16) || stack.X[k].dtype != stack.X[0].dtype)
            return FEDLORA_BAD_DTYPE;
    return FEDLORA_OK;
}

class FastGrams {
  public:
    FastGrams(const std::vector<GramStack> &stacks, Workspace &workspace, Upload &upload) {
        std::vector<FastTask> tasks;
        std::vector<int64_t> first, first_sum;
        int64_t parts = 0;
        for (const int64_t dtype : {FEDLORA_BFLOAT16, FEDLORA_FLOAT16})
            for (const GramStack &stack : stacks) {
                const int64_t R = stack.G.cols, across = (R + kSide - 1) / kSide, rows = stack.count ? stack.X[0].rows : 0;
                if (!R || !stack.G.batch || stack.X[0].dtype != dtype) continue;
                FastTask task = {reading_of(stack.X, stack.count, upload), stack.scale, stack.G, nullptr, rows, 0, 0};
                task.parts = (int32_t)std::max<int64_t>((rows + kLength - 1) / kLength, 1);
                task.tiles = (int32_t)(across * (across + 1) / 2);
                const int64_t tiles = stack.G.batch * task.tiles;
                task.slots = workspace.take<double>(tiles * task.parts * slot_of(R));
                first.push_back(parts), first_sum.push_back(sums_);
                parts += tiles * task.parts, sums_ += tiles * (slot_of(R) / kTile);
                if (dtype == FEDLORA_BFLOAT16) bfloat16_ += tiles * task.parts;
                else float16_ += tiles * task.parts;
                tasks.push_back(task);
            }
        count_ = (int64_t)tasks.size();
        tasks_ = upload.add(tasks);
        first_ = upload.add(first), first_sum_ = upload.add(first_sum);
    }

    // Two launches, three where there are blocks of both kinds.
    void launch(void *stream) const {
        const int64_t bytes = std::max({Layout<Bfloat16, Narrow>::kBytes, Layout<Bfloat16, Wide>::kBytes, Layout<Float16, Narrow>::kBytes,
                                        Layout<Float16, Wide>::kBytes});
        const auto start = [&](auto kernel, int64_t parts, int64_t done) {
            fedlora::launch(kernel, dim3((unsigned)parts), dim3(kStripThreads), bytes, stream, tasks_, first_, count_, done);
        };
        start(fast_parts<Bfloat16>, bfloat16_, (int64_t)0);
        start(fast_parts<Float16>, float16_, bfloat16_);
        fedlora::launch(fast_sums, dim3((unsigned)sums_), dim3((unsigned)kTile), 0, stream, tasks_, first_sum_, count_);
    }

  private:
    const FastTask *tasks_;
    const int64_t *first_, *first_sum_; // part and sum of each task
    int64_t count_ = 0, bfloat16_ = 0, float16_ = 0, sums_ = 0;
};

} // namespace
} // namespace fedlora

extern "C" {

using namespace fedlora;

int fedlora_fast_gram_workspace(const fedlora_block *X, const int64_t *counts, const fedlora_block *G, int64_t groups, int64_t,
                                int64_t *bytes) {
    if (!X || !counts || !G || !bytes || groups < 0) return FEDLORA_BAD_ARGUMENT;
    Workspace workspace;
    Upload upload(workspace);
    FastGrams(stacks_of(X, counts, nullptr, G, groups), workspace, upload);
    *bytes = workspace.bytes();
    return FEDLORA_OK;
}

int fedlora_fast_gram(const fedlora_block *X, const int64_t *counts, const fedlora_block *scale, const fedlora_block *G, int64_t groups,
                      void *memory, int64_t memory_bytes, int64_t, void *stream) {
    if (!X || !counts || !scale || !G || !memory || groups < 0) return FEDLORA_BAD_ARGUMENT;
    const std::vector<GramStack> stacks = stacks_of(X, counts, scale, G, groups);
    for (const GramStack &stack : stacks)
        if (const int status = status_of_fast(stack)) return status;
    Workspace workspace(memory, memory_bytes);
    Upload upload(workspace);
    const FastGrams grams(stacks, workspace, upload);
    if (!workspace.fits()) return FEDLORA_BAD_WORKSPACE;
    upload.send(stream);
    grams.launch(stream);
    return finish();
}

} // extern "C"
