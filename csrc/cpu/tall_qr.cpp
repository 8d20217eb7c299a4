// QR of tall stacks of blocks by Householder reflections: a strip of rows in the second-level cache is packed into panels of eight
// columns, and each panel is reflected onto the triangle above it, with what stands to its right.
#include "tall_qr.h"

#include <omp.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "pages.hpp"
#include "panel.h"
#include "partial.h"
#include "reflectors.h"

namespace {

#include "element.hpp"
#include "strips.hpp"
#include "stages.hpp"
#include "unpack.hpp"

using fedlora::kBlock;
using fedlora::kGroup;
using fedlora::kSquare;
using fedlora::TallQR;

constexpr int64_t kHeight = 256;  // rows of a strip
constexpr int64_t kMost = 64;     // chains of a matrix
constexpr int64_t kNear = 32;     // rows whose blocks stay in the first-level cache while they are read

int64_t gap_of(int64_t height) { return 8 * height + kBlock; }

TallQR::Rows chain_rows(const TallQR &qr, int64_t chain) {
    const int64_t chains = qr.chains();
    const auto begin = [&](int64_t c) { return qr.rows / chains * c + smaller(c, qr.rows % chains); };
    return {begin(chain), begin(chain + 1)};
}

// Rows of memory that a strip takes: the first one holds the triangle it is reduced to.
int64_t height_of(const TallQR &qr, int64_t s) { return s ? kHeight : larger(8 * qr.panels(), kHeight); }

// Panels of pivots and of the rows below them. In a first strip the pivots are rows of its own.
struct Step {
    double *pivots;
    int64_t pivot_gap;
    double *rows;
    int64_t gap, height;
    bool first, triangular;

    double *pivot(int64_t row, int64_t panel) const { return pivots + TallQR::at(pivot_gap, panel, 8 * row); }
    double *below(int64_t row, int64_t panel) const { return rows + TallQR::at(gap, panel, first ? 8 * (row + 1) : 0); }
    int64_t count(int64_t row) const {
        if (first) return height - 8 * (row + 1);
        return triangular ? 8 * (row + 1) : height;
    }
    const double *block(int64_t panel) const { return rows + panel * gap; }
    double *block(int64_t panel) { return rows + panel * gap; }
};

// Block p of what `done` keeps is applied to panels [from, panels) of `to`.
void apply_block(const Step &done, int64_t p, const Step &to, int64_t from, int64_t panels, bool transposed) {
    for (int64_t j = from; j < panels; j += kGroup)
        fedlora::reflectors().apply(done.block(p), done.below(p, p), done.count(p), to.pivot(p, j), to.pivot_gap, to.below(p, j),
                                    to.gap, smaller(kGroup, panels - j), transposed);
}

void reduce(Step step, int64_t panels) {
    for (int64_t p = 0; p < panels; ++p) {
        fedlora::reflectors().factor(step.pivot(p, p), step.below(p, p), step.count(p), step.block(p));
        apply_block(step, p, step, p + 1, panels, true);
    }
}

// [C; rows] of `to`, C standing at its pivots, is multiplied with the reflections of `done`; the rows are zero and need not be so if
// C is upper triangular: then they come up from panel to panel.
void expand(const Step &done, const Step &to, int64_t panels, bool upper) {
    for (int64_t p = panels - 1; p >= 0; --p) {
        if (upper) fedlora::reflectors().start(done.block(p), done.below(p, p), done.count(p), to.pivot(p, p), to.below(p, p));
        apply_block(done, p, to, upper ? p + 1 : 0, panels, false);
    }
}

FEDLORA_CLONES void multiply(double *panel, const double *factors, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 8
        for (int64_t j = 0; j < 8; ++j) panel[i * 8 + j] *= factors[j];
}

// bits[j] = max(bits[j], bits of |x_j|): as integers they are in order, with what is not finite above all.
FEDLORA_CLONES void raise(const double *panel, int64_t *bits, int64_t count) {
    int64_t most[8];
    for (int64_t j = 0; j < 8; ++j) most[j] = bits[j];
    for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 8
        for (int64_t j = 0; j < 8; ++j) {
            int64_t x;
            std::memcpy(&x, panel + i * 8 + j, 8);
            x &= INT64_MAX;
            most[j] = x > most[j] ? x : most[j];
        }
    for (int64_t j = 0; j < 8; ++j) bits[j] = most[j];
}

}  // namespace

