// X Q in the dtype of X, and fedlora_turned. Factors of float32 and float64 that lie dense in memory are read and written where
// they are; all others go through strips in the first-level cache.
#include "turned.h"

#include <omp.h>

#include <cfloat>
#include <cmath>
#include <cstring>

#include "pages.hpp"
#include "panel.h"
#include "partial.h"
#include "turn.h"

namespace {

#include "element.hpp"
#include "strips.hpp"

using fedlora::kStreamed;
using fedlora::Turned;

constexpr int64_t kTurnStrip = 128;

int64_t in_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t row_of(int64_t r) { return (r + fedlora::kTurnPad - 1) / fedlora::kTurnPad * fedlora::kTurnPad; }

template <class S, class T>
inline void convert(T *out, int64_t gap, const S *x, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i * gap] = (T)widen(x[i * stride]);
}

// Whether what was written is finite.
template <class S, class T>
inline bool convert_back(S *out, int64_t gap, const T *x, int64_t stride, int64_t count) {
    int64_t bad = 0;
    for (int64_t i = 0; i < count; ++i) {
        narrow((double)x[i * stride], out[i * gap]);
        bad |= !(std::fabs(widen(out[i * gap])) <= DBL_MAX);
    }
    return !bad;
}

template <class S>
inline bool all_finite(const S *x, int64_t stride, int64_t count) {
    int64_t bad = 0;
    for (int64_t i = 0; i < count; ++i) bad |= !(std::fabs(widen(x[i * stride])) <= DBL_MAX);
    return !bad;
}

#define FEDLORA_CONVERT(name, S, T)                                                                                                         \
    FEDLORA_CLONES void load_##name(T *out, int64_t gap, const S *x, int64_t stride, int64_t count) { convert(out, gap, x, stride, count); } \
    FEDLORA_CLONES bool keep_##name(S *out, int64_t gap, const T *x, int64_t stride, int64_t count) {                                       \
        return convert_back(out, gap, x, stride, count);                                                                                     \
    }                                                                                                                                        \
    FEDLORA_CLONES bool finite_##name(const S *x, int64_t stride, int64_t count) { return all_finite(x, stride, count); }
FEDLORA_CONVERT(float64, double, double)
FEDLORA_CONVERT(float32, float, float)
FEDLORA_CONVERT(bfloat16, Bfloat16, float)
FEDLORA_CONVERT(float16, Float16, float)

inline void load_run(const fedlora_block &, const char *x, double *out, int64_t gap, int64_t stride, int64_t count) {
    load_float64(out, gap, (const double *)x, stride, count);
}
inline void load_run(const fedlora_block &X, const char *x, float *out, int64_t gap, int64_t stride, int64_t count) {
    switch (X.dtype) {
        case FEDLORA_FLOAT32: return load_float32(out, gap, (const float *)x, stride, count);
        case FEDLORA_BFLOAT16: return load_bfloat16(out, gap, (const Bfloat16 *)x, stride, count);
        default: return load_float16(out, gap, (const Float16 *)x, stride, count);
    }
}
inline bool keep_run(const fedlora_block &, char *out, const double *x, int64_t gap, int64_t stride, int64_t count) {
    return keep_float64((double *)out, gap, x, stride, count);
}
inline bool keep_run(const fedlora_block &S, char *out, const float *x, int64_t gap, int64_t stride, int64_t count) {
    switch (S.dtype) {
        case FEDLORA_FLOAT32: return keep_float32((float *)out, gap, x, stride, count);
        case FEDLORA_BFLOAT16: return keep_bfloat16((Bfloat16 *)out, gap, x, stride, count);
        default: return keep_float16((Float16 *)out, gap, x, stride, count);
    }
}
inline bool finite_run(const fedlora_block &X, const char *x, int64_t stride, int64_t count) {
    switch (X.dtype) {
        case FEDLORA_FLOAT64: return finite_float64((const double *)x, stride, count);
        case FEDLORA_FLOAT32: return finite_float32((const float *)x, stride, count);
        case FEDLORA_BFLOAT16: return finite_bfloat16((const Bfloat16 *)x, stride, count);
        default: return finite_float16((const Float16 *)x, stride, count);
    }
}

char *address(const fedlora_block &b, int64_t i, int64_t row, int64_t col) {
    return (char *)b.data + (i * b.batch_stride + row * b.row_stride + col * b.col_stride) * size_of(b.dtype);
}

