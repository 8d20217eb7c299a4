// fedlora_stacked_qr: QR of blocks side by side.
//
// Stacks that are well conditioned, where float32 is the answer, go by their Gram: R = U, Q = X U^-1. The others, and all of
// float64, go by Householder reflections. Either way has stages, each of independent tasks over chunks of rows that do not depend
// on the threads.
#include <omp.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cholesky_qr.h"
#include "echelon.h"
#include "gram.h"
#include "pages.hpp"
#include "panel.h"
#include "partial.h"
#include "reflectors.h"
#include "tall_qr.h"

namespace {

#include "element.hpp"
#include "strips.hpp"
#include "stages.hpp"
#include "unpack.hpp"

using fedlora::CholeskyQR;
using fedlora::Gram;
using fedlora::kGroup;
using fedlora::TallQR;

constexpr double kRoundoff = 0x1p-53;
constexpr double kLoss = 1e-8;   // of orthogonality, the most that one pass may take
constexpr int64_t kRows = 128;    // of a strip of Q

struct Problem {
    const fedlora_block *X;
    int64_t count;
    fedlora_block weights, R, rank, info, notes;
    const fedlora_block *Q;

    int64_t rows() const { return R.rows && count ? X[0].rows : 0; }
    int64_t width() const { return R.cols; }
    int64_t order() const { return (R.cols + 7) / 8 * 8; }
    bool easy() const { return R.dtype == FEDLORA_FLOAT32 && rows() >= R.cols; }
    TallQR tall() const { return {X, count, rows(), R.cols}; }
    CholeskyQR cholesky() const { return {R.cols}; }
};

// 2^e for every integer, in two factors that are numbers.
struct Power {
    double half, rest;
    double of(double x) const { return x * half * rest; }
};

double power(int64_t e) { return std::ldexp(1.0, (int)e); }

Power power_of(int64_t e) {
    const int64_t half = e >= 0 ? e / 2 : -(-e / 2);
    return {power(half), power(e - half)};
}

int64_t exponent_of(double x) {  // 2^e <= x < 2^(e + 1)
    int e = 1;
    if (x > 0 && x <= DBL_MAX) std::frexp(x, &e);
    return e - 1;
}

double squares_of(const double *column, int64_t count) {  // of a panel
    double sum = 0;
    for (int64_t a = 0; a < count; ++a) sum += column[8 * a] * column[8 * a];
    return sum;
}

// The weight of every column.
void spread_weights(const Problem &p, int64_t i, double *out) {
    for (int64_t k = 0; k < p.count; ++k) {
        const double w = ((const double *)p.weights.data)[i * p.weights.row_stride + k * p.weights.col_stride];
        for (int64_t j = 0; j < p.X[k].cols; ++j) *out++ = w;
    }
}

template <class T>
void fill_matrix(const fedlora_block &M, int64_t i, T x) {
    for (int64_t row = 0; row < M.rows; ++row)
        for (int64_t col = 0; col < M.cols; ++col)
            ((T *)M.data)[i * M.batch_stride + row * M.row_stride + col * M.col_stride] = x;
}

void fill(const fedlora_block &M, int64_t i, double x) {
    if (M.dtype == FEDLORA_FLOAT64) return fill_matrix<double>(M, i, x);
    fill_matrix<float>(M, i, (float)x);
}

void say(const Problem &p, int64_t i, int64_t rank, int32_t info) {
    element<int32_t>(p.rank, i) = (int32_t)rank;
    element<int32_t>(p.info, i) = info;
    const int32_t zero = rank == 0 ? FEDLORA_NOTE_ZERO : 0, deficient = rank < p.width() ? FEDLORA_NOTE_RANK_DEFICIENT : 0;
    element<int32_t>(p.notes, i) = info & FEDLORA_INFO_NONFINITE ? 0 : zero | deficient;
}

void say_nonfinite(const Problem &p, int64_t i) {
    fill(p.R, i, NAN);
    if (p.Q) fill(*p.Q, i, NAN);
    say(p, i, 0, FEDLORA_INFO_NONFINITE);
}

// Row of R from numbers that are yet to be multiplied with their columns' powers and sizes; whether all stay finite.
template <class T>
inline bool write_row(const fedlora_block &R, int64_t i, int64_t row, const double *x, const Power *powers,
                      const double *weights) {
    T *const out = (T *)R.data + i * R.batch_stride + row * R.row_stride;
    bool finite = true;
    for (int64_t j = 0; j < R.cols; ++j) {
        const T number = (T)(powers[j].of(x[j]) * std::fabs(weights[j]));
        finite &= std::fabs(number) <= (sizeof(T) == 4 ? FLT_MAX : DBL_MAX);
        out[j * R.col_stride] = number + (T)0;  // -0 becomes 0
    }
    return finite;
}

FEDLORA_CLONES bool write_row_float32(const fedlora_block &R, int64_t i, int64_t row, const double *x, const Power *powers,
                                      const double *weights) {
    return write_row<float>(R, i, row, x, powers, weights);
}
FEDLORA_CLONES bool write_row_float64(const fedlora_block &R, int64_t i, int64_t row, const double *x, const Power *powers,
                                      const double *weights) {
    return write_row<double>(R, i, row, x, powers, weights);
}

bool write_row_any(const fedlora_block &R, int64_t i, int64_t row, const double *x, const Power *powers, const double *weights) {
    if (R.dtype == FEDLORA_FLOAT64) return write_row_float64(R, i, row, x, powers, weights);
    return write_row_float32(R, i, row, x, powers, weights);
}

// By the Gram. Matrices that it cannot certify are marked, and nothing is written of them.
struct Easy {
    const Problem &p;
    bool *hard;
    static constexpr int kStages = 3;

