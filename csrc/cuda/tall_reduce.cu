// TSQR up: every leaf to a triangle, and triangles up the tree by whoever comes last.
//
// Source of the scheme: Demmel, Grigori, Hoemmen, Langou, Communication-optimal parallel and sequential QR and LU
// factorizations (2012).
#include "element.cuh"
#include "tall_factors.cuh"

namespace fedlora {
namespace {

// Numbers of shared memory beside the room: a panel's T, scratch of the panel and of the warps, and who came before.
constexpr int kFixed = kPanelKept + kPanelScratch + kTallWarps * kTileScratch + 2;

struct Scratch {
    double *kept, *panel, *tiles, *room;
    int32_t *before;
    __device__ explicit Scratch(double *shared)
        : kept(shared), panel(kept + kPanelKept), tiles(panel + kPanelScratch), room(shared + kFixed),
          before(reinterpret_cast<int32_t *>(room - 2)) {}
};

__global__ void clear_arrivals(int32_t *arrivals, int64_t count) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) arrivals[i] = 0;
}

// Some columns of a leaf from their block.
template <class T>
__device__ void load_block(const fedlora_block &X, int64_t matrix, int64_t begin, int height, const double *scale,
                           int64_t scale_stride, double *out, int gap) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const T *const source = address<T>(X, matrix) + begin * X.row_stride;
    // lanes go down the rows where these lie together in memory, else over patches of 4 x 8
    const int tall = is_down(X) ? kWarp : 4, wide = kWarp / tall;
    const int across = ((int)X.cols + wide - 1) / wide, patches = across * ((height + tall - 1) / tall);
    for (int patch = warp; patch < patches; patch += kTallWarps) {
        const int row = patch / across * tall + lane % tall, col = patch % across * wide + lane / tall;
        if (row >= height || col >= X.cols) continue;
        const double x = widen(source[row * X.row_stride + col * X.col_stride]);
        out[col * gap + row] = scale ? x * scale[col * scale_stride] : x;
    }
}

// With zeros up to whole panels.
__device__ void load_leaf(const TallFactors &f, int64_t matrix, int leaf, double *out) {
    const TallShape &shape = f.shape;
    const int height = shape.height_of(leaf), gap = shape.leaf_gap, all = panels_up(height);
    const double *scale = f.scale.rows ? address<double>(f.scale, matrix) : nullptr;
    double *column = out;
    for (int64_t k = 0; k < f.count; ++k) {
        const fedlora_block &X = f.X[k];
        with_float(X.dtype, [&](auto type) {
            load_block<decltype(type)>(X, matrix, shape.begin(leaf), height, scale, f.scale.col_stride, column, gap);
        });
        column += (int)X.cols * gap;
        if (scale) scale += X.cols * f.scale.col_stride;
    }
    const int below = all - height, beside = shape.width - shape.cols;
    for (int e = threadIdx.x; e < below * shape.width; e += kTallThreads) out[e / below * gap + height + e % below] = 0;
    for (int e = threadIdx.x; e < beside * all; e += kTallThreads) column[e / all * gap + e % all] = 0;
}

// Rows become reflections and a triangle, whose blocks on the diagonal go to `triangle` at once.
__device__ void reduce_leaf(const TallShape &shape, double *A, int height, double *buffer, double *triangle, double *kept_out,
                            const Scratch &scratch) {
    const int warp = threadIdx.x / kWarp, gap = shape.leaf_gap;
    for (int p = 0; p < shape.reflected; ++p) {
        const int first = p * kPanel, count = height - first;
        double *const home = A + first * (gap + 1), *const V = buffer ? buffer : home;
        const int V_gap = buffer ? gap_of(count) : gap;
        if (buffer) {
            copy_panel(V, V_gap, home, gap, count);
            __syncthreads();
        }
        double *const corner = triangle + first * (shape.gap + 1);
        factor_panel<false>({V, V_gap, count, V, V_gap}, corner, shape.gap, scratch.kept, scratch.panel);
        if (buffer) copy_panel(home, gap, V, V_gap, count);
        if (kept_out) copy_numbers(kept_out + p * kPanelKept, scratch.kept, kPanelKept);
        for (int col = first + kPanel + warp * kTileCols; col < shape.width; col += kTallWarps * kTileCols)
            update_tile<false, true>(V, V_gap, count, scratch.kept, A + col * gap + first, gap, min(kTileCols, shape.width - col),
                                     nullptr, 0, scratch.tiles + warp * kTileScratch);
        __syncthreads();
    }
    // what stands above the blocks on the diagonal
    for (int j = warp; j < shape.width; j += kTallWarps) {
        const int above = min(j / kPanel * kPanel, shape.order);
        for (int i = threadIdx.x % kWarp; i < above; i += kWarp) triangle[j * shape.gap + i] = A[j * gap + i];
    }
}