namespace fedlora {

int64_t TallQR::at(int64_t gap, int64_t panel, int64_t row) { return panel * gap + kBlock + 8 * row; }

int64_t TallQR::panels() const { return (R + 7) / 8; }

int64_t TallQR::gap() const { return gap_of(8 * panels()); }

int64_t TallQR::triangle() const { return panels() * gap(); }

int64_t TallQR::chains() const { return larger(1, smaller(kMost, rows / larger(2048, 32 * panels()))); }

int64_t TallQR::strip_gap() const { return gap_of(height_of(*this, 0)); }

int64_t TallQR::strip() const { return panels() * strip_gap(); }

int64_t TallQR::kept() const { return strip() + (strips(0) - 1) * panels() * gap_of(kHeight); }

int64_t TallQR::strips(int64_t chain) const {
    const Rows all = chain_rows(*this, chain);
    return 1 + larger(0, (all.end - all.begin - height_of(*this, 0) + kHeight - 1) / kHeight);
}

TallQR::Rows TallQR::rows_of(int64_t chain, int64_t s) const {
    const Rows all = chain_rows(*this, chain);
    const int64_t first = all.begin + height_of(*this, 0);
    if (s == 0) return {all.begin, smaller(first, all.end)};
    return {first + (s - 1) * kHeight, smaller(first + s * kHeight, all.end)};
}

void TallQR::pack(int64_t i, const Rows &rows, double *strip, int64_t gap, int64_t height) const {
    const int64_t size = rows.end - rows.begin;
    // rows that lie together are read together, by whole lines
    const int64_t step = count && by_columns(X[0]) ? size : kNear;
    for (int64_t first = 0; first < size; first += step) {
        const int64_t part = smaller(step, size - first);
        int64_t column = 0;
        for (int64_t k = 0; k < count; ++k) {
            const fedlora_block &block = X[k];
            const int64_t offset = i * block.batch_stride + (rows.begin + first) * block.row_stride;
            for (int64_t j = 0, width = 0; j < block.cols; j += width, column += width) {
                width = smaller(8 - column % 8, block.cols - j);
                fedlora::panel().widen(strip + at(gap, column / 8, first) + column % 8, 8, block, offset + j * block.col_stride, part,
                                         width);
            }
        }
        for (; column % 8; ++column)
            for (int64_t row = 0; row < part; ++row) strip[at(gap, column / 8, first + row) + column % 8] = 0;
    }
    for (int64_t p = 0; p < panels(); ++p) std::memset(strip + at(gap, p, size), 0, sizeof(double) * 8 * (size_t)(height - size));
}

void TallQR::largest(int64_t i, int64_t chain, int64_t *bits, double *strip) const {
    std::memset(bits, 0, sizeof(int64_t) * 8 * (size_t)panels());
    for (int64_t s = 0; s < strips(chain); ++s) {
        const Rows part = rows_of(chain, s);
        pack(i, part, strip, strip_gap(), part.end - part.begin);
        for (int64_t p = 0; p < panels(); ++p) raise(strip + at(strip_gap(), p, 0), bits + 8 * p, part.end - part.begin);
    }
}

void TallQR::factor(int64_t i, int64_t chain, const double *scale, double *triangle, double *keep, double *strip) const {
    for (int64_t s = 0; s < strips(chain); ++s) {
        const Rows part = rows_of(chain, s);
        const int64_t count = part.end - part.begin, height = s ? count : height_of(*this, 0);
        const int64_t gap = keep ? gap_of(height_of(*this, s)) : strip_gap();
        double *const out = keep ? keep : strip;
        pack(i, part, out, gap, height);
        for (int64_t p = 0; scale && p < panels(); ++p) multiply(out + at(gap, p, 0), scale + 8 * p, count);
        if (s) {
            reduce({triangle, this->gap(), out, gap, height, false, false}, panels());
        } else {
            reduce({out, gap, out, gap, height, true, false}, panels());
            for (int64_t p = 0; p < panels(); ++p) {
                const int64_t rows_above = 8 * (p + 1), all = 8 * panels();
                double *const column = triangle + at(this->gap(), p, 0);
                std::memcpy(column, out + at(gap, p, 0), sizeof(double) * 8 * (size_t)rows_above);
                std::memset(column + 8 * rows_above, 0, sizeof(double) * 8 * (size_t)(all - rows_above));
            }
        }
        if (keep) keep += panels() * gap;
    }
}

// Pairs, then pairs of pairs, so that rounding does not add up along the chains.
void TallQR::merge(double *triangles) const {
    for (int64_t step = 1; step < chains(); step *= 2)
        for (int64_t chain = 0; chain + step < chains(); chain += 2 * step) {
            double *const first = triangles + chain * triangle();
            reduce({first, gap(), first + step * triangle(), gap(), 8 * panels(), false, true}, panels());
        }
}

void TallQR::split(const double *triangles, double *squares, bool upper) const {
    int64_t step = 1;
    while (2 * step < chains()) step *= 2;
    for (; step > 0; step /= 2)
        for (int64_t chain = 0; chain + step < chains(); chain += 2 * step) {
            double *const share = squares + chain * triangle(), *const other = share + step * triangle();
            double *const kept = const_cast<double *>(triangles) + (chain + step) * triangle();
            std::memset(other, 0, sizeof(double) * (size_t)triangle());  // below its diagonal, too
            const Step done = {nullptr, 0, kept, gap(), 8 * panels(), false, true};
            expand(done, {share, gap(), other, gap(), 8 * panels(), false, true}, panels(), upper);
        }
}

void TallQR::apply(int64_t chain, int64_t s, const double *kept, double *square, bool upper, double *strip) const {
    const Rows part = rows_of(chain, s);
    const int64_t height = s ? part.end - part.begin : height_of(*this, 0);
    double *const from = const_cast<double *>(kept) + (s ? this->strip() + (s - 1) * panels() * gap_of(kHeight) : 0);
    const Step done = {nullptr, 0, from, gap_of(height_of(*this, s)), height, s == 0, false};
    const Step to = {s ? square : strip, s ? gap() : strip_gap(), strip, strip_gap(), height, s == 0, false};
    for (int64_t p = 0; p < panels(); ++p) {
        double *const column = strip + at(strip_gap(), p, 0);
        const int64_t above = s ? 0 : 8 * panels();
        if (above) std::memcpy(column, square + at(gap(), p, 0), sizeof(double) * 8 * (size_t)above);
        if (!upper) std::memset(column + 8 * above, 0, sizeof(double) * 8 * (size_t)(height - above));
    }
    expand(done, to, panels(), upper);
}

}  // namespace fedlora