    struct Slot {
        double *leaving, *G, *mixer;
        // panels of X that go into a panel of Q and those before it; after the last one, whether Q is to be written
        int64_t *reach;
    };

    int64_t squares() const { return p.cholesky().size(); }
    // G of matrix i alone has memory, that of the slot.
    Gram gram(const Slot &slot, int64_t i) const {
        const int64_t R = p.width();
        return {p.X, p.count, {}, {(int64_t)slot.G - 8 * i * R * R, R, R, R, 1, FEDLORA_FLOAT64, p.R.batch, R * R}};
    }
    Slot slot(Place &place) const {
        Slot s{};
        s.leaving = place.take(gram(s, 0).leaving() * gram(s, 0).chunks());
        s.G = place.take(p.width() * p.width());
        s.mixer = place.take(squares());
        s.reach = (int64_t *)place.take(p.cholesky().panels() + 1);
        return s;
    }
    int64_t scratch_size() const {
        const int64_t certify = 2 * squares() + 16 * p.order() + 64;
        const int64_t rows = (8 * kRows + fedlora::kBlock) * (p.cholesky().panels() + kGroup);
        return larger(gram({}, 0).scratch(), larger(certify, rows));
    }
    int64_t tasks(int stage) const {
        switch (stage) {
            case 0: return gram({}, 0).chunks();
            case 1: return 1;
            default: return p.Q ? chunks_of(p.rows()) : 0;
        }
    }
    void run(int stage, int64_t i, int64_t task, Place place, double *scratch) const {
        const Slot s = slot(place);
        switch (stage) {
            case 0: {
                const Gram g = gram(s, i);
                return g.run(i, task, scratch, s.leaving + task * g.leaving());
            }
            case 1: return certify(s, i, {scratch});
            default: return write(s, i, task, {scratch});
        }
    }