// Whether the kernels can take a block as it lies.
bool lies_by_columns(const fedlora_block &b) { return b.row_stride == 1; }
bool lies_by_rows(const fedlora_block &b) { return b.col_stride == 1 && b.row_stride == b.cols; }

bool is_identity(const fedlora_block &Q, int64_t i) {
    const double *q = (const double *)Q.data + i * Q.batch_stride;
    for (int64_t row = 0; row < Q.rows; ++row)
        for (int64_t col = 0; col < Q.cols; ++col)
            if (q[row * Q.row_stride + col * Q.col_stride] != (row == col ? 1.0 : 0.0)) return false;
    return true;
}

// Rows [first, first + count) of matrix i, bit for bit; whether they are finite.
bool copy(const Turned &t, int64_t i, int64_t first, int64_t count) {
    const int64_t bytes = size_of(t.X.dtype);
    const bool turned = by_columns(t.out);
    const int64_t lines = turned ? t.X.cols : count, length = turned ? count : t.X.cols;
    const int64_t from = (turned ? t.X.row_stride : t.X.col_stride), to = (turned ? t.out.row_stride : t.out.col_stride);
    bool finite = true;
    for (int64_t line = 0; line < lines; ++line) {
        const int64_t row = turned ? first : first + line, col = turned ? line : 0;
        const char *x = address(t.X, i, row, col);
        char *out = address(t.out, i, row, col);
        finite &= finite_run(t.X, x, from, length);
        if (from == 1 && to == 1)
            std::memcpy(out, x, (size_t)(length * bytes));
        else
            for (int64_t e = 0; e < length; ++e) std::memcpy(out + e * to * bytes, x + e * from * bytes, (size_t)bytes);
    }
    return finite;
}

const fedlora::Turns<float> &turns(const float *) { return fedlora::turn().single; }
const fedlora::Turns<double> &turns(const double *) { return fedlora::turn().wide; }

template <class T>
bool turn_rows(const Turned &t, int64_t i, int64_t begin, int64_t end, bool stream, char *scratch) {
    const int64_t r = t.X.cols, ldq = row_of(r);
    const bool turned = by_columns(t.out), own = size_of(t.X.dtype) == (int64_t)sizeof(T);
    const bool read = own && (turned ? lies_by_columns(t.X) : lies_by_rows(t.X));
    const bool write = own && (turned ? lies_by_columns(t.out) : lies_by_rows(t.out));
    T *const Q = (T *)scratch, *const in = Q + in_lines(r * ldq * sizeof(T)) / sizeof(T), *const out = in + kTurnStrip * r;
    for (int64_t row = 0; row < r; ++row)
        for (int64_t col = 0; col < ldq; ++col)
            Q[row * ldq + col] = col < r ? (T)((const double *)t.Q.data)[i * t.Q.batch_stride + row * t.Q.row_stride + col * t.Q.col_stride] : T(0);
    const int64_t step = read && write ? end - begin : kTurnStrip;
    bool finite = true;
    for (int64_t first = begin; first < end; first += step) {
        const int64_t count = smaller(step, end - first);
        const T *x = in;
        T *y = out;
        int64_t ldx = kTurnStrip, ldy = kTurnStrip;
        if (read) {
            x = (const T *)address(t.X, i, first, 0), ldx = t.X.col_stride;
        } else if (turned) {
            for (int64_t c = 0; c < r; ++c) load_run(t.X, address(t.X, i, first, c), in + c * ldx, 1, t.X.row_stride, count);
        } else if (by_columns(t.X)) {
            for (int64_t c = 0; c < r; ++c) load_run(t.X, address(t.X, i, first, c), in + c, r, t.X.row_stride, count);
        } else {
            for (int64_t d = 0; d < count; ++d) load_run(t.X, address(t.X, i, first + d, 0), in + d * r, 1, t.X.col_stride, r);
        }
        if (write) y = (T *)address(t.out, i, first, 0), ldy = t.out.col_stride;
        const bool past = stream && write;
        finite &= turned ? turns(in).columns(x, ldx, Q, y, ldy, count, r, past) : turns(in).rows(x, Q, y, count, r, past);
        if (write) continue;
        if (turned)
            for (int64_t c = 0; c < r; ++c) finite &= keep_run(t.out, address(t.out, i, first, c), out + c * ldy, t.out.row_stride, 1, count);
        else
            for (int64_t d = 0; d < count; ++d) finite &= keep_run(t.out, address(t.out, i, first + d, 0), out + d * r, t.out.col_stride, 1, r);
    }
    return finite;
}

}  // namespace

