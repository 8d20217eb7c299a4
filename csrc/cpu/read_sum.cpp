// fedlora_read_sum: sums of matrices that lie in files, a cache-sized piece of every file at a time, so that what is read never
// goes to memory and back. fedlora_read_alike: whether such matrices are the same.
//
// Chunks, and the order in which numbers and norms are added up, are those of fedlora_weighted_sum: so are the bits.

// Products and sums must round as they are written: torch's do, and so do those of every instruction set.
#pragma GCC optimize("fp-contract=off")

#include <omp.h>

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "partial.h"
#include "range.h"

namespace {

#include "element.hpp"
#include "add.hpp"

using fedlora::is_valid;
using fedlora::read_range;

constexpr int64_t kSpan = 16 * kTile;     // numbers of the sum that pieces are read for: 64 KiB of float32
constexpr int64_t kPieces = 512 << 10;    // bytes of the pieces that are held at once, of one client at least
constexpr int64_t kLargest = 8;           // bytes of a number
constexpr int64_t kScratch = kSpan * kLargest + kPieces;

struct Problem {
    const fedlora_range *X;  // of the matrices one after the other, count of each
    int64_t count;
    fedlora_block weights, sum, norm, rounding, info, notes;

    int64_t tasks() const { return chunks_of(sum) * sum.batch; }
    const fedlora_range &range(int64_t i, int64_t k) const { return X[i * count + k]; }
    double weight(int64_t i, int64_t k) const {
        return ((const double *)weights.data)[i * weights.row_stride + k * weights.col_stride];
    }

    int status() const {
        if (!is_float(sum.dtype) || weights.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
        if (count < 0 || sum.batch < 0 || sum.rows < 0 || sum.cols < 0) return FEDLORA_BAD_SHAPE;
        if (sum.col_stride != 1 || sum.row_stride != sum.cols) return FEDLORA_BAD_SHAPE;
        if (weights.rows != sum.batch || weights.cols != count) return FEDLORA_BAD_SHAPE;
        for (int64_t i = 0; i < sum.batch; ++i)
            for (int64_t k = 0; k < count; ++k)
                if (!is_valid(range(i, k)) || range(i, k).rows > sum.rows || range(i, k).cols > sum.cols) return FEDLORA_BAD_SHAPE;
        const bool fit = scalar(norm, FEDLORA_FLOAT64, sum.batch) && scalar(rounding, FEDLORA_FLOAT64, sum.batch) &&
                         scalar(info, FEDLORA_INT32, sum.batch) && scalar(notes, FEDLORA_INT32, sum.batch);
        return fit ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
    }
};

// A part of the sum: whole rows, or some columns of one. Blocks as wide as the sum are one row as a whole.
struct Span {
    int64_t row, begin, rows, count;  // its first number (row, begin), its rows, the numbers of each
};

// A client's share of a span, in the buffer.
struct Piece {
    const char *data;
    int64_t dtype, rows, count;
    double weight;
};

// The share of a matrix of so many rows and columns.
void cut(const Span &span, int64_t rows, int64_t cols, int64_t &there, int64_t &count) {
    there = rows - span.row < span.rows ? rows - span.row : span.rows;
    count = cols - span.begin < span.count ? cols - span.begin : span.count;
    if (there <= 0 || count <= 0) there = count = 0;
}

// One task: pieces of all clients are read, and added up while they are in the cache.
class Chunk {
  public:
    Chunk(const Problem &p, int64_t i, char *scratch, Partial &partial)
        : p_(p), i_(i), acc_((double *)scratch), buffer_(scratch + kSpan * kLargest), partial_(partial) {}

    // Rows [first, last) of the sum; false where a file could not be read.
    bool run(int64_t first, int64_t last) {
        bool packed = true;
        for (int64_t k = 0; k < p_.count; ++k) packed = packed && p_.range(i_, k).cols == p_.sum.cols;
        const int64_t cols = p_.sum.cols;
        bool read = true;
        if (packed) {
            as_row_ = true;
            for (int64_t at = first * cols, end = last * cols; read && at < end; at += kSpan)
                read = add({0, at, 1, end - at < kSpan ? end - at : kSpan});
            return read;
        }
        as_row_ = false;
        const int64_t step = cols < kSpan ? kSpan / cols : 1;
        for (int64_t row = first; row < last; row += step) {
            const int64_t rows = last - row < step ? last - row : step;
            for (int64_t at = 0; read && at < cols; at += kSpan) read = add({row, at, rows, cols - at < kSpan ? cols - at : kSpan});
        }
        return read;
    }

