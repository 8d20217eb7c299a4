// fedlora_gram: X^T X of blocks side by side, in one pass over the blocks.
//
// G is cut into squares, of which a stack of common width has one, and the rows into chunks that do not depend on the
// threads. A chunk widens strips of the blocks into panels of eight columns, small enough for the second-level cache, and
// multiplies the panels with each other, above the diagonal only. It leaves its tiles in the workspace, and those of all
// chunks are added up in order, a few at a time.
#include <omp.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "gram.h"
#include "panel.h"
#include "partial.h"

namespace {

#include "element.hpp"
#include "strips.hpp"

using fedlora::Gram;
using fedlora::kGroup;
using fedlora::kPad;

constexpr int64_t kDepth = 128;                 // rows of a strip
constexpr int64_t kGap = kPad * kDepth + kPad;  // from panel to panel: equal rows do not share their places in the cache
constexpr int64_t kSide = 24;                   // panels of a square
constexpr int64_t kNear = 32;                   // rows whose blocks stay in the first-level cache while they are read
constexpr int64_t kTile = kPad * kPad;          // numbers of one panel times another
constexpr int64_t kWave = 16 << 20;             // bytes of tiles that may wait for their turn

int64_t up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

// Panels of the stack.
struct Range {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
};

// How G is cut: equal squares, but for the last ones.
struct Cut {
    int64_t panels, squares, side;
    int64_t count() const { return squares * (squares + 1) / 2; }
    Range range(int64_t square) const { return {square * side, smaller((square + 1) * side, panels)}; }
};

Cut cut_of(int64_t R) {
    const int64_t panels = larger(up(R, kPad), 1), squares = up(panels, kSide);
    const int64_t side = squares == 1 ? panels : up(up(panels, squares), kGroup) * kGroup;
    return {panels, up(panels, side), side};
}

// Some rows of one square; squares go from column to column of G.
struct Part {
    Range left, right;
    int64_t chunk, chunks;
    bool diagonal() const { return left.begin == right.begin; }
};

Part part_of(const Gram &gram, int64_t index) {
    const Cut cut = cut_of(gram.G.cols);
    const int64_t chunks = gram.chunks() / cut.count();
    int64_t right = 0, left = index / chunks;
    for (; left > right; ++right) left -= right + 1;
    return {cut.range(left), cut.range(right), index % chunks, chunks};
}

// All tiles of a part: panel a with panels b, ..., b + width - 1, none of them below the diagonal.
template <class F>
void for_tiles(const Part &part, const F &visit) {
    for (int64_t b = part.right.begin, width = 0; b < part.right.end; b += width) {
        const int64_t open = part.right.end - b;
        width = open == kGroup + 1 ? 2 : smaller(open, kGroup);  // a single panel would be slow
        const int64_t end = part.diagonal() ? b + width : part.left.end;
        for (int64_t a = part.left.begin; a < end; ++a) {
            const int64_t first = part.diagonal() ? larger(a, b) : b;
            visit(a, first, b + width - first);
        }
    }
}

// Columns of panels times their factors.
FEDLORA_CLONES void multiply(double *out, const double *factors, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < kPad; ++j) out[i * kPad + j] *= factors[j];
}

// Rows [first, first + count) of the panels of a range; what lies beyond the last column is zero.
void pack_rows(const Gram &gram, int64_t i, int64_t first, int64_t count, const Range &range, double *out) {
    const int64_t begin = range.begin * kPad, end = smaller(range.end * kPad, gram.G.cols);
    const auto place = [&](int64_t column) { return out + (column - begin) / kPad * kGap + (column - begin) % kPad; };
    int64_t at = 0;
    for (int64_t k = 0; k < gram.count && at < end; at += gram.X[k].cols, ++k) {
        const fedlora_block &X = gram.X[k];
        const int64_t offset = i * X.batch_stride + first * X.row_stride, stop = smaller(at + X.cols, end);
        for (int64_t column = larger(at, begin), width = 0; column < stop; column += width) {
            width = smaller(kPad - column % kPad, stop - column);
            fedlora::panel().widen(place(column), kPad, X, offset + (column - at) * X.col_stride, count, width);
        }
    }
    for (int64_t column = end; column < range.end * kPad; ++column)
        for (int64_t row = 0; row < count; ++row) place(column)[row * kPad] = 0.0;
}