// Two triangles: the first becomes that of both, the second the reflections.
__device__ void reduce_node(const TallShape &shape, double *first, double *second, double *buffer, double *kept_out,
                            const Scratch &scratch) {
    const int warp = threadIdx.x / kWarp, gap = shape.gap;
    for (int p = 0; p < shape.reflected; ++p) {
        const int begin = p * kPanel, count = begin + kPanel;
        double *const home = second + begin * gap, *const V = buffer ? buffer : home, *const corner = first + begin * (gap + 1);
        const int V_gap = buffer ? gap_of(count) : gap;
        if (buffer) {
            copy_panel(V, V_gap, home, gap, count);
            __syncthreads();
        }
        factor_panel<true>({V, V_gap, count, corner, gap}, corner, gap, scratch.kept, scratch.panel);
        if (buffer) copy_panel(home, gap, V, V_gap, count);
        copy_numbers(kept_out + p * kPanelKept, scratch.kept, kPanelKept);
        for (int col = count + warp * kTileCols; col < shape.width; col += kTallWarps * kTileCols)
            update_tile<true, true>(V, V_gap, count, scratch.kept, second + col * gap, gap, min(kTileCols, shape.width - col),
                                    first + col * gap + begin, gap, scratch.tiles + warp * kTileScratch);
        __syncthreads();
    }
}

// Columns down to the end of the block on the diagonal.
__device__ void copy_triangle(const TallShape &shape, double *to, const double *from) {
    for (int j = threadIdx.x / kWarp; j < shape.width; j += kTallWarps)
        for (int i = threadIdx.x % kWarp; i < panels_up(j + 1); i += kWarp) to[j * shape.gap + i] = from[j * shape.gap + i];
}

__device__ void merge(const TallFactors &f, double *first, double *second, double *kept_out, const Scratch &scratch) {
    if (f.node_room != kInShared) {
        reduce_node(f.shape, first, second, f.node_room == kPanelShared ? scratch.room : nullptr, kept_out, scratch);
        return;
    }
    double *const upper = scratch.room, *const lower = upper + f.shape.triangle_size();
    copy_triangle(f.shape, upper, first);
    copy_triangle(f.shape, lower, second);
    __syncthreads();
    reduce_node(f.shape, upper, lower, nullptr, kept_out, scratch);
    copy_triangle(f.shape, first, upper);
    copy_triangle(f.shape, second, lower);
}

// Whether this block is the second of two; then it sees what the other has written.
__device__ bool comes_last(int32_t *arrivals, int32_t *before) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        *before = atomicAdd(arrivals, 1);
        __threadfence();
    }
    __syncthreads();
    return *before == 1;
}

__device__ void write_triangle(const TallFactors &f, int64_t matrix, const double *triangle) {
    double *const out = address<double>(f.R, matrix);
    for (int64_t e = threadIdx.x; e < f.R.rows * f.R.cols; e += kTallThreads) {
        const int i = (int)(e / f.R.cols), j = (int)(e % f.R.cols);
        out[i * f.R.row_stride + j * f.R.col_stride] = i <= j ? triangle[j * f.shape.gap + i] : 0;
    }
}