namespace fedlora {

int Turned::status() const {
    if (!is_float(X.dtype) || out.dtype != X.dtype || Q.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    if (X.rows < 0 || X.cols < 0 || X.batch < 0 || out.rows != X.rows || out.cols != X.cols || out.batch != X.batch) return FEDLORA_BAD_SHAPE;
    return Q.rows == X.cols && Q.cols == X.cols && Q.batch == X.batch ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

int64_t Turned::chunks() const { return chunks_of(X.rows); }

int64_t Turned::scratch() const {
    const int64_t bytes = X.dtype == FEDLORA_FLOAT64 ? 8 : 4;
    return in_lines(X.cols * row_of(X.cols) * bytes) + 2 * in_lines(kTurnStrip * X.cols * bytes);
}

bool Turned::run(int64_t i, int64_t chunk, bool stream, void *scratch) const {
    const int64_t begin = chunk * kChunk, end = smaller(begin + kChunk, X.rows);
    if (X.cols == 0) return true;
    if (is_identity(Q, i)) return copy(*this, i, begin, end - begin);
    return X.dtype == FEDLORA_FLOAT64 ? turn_rows<double>(*this, i, begin, end, stream, (char *)scratch)
                                      : turn_rows<float>(*this, i, begin, end, stream, (char *)scratch);
}

bool Turned::finite(int64_t i) const {
    const bool turned = by_columns(X);
    for (int64_t line = 0; line < (turned ? X.cols : X.rows); ++line) {
        const char *x = turned ? address(X, i, 0, line) : address(X, i, line, 0);
        if (!finite_run(X, x, turned ? X.row_stride : X.col_stride, turned ? X.rows : X.cols)) return false;
    }
    return true;
}

void Turned::spoil(int64_t i) const {
    const double nan = std::nan("");
    for (int64_t row = 0; row < out.rows; ++row)
        for (int64_t col = 0; col < out.cols; ++col) {
            char *at = address(out, i, row, col);
            switch (out.dtype) {
                case FEDLORA_FLOAT64: narrow(nan, *(double *)at); break;
                case FEDLORA_FLOAT32: narrow(nan, *(float *)at); break;
                case FEDLORA_BFLOAT16: narrow(nan, *(Bfloat16 *)at); break;
                default: narrow(nan, *(Float16 *)at);
            }
        }
}

}  // namespace fedlora

namespace {

int64_t slice_of(const fedlora_block *X, const fedlora_block *Q, const fedlora_block *out, int64_t groups) {
    int64_t most = 0;
    for (int64_t g = 0; g < groups; ++g) most = larger(most, Turned{X[g], Q[g], out[g]}.scratch());
    return most;
}

void run_group(const Turned &t, char *scratch, int64_t slice, int threads) {
    const int64_t chunks = t.chunks(), tasks = chunks * t.X.batch;
    const bool stream = t.X.rows * t.X.cols * t.X.batch * size_of(t.X.dtype) > kStreamed;
#pragma omp parallel for num_threads(tasks < threads ? (tasks > 0 ? (int)tasks : 1) : threads) schedule(dynamic)
    for (int64_t i = 0; i < tasks; ++i) t.run(i / chunks, i % chunks, stream, scratch + slice * omp_get_thread_num());
}

}  // namespace

extern "C" {

int fedlora_turned_workspace(const fedlora_block *X, const fedlora_block *Q, const fedlora_block *out, int64_t groups, int64_t threads,
                             int64_t *bytes) {
    if (!X || !Q || !out || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    *bytes = slice_of(X, Q, out, groups) * threads + 64;
    return FEDLORA_OK;
}

int fedlora_turned(const fedlora_block *X, const fedlora_block *Q, const fedlora_block *out, int64_t groups, void *workspace,
                   int64_t workspace_bytes, int64_t threads, void *) {
    if (!X || !Q || !out || !workspace || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    for (int64_t g = 0; g < groups; ++g)
        if (const int status = Turned{X[g], Q[g], out[g]}.status()) return status;
    const int64_t slice = slice_of(X, Q, out, groups);
    if (workspace_bytes < slice * threads + 64) return FEDLORA_BAD_WORKSPACE;
    char *const start = (char *)(((uintptr_t)workspace + 63) / 64 * 64);
    for (int64_t g = 0; g < groups; ++g) fedlora::prefer_huge_pages({{out[g], size_of(out[g].dtype)}});
    for (int64_t g = 0; g < groups; ++g) run_group({X[g], Q[g], out[g]}, start, slice, (int)threads);
    return FEDLORA_OK;
}

}  // extern "C"
