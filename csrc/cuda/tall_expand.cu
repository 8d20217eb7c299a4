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

// Numbers of shared memory beside the room: a panel's T, and scratch of the warps.
constexpr int kFixed = kPanelKept + kTallWarps * kTileScratch;

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

// Panels of reflections, one after the other, for all warps of a block.
struct Reflections {
    const double *V;
    int gap;
    const double *kept;
};

// Tiles lose their part along a panel; rows of V are `count`, and the tile's first of them is at `rows`.
template <bool kStacked>
__device__ void turn(const Reflections &from, int count, bool busy, double *rows, double *pivots, int gap, double *kept,
                     double *buffer, double *scratch) {
    copy_numbers(kept, from.kept, kPanelKept);
    if (buffer) copy_panel(buffer, gap_of(count), from.V, from.gap, count);
    __syncthreads();
    if (busy)
        update_tile<kStacked, false>(buffer ? buffer : from.V, buffer ? gap_of(count) : from.gap, count, kept, rows, gap,
                                     kTileCols, pivots, gap, scratch);
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

    double *const kept = shared, *const scratch = kept + kPanelKept + warp * kTileScratch, *const room = shared + kFixed;
    double *const buffer = share.staged ? room : nullptr;
    double *const tiles = share.memory ? share.memory + (int64_t)slot * share.tiles * shape.tile_size()
                                       : room + (share.staged ? shape.panel_size() : 0);
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
        for (int p = last; p >= 0; --p)
            turn<true>({V + p * kPanel * shape.gap, shape.gap, T + p * kPanelKept}, (p + 1) * kPanel, p <= own_last, second,
                       top + p * kPanel, gap, kept, buffer, scratch);
        for (int j = 0; busy && j < kTileCols; ++j)
            for (int i = threadIdx.x % kWarp; i < shape.order; i += kWarp) {
                if (leaf & step) top[j * gap + i] = second[j * gap + i];
                second[j * gap + i] = 0;
            }
        __syncwarp();
    }
    const int64_t node = way;
    const double *const V = f.leaves + node * shape.leaf_size(), *const T = f.leaf_kept + node * shape.kept_size();
    for (int p = last; p >= 0; --p)
        turn<false>({V + p * kPanel * (gap + 1), gap, T + p * kPanelKept}, height - p * kPanel, p <= own_last, top + p * kPanel,
                    nullptr, gap, kept, buffer, scratch);
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
        const int64_t panel = shape.panel_size(), tile = shape.tile_size(), all = (product.out.cols + kTileCols - 1) / kTileCols;
        const bool staged = panel + tile <= free;
        const int64_t places = (free - staged * panel) / tile;
        const int64_t tiles = std::min<int64_t>({all, kTallWarps, places > 0 ? places : kTallWarps});
        const int64_t chunks = (all + tiles - 1) / tiles;
        const int64_t blocks = product.out.batch * shape.leaves * chunks;
        double *const memory = places > 0 ? nullptr : workspace.take<double>(blocks * tiles * tile);
        shares.push_back({product, (int)chunks, (int)tiles, staged, memory});
        shared = std::max(shared, (places > 0 ? tiles * tile : 0) + staged * panel);
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
