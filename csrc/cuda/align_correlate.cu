// Correlations of pairs with their references up to rank 32, a block of threads per pair: one read of both, powers of two taken
// out, terms weighed against each other.
#include "align.cuh"

#include <algorithm>

#include "slots.cuh"
#include "tile.cuh"

namespace fedlora {
namespace {

constexpr int kLine = kTurnTile + 4;

// Shared memory for pairs of a rank up to N: tiles of both sides of a term, then the sums of the warps, then the products of the
// terms.
template <int N, class Number>
struct CorrelationShape {
    using T = Number; // that tiles are kept in
    static constexpr int kRank = N, kColumns = N < 16 ? 16 : N, kProduct = N * N;
    static constexpr int64_t kTiles = 2 * kColumns * kLine * sizeof(T), kSums = 8 * kTurnWarps * kProduct;
    static constexpr int64_t kProducts = std::max(kTiles, kSums), kBytes = kProducts + 2 * 8 * kProduct;
    static_assert(kProducts % 16 == 0, "products lie where numbers of float64 may");
};

// The largest over the block, the same in all threads.
__device__ double largest_of_block(double x, double *room) {
    for (int o = kWarp / 2; o > 0; o /= 2) x = fmax(x, __shfl_xor_sync(kAllLanes, x, o));
    __syncthreads();
    if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = x;
    __syncthreads();
    for (int w = 0; w < kTurnWarps; ++w) x = fmax(x, room[w]);
    return x;
}

// The sum over the block in a fixed order, the same in all threads.
__device__ double sum_of_block(double x, double *room) {
    for (int o = kWarp / 2; o > 0; o /= 2) x += __shfl_xor_sync(kAllLanes, x, o);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = x;
    __syncthreads();
    double sum = 0.0;
    for (int w = 0; w < kTurnWarps; ++w) sum += room[w];
    return sum;
}

// Exponent of the largest finite number of float64, whose squares may leave the range; 0 for all else.
__device__ int exponent_to_take(const fedlora_block &b, int64_t matrix, double *room) {
    if (b.dtype != FEDLORA_FLOAT64) return 0;
    double largest = 0.0;
    for_numbers(b, matrix, [&](double x) { largest = is_finite(x) ? fmax(largest, fabs(x)) : largest; });
    return exponent_above(largest_of_block(largest, room));
}

// Some rows, by columns, times 2^-exponent.
template <class T>
__device__ void fetch_tile(const fedlora_block &b, int64_t matrix, int64_t first, int rows, int exponent, T *tile) {
    with_float(b.dtype, [&](auto kind) {
        using S = decltype(kind);
        for_quads(b, rows, (int)b.cols, [&](int row, int column, int64_t along, int count, bool down) {
            Four four;
            load_four(four, element<S>(b, matrix, first + row, column), along, count);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                S x;
                take(four, i, x);
                const double number = exponent ? scaled_by(widen(x), -exponent) : widen(x);
                if (i < count) tile[(column + (down ? 0 : i)) * kLine + row + (down ? i : 0)] = (T)number;
            }
        });
    });
}

// product = X^T Y without its powers of two; |X| |Y| without them, the same in all threads.
template <class Shape>
__device__ double correlate(const AlignTerm &term, int64_t matrix, const int (&exponents)[2], unsigned char *work, double *product,
                            double *room) {
    using T = typename Shape::T;
    constexpr int N = Shape::kRank;
    T *const left = reinterpret_cast<T *>(work), *const right = left + Shape::kColumns * kLine;
    const int r = (int)term.X.cols, thread = (int)threadIdx.x, warp = thread / kWarp;
    double c[Shape::kColumns / 16][N / 8][4] = {}, squares[2] = {0.0, 0.0};
    for (int64_t first = 0; first < term.X.rows; first += kTurnTile) {
        const int rows = (int)min(term.X.rows - first, (int64_t)kTurnTile);
        __syncthreads();
        if (first == 0 || rows < kTurnTile) {
            for (int e = thread; e < 2 * Shape::kColumns * kLine; e += kTurnThreads) left[e] = 0;
            __syncthreads();
        }
        fetch_tile(term.X, matrix, first, rows, exponents[0], left);
        fetch_tile(term.Y, matrix, first, rows, exponents[1], right);
        __syncthreads();
        for (int column = 0; column < r; ++column) {
            const double x = left[column * kLine + thread], y = right[column * kLine + thread];
            squares[0] += x * x;
            squares[1] += y * y;
        }
#pragma unroll 1
        for (int step = 0; step < kTurnTile / kTurnWarps / 8; ++step) {
            const int begin = kTurnTile / kTurnWarps * warp + 8 * step;
            multiply<2>(
                c, [&](int i, int k) { return (double)left[i * kLine + begin + k]; },
                [&](int k, int j) { return (double)right[j * kLine + begin + k]; });
        }
    }
    __syncthreads();
    double *const parts = reinterpret_cast<double *>(work);
    const LaneOfTile at;
#pragma unroll
    for (int m = 0; m < Shape::kColumns / 16; ++m)
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (16 * m + at.row(e) < N) parts[(warp * N + 16 * m + at.row(e)) * N + 8 * n + at.col(e)] = c[m][n][e];
    __syncthreads();
    for (int e = thread; e < N * N; e += kTurnThreads) {
        double sum = 0.0;
        for (int w = 0; w < kTurnWarps; ++w) sum += parts[w * N * N + e];
        product[e] = sum;
    }
    const double of_X = sum_of_block(squares[0], room), of_Y = sum_of_block(squares[1], room);
    return sqrt(of_X) * sqrt(of_Y);
}

// wide: some of the group is float64, and shared memory is as large as that takes.
template <int N>
__global__ void __launch_bounds__(kTurnThreads, 3) correlate_pairs(const AlignStep *steps, const int64_t *first, int64_t count, bool wide) {
    using Narrow = CorrelationShape<N, float>;
    using Wide = CorrelationShape<N, double>;
    FEDLORA_DYNAMIC_SHARED(unsigned char, work);
    __shared__ double room[kTurnWarps];
    double *const products = reinterpret_cast<double *>(work + (wide ? Wide::kProducts : Narrow::kProducts));
    const int64_t slot = blockIdx.x, g = slot_group(first, count, slot), matrix = slot - first[g];
    const AlignStep &step = steps[g];
    const AlignGroup &group = step.group;
    const int r = (int)group.rank();
    double sizes[2] = {0.0, 0.0};
    int powers[2] = {0, 0};
#pragma unroll
    for (int t = 0; t < 2; ++t) {
        if (t >= group.count) continue;
        const AlignTerm &term = group.terms[t];
        const int exponents[2] = {exponent_to_take(term.X, matrix, room), exponent_to_take(term.Y, matrix, room)};
        sizes[t] = wide ? correlate<Wide>(term, matrix, exponents, work, products + t * N * N, room)
                        : correlate<Narrow>(term, matrix, exponents, work, products + t * N * N, room);
        powers[t] = exponents[0] + exponents[1];
    }
    __syncthreads();
    const AlignScales scales = align_scales(group, sizes, powers);
    double *const M = address<double>(step.products[0], matrix);
    for (int e = (int)threadIdx.x; e < r * r; e += kTurnThreads) {
        const int at = e / r * N + e % r;
        double sum = scales.weights[0] * products[at];
        if (group.count > 1) sum += scales.weights[1] * products[N * N + at];
        M[e] = sum;
    }
    if (threadIdx.x == 0) settle_scales(step, matrix, scales);
}

bool is_wide(const AlignGroup &group) {
    bool wide = false;
    for (int t = 0; t < group.count; ++t)
        wide |= group.terms[t].X.dtype == FEDLORA_FLOAT64 || group.terms[t].Y.dtype == FEDLORA_FLOAT64;
    return wide;
}

struct Kernel {
    int64_t rank; // up to this one
    void (*run)(const AlignStep *, const int64_t *, int64_t, bool);
    int64_t bytes[2]; // without and with float64
};

template <int N>
constexpr Kernel kernel_up_to() {
    return {N, correlate_pairs<N>, {CorrelationShape<N, float>::kBytes, CorrelationShape<N, double>::kBytes}};
}

const Kernel kKernels[] = {kernel_up_to<8>(), kernel_up_to<16>(), kernel_up_to<32>()};

const Kernel &kernel_of(const AlignGroup &group) {
    const Kernel *kernel = kKernels;
    while (kernel->rank < group.rank()) ++kernel;
    return *kernel;
}

} // namespace

Correlations::Correlations(const std::vector<AlignStep> &steps, Upload &upload) {
    for (const Kernel &kernel : kKernels)
        for (const bool wide : {false, true}) {
            std::vector<AlignStep> members;
            std::vector<int64_t> first = {0};
            for (const AlignStep &step : steps)
                if (step.group.rank() <= kCorrelatedMax && &kernel_of(step.group) == &kernel && is_wide(step.group) == wide) {
                    members.push_back(step);
                    first.push_back(first.back() + step.group.batch());
                }
            if (members.empty()) continue;
            shares_.push_back({kernel.run, wide, kernel.bytes[wide], upload.add(members), upload.add(first), (int64_t)members.size(), first.back()});
        }
}

void Correlations::launch(void *stream) const {
    for (const Share &share : shares_)
        fedlora::launch(share.kernel, dim3((unsigned)share.pairs), dim3(kTurnThreads), share.bytes, stream, share.steps, share.first,
                        share.count, share.wide);
}

} // namespace fedlora