namespace {

// Q and T as they come.
struct Job {
    TallQR qr;
    fedlora_block scale, Q, R;
    static constexpr int kStages = 3;

    struct Slot {
        double *triangles, *squares, *kept;
    };

    Slot slot(Place &place) const {
        const int64_t chains = qr.chains();
        return {place.take(qr.triangle() * chains), place.take(qr.triangle() * chains), place.take(qr.kept() * chains)};
    }
    int64_t scratch_size() const { return qr.strip() + 8 * qr.panels(); }
    int64_t tasks(int stage) const { return stage == 1 ? 1 : qr.chains(); }
    void run(int stage, int64_t i, int64_t task, Place place, double *scratch) const {
        const Slot s = slot(place);
        switch (stage) {
            case 0: return factor(s, i, task, {scratch});
            case 1: return merge(s, i);
            default: return write(s, i, task, scratch);
        }
    }

    void factor(const Slot &s, int64_t i, int64_t chain, Place place) const {
        double *const factors = place.take(8 * qr.panels());
        for (int64_t j = 0; j < 8 * qr.panels(); ++j) factors[j] = j < qr.R ? scale_at(scale, i, j) : 0;
        qr.factor(i, chain, factors, s.triangles + chain * qr.triangle(), s.kept + chain * qr.kept(), place.take(qr.strip()));
    }

    void merge(const Slot &s, int64_t i) const {
        qr.merge(s.triangles);
        std::memset(s.squares, 0, sizeof(double) * (size_t)qr.triangle());
        for (int64_t row = 0; row < R.rows; ++row) {
            s.squares[TallQR::at(qr.gap(), row / 8, row) + row % 8] = 1;
            for (int64_t j = 0; j < qr.R; ++j)
                ((double *)R.data)[i * R.batch_stride + row * R.row_stride + j * R.col_stride] =
                    s.triangles[TallQR::at(qr.gap(), j / 8, row) + j % 8];
        }
        qr.split(s.triangles, s.squares, true);
    }