    void certify(const Slot &s, int64_t i, Place place) const {
        const Gram g = gram(s, i);
        const CholeskyQR whole = p.cholesky();
        const int64_t R = p.width();
        for (int64_t chunk = 0; chunk < g.chunks(); ++chunk) g.add(i, chunk, s.leaving + chunk * g.leaving());
        double *const U = place.take(squares()), *const negative = place.take(squares());
        double *const scratch = place.take(64 * whole.panels());
        double *const weights = place.take(R), *const row = place.take(R), *const scale = place.take(R);
        Power *const powers = (Power *)place.take(2 * R);
        int64_t *const live = (int64_t *)place.take(R), count = 0;
        int64_t &wanted = s.reach[whole.panels()];
        wanted = hard[i] = false;
        for (int64_t j = 0; j < R; ++j) {
            const double square = s.G[j * R + j];
            if (!(square <= DBL_MAX)) return say_nonfinite(p, i);
            const int64_t e = exponent_of(std::sqrt(square)) + 1;
            powers[j] = power_of(e);
            scale[j] = power(-e);
            if (square > 0) live[count++] = j;
        }
        spread_weights(p, i, weights);
        for (int64_t j = 0; j < R; ++j) scale[j] = weights[j] < 0 ? -scale[j] : scale[j];
        const CholeskyQR qr = {count};
        for (int64_t a = 0; a < 8 * qr.panels(); ++a)
            for (int64_t b = a; b < 8 * qr.panels(); ++b)
                U[qr.at(a, b)] = b < count ? s.G[live[a] * R + live[b]] * scale[live[a]] * scale[live[b]] : a == b;
        hard[i] = !(2 * kRoundoff * qr.factor(U, negative, scratch) <= kLoss);
        if (hard[i]) return;
        bool finite = true;
        for (int64_t a = 0; a < p.R.rows; ++a) {
            std::memset(row, 0, sizeof(double) * (size_t)R);
            for (int64_t b = a; b < count; ++b) row[live[b]] = U[qr.at(a, b)];
            finite &= write_row_any(p.R, i, a, row, powers, weights);
        }
        say(p, i, count, finite ? 0 : FEDLORA_INFO_OVERFLOW);
        if (!p.Q) return;
        // rows of the inverse go where their columns of X are
        std::memset(s.mixer, 0, sizeof(double) * (size_t)squares());
        for (int64_t a = 0; a < count; ++a)
            for (int64_t b = a; b < count; ++b) s.mixer[whole.at(live[a], b)] = negative[qr.at(a, b)] * scale[live[a]];
        for (int64_t panel = 0; panel < whole.panels(); ++panel)
            s.reach[panel] = count ? live[smaller(8 * panel + 7, count - 1)] / 8 + 1 : 0;
        wanted = true;
    }

    void write(const Slot &s, int64_t i, int64_t chunk, Place place) const {
        const CholeskyQR qr = p.cholesky();
        if (!s.reach[qr.panels()]) return;
        const int64_t gap = 8 * kRows + fedlora::kBlock, begin = chunk * kChunk, end = smaller(begin + kChunk, p.rows());
        double *const X = place.take(gap * qr.panels()), *const Q = place.take(gap * kGroup);
        for (int64_t first = begin; first < end; first += kRows) {
            const int64_t rows = smaller(kRows, end - first);
            p.tall().pack(i, {first, first + rows}, X, gap, rows);
            for (int64_t j = 0, width = 0; j < qr.panels(); j += width) {
                width = smaller(kGroup, qr.panels() - j);
                std::memset(Q, 0, sizeof(double) * (size_t)(gap * width));
                for (int64_t panel = 0, done = 0; panel < s.reach[j + width - 1]; ++panel) {
                    while (s.reach[j + done] <= panel) ++done;
                    fedlora::reflectors().update(Q + done * gap, gap, X + TallQR::at(gap, panel, 0), rows,
                                                 s.mixer + qr.at(8 * panel, 8 * (j + done)), qr.gap(), width - done);
                }
                write_rows(*p.Q, i, first, first + rows, Q, gap, 8 * j, 8 * width);
            }
        }
    }
};

// By reflections. Columns whose squares may leave the range, or have done so, are scaled and done again.
struct Hard {
    const Problem &p;
    static constexpr int kStages = 7;

    struct Slot {
        double *triangles, *squares, *kept;
        int64_t *largest, *e;  // bits of the largest numbers of the columns of every chain; exponents that columns are scaled by
        Power *powers;
        int64_t *again, *form;
    };
    enum { kNo, kPerhaps, kYes, kNever };   // whether columns are out of range; of what is not finite nothing is to be had
    enum { kNothing, kTriangle, kSquare };  // what Q is multiplied with

