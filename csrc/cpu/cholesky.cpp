// fedlora_cholesky: pivoted Cholesky factors of Gram matrices (docs/numerics.md, Pivoted Cholesky), a matrix to a thread.
//
// What is left of G stays together: after a panel of columns, the rows and columns that have not been pivots move up, and the
// panel is taken from them in one product. Within a panel each column is brought up to date when it becomes the pivot.
#include "cholesky.h"

#include <omp.h>

#include "fedlora.h"
#include "panel.h"

namespace {

constexpr double kRoundoff = 0x1p-53;
constexpr int64_t kAlignment = 64, kLanes = 8, kHigh = 8;
constexpr double kDone = -__builtin_inf();  // the diagonal of a former pivot
constexpr int64_t kPanel = 16, kWhole = 48;  // columns of a panel; matrices up to kWhole are one

// Eight numbers; an instruction set with shorter vectors takes several.
typedef double Vec __attribute__((vector_size(64)));

int64_t vectors_of(int64_t R) { return (R + kLanes - 1) / kLanes; }

int64_t stride_of(int64_t R) { return vectors_of(R) | 1; }

struct Problem {
    const double *G;
    int64_t row, col, R;
    double width;
};

template <class T>
T *first_of(const fedlora_block &block, int64_t index) {
    return (T *)block.data + index * block.batch_stride;
}

// The scratch: what is left of G, the columns of the panel, their negatives without the pivots, the diagonal, and places in G.
struct Rest {
    Vec *G, *panel, *negative;
    double *diag;
    int64_t *place, *kept;
    int64_t stride, count;

