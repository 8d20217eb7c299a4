// From two Grams to their Cholesky factors: weights, balancing, energies and norms (docs/numerics.md, Balancing, Pivoted Cholesky).
#include <cfloat>

#include "cholesky.cuh"
#include "product_state.cuh"
#include "slots.cuh"

namespace fedlora {
namespace {

constexpr int kWarps = kCholeskyThreads / kWarp;

template <class T>
__device__ T over_warp(T x, T (*join)(T, T)) {
    for (int step = kWarp / 2; step > 0; step /= 2) x = join(x, __shfl_xor_sync(kAllLanes, x, step));
    return x;
}

__device__ int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
__device__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ double sum_of(double a, double b) { return a + b; }
__device__ double greater(double a, double b) { return a > b ? a : b; }

// Columns of one update, in shared memory: their weights, and the powers of two that balance B and A; 0 for those without a part in it.
struct Columns {
    int64_t R;
    double *om, *gauges;
    __device__ double *d(int side) const { return gauges + side * R; }
};

// What a block finds; bound and rank are those of its side.
struct Found {
    int64_t e, live;
    double energy, energy_abs, bound;
    int rank;
    bool bad;
};

// What the scale of a column of B, or of a row of A, takes away.
__device__ int64_t taken(const ProductGroup &group, int64_t at, int side, int64_t column) {
    return group.exponents[side] ? group.exponents[side][at * group.R + column] : 0;
}

__device__ int64_t exponent_at(const ProductGroup &group, int64_t at, int64_t column) {
    return taken(group, at, kB, column) + taken(group, at, kA, column);
}

__device__ double weight_at(const ProductGroup &group, int64_t at, int64_t column) {
    return group.weights[at * group.clients + group.client[column]];
}

// Every warp looks at all columns, so that all know of all without waiting; each writes down its own.
__device__ void balance_columns(const ProductGroup &group, int64_t at, int side, const Columns &columns, Found &found) {
    const int warp = (int)threadIdx.x / kWarp, lane = (int)threadIdx.x % kWarp;
    const int64_t R = group.R;
    int64_t e = INT64_MIN;
    for (int64_t j = lane; j < R; j += kWarp) e = larger(e, exponent_at(group, at, j) + exponent_of(weight_at(group, at, j)));
    e = over_warp(e, larger);
    e += e & 1; // even, so that its root is a power of two
    bool bad = false;
    int64_t live = 0;
    for (int64_t begin = 0; begin < R; begin += kWarp) {
        const int64_t j = begin + lane;
        bool lives = false;
        if (j < R) {
            const double om = scale_pow2(weight_at(group, at, j), exponent_at(group, at, j) - e);
            const double b = group.G[kB][at * group.step + j * (R + 1)], a = group.G[kA][at * group.step + j * (R + 1)] * (om * om);
            bad |= !(fabs(b) <= DBL_MAX && fabs(a) <= DBL_MAX);
            lives = b > 0 && a > 0;
            // Ties go up, not to even: then scaling B by a power of four shifts every exponent alike and no bit changes.
            int64_t shift = lives ? (exponent_of(a) - exponent_of(b) + 2) >> 2 : 0;
            shift = smaller(shift, 1022 + taken(group, at, kB, j)); // scale and gauge together stay in range
            shift = larger(shift, exponent_of(om) - taken(group, at, kA, j) - 1021);
            if (begin / kWarp % kWarps == warp) {
                columns.om[j] = om;
                columns.d(kB)[j] = lives ? pow2(shift) : 0;
                columns.d(kA)[j] = lives ? pow2(-shift) : 0;
                const double gauge = !lives ? 0 : side == kB ? pow2(shift) : om * pow2(-shift);
                group.gauge[side][at * R + j] = gauge;
                group.stretch[side][at * R + j] = group.scale[side] ? group.scale[side][at * R + j] * gauge : gauge;
                if (side == kB) address<double>(group.balance, at)[j * group.balance.col_stride] = pow2(shift);
            }
        }
        live += __popc(__ballot_sync(kAllLanes, lives));
    }
    found.e = e;
    found.bad = __any_sync(kAllLanes, bad);
    found.live = found.bad ? 0 : live;
}

// The balanced Gram of a side goes to `out`; energies are those of both, answered for side B alone. Sums are those of a warp over the rows
// that it takes, then of the warps. All of `out` is there for all threads.
__device__ void balance_gram(const ProductGroup &group, int64_t at, int side, const Columns &columns, double *out, double (*sums)[4],
                             Found &found) {
    const int warp = (int)threadIdx.x / kWarp, lane = (int)threadIdx.x % kWarp;
    const int64_t R = group.R;
    const double *const own = group.G[side] + at * group.step, *const other = group.G[1 - side] + at * group.step;
    const auto balanced = [&](const double *G, int which, int64_t i, int64_t j) {
        const double weight = which == kA ? columns.om[i] * columns.om[j] : 1;
        return G[i * R + j] * weight * columns.d(which)[i] * columns.d(which)[j];
    };
    double most = 0, squares = 0, energy = 0, energy_abs = 0;
    for (int64_t i = warp; i < R; i += kWarps) {
        double row = 0;
        for (int64_t j = lane; j < R; j += kWarp) {
            const double x = balanced(own, side, i, j);
            out[i * R + j] = x;
            row += fabs(x);
            squares += x * x;
            if (side == kB) {
                const double product = x * balanced(other, kA, i, j);
                energy += product;
                energy_abs += fabs(product);
            }
        }
        most = greater(most, over_warp(row, sum_of));
    }
    squares = over_warp(squares, sum_of);
    energy = over_warp(energy, sum_of);
    energy_abs = over_warp(energy_abs, sum_of);
    if (lane == 0) {
        sums[warp][0] = most;
        sums[warp][1] = squares;
        sums[warp][2] = energy;
        sums[warp][3] = energy_abs;
    }
    __syncthreads();
    for (int w = 1; w < kWarps && threadIdx.x == 0; ++w) {
        most = greater(most, sums[w][0]);
        squares += sums[w][1];
        energy += sums[w][2];
        energy_abs += sums[w][3];
    }
    const double frobenius = sqrt(squares); // of the first thread alone, as all of these
    found.bound = most < frobenius ? most : frobenius;
    found.energy = energy;
    found.energy_abs = energy_abs;
}

__global__ void __launch_bounds__(kCholeskyThreads) weigh(ProductList list) {
    FEDLORA_DYNAMIC_SHARED(double, shared);
    __shared__ double sums[kWarps][4];
    const int64_t g = slot_group(list.first, list.count, blockIdx.x), item = (int64_t)blockIdx.x - list.first[g];
    const int64_t at = item / 2;
    const int side = (int)(item % 2);
    const ProductGroup &group = list.groups[g];
    const int64_t R = group.R;
    double *const left = group.left[side] ? group.left[side] + at * R * R : shared;
    double *const beside = group.left[side] ? shared : shared + R * R;
    double *const F = group.F[side] + at * R * R;
    const Columns columns = {R, beside, beside + R};
    Found found = {};
    balance_columns(group, at, side, columns, found);
    __syncthreads();
    if (found.live > 0) {
        balance_gram(group, at, side, columns, left, sums, found); // after which nobody needs the columns
        found.rank = pivoted_cholesky(left, R, (int)R, (double)found.live, beside, F, 1, R);
    } else {
        for (int64_t n = threadIdx.x; n < R * R; n += blockDim.x) F[n] = 0;
    }
    if (threadIdx.x) return;
    ProductFacts &facts = group.facts[at];
    facts.bound[side] = found.bound;
    facts.rank[side] = found.rank;
    if (side == kA) return;
    facts.e = found.e;
    facts.live = found.live;
    facts.bad = found.bad;
    facts.energy = found.energy;
    facts.energy_abs = found.energy_abs;
}

} // namespace

void weigh_products(const ProductList &list, int64_t shared_bytes, void *stream) {
    launch(weigh, dim3((unsigned)list.blocks), dim3(kCholeskyThreads), shared_bytes, stream, list);
}

} // namespace fedlora