    void write(const Slot &s, int64_t i, int64_t chain, double *strip) const {
        for (int64_t part = qr.strips(chain) - 1; part >= 0; --part) {
            qr.apply(chain, part, s.kept + chain * qr.kept(), s.squares + chain * qr.triangle(), true, strip);
            const TallQR::Rows rows = qr.rows_of(chain, part);
            write_rows(Q, i, rows.begin, rows.end, strip + TallQR::at(qr.strip_gap(), 0, 0), qr.strip_gap(), 0, 8 * qr.panels());
        }
    }
};

struct Tables {
    const fedlora_block *X;
    const int64_t *counts;
    const fedlora_block *scale, *Q, *R;
    int64_t groups;

    Job job(int64_t g, int64_t first) const { return {{X + first, counts[g], Q[g].rows, R[g].cols}, scale[g], Q[g], R[g]}; }
    int status(int64_t g, int64_t first) const {
        if (Q[g].dtype != FEDLORA_FLOAT64 || R[g].dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
        if (counts[g] < 1 || Q[g].batch < 0 || Q[g].rows < 1 || R[g].cols < 1) return FEDLORA_BAD_SHAPE;
        int64_t width = 0;
        for (int64_t k = first; k < first + counts[g]; ++k) {
            if (!is_float(X[k].dtype)) return FEDLORA_BAD_DTYPE;
            if (X[k].batch != Q[g].batch || X[k].rows != Q[g].rows || X[k].cols < 0) return FEDLORA_BAD_SHAPE;
            width += X[k].cols;
        }
        const int64_t least = smaller(Q[g].rows, width);
        const bool fit = R[g].cols == width && R[g].rows == least && R[g].batch == Q[g].batch && Q[g].cols == least && scale[g].rows == 1;
        return fit ? scale_status(scale[g], width, Q[g].batch) : FEDLORA_BAD_SHAPE;
    }
    int status() const {
        for (int64_t g = 0, first = 0; g < groups; first += counts[g], ++g)
            if (const int found = status(g, first)) return found;
        return FEDLORA_OK;
    }
    Stages stages(int64_t threads) const {
        Stages all = {threads};
        for (int64_t g = 0, first = 0; g < groups; first += counts[g], ++g) all.make_room(job(g, first));
        return all;
    }
};

}  // namespace

extern "C" {

int fedlora_tall_qr_workspace(const fedlora_block *X, const int64_t *counts, const fedlora_block *scale, const fedlora_block *Q,
                              const fedlora_block *R, int64_t groups, int64_t threads, int64_t *bytes) {
    if (!X || !counts || !scale || !Q || !R || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    const Tables tables = {X, counts, scale, Q, R, groups};
    if (const int status = tables.status()) return status;
    *bytes = 8 * tables.stages(threads).size() + 64;
    return FEDLORA_OK;
}

int fedlora_tall_qr(const fedlora_block *X, const int64_t *counts, const fedlora_block *scale, const fedlora_block *Q,
                    const fedlora_block *R, int64_t groups, void *workspace, int64_t workspace_bytes, int64_t threads, void *) {
    if (!X || !counts || !scale || !Q || !R || !workspace || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    const Tables tables = {X, counts, scale, Q, R, groups};
    if (const int status = tables.status()) return status;
    const Stages stages = tables.stages(threads);
    if (workspace_bytes < 8 * stages.size() + 64) return FEDLORA_BAD_WORKSPACE;
    double *const start = (double *)(((uintptr_t)workspace + 63) / 64 * 64);
    fedlora::prefer_huge_pages(fedlora::Extent((int64_t)workspace, (int64_t)workspace + 8 * stages.size()));
    for (int64_t g = 0; g < groups; ++g) fedlora::prefer_huge_pages(fedlora::Extent(Q[g], 8));
#pragma omp parallel num_threads((int)threads)
    for (int64_t g = 0, first = 0; g < groups; first += counts[g], ++g) work(tables.job(g, first), nullptr, Q[g].batch, stages, start);
    return FEDLORA_OK;
}

}  // extern "C"