    Rest(int64_t R, double *scratch) : stride(stride_of(R)), count(R) {
        const int64_t columns = panel_of(R);
        G = (Vec *)scratch;
        panel = G + R * stride;
        negative = panel + columns * stride;
        diag = (double *)(negative + columns * stride);
        place = (int64_t *)(diag + stride * kLanes);
        kept = place + stride * kLanes;
    }
    static int64_t panel_of(int64_t R) { return R <= kWhole ? R : kPanel; }
    static int64_t size(int64_t R) { return stride_of(R) * kLanes * (R + 2 * panel_of(R) + 3); }
    double *row(int64_t i) { return (double *)(G + i * stride); }
    double *column(int64_t k) { return (double *)(panel + k * stride); }
};

// column -= sum_t P_t P_t[pivot], t < count, N vectors from `at` on.
template <int N>
inline __attribute__((always_inline)) void eliminate(Vec *column, const Vec *P, int64_t stride, int64_t at, int64_t count,
                                                     int64_t pivot) {
    Vec sum[N];
    for (int n = 0; n < N; ++n) sum[n] = column[at + n];
    for (int64_t t = 0; t < count; ++t) {
        const Vec *done = P + t * stride;
        const double factor = ((const double *)done)[pivot];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[n] -= done[at + n] * factor;
    }
    for (int n = 0; n < N; ++n) column[at + n] = sum[n];
}

// Place of the largest diagonal left, the first of equal ones; -1 where none is above `stop` or one is NaN.
inline __attribute__((always_inline)) int64_t pivot_of(const Rest &rest, double stop) {
    double largest = 0;
    int64_t unsound = 0;
#pragma omp simd reduction(max : largest) reduction(| : unsound)
    for (int64_t i = 0; i < rest.count; ++i) {
        largest = rest.diag[i] > largest ? rest.diag[i] : largest;
        unsound |= rest.diag[i] != rest.diag[i];
    }
    if (unsound || !(largest > stop)) return -1;
    int64_t pivot = 0;
    while (rest.diag[pivot] != largest) ++pivot;
    return pivot;
}

// Column k of the panel from the row of the pivot.
inline __attribute__((always_inline)) void advance(Rest &rest, int64_t k, int64_t pivot) {
    const int64_t vectors = vectors_of(rest.count);
    Vec *const column = rest.panel + k * rest.stride;
    double *const element = (double *)column;
    for (int64_t v = 0; v < vectors; ++v) column[v] = ((const Vec *)rest.row(pivot))[v];
    int64_t at = 0;
    for (; at + kHigh <= vectors; at += kHigh) eliminate<kHigh>(column, rest.panel, rest.stride, at, k, pivot);
    for (; at < vectors; ++at) eliminate<1>(column, rest.panel, rest.stride, at, k, pivot);
    const double root = __builtin_sqrt(rest.diag[pivot]);
#pragma omp simd
    for (int64_t i = 0; i < rest.count; ++i) {
        element[i] = rest.diag[i] == kDone ? 0 : element[i] / root;
        rest.diag[i] -= element[i] * element[i];
    }
    element[pivot] = root;
    rest.diag[pivot] = kDone;
}

// Rows and columns that have not been pivots move up, and the panel is taken from them.
inline __attribute__((always_inline)) void close(Rest &rest, int64_t columns) {
    int64_t left = 0;
    for (int64_t i = 0; i < rest.count; ++i)
        if (rest.diag[i] != kDone) rest.kept[left++] = i;
    const int64_t padded = vectors_of(left) * kLanes;
    for (int64_t a = 0; a < left; ++a) {
        const double *const from = rest.row(rest.kept[a]);
        double *const to = rest.row(a);
        for (int64_t b = 0; b < left; ++b) to[b] = from[rest.kept[b]];
        for (int64_t b = left; b < padded; ++b) to[b] = 0;
        rest.diag[a] = rest.diag[rest.kept[a]];
        rest.place[a] = rest.place[rest.kept[a]];
    }
    for (int64_t k = 0; k < columns; ++k) {
        double *const positive = rest.column(k), *const negative = (double *)(rest.negative + k * rest.stride);
        for (int64_t b = 0; b < left; ++b) positive[b] = positive[rest.kept[b]];
        for (int64_t b = 0; b < left; ++b) negative[b] = -positive[b];
        for (int64_t b = left; b < padded; ++b) negative[b] = 0;
    }
    rest.count = left;
    const int64_t ld = rest.stride * kLanes;
    fedlora::panel().add(rest.row(0), ld, rest.column(0), 1, ld, (const double *)rest.negative, ld, left, columns, padded);
}

// Panel after panel; every comparison is written so that NaN ends the elimination.
inline __attribute__((always_inline)) int64_t factor(const Problem &p, double *L, double *scratch) {
    const int64_t R = p.R, columns = Rest::panel_of(R), ld = stride_of(R) * kLanes;
    Rest rest(R, scratch);
    double largest = 0, probe = 0;
    for (int64_t i = 0; i < R; ++i) {
        double *const row = rest.row(i);
        for (int64_t j = 0; j < R; ++j) row[j] = p.G[i * p.row + j * p.col];
        for (int64_t j = R; j < vectors_of(R) * kLanes; ++j) row[j] = 0;
        rest.diag[i] = row[i];
        rest.place[i] = i;
        probe += row[i] - row[i];
        largest = row[i] > largest ? row[i] : largest;
    }
    const double stop = largest * p.width * kRoundoff + probe;
    int64_t rank = 0;
    while (rank < R) {
        int64_t k = 0;
        for (; k < columns && rank < R; ++k, ++rank) {
            const int64_t pivot = pivot_of(rest, stop);
            if (pivot < 0) return rank;
            advance(rest, k, pivot);
            double *const out = L + rank * ld;
            for (int64_t i = 0; i < ld; ++i) out[i] = 0;
            for (int64_t i = 0; i < rest.count; ++i) out[rest.place[i]] = rest.column(k)[i];
        }
        if (rank < R) close(rest, k);
    }
    return rank;
}

using Factor = int64_t (*)(const Problem &, double *, double *);

int64_t factor_base(const Problem &p, double *L, double *scratch) { return factor(p, L, scratch); }

#ifdef __x86_64__
__attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) int64_t factor_v4(const Problem &p, double *L,
                                                                                    double *scratch) {
    return factor(p, L, scratch);
}
__attribute__((target("arch=x86-64-v3"))) int64_t factor_v3(const Problem &p, double *L, double *scratch) {
    return factor(p, L, scratch);
}
#endif

Factor variant() {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return factor_v4;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return factor_v3;
#endif
    return factor_base;
}