  private:
    bool add(const Span &span) {
        std::memset(acc_, 0, sizeof(double) * (size_t)(span.rows * span.count));
        int64_t k = 0;
        do {
            Piece pieces[kMost];
            int64_t held = 0;
            if (!read(span, k, pieces, held)) return false;
            for (int64_t row = 0; row < span.rows; ++row)
                for (int64_t begin = 0; begin < span.count; begin += kTile)
                    add_tile(span, row, begin, pieces, held, k == p_.count);
        } while (k < p_.count);
        return true;
    }

    // The next clients' pieces, as many as the buffer takes.
    bool read(const Span &span, int64_t &k, Piece *pieces, int64_t &held) {
        for (int64_t used = 0; k < p_.count && held < kMost; ++k) {
            const fedlora_range &X = p_.range(i_, k);
            const double w = p_.weight(i_, k);
            int64_t rows, count;
            as_row_ ? cut(span, 1, X.rows * X.cols, rows, count) : cut(span, X.rows, X.cols, rows, count);
            if (w == 0.0 || rows == 0) continue;
            const int64_t bytes = (rows * count * size_of(X.dtype) + 63) / 64 * 64;
            if (used + bytes > kPieces) return true;
            if (!read_range(X, span.row * X.cols + span.begin, rows * count, buffer_ + used)) return false;
            pieces[held++] = {buffer_ + used, X.dtype, rows, count, w};
            used += bytes;
        }
        return true;
    }

    void add_tile(const Span &span, int64_t row, int64_t begin, const Piece *pieces, int64_t held, bool last) {
        const int64_t count = span.count - begin < kTile ? span.count - begin : kTile;
        double *const acc = acc_ + row * span.count + begin;
        for (int64_t n = 0; n < held; ++n) {
            const Piece &x = pieces[n];
            const int64_t there = row < x.rows ? (x.count - begin < count ? x.count - begin : count) : 0;
            if (there > 0) add_any(x.dtype, x.data + (row * x.count + begin) * size_of(x.dtype), 1, acc, x.weight, there);
        }
        if (last) {
            const int64_t offset = i_ * p_.sum.batch_stride + (span.row + row) * p_.sum.cols + span.begin + begin;
            store_any(p_.sum, offset, acc, 1, count, partial_);
        }
    }