    Slot slot(Place &place) const {
        const TallQR qr = p.tall();
        Slot s{};
        s.triangles = place.take(qr.triangle() * qr.chains());
        s.squares = place.take(p.Q ? qr.triangle() * qr.chains() : 0);
        s.kept = place.take(p.Q ? qr.kept() * qr.chains() : 0);
        s.largest = (int64_t *)place.take(p.order() * qr.chains());
        s.e = (int64_t *)place.take(p.order());
        s.powers = (Power *)place.take(2 * p.order());
        s.again = (int64_t *)place.take(1);
        s.form = (int64_t *)place.take(1);
        return s;
    }
    int64_t scratch_size() const {
        const int64_t R = p.order();
        return larger(p.tall().strip(), (p.R.rows + 1) * (R + p.R.rows)) + 4 * R + 64;
    }
    int64_t tasks(int stage) const {
        const bool whole = stage == 1 || stage == 3 || stage == 5, unwanted = stage == 6 && !p.Q;
        return whole ? 1 : unwanted ? 0 : p.tall().chains();
    }
    void run(int stage, int64_t i, int64_t task, Place place, double *scratch) const {
        const Slot s = slot(place);
        switch (stage) {
            case 0: return factor(s, i, task, nullptr, {scratch});
            case 1: return judge(s);
            case 2: return *s.again == kPerhaps ? p.tall().largest(i, task, s.largest + task * p.order(), scratch) : void();
            case 3: return *s.again == kPerhaps ? decide(s) : void();
            case 4: return *s.again == kYes ? factor(s, i, task, s.e, {scratch}) : void();
            case 5: return finish(s, i, {scratch});
            default: return write(s, i, task, scratch);
        }
    }

    void factor(const Slot &s, int64_t i, int64_t chain, const int64_t *e, Place place) const {
        const TallQR qr = p.tall();
        double *const scale = place.take(p.order());
        bool plain = !e;
        std::memset(scale, 0, sizeof(double) * (size_t)p.order());
        spread_weights(p, i, scale);
        for (int64_t j = 0; j < p.width(); ++j) {
            plain &= scale[j] > 0;
            scale[j] = std::copysign(power(e ? -e[j] : 0), scale[j]);
        }
        double *const kept = p.Q ? s.kept + chain * qr.kept() : nullptr;
        qr.factor(i, chain, plain ? nullptr : scale, s.triangles + chain * qr.triangle(), kept, place.take(qr.strip()));
    }

    const double *column(const Slot &s, int64_t j) const { return s.triangles + TallQR::at(p.tall().gap(), j / 8, 0) + j % 8; }

    void judge(const Slot &s) const {
        const TallQR qr = p.tall();
        *s.again = kNo;
        std::memset(s.e, 0, sizeof(int64_t) * (size_t)p.order());
        qr.merge(s.triangles);
        for (int64_t j = 0; j < p.width(); ++j) {
            const double squares = squares_of(column(s, j), smaller(j + 1, p.R.rows));
            if (!(squares >= 0x1p-600 && squares <= 0x1p600)) *s.again = kPerhaps;
        }
    }

    void decide(const Slot &s) const {
        *s.again = kNo;
        for (int64_t j = 0; j < p.width(); ++j) {
            int64_t bits = 0;
            double most;
            for (int64_t chain = 0; chain < p.tall().chains(); ++chain) bits = larger(bits, s.largest[chain * p.order() + j]);
            std::memcpy(&most, &bits, 8);
            if (!(most <= DBL_MAX)) *s.again = kNever;
            if (*s.again == kNo && most > 0 && !(most >= 0x1p-290 && most <= 0x1p290)) *s.again = kYes;
            s.e[j] = larger(-1022, smaller(1022, exponent_of(most)));
        }
        if (*s.again == kNo) std::memset(s.e, 0, sizeof(int64_t) * (size_t)p.order());
    }

