// TSQR down: columns of C from the top of the tree to the rows of a leaf.
//
// Each block goes its own way from the top, so that nothing but the reflections is kept and nobody waits: a node is passed once
// for every leaf below it, which costs about as much as the leaves themselves.
#include "element.cuh"
#include "tall_factors.cuh"

namespace fedlora {

struct TallShare {
    TallProduct product;
    int chunks;      // of columns, one for a block
    int tiles;      // of a chunk, kTileCols columns for a warp
    bool staged;    // panels of reflections are copied to shared memory
    double *memory; // of tiles that have no room there; else null
};

namespace {

// Numbers of shared memory beside the room: T of two panels, and scratch of the warps.
constexpr int kFixed = 2 * kPanelKept + kTallWarps * kTileScratch;

// Columns of C on top of zeros.
__device__ void load_tile(const TallProduct &product, int64_t matrix, int least, int first, double *tile, int gap, int height) {
    const fedlora_block &C = product.C;
    const double *const from = C.rows ? address<double>(C, matrix) + first * C.col_stride : nullptr;
    for (int j = 0; j < kTileCols; ++j)
        for (int i = threadIdx.x % kWarp; i < height; i += kWarp) {
            const bool given = i < least && first + j < product.out.cols;
            tile[j * gap + i] = !given ? 0 : from ? from[i * C.row_stride + j * C.col_stride] : i == first + j;
        }
    __syncwarp();
}

template <class T>
__device__ void store_tile(const fedlora_block &out, int64_t matrix, int64_t begin, int height, int64_t first, int cols,
                           const double *tile, int gap) {
    T *const to = address<T>(out, matrix) + begin * out.row_stride + first * out.col_stride;
    const bool down = is_down(out);
    for (int e = threadIdx.x % kWarp; e < height * kTileCols; e += kWarp) {
        const int i = down ? e % height : e / kTileCols, j = down ? e / height : e % kTileCols;
        if (j < cols) narrow(tile[j * gap + i], to[i * out.row_stride + j * out.col_stride]);
    }
}

// The reflections of a leaf or of a node, in panels.
template <bool kStacked>
struct Reflections {
    const double *V, *T;
    int gap, height;

    __device__ const double *panel(int p) const { return V + p * kPanel * (kStacked ? gap : gap + 1); }
    __device__ int count(int p) const { return kStacked ? (p + 1) * kPanel : height - p * kPanel; }
};

// Where panels are on their way to, by turns; without a buffer they stay where they are.
struct Stages {
    double *kept, *buffer;
    int size;

    __device__ double *kept_of(int p) const { return kept + p % 2 * kPanelKept; }
    __device__ double *buffer_of(int p) const { return buffer ? buffer + p % 2 * size : nullptr; }
    template <bool kStacked>
    __device__ void fetch(const Reflections<kStacked> &from, int p) const {
        copy_pairs(kept_of(p), from.T + p * kPanelKept, threadIdx.x, blockDim.x, kPanelKept);
        const int count = from.count(p);
        for (int j = threadIdx.x / kWarp; buffer && j < kPanel; j += blockDim.x / kWarp)
            copy_pairs(buffer_of(p) + j * gap_of(count), from.panel(p) + j * from.gap, threadIdx.x % kWarp, kWarp, count);
        close_group();
    }