    static constexpr int64_t kMost = 64;
    const Problem &p_;
    int64_t i_;
    double *acc_;
    char *buffer_;
    Partial &partial_;
    bool as_row_ = false;  // the matrices count as one row
};

}  // namespace

namespace {

int64_t tasks_of(const fedlora_block *sum, int64_t groups) {
    int64_t total = 0;
    for (int64_t g = 0; g < groups; ++g) total += chunks_of(sum[g]) * sum[g].batch;
    return total;
}

int64_t in_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t workspace_bytes_of(const fedlora_block *sum, int64_t groups, int64_t threads) {
    return in_lines(tasks_of(sum, groups) * (int64_t)sizeof(Partial)) + kScratch * threads + 64;
}

// Calls visit(group, its ranges, its first task) for every group.
template <class F>
void for_groups(const fedlora_range *X, const int64_t *counts, const fedlora_block *sum, int64_t groups, const F &visit) {
    int64_t task = 0;
    for (int64_t g = 0; g < groups; X += counts[g] * sum[g].batch, task += chunks_of(sum[g]) * sum[g].batch, ++g) visit(g, X, task);
}

// Whether all matrices hold what the first does in as many of its rows as they have, bit for bit. read is false where a file cannot be.
bool are_alike(const fedlora_range *X, int64_t count, char *buffer, bool &read) {
    constexpr int64_t half = kPieces / 2;
    for (int64_t k = 1; k < count; ++k)
        if (X[k].cols != X[0].cols || X[k].rows > X[0].rows || X[k].dtype != X[0].dtype) return false;
    if (count < 2) return true;
    const int64_t numbers = X[0].rows * X[0].cols, size = size_of(X[0].dtype);
    for (int64_t begin = 0; begin < numbers; begin += half / size) {
        const int64_t length = numbers - begin < half / size ? numbers - begin : half / size;
        if (!(read = read_range(X[0], begin, length, buffer))) return false;
        for (int64_t k = 1; k < count; ++k) {
            const int64_t left = X[k].rows * X[k].cols - begin, own = left < length ? left : length;
            if (own <= 0) continue;
            if (!(read = read_range(X[k], begin, own, buffer + half))) return false;
            if (std::memcmp(buffer, buffer + half, (size_t)(own * size))) return false;
        }
    }
    return true;
}

}  // namespace

extern "C" {

int fedlora_read_sum_workspace(const fedlora_block *sum, int64_t groups, int64_t threads, int64_t *bytes) {
    if (!sum || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    *bytes = workspace_bytes_of(sum, groups, threads);
    return FEDLORA_OK;
}

int fedlora_read_sum(const fedlora_range *X, const int64_t *counts, const fedlora_block *weights, const fedlora_block *sum,
                     const fedlora_block *norm, const fedlora_block *rounding, const fedlora_block *info, const fedlora_block *notes,
                     int64_t groups, void *workspace, int64_t workspace_bytes, int64_t threads, void *) {
    if (!X || !counts || !weights || !sum || !norm || !rounding || !info || !notes || !workspace || groups < 0 || threads < 1)
        return FEDLORA_BAD_ARGUMENT;
    const auto problem = [&](int64_t g, const fedlora_range *own) {
        return Problem{own, counts[g], weights[g], sum[g], norm[g], rounding[g], info[g], notes[g]};
    };
    int status = FEDLORA_OK;
    for_groups(X, counts, sum, groups, [&](int64_t g, const fedlora_range *own, int64_t) { status = status ? status : problem(g, own).status(); });
    if (status) return status;
    if (workspace_bytes < workspace_bytes_of(sum, groups, threads)) return FEDLORA_BAD_WORKSPACE;
    const int64_t tasks = tasks_of(sum, groups);
    Partial *const partials = (Partial *)in_lines((int64_t)workspace);
    char *const scratch = (char *)partials + in_lines(tasks * (int64_t)sizeof(Partial));
    std::atomic<bool> read{true};
#pragma omp parallel for num_threads(tasks < threads ? (tasks > 0 ? (int)tasks : 1) : (int)threads) schedule(dynamic)
    for (int64_t t = 0; t < tasks; ++t) {
        if (!read.load(std::memory_order_relaxed)) continue;
        for_groups(X, counts, sum, groups, [&](int64_t g, const fedlora_range *own, int64_t first) {
            const int64_t chunks = chunks_of(sum[g]), step = rows_of_chunk(sum[g]), at = t - first;
            if (at < 0 || at >= chunks * sum[g].batch) return;
            const Problem p = problem(g, own);
            const int64_t row = at % chunks * step, last = row + step < sum[g].rows ? row + step : sum[g].rows;
            partials[t] = {};
            if (!Chunk(p, at / chunks, scratch + kScratch * omp_get_thread_num(), partials[t]).run(row, last)) read = false;
        });
    }
    if (!read) return FEDLORA_UNREADABLE;
    for_groups(X, counts, sum, groups, [&](int64_t g, const fedlora_range *, int64_t first) {
        const int64_t chunks = chunks_of(sum[g]);
        for (int64_t i = 0; i < sum[g].batch; ++i)
            finish(norm[g], rounding[g], info[g], notes[g], i, partials + first + i * chunks, chunks);
    });
    return FEDLORA_OK;
}

int fedlora_read_alike_workspace(int64_t threads, int64_t *bytes) {
    if (!bytes || threads < 1) return FEDLORA_BAD_ARGUMENT;
    *bytes = kPieces * threads + 64;
    return FEDLORA_OK;
}

int fedlora_read_alike(const fedlora_range *X, const int64_t *counts, int64_t matrices, int32_t *alike, void *workspace,
                       int64_t workspace_bytes, int64_t threads, void *) {
    if (!X || !counts || !alike || !workspace || matrices < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    int64_t total = 0;
    for (int64_t i = 0; i < matrices; total += counts[i], ++i)
        if (counts[i] < 0) return FEDLORA_BAD_SHAPE;
    for (int64_t n = 0; n < total; ++n)
        if (!fedlora::is_valid(X[n])) return FEDLORA_BAD_SHAPE;
    if (workspace_bytes < kPieces * threads + 64) return FEDLORA_BAD_WORKSPACE;
    char *const scratch = (char *)in_lines((int64_t)workspace);
    std::atomic<bool> read{true};
#pragma omp parallel for num_threads(matrices < threads ? (matrices > 0 ? (int)matrices : 1) : (int)threads) schedule(dynamic)
    for (int64_t i = 0; i < matrices; ++i) {
        const fedlora_range *own = X;
        for (int64_t before = 0; before < i; ++before) own += counts[before];
        bool fine = true;
        alike[i] = are_alike(own, counts[i], scratch + kPieces * omp_get_thread_num(), fine);
        if (!fine) read = false;
    }
    return read ? FEDLORA_OK : FEDLORA_UNREADABLE;
}

}  // extern "C"