void pack(const Gram &gram, int64_t i, int64_t first, int64_t count, const Range &range, double *out) {
    const int64_t step = gram.count && by_columns(gram.X[0]) ? kDepth : kNear;
    for (int64_t row = 0; row < count; row += step)
        pack_rows(gram, i, first + row, smaller(step, count - row), range, out + row * kPad);
    if (!gram.scale.rows) return;
    for (int64_t panel = range.begin; panel < range.end; ++panel) {
        double factors[kPad] = {};
        const int64_t first = panel * kPad, columns = smaller(kPad, gram.G.cols - first);
        for (int64_t j = 0; j < columns; ++j) factors[j] = scale_at(gram.scale, i, first + j);
        multiply(out + (panel - range.begin) * kGap, factors, count);
    }
}

// One tile of G, or what there is of it, and more of it.
void add_tile(const Gram &gram, double *G, int64_t a, int64_t b, int64_t width, const double *tile, bool first, bool last) {
    const int64_t row = gram.G.row_stride, col = gram.G.col_stride, R = gram.G.cols;
    const int64_t rows = smaller(kPad, R - a * kPad), cols = smaller(width * kPad, R - b * kPad);
    double *const up = G + a * kPad * row + b * kPad * col, *const down = G + b * kPad * row + a * kPad * col;
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = a == b ? i : 0; j < cols; ++j) {
            const double more = tile[i * width * kPad + j];
            up[i * row + j * col] = first ? more : up[i * row + j * col] + more;
        }
    for (int64_t j = 0; last && j < cols; ++j)
        for (int64_t i = 0; i < (a == b ? smaller(j, rows) : rows); ++i) down[j * row + i * col] = up[i * row + j * col];
}

}  // namespace

