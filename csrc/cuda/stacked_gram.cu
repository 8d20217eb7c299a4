// Stacks whose Gram is well conditioned: R is its Cholesky factor, Q = X R^-1 (docs/numerics.md, Stacked QR). A block has a
// matrix.
//
// Eight columns at a time; what stands beside them goes by the float64 tile product, a warp for sixteen columns.
#include "mixed_sum.cuh"
#include "slots.cuh"
#include "stacked_task.cuh"
#include "tall_factors.cuh"

namespace fedlora {
namespace {

constexpr double kLoss = 1e-8; // of orthogonality, the most that one pass may take

// Shared memory of a block: for every column its scale, its exponent and its place among those that are not zero; scratch.
constexpr int64_t kFixed = kStackedWarps * kTileScratch + kStackedWarps;
int64_t fixed_of(int64_t width) { return kFixed + 2 * panels_up((int)width) + 2; }
int64_t square_of(int64_t width) { return (int64_t)panels_up((int)width) * gap_of(panels_up((int)width)); }

// Columns [first, first + cols) of A lose rows [begin, end) of P times their own rows [from, from + 8): both are by columns,
// and P is read by rows from + k of column i, or by column from + k of row i.
template <bool kTurned>
__device__ void take_panel(double *A, int gap, int first, int cols, int from, int begin, int end, const double *P,
                           double *scratch) {
    const LaneOfTile lane;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const int row = lane.row(e), col = lane.col(e);
        scratch[row * kTileGap + col] = row < cols ? -A[(first + row) * gap + from + col] : 0;
    }
    __syncwarp();
    const LeftRows taken(scratch);
    const bool both = cols > kPanel;
    double *const low = A + (first + lane.g) * gap + 2 * lane.t, *const high = low + kPanel * gap;
    for (int i = begin; i < end; i += kPanel) {
        double2 *const a = reinterpret_cast<double2 *>(low + i), *const b = reinterpret_cast<double2 *>(high + i);
        const double2 first_row = *a, second_row = both ? *b : make_double2(0, 0);
        double tile[4] = {first_row.x, first_row.y, second_row.x, second_row.y};
        const auto right = [&](int k, int row) {
            return kTurned ? P[(i + row) * gap + from + k] : P[(from + k) * gap + i + row];
        };
        taken.multiply(tile, right);
        *a = make_double2(tile[0], tile[1]);
        if (both) *b = make_double2(tile[2], tile[3]);
    }
    __syncwarp();
}

// The block on the diagonal becomes upper triangular, by one warp whose lanes have a column each; false where it is not definite.
__device__ bool factor_corner(double *D, int gap) {
    const int lane = threadIdx.x % kWarp, col = lane % kPanel;
    double x[kPanel];
#pragma unroll
    for (int i = 0; i < kPanel; ++i) x[i] = D[col * gap + i];
    bool definite = true;
#pragma unroll
    for (int k = 0; k < kPanel; ++k) {
        const double pivot = __shfl_sync(kAllLanes, x[k], k);
        definite &= pivot > 0;
        const double inverse = 1 / sqrt(pivot), own = x[k] * inverse;
#pragma unroll
        for (int i = k + 1; i < kPanel; ++i) x[i] -= __shfl_sync(kAllLanes, own, i) * own;
        x[k] = own;
    }
#pragma unroll
    for (int i = 0; i < kPanel; ++i)
        if (lane < kPanel) D[col * gap + i] = i <= col ? x[i] : 0;
    return definite;
}

// U in place of the upper triangle of A; false where A is not definite.
__device__ bool factor(double *A, int width, double *scratch) {
    const int gap = gap_of(width), warp = threadIdx.x / kWarp;
    for (int p = 0; p < width; p += kPanel) {
        double *const D = A + p * (gap + 1);
        const bool definite = warp != 0 || factor_corner(D, gap);
        if (__syncthreads_or(!definite)) return false;
        for (int j = p + kPanel + threadIdx.x; j < width; j += kStackedThreads) {
            double *const column = A + j * gap + p;
            double x[kPanel];
#pragma unroll
            for (int k = 0; k < kPanel; ++k) {
                double sum = column[k];
#pragma unroll
                for (int i = 0; i < k; ++i) sum -= D[k * gap + i] * x[i];
                column[k] = x[k] = sum / D[k * gap + k];
            }
        }
        __syncthreads();
        for (int first = p + kPanel + warp * kTileCols; first < width; first += kStackedWarps * kTileCols) {
            const int cols = min(kTileCols, width - first);
            take_panel<true>(A, gap, first, cols, p, p + kPanel, first + cols, A, scratch + warp * kTileScratch);
        }
        __syncthreads();
    }
    return true;
}

// N = U^-1 down to the end of the blocks on the diagonal, a warp for sixteen columns.
__device__ void invert(const double *U, double *N, int width, double *scratch) {
    const int gap = gap_of(width), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    for (int first = warp * kTileCols; first < width; first += kStackedWarps * kTileCols) {
        const int cols = min(kTileCols, width - first), height = first + cols;
        for (int j = 0; j < cols; ++j)
            for (int i = lane; i < height; i += kWarp) N[(first + j) * gap + i] = i == first + j;
        __syncwarp();
        for (int p = height - kPanel; p >= 0; p -= kPanel) {
            if (lane < cols) {
                const double *const D = U + p * (gap + 1);
                double *const column = N + (first + lane) * gap + p;
                double x[kPanel];
#pragma unroll
                for (int k = kPanel - 1; k >= 0; --k) {
                    double sum = column[k];
#pragma unroll
                    for (int i = k + 1; i < kPanel; ++i) sum -= D[i * gap + k] * x[i];
                    column[k] = x[k] = sum / D[k * gap + k];
                }
            }
            __syncwarp();
            take_panel<false>(N, gap, first, cols, p, 0, p, U, scratch + warp * kTileScratch);
        }
    }
    __syncthreads();
}

// Squares of the upper triangle, without the columns of zeros that stand as those of the identity.
__device__ double squares_of(const double *A, int width, const int *place, double *room) {
    double sum = 0;
    for (int j = threadIdx.x / kWarp; j < width; j += kStackedWarps) {
        const double *const column = A + j * gap_of(width);
        for (int i = threadIdx.x % kWarp; place[j] >= 0 && i <= j; i += kWarp) sum += column[i] * column[i];
    }
    return sum_of_block(sum, room);
}

// Where every column stands among those that are not zero, by one warp; how many these are.
__device__ int find_places(const double *G, int R, int width, int *place) {
    const int lane = threadIdx.x % kWarp;
    int before = 0;
    for (int first = 0; first < width; first += kWarp) {
        const int j = first + lane;
        const bool live = j < R && G[(int64_t)j * R + j] > 0;
        const unsigned all = __ballot_sync(kAllLanes, live);
        if (j < width) place[j] = live ? before + __popc(all & ((1u << lane) - 1)) : -1;
        before += __popc(all);
    }
    return before;
}

__global__ void __launch_bounds__(kStackedThreads) by_gram(const StackedTask *tasks, const int64_t *first, int64_t count) {
    FEDLORA_DYNAMIC_SHARED(double, shared);
    const int64_t g = slot_group(first, count, blockIdx.x), matrix = blockIdx.x - first[g];
    const StackedTask &task = tasks[g];
    const int R = (int)task.width, width = panels_up(R), gap = gap_of(width);
    const double *const G = task.G + matrix * R * R;
    double *const scratch = shared, *const sums = scratch + kStackedWarps * kTileScratch, *const scale = sums + kStackedWarps;
    int *const exponents = reinterpret_cast<int *>(scale + width), *const place = exponents + width, *const live = place + width;
    double *const U = task.factors ? task.factors + matrix * 2 * width * gap : scale + 2 * width + 2, *const N = U + width * gap;

    bool finite = true;
    for (int j = threadIdx.x; j < width; j += kStackedThreads) {
        const double square = j < R ? G[(int64_t)j * R + j] : 0;
        finite &= square <= kLargest;
        exponents[j] = square > 0 && square <= kLargest ? exponent_of(sqrt(square)) + 1 : 0;
        scale[j] = j < R ? copysign(ldexp(1.0, -exponents[j]), task.weight(matrix, j)) : 1;
    }
    if (threadIdx.x < kWarp) {
        const int number = find_places(G, R, width, place);
        if (threadIdx.x == 0) *live = number;
    }
    if (__syncthreads_or(!finite)) {
        say_nonfinite(task, matrix);
        if (threadIdx.x == 0) task.hard[matrix] = 0, task.ranks[matrix] = kNoNumbers;
        return;
    }
    for (int j = threadIdx.x / kWarp; j < width; j += kStackedWarps)
        for (int i = threadIdx.x % kWarp; i < panels_up(j + 1); i += kWarp) {
            const bool both = place[i] >= 0 && place[j] >= 0;
            U[j * gap + i] = both ? G[(int64_t)j * R + i] * scale[i] * scale[j] : i == j;
        }
    __syncthreads();
    bool easy = factor(U, width, scratch);
    if (easy) {
        invert(U, N, width, scratch);
        easy = 2 * kUnitRoundoff * squares_of(U, width, place, sums) * squares_of(N, width, place, sums) <= kLoss;
    }
    for (int j = threadIdx.x; j < R; j += kStackedThreads) {
        task.scale[matrix * R + j] = scale[j];
        task.exponents[matrix * R + j] = exponents[j];
    }
    if (threadIdx.x == 0) task.hard[matrix] = !easy, task.ranks[matrix] = easy ? R : 0;
    if (!easy) return;

    bool fits = true;
    for (int e = threadIdx.x; e < R * R; e += kStackedThreads) {
        const int i = e / R, j = e % R;
        if (place[i] >= 0) fits &= write_entry(task, matrix, place[i], j, i <= j ? U[j * gap + i] : 0, exponents[j]);
        if (i >= *live) write_entry(task, matrix, i, j, 0, 0);
    }
    say(task, matrix, *live, __syncthreads_or(!fits) ? FEDLORA_INFO_OVERFLOW : 0);
    if (!task.wants_q()) return;
    double *const mixer = task.mixers + matrix * R * R;
    for (int e = threadIdx.x; e < R * R; e += kStackedThreads) {
        const int i = e / R, j = e % R;
        if (place[j] >= 0) mixer[(int64_t)i * R + place[j]] = i <= j && place[i] >= 0 ? N[j * gap + i] * scale[i] : 0;
        if (j >= *live) mixer[(int64_t)i * R + j] = 0;
    }
}

} // namespace

bool stacked_gram_fits(int64_t width) {
    return (fixed_of(width) + 2 * square_of(width)) * (int64_t)sizeof(double) <= limits().shared_bytes;
}

int64_t stacked_gram_bytes(int64_t width) {
    return (fixed_of(width) + (stacked_gram_fits(width) ? 2 * square_of(width) : 0)) * (int64_t)sizeof(double);
}

int64_t stacked_gram_size(int64_t width) { return stacked_gram_fits(width) ? 0 : 2 * square_of(width); }

void launch_stacked_gram(const StackedList &list, int64_t shared_bytes, void *stream) {
    launch(by_gram, dim3((unsigned)list.matrices), dim3(kStackedThreads), shared_bytes, stream, list.tasks, list.first,
           list.count);
}

} // namespace fedlora