  private:
    __device__ static void copy_pairs(double *to, const double *from, int first, int step, int count) {
        for (int i = 2 * first; i < count; i += 2 * step) copy_async<16>(to + i, from + i, 16);
    }
};

// Tiles lose their parts along the panels from `last` on down to the first; that of this warp from `own_last` on. Panels are
// fetched one ahead. All of a block comes here.
template <bool kStacked>
__device__ void turn(const Reflections<kStacked> &from, const Stages &stages, int last, int own_last, double *top, double *second,
                     int gap, double *scratch) {
    stages.fetch(from, last);
    for (int p = last; p >= 0; --p) {
        wait_groups<0>();
        __syncthreads(); // panel p is there for all, and nobody looks at the one before
        if (p > 0) stages.fetch(from, p - 1);
        if (p > own_last) continue;
        const int count = from.count(p);
        const double *const V = stages.buffer ? stages.buffer_of(p) : from.panel(p);
        update_tile<kStacked, false>(V, stages.buffer ? gap_of(count) : from.gap, count, stages.kept_of(p),
                                     kStacked ? second : top + p * kPanel, gap, kTileCols, top + p * kPanel, gap, scratch);
    }
    __syncthreads();
}

__global__ void __launch_bounds__(kTallThreads, 2) expand(const TallFactors *all, const TallShare *shares,
                                                          const int64_t *first_block, int64_t count) {
    FEDLORA_DYNAMIC_SHARED(double, shared);
    const int64_t entry = slot_group(first_block, count, blockIdx.x);
    const TallShare &share = shares[entry];
    const TallProduct &product = share.product;
    const TallFactors &f = all[product.stack];
    const TallShape &shape = f.shape;
    const int slot = (int)(blockIdx.x - first_block[entry]), chunk = slot % share.chunks, way = slot / share.chunks;
    const int matrix = way / shape.leaves, leaf = way % shape.leaves, warp = threadIdx.x / kWarp;
    if (f.active && !f.active[matrix]) return;
    const int cols = (int)product.out.cols, wanted = product.ranks ? min(product.ranks[matrix], cols) : cols;
    const int across = share.tiles * kTileCols, first = chunk * across, end = min(wanted, first + across);
    const int own = first + warp * kTileCols;
    if (first >= end) return;
    const bool busy = warp < share.tiles && own < end;

    double *const scratch = shared + 2 * kPanelKept + warp * kTileScratch, *const room = shared + kFixed;
    const Stages stages = {shared, share.staged ? room : nullptr, shape.panel_size()};
    double *const tiles = share.memory ? share.memory + (int64_t)slot * share.tiles * shape.tile_size()
                                       : room + (share.staged ? 2 * shape.panel_size() : 0);
    double *const top = tiles + (int64_t)warp * shape.tile_size(), *const second = top + shape.order;
    const int gap = shape.leaf_gap, height = panels_up(shape.height_of(leaf));
    // while all is upper triangular, panels beyond a column have nothing to do with it
    const bool upper = product.triangular ? product.triangular[matrix] != 0 : product.upper;
    const int last = upper ? min(shape.reflected, panels_up(end) / kPanel) - 1 : shape.reflected - 1;
    const int own_last = !busy ? -1 : upper ? (own + kTileCols) / kPanel - 1 : last;

    if (busy) load_tile(product, matrix, shape.least, own, top, gap, height);
    int step = 1;
    while (2 * step < shape.leaves) step *= 2;
    for (; shape.leaves > 1 && step; step /= 2) {
        const int right = (leaf & ~(2 * step - 1)) + step;
        if (right >= shape.leaves) continue;
        const int64_t node = way - leaf + right;
        const double *const V = f.triangles + node * shape.triangle_size(), *const T = f.node_kept + node * shape.kept_size();
        turn(Reflections<true>{V, T, shape.gap, 0}, stages, last, own_last, top, second, gap, scratch);
        for (int j = 0; busy && j < kTileCols; ++j)
            for (int i = threadIdx.x % kWarp; i < shape.order; i += kWarp) {
                if (leaf & step) top[j * gap + i] = second[j * gap + i];
                second[j * gap + i] = 0;
            }
        __syncwarp();
    }
    const double *const V = f.leaves + way * shape.leaf_size(), *const T = f.leaf_kept + way * shape.kept_size();
    turn(Reflections<false>{V, T, gap, height}, stages, last, own_last, top, second, gap, scratch);
    if (!busy) return;
    with_float(product.out.dtype, [&](auto type) {
        store_tile<decltype(type)>(product.out, matrix, shape.begin(leaf), shape.height_of(leaf), own, min(kTileCols, end - own),
                                   top, gap);
    });
}

} // namespace

TallProducts::TallProducts(const TallQR &qr, const std::vector<TallProduct> &products, Workspace &workspace, Upload &upload)
    : factors_(qr.factors_), count_((int64_t)products.size()) {
    const int64_t free = limits().shared_bytes / (int64_t)sizeof(double) - kFixed;
    std::vector<int64_t> first = {0};
    std::vector<TallShare> shares;
    int64_t shared = 0, warps = 1;
    for (const TallProduct &product : products) {
        const TallShape shape(qr.rows_[(size_t)product.stack], qr.cols_[(size_t)product.stack]);
        const int64_t panels = 2 * shape.panel_size(), tile = shape.tile_size();
        const int64_t all = (product.out.cols + kTileCols - 1) / kTileCols;
        const bool staged = panels + tile <= free;
        const int64_t places = (free - staged * panels) / tile;
        const int64_t tiles = std::min<int64_t>({all, kTallWarps, places > 0 ? places : kTallWarps});
        const int64_t chunks = (all + tiles - 1) / tiles;
        const int64_t blocks = product.out.batch * shape.leaves * chunks;
        double *const memory = places > 0 ? nullptr : workspace.take<double>(blocks * tiles * tile);
        shares.push_back({product, (int)chunks, (int)tiles, staged, memory});
        shared = std::max(shared, (places > 0 ? tiles * tile : 0) + staged * panels);
        warps = std::max(warps, tiles);
        first.push_back(first.back() + blocks);
    }
    blocks_ = first.back();
    shares_ = upload.add(shares);
    first_ = upload.add(first);
    shared_bytes_ = (kFixed + shared) * (int64_t)sizeof(double);
    threads_ = kWarp * warps;
}

void TallProducts::launch(void *stream) const {
    fedlora::launch(expand, dim3((unsigned)blocks_), dim3((unsigned)threads_), shared_bytes_, stream, factors_, shares_, first_,
                    count_);
}

} // namespace fedlora