int check(const fedlora_block &G, const fedlora_block &width, const fedlora_block &L) {
    if (G.dtype != FEDLORA_FLOAT64 || width.dtype != FEDLORA_FLOAT64 || L.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    const bool fit = G.rows >= 0 && G.batch >= 0 && G.cols == G.rows && L.rows == G.rows && L.cols == G.rows &&
                     L.batch == G.batch && width.rows == 1 && width.cols == 1 && width.batch == G.batch;
    return fit ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

// The factor, and what it takes to make it.
int64_t scratch_size(int64_t R) { return stride_of(R) * kLanes * R + Rest::size(R); }

int64_t scratch_per_thread(const fedlora_block *G, int64_t groups) {
    int64_t most = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t bytes = scratch_size(G[g].rows) * 8;
        most = bytes > most ? bytes : most;
    }
    return most;
}

int64_t matrices_of(const fedlora_block *G, int64_t groups) {
    int64_t matrices = 0;
    for (int64_t g = 0; g < groups; ++g) matrices += G[g].batch;
    return matrices;
}

// The factor to the caller's array, in tiles, with zeros from the rank on.
void store(const double *columns, int64_t rank, const fedlora_block &L, int64_t index) {
    constexpr int64_t tile = 8;
    const int64_t R = L.rows, stride = fedlora::factor_stride(R);
    double *const out = first_of<double>(L, index);
    for (int64_t i = 0; i < R; i += tile)
        for (int64_t k = 0; k < R; k += tile)
            for (int64_t kk = k; kk < k + tile && kk < R; ++kk)
                for (int64_t ii = i; ii < i + tile && ii < R; ++ii)
                    out[ii * L.row_stride + kk * L.col_stride] = kk < rank ? columns[kk * stride + ii] : 0;
}

void factor_group(const fedlora_block &G, const fedlora_block &width, const fedlora_block &L, double *scratch) {
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < G.batch; ++i) {
        const double *matrix = first_of<const double>(G, i), columns = *first_of<const double>(width, i);
        double *const rest = scratch + fedlora::factor_stride(G.rows) * G.rows;
        store(scratch, fedlora::pivoted_cholesky(matrix, G.row_stride, G.col_stride, G.rows, columns, scratch, rest), L, i);
    }
}

}  // namespace

namespace fedlora {

int64_t factor_stride(int64_t R) { return stride_of(R) * kLanes; }

int64_t factor_scratch(int64_t R) { return Rest::size(R); }

int64_t pivoted_cholesky(const double *G, int64_t row, int64_t col, int64_t R, double width, double *L, double *scratch) {
    static const Factor chosen = variant();
    return chosen({G, row, col, R, width}, L, scratch);
}

}  // namespace fedlora

extern "C" {

int fedlora_cholesky_workspace(const fedlora_block *G, int64_t groups, int64_t threads, int64_t *bytes) {
    if (!G || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    for (int64_t g = 0; g < groups; ++g)
        if (G[g].rows < 0) return FEDLORA_BAD_SHAPE;
    *bytes = scratch_per_thread(G, groups) * threads + kAlignment;
    return FEDLORA_OK;
}

int fedlora_cholesky(const fedlora_block *G, const fedlora_block *width, const fedlora_block *L, int64_t groups,
                     void *workspace, int64_t workspace_bytes, int64_t threads, void *) {
    if (!G || !width || !L || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    for (int64_t g = 0; g < groups; ++g)
        if (const int status = check(G[g], width[g], L[g])) return status;
    const int64_t matrices = matrices_of(G, groups), slice = scratch_per_thread(G, groups);
    if (matrices == 0) return FEDLORA_OK;
    if (!workspace || workspace_bytes < slice * threads + kAlignment) return FEDLORA_BAD_WORKSPACE;
    const uintptr_t address = ((uintptr_t)workspace + kAlignment - 1) / kAlignment * kAlignment;

#pragma omp parallel num_threads((int)(matrices < threads ? matrices : threads))
    {
        double *scratch = (double *)(address + slice * omp_get_thread_num());
        for (int64_t g = 0; g < groups; ++g) factor_group(G[g], width[g], L[g], scratch);
    }
    return FEDLORA_OK;
}

}  // extern "C"