namespace fedlora {

int Gram::status() const {
    const int64_t batch = G.batch, rows = count > 0 ? X[0].rows : 0;
    if (G.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    if (count < 0 || batch < 0 || G.rows < 0 || G.rows != G.cols) return FEDLORA_BAD_SHAPE;
    int64_t R = 0;
    for (int64_t k = 0; k < count; ++k) {
        if (!is_float(X[k].dtype)) return FEDLORA_BAD_DTYPE;
        if (X[k].batch != batch || X[k].rows != rows || rows < 0 || X[k].cols < 0) return FEDLORA_BAD_SHAPE;
        R += X[k].cols;
    }
    if (R != G.cols) return FEDLORA_BAD_SHAPE;
    return scale_status(scale, R, batch);
}

// A matrix without rows is one empty chunk: its G is written all the same.
int64_t Gram::chunks() const { return larger(chunks_of(count ? X[0].rows : 0), 1) * cut_of(G.cols).count(); }

int64_t Gram::leaving() const {
    const Cut cut = cut_of(G.cols);
    return kTile * (cut.squares == 1 ? cut.panels * (cut.panels + 1) / 2 : cut.side * cut.side);
}

int64_t Gram::scratch() const {
    const Cut cut = cut_of(G.cols);
    return kGap * cut.side * (cut.squares == 1 ? 1 : 2);
}

void Gram::run(int64_t i, int64_t chunk, double *scratch, double *leaving) const {
    const Part part = part_of(*this, chunk);
    const int64_t begin = part.chunk * kChunk, end = smaller(begin + kChunk, count ? X[0].rows : 0);
    double *const left = scratch, *const right = part.diagonal() ? left : left + part.left.size() * kGap;
    const int64_t near = chunks() == part.chunks ? count : 0;  // a square of several needs only some of the columns
    int64_t tiles = 0;
    for_tiles(part, [&](int64_t, int64_t, int64_t) { ++tiles; });
    if (begin == end) std::memset(leaving, 0, sizeof(double) * (size_t)this->leaving());
    for (int64_t first = begin; first < end; first += kDepth) {
        const int64_t rows = smaller(kDepth, end - first);
        pack(*this, i, first, rows, part.left, left);
        if (!part.diagonal()) pack(*this, i, first, rows, part.right, right);
        Ahead ahead(X, near, i, first + rows, smaller(kDepth, end - first - rows), tiles);
        double *tile = leaving;
        for_tiles(part, [&](int64_t a, int64_t b, int64_t width) {
            const double *const P = left + (a - part.left.begin) * kGap, *const Q = right + (b - part.right.begin) * kGap;
            panel().tile(tile, P, Q, kGap, rows, width, first > begin);
            ahead.fetch();
            tile += width * kTile;
        });
    }
}

void Gram::add(int64_t i, int64_t chunk, const double *leaving) const {
    const Part part = part_of(*this, chunk);
    for_tiles(part, [&](int64_t a, int64_t b, int64_t width) {
        const bool first = part.chunk == 0, last = part.chunk == part.chunks - 1;
        add_tile(*this, (double *)G.data + i * G.batch_stride, a, b, width, leaving, first, last);
        leaving += width * kTile;
    });
}

}  // namespace fedlora

namespace {

// Chunks between two barriers: some for every thread as long as their triangles are small.
int64_t wave_of(const Gram &gram, int64_t threads) {
    const int64_t size = larger(gram.leaving() * 8, 1), tasks = gram.chunks() * gram.G.batch;
    return smaller(larger(threads, smaller(4 * threads, kWave / size)), tasks);
}

// The workspace: what a wave of the greatest group leaves, then the scratch of every thread; in bytes.
struct Layout {
    int64_t leavings, scratch, threads;
    int64_t bytes() const { return leavings + scratch * threads + 64; }
};

Layout layout_of(const fedlora_block *X, const int64_t *counts, const fedlora_block *G, int64_t groups, int64_t threads) {
    Layout layout = {0, 0, threads};
    for (int64_t g = 0; g < groups; X += counts[g], ++g) {
        const Gram gram = {X, counts[g], {}, G[g]};
        layout.leavings = larger(layout.leavings, wave_of(gram, threads) * gram.leaving() * 8);
        layout.scratch = larger(layout.scratch, gram.scratch() * 8);
    }
    return layout;
}

void run_group(const Gram &gram, double *leavings, char *scratch, int64_t slice, int threads) {
    const int64_t chunks = gram.chunks(), tasks = chunks * gram.G.batch, size = gram.leaving(), wave = wave_of(gram, threads);
#pragma omp parallel num_threads(tasks < threads ? (tasks > 0 ? (int)tasks : 1) : threads)
    for (int64_t begin = 0; begin < tasks; begin += wave) {
        const int64_t end = smaller(begin + wave, tasks);
#pragma omp for schedule(dynamic)
        for (int64_t t = begin; t < end; ++t)
            gram.run(t / chunks, t % chunks, (double *)(scratch + slice * omp_get_thread_num()), leavings + (t - begin) * size);
#pragma omp for
        for (int64_t i = begin / chunks; i <= (end - 1) / chunks; ++i)
            for (int64_t t = larger(begin, i * chunks); t < smaller(end, (i + 1) * chunks); ++t)
                gram.add(i, t % chunks, leavings + (t - begin) * size);
    }
}

}  // namespace

extern "C" {

int fedlora_gram_workspace(const fedlora_block *X, const int64_t *counts, const fedlora_block *G, int64_t groups,
                           int64_t threads, int64_t *bytes) {
    if (!X || !counts || !G || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    *bytes = layout_of(X, counts, G, groups, threads).bytes();
    return FEDLORA_OK;
}

int fedlora_gram(const fedlora_block *X, const int64_t *counts, const fedlora_block *scale, const fedlora_block *G,
                 int64_t groups, void *workspace, int64_t workspace_bytes, int64_t threads, void *) {
    if (!X || !counts || !scale || !G || !workspace || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    const fedlora_block *at = X;
    for (int64_t g = 0; g < groups; at += counts[g], ++g)
        if (const int status = Gram{at, counts[g], scale[g], G[g]}.status()) return status;
    const Layout layout = layout_of(X, counts, G, groups, threads);
    if (workspace_bytes < layout.bytes()) return FEDLORA_BAD_WORKSPACE;
    char *const start = (char *)(((uintptr_t)workspace + 63) / 64 * 64);
    at = X;
    for (int64_t g = 0; g < groups; at += counts[g], ++g)
        run_group({at, counts[g], scale[g], G[g]}, (double *)start, start + layout.leavings, layout.scratch, (int)threads);
    return FEDLORA_OK;
}

}  // extern "C"
