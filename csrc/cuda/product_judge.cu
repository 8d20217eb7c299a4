// Cores, and what follows from their singular values: rank, certificate, coefficients of left and right (docs/numerics.md, One pass).
#include "product_state.cuh"
#include "slots.cuh"
#include "tile.cuh"

namespace fedlora {
namespace {

constexpr int kDepth = 16, kLine = kProductTile + 4;
constexpr int kTilesN = 4;                   // a warp has 16 x 32 of a tile
constexpr double kRoundoff = 0x1p-53;

// sum += the tile of X^T Y over `depth` rows, with values left(row of the tile, k) and right(k, column of the tile), where a neighbour in
// memory is the next row (kDown) or the next k; right has the next k. By all threads of a block.
template <bool kDown, class Left, class Right>
__device__ void product_tile(double (&sum)[1][kTilesN][4], int64_t depth, double *shared, const Left &left, const Right &right) {
    double *const own = shared, *const other = shared + kDepth * kLine;
    const int warp = (int)threadIdx.x / kWarp, top = warp % 4 * 16, side = warp / 4 * 32;
    for (int64_t begin = 0; begin < depth; begin += kDepth) {
        for (int n = threadIdx.x; n < kProductTile * kDepth; n += kProductThreads) {
            const int row = kDown ? n % kProductTile : n / kDepth, k = kDown ? n / kProductTile : n % kDepth;
            own[k * kLine + row] = begin + k < depth ? left(row, begin + k) : 0;
            other[n % kDepth * kLine + n / kDepth] = begin + n % kDepth < depth ? right(begin + n % kDepth, n / kDepth) : 0;
        }
        __syncthreads();
        multiply<kDepth / 4>(
            sum, [&](int row, int k) { return own[k * kLine + top + row]; },
            [&](int k, int column) { return other[k * kLine + side + column]; });
        __syncthreads();
    }
}

// Calls f(row, column, value) for every number of the tile.
template <class F>
__device__ void each_of_tile(const double (&sum)[1][kTilesN][4], const F &f) {
    const LaneOfTile lane;
    const int warp = (int)threadIdx.x / kWarp, top = warp % 4 * 16, side = warp / 4 * 32;
#pragma unroll
    for (int n = 0; n < kTilesN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) f(top + lane.row(e), side + 8 * n + lane.col(e), sum[0][n][e]);
}

__global__ void __launch_bounds__(kProductThreads, 1) core_tiles(ProductList list, int64_t pass) {
    __shared__ double shared[2 * kDepth * kLine];
    const int64_t g = slot_group(list.first, list.count, blockIdx.x);
    const ProductGroup &group = list.groups[g];
    const int64_t R = group.R, across = (R + kProductTile - 1) / kProductTile, item = (int64_t)blockIdx.x - list.first[g];
    const int64_t at = item / (across * across), top = item / across % across * kProductTile, side = item % across * kProductTile;
    if (pass == 2 && !group.again[at]) return;
    const int64_t rows = group.rows(kB, pass), cols = group.rows(kA, pass);
    if (top >= rows || side >= cols) return;
    const double *const B = pass == 1 ? group.F[kB] + at * R * R : group.G[kB] + at * group.step;
    const double *const A = pass == 1 ? group.F[kA] + at * R * R : group.G[kA] + at * group.step;
    double *const C = group.C + at * R * R;
    double sum[1][kTilesN][4] = {};
    product_tile<false>(
        sum, R, shared, [&](int row, int64_t k) { return top + row < rows ? B[(top + row) * R + k] : 0; },
        [&](int64_t k, int column) { return side + column < cols ? A[(side + column) * R + k] : 0; });
    each_of_tile(sum, [&](int row, int column, double x) {
        if (top + row < rows && side + column < cols) C[(top + row) * R + side + column] = x;
    });
}

// What one thread finds for its whole block.
struct Verdict {
    Certificate found;
    int64_t rank; // columns to form; kNone for a matrix with NaN or Inf
    bool bad;
};
constexpr int64_t kNone = -1;

__device__ Verdict judge(const ProductGroup &group, const ProductFacts &facts, const double *s, const ProductWish &wish, int64_t pass,
                         Spectrum &known) {
    const double norm = sqrt(facts.bound[kB] * facts.bound[kA]), floor = 4 * (double)facts.live * kRoundoff * norm;
    known = {s, group.least(), facts.live, group.R, facts.energy, facts.energy_abs, floor, norm, facts.e, pass == 2};
    if (pass == 2) { // |C|^2, which no cancellation has touched
        known.energy = 0;
        for (int64_t i = 0; i < known.count; ++i) known.energy += s[i] * s[i];
    }
    Verdict verdict = {certify(known, wish.rule, group.rho_max), 0, facts.bad != 0};
    if (!verdict.found.doubtful) verdict.rank = spectrum::smaller(verdict.found.rank, group.room);
    if (verdict.bad) verdict.rank = kNone;
    return verdict;
}

// Everything but the factors, by the first block of a matrix. The overflow of a factor joins the info when it is known.
__device__ void report(const ProductGroup &group, int64_t at, const ProductFacts &facts, const Spectrum &known, const Verdict &verdict,
                       int64_t pass) {
    const Certificate &c = verdict.found;
    double *const S = address<double>(group.S, at);
    const int64_t kept = spectrum::smaller(c.rank, known.count);
    bool overflow = false;
    for (int64_t j = threadIdx.x; j < group.room; j += kProductThreads) {
        const double x = verdict.bad ? NAN : j < kept ? scale_pow2(known.s[j], known.e) : 0;
        overflow |= isinf(x);
        S[j * group.S.col_stride] = x;
    }
    const int beyond = __syncthreads_or(overflow);
    if (threadIdx.x) return;
    if (pass == 1) {
        const bool again = c.doubtful && !verdict.bad;
        group.again[at] = again;
        group.ranks[1][at] = 0;
    }
    group.ranks[pass - 1][at] = (int32_t)verdict.rank;
    const double told[FEDLORA_PRODUCT_VALUES] = {scale_pow2(known.energy, 2 * known.e),
                                                 c.error,
                                                 c.error_bound,
                                                 c.rho,
                                                 c.sigma_err,
                                                 scale_pow2(known.energy_abs, 2 * known.e),
                                                 known.energy_abs,
                                                 known.norm,
                                                 known.floor};
    double *const values = address<double>(group.values, at);
#pragma unroll
    for (int v = 0; v < FEDLORA_PRODUCT_VALUES; ++v) values[v * group.values.row_stride] = verdict.bad ? NAN : told[v];
    const int64_t info = verdict.bad ? FEDLORA_INFO_NONFINITE : group.svd_info[at] | (beyond ? FEDLORA_INFO_OVERFLOW : 0);
    const int64_t codes[FEDLORA_PRODUCT_CODES] = {c.rank, c.numerical_rank, pass, info, info ? 0 : c.notes, 0};
    int32_t *const out = address<int32_t>(group.codes, at);
#pragma unroll
    for (int v = 0; v < FEDLORA_PRODUCT_CODES; ++v)
        out[v * group.codes.row_stride] = verdict.bad && v != 3 ? 0 : (int32_t)codes[v];
}

__global__ void __launch_bounds__(kProductThreads, 1) coefficients(ProductList list, ProductWish wish, int64_t pass) {
    __shared__ double shared[2 * kDepth * kLine], s[FEDLORA_PRODUCT_SVD_MAX];
    __shared__ Verdict verdict;
    __shared__ Spectrum known;
    const int64_t g = slot_group(list.first, list.count, blockIdx.x);
    const ProductGroup &group = list.groups[g];
    const int64_t R = group.R, room = group.room, most = spectrum::smaller(group.least(), room);
    const int64_t down = (R + kProductTile - 1) / kProductTile, across = (most + kProductTile - 1) / kProductTile;
    const int64_t item = (int64_t)blockIdx.x - list.first[g], tile = item % (2 * down * across), at = item / (2 * down * across);
    const int side = (int)(tile / (down * across)), other = 1 - side;
    const int64_t top = tile / across % down * kProductTile, begin = tile % across * kProductTile;
    if (pass == 2 && !group.again[at]) return;
    const ProductFacts &facts = group.facts[at];
    for (int64_t i = threadIdx.x; i < group.least(); i += kProductThreads) s[i] = group.s[at * R + i];
    __syncthreads();
    if (threadIdx.x == 0) verdict = judge(group, facts, s, wish, pass, known);
    __syncthreads();
    if (tile == 0) report(group, at, facts, known, verdict, pass);
    const int64_t p = verdict.rank;
    if (begin >= p) return;

    const double power = side == kB ? wish.powers[kB] : wish.powers[kA];
    const int64_t e = (int64_t)((double)known.e * power);
    const double one = pow2(e >> 1), two = pow2(e - (e >> 1));
    double *const K = group.G[side] + at * group.step;
    if (pass == 2) { // the factors are orthogonal already, and want their singular values alone
        for (int n = threadIdx.x; n < kProductTile * kProductTile; n += kProductThreads) {
            const int64_t i = top + n / kProductTile, j = begin + n % kProductTile;
            if (i >= most || j >= p) continue;
            const double factor = i != j ? 0 : power == 0 ? 1 : power == 1 ? s[j] : sqrt(s[j]);
            K[i * room + j] = factor * one * two;
        }
        return;
    }
    const double *const F = group.F[other] + at * R * R, *const W = group.W[other] + at * R * R; // U = B F_A^T V S^-1
    double sum[1][kTilesN][4] = {};
    product_tile<true>(
        sum, facts.rank[other], shared, [&](int row, int64_t k) { return top + row < R ? F[k * R + top + row] : 0; },
        [&](int64_t k, int column) { return begin + column < p ? W[(begin + column) * R + k] : 0; });
    each_of_tile(sum, [&](int row, int column, double x) {
        const int64_t i = top + row, j = begin + column;
        if (i >= R || j >= p) return;
        const double factor = power == 0 ? 1 / s[j] : power == 1 ? 1 : 1 / sqrt(s[j]);
        K[i * room + j] = group.gauge[side][at * R + i] * x * factor * one * two;
    });
}

} // namespace

void multiply_cores(const ProductList &list, int64_t pass, void *stream) {
    launch(core_tiles, dim3((unsigned)list.blocks), dim3(kProductThreads), 0, stream, list, pass);
}

void judge_products(const ProductList &list, const ProductWish &wish, int64_t pass, void *stream) {
    launch(coefficients, dim3((unsigned)list.blocks), dim3(kProductThreads), 0, stream, list, wish, pass);
}

} // namespace fedlora