    void finish(const Slot &s, int64_t i, Place place) const {
        const TallQR qr = p.tall();
        const int64_t rows = p.R.rows, R = p.width(), width = R + rows, gap = qr.gap();
        double *const weights = place.take(R), *const scratch = place.take(width), *const F = place.take(rows * width);
        *s.form = kNothing;
        if (*s.again == kNever) return say_nonfinite(p, i);
        if (*s.again == kYes) qr.merge(s.triangles);
        spread_weights(p, i, weights);
        const double tolerance = 16 * kRoundoff * (double)R;
        bool full = true;
        std::memset(F, 0, sizeof(double) * (size_t)(rows * width));
        for (int64_t j = 0; j < R; ++j) {
            const int64_t count = smaller(j + 1, rows), rest = exponent_of(std::sqrt(squares_of(column(s, j), count))) + 1;
            const double factor = power(-rest);
            s.powers[j] = power_of(s.e[j] + rest);
            for (int64_t a = 0; a < count; ++a) F[a * width + j] = column(s, j)[8 * a] * factor;
            if (j < rows) full &= std::fabs(F[j * width + j]) > tolerance;
        }
        for (int64_t a = 0; a < rows; ++a) F[a * width + R + a] = 1;
        const int64_t rank = fedlora::echelon(F, rows, R, tolerance, scratch);
        bool finite = true;
        for (int64_t a = 0; a < rows; ++a) finite &= write_row_any(p.R, i, a, F + a * width, s.powers, weights);
        say(p, i, rank, finite ? 0 : FEDLORA_INFO_OVERFLOW);
        if (!p.Q) return;
        std::memset(s.squares, 0, sizeof(double) * (size_t)qr.triangle());
        for (int64_t b = 0; b < rank; ++b)
            for (int64_t a = 0; a < rows; ++a) s.squares[TallQR::at(gap, b / 8, a) + b % 8] = F[b * width + R + a];
        *s.form = full ? kTriangle : kSquare;
        qr.split(s.triangles, s.squares, full);
    }