__global__ void __launch_bounds__(kTallThreads, 2) reduce(const TallFactors *all, const int64_t *first_leaf, int64_t stacks) {
    FEDLORA_DYNAMIC_SHARED(double, shared);
    const Scratch scratch(shared);
    const int64_t stack = slot_group(first_leaf, stacks, blockIdx.x);
    const TallFactors &f = all[stack];
    const TallShape &shape = f.shape;
    const int64_t slot = blockIdx.x - first_leaf[stack], matrix = slot / shape.leaves;
    const int leaf = (int)(slot % shape.leaves), height = panels_up(shape.height_of(leaf)), gap = shape.leaf_gap;
    if (f.active && !f.active[matrix]) return;

    const int64_t first = matrix * shape.leaves; // of this matrix in all tables
    double *const triangles = f.triangles + first * shape.triangle_size();
    double *const home = f.leaves + slot * shape.leaf_size(), *const triangle = triangles + leaf * shape.triangle_size();
    double *const kept = f.keep ? f.leaf_kept + slot * shape.kept_size() : nullptr;
    if (f.leaf_room == kInShared) {
        load_leaf(f, matrix, leaf, scratch.room);
        __syncthreads();
        reduce_leaf(shape, scratch.room, height, nullptr, triangle, kept, scratch);
        for (int p = 0; f.keep && p < shape.reflected; ++p) {
            const int at = p * kPanel * (gap + 1);
            copy_panel(home + at, gap, scratch.room + at, gap, height - p * kPanel);
        }
    } else {
        load_leaf(f, matrix, leaf, home);
        __syncthreads();
        reduce_leaf(shape, home, height, f.leaf_room == kPanelShared ? scratch.room : nullptr, triangle, kept, scratch);
    }

    int left = leaf;
    for (int step = 1; step < shape.leaves; step *= 2) {
        const int right = left | step;
        left &= ~step;
        if (right >= shape.leaves) continue;
        if (!comes_last(f.arrivals + first + right, scratch.before)) return;
        merge(f, triangles + left * shape.triangle_size(), triangles + right * shape.triangle_size(),
              f.node_kept + (first + right) * shape.kept_size(), scratch);
    }
    __syncthreads();
    write_triangle(f, matrix, triangles);
}

// The best room that there is, and the most that one takes.
Room room_for(int64_t whole, int64_t panel, int64_t &most) {
    const int64_t free = limits().shared_bytes / (int64_t)sizeof(double) - kFixed;
    const Room room = whole <= free ? kInShared : panel <= free ? kPanelShared : kInWorkspace;
    most = std::max(most, room == kInShared ? whole : room == kPanelShared ? panel : 0);
    return room;
}

} // namespace

TallQR::TallQR(const std::vector<TallStack> &stacks, Workspace &workspace, Upload &upload) {
    std::vector<int64_t> first = {0};
    std::vector<TallFactors> factors;
    int64_t shared = 0;
    for (const TallStack &stack : stacks) {
        const TallShape shape(stack.X[0].rows, stack.R.cols);
        const int64_t leaves = stack.R.batch * shape.leaves, nodes = shape.leaves > 1 ? leaves : 0;
        const Room leaf_room = room_for(shape.leaf_size(), shape.panel_size(), shared);
        const Room node_room = nodes ? room_for(2 * shape.triangle_size(), kPanel * shape.gap, shared) : kInShared;
        const bool at_home = stack.keep || leaf_room != kInShared;
        factors.push_back({upload.add(stack.X, stack.count), stack.count, stack.scale, stack.R, stack.active, shape, stack.keep,
                           leaf_room, node_room, workspace.take<double>(at_home ? leaves * shape.leaf_size() : 0),
                           workspace.take<double>(leaves * shape.triangle_size()),
                           workspace.take<double>(stack.keep ? leaves * shape.kept_size() : 0),
                           workspace.take<double>(nodes * shape.kept_size()), nullptr});
        first.push_back(first.back() + leaves);
        rows_.push_back(shape.rows);
        cols_.push_back(shape.cols);
    }
    leaves_ = first.back();
    arrivals_ = workspace.take<int32_t>(leaves_);
    for (size_t k = 0; k < factors.size(); ++k) factors[k].arrivals = arrivals_ + first[k];
    factors_ = upload.add(factors);
    first_ = upload.add(first);
    shared_bytes_ = (kFixed + shared) * (int64_t)sizeof(double);
}

void TallQR::launch(void *stream) const {
    const int64_t blocks = (leaves_ + kTallThreads - 1) / kTallThreads;
    fedlora::launch(clear_arrivals, dim3((unsigned)blocks), dim3(kTallThreads), 0, stream, arrivals_, leaves_);
    fedlora::launch(reduce, dim3((unsigned)leaves_), dim3(kTallThreads), shared_bytes_, stream, factors_, first_,
                    (int64_t)rows_.size());
}

} // namespace fedlora