    void write(const Slot &s, int64_t i, int64_t chain, double *strip) const {
        if (*s.form == kNothing) return;
        const TallQR qr = p.tall();
        for (int64_t part = qr.strips(chain) - 1; part >= 0; --part) {
            qr.apply(chain, part, s.kept + chain * qr.kept(), s.squares + chain * qr.triangle(), *s.form == kTriangle, strip);
            const TallQR::Rows rows = qr.rows_of(chain, part);
            write_rows(*p.Q, i, rows.begin, rows.end, strip + TallQR::at(qr.strip_gap(), 0, 0), qr.strip_gap(), 0, p.order());
        }
    }
};

// The workspace: that of the stages; then, of the greatest batch, the matrices that are hard.
struct Layout {
    Stages stages;
    int64_t batch;
    int64_t bytes() const { return 8 * (stages.size() + 2 * padded(batch)) + 64; }
    int64_t *list(double *start) const { return (int64_t *)(start + stages.size()); }
    bool *hard(double *start) const { return (bool *)(list(start) + padded(batch)); }
};

void run_group(const Problem &p, const Layout &layout, double *start) {
    const int64_t batch = p.R.batch;
    bool *const hard = layout.hard(start);
    int64_t *const list = layout.list(start), count = 0;
    if (p.R.rows == 0) {
#pragma omp for
        for (int64_t i = 0; i < batch; ++i) say(p, i, 0, 0);
        return;
    }
    if (p.easy()) work(Easy{p, hard}, nullptr, batch, layout.stages, start);
    for (int64_t i = 0; i < batch; ++i)
        if (!p.easy() || hard[i]) ++count;
#pragma omp single
    for (int64_t i = 0, n = 0; i < batch; ++i)
        if (!p.easy() || hard[i]) list[n++] = i;
    work(Hard{p}, list, count, layout.stages, start);
}

int check(const Problem &p) {
    const int64_t batch = p.R.batch;
    if (p.count < 0 || batch < 0 || p.R.rows < 0 || p.R.cols < 0) return FEDLORA_BAD_SHAPE;
    int64_t R = 0, rows = p.count ? p.X[0].rows : 0, dtype = FEDLORA_FLOAT32;
    for (int64_t k = 0; k < p.count; ++k) {
        const fedlora_block &X = p.X[k];
        if (!is_float(X.dtype)) return FEDLORA_BAD_DTYPE;
        if (X.batch != batch || X.rows != rows || rows < 0 || X.cols < 0) return FEDLORA_BAD_SHAPE;
        R += X.cols;
        if (X.dtype == FEDLORA_FLOAT64) dtype = FEDLORA_FLOAT64;
    }
    if (p.R.dtype != dtype || p.weights.dtype != FEDLORA_FLOAT64 || (p.Q && p.Q->dtype != dtype)) return FEDLORA_BAD_DTYPE;
    const bool fit = p.R.cols == R && p.R.rows == smaller(rows, R) && p.weights.rows == batch && p.weights.cols == p.count &&
                     p.weights.batch == 1 && scalar(p.rank, FEDLORA_INT32, batch) && scalar(p.info, FEDLORA_INT32, batch) &&
                     scalar(p.notes, FEDLORA_INT32, batch) && R <= FEDLORA_STACKED_QR_MAX;
    const bool fit_Q = !p.Q || ((p.Q->rows == rows || !p.count) && p.Q->cols == p.R.rows && p.Q->batch == batch);
    return fit && fit_Q ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

struct Tables {
    const fedlora_block *X;
    const int64_t *counts;
    const fedlora_block *weights, *Q, *R, *rank, *info, *notes;
    int64_t groups;

    // `first` is the number of blocks of the groups before.
    Problem problem(int64_t g, int64_t first) const {
        return {X + first, counts[g], weights[g], R[g], rank[g], info[g], notes[g], Q ? Q + g : nullptr};
    }
    int status() const {
        for (int64_t g = 0, first = 0; g < groups; first += counts[g], ++g)
            if (const int status = check(problem(g, first))) return status;
        return FEDLORA_OK;
    }
    Layout layout(int64_t threads) const {
        Layout all = {{threads}, 0};
        for (int64_t g = 0, first = 0; g < groups; first += counts[g], ++g) {
            const Problem p = problem(g, first);
            if (p.R.rows == 0) continue;
            all.batch = larger(all.batch, p.R.batch);
            all.stages.make_room(Hard{p});
            if (p.easy()) all.stages.make_room(Easy{p, nullptr});
        }
        return all;
    }
};

}  // namespace

extern "C" {

int fedlora_stacked_qr_workspace(const fedlora_block *X, const int64_t *counts, const fedlora_block *weights, const fedlora_block *Q,
                                 const fedlora_block *R, const fedlora_block *rank, const fedlora_block *info,
                                 const fedlora_block *notes, int64_t groups, int64_t threads, int64_t *bytes) {
    if (!X || !counts || !weights || !R || !rank || !info || !notes || !bytes || groups < 0 || threads < 1)
        return FEDLORA_BAD_ARGUMENT;
    const Tables tables = {X, counts, weights, Q, R, rank, info, notes, groups};
    if (const int status = tables.status()) return status;
    *bytes = tables.layout(threads).bytes();
    return FEDLORA_OK;
}

int fedlora_stacked_qr(const fedlora_block *X, const int64_t *counts, const fedlora_block *weights, const fedlora_block *Q,
                       const fedlora_block *R, const fedlora_block *rank, const fedlora_block *info, const fedlora_block *notes,
                       int64_t groups, void *workspace, int64_t workspace_bytes, int64_t threads, void *) {
    if (!X || !counts || !weights || !R || !rank || !info || !notes || !workspace || groups < 0 || threads < 1)
        return FEDLORA_BAD_ARGUMENT;
    const Tables tables = {X, counts, weights, Q, R, rank, info, notes, groups};
    if (const int status = tables.status()) return status;
    const Layout layout = tables.layout(threads);
    if (workspace_bytes < layout.bytes()) return FEDLORA_BAD_WORKSPACE;
    double *const start = (double *)(((uintptr_t)workspace + 63) / 64 * 64);
    fedlora::prefer_huge_pages(fedlora::Extent((int64_t)workspace, (int64_t)workspace + layout.bytes()));
    for (int64_t g = 0; Q && g < groups; ++g) fedlora::prefer_huge_pages(fedlora::Extent(Q[g], size_of(Q[g].dtype)));
#pragma omp parallel num_threads((int)threads)
    for (int64_t g = 0, first = 0; g < groups; first += counts[g], ++g) run_group(tables.problem(g, first), layout, start);
    return FEDLORA_OK;
}

}  // extern "C"
