// SVD of small matrices: a thread each up to 8 x 8 (6 x 6 in float64), a part of a warp each above. Both read and write through
// shared memory, where matrices lie by columns.
#include "small_svd.cuh"

#include "completion.cuh"
#include "element.cuh"
#include "team_svd.cuh"
#include "thread_svd.cuh"

namespace fedlora {
namespace {

constexpr int kRawSweeps = 60;
constexpr int kBlock = 64;

// Blocks that a multiprocessor should hold: what the columns leave of its 64 K registers. Without them the compiler spills in
// order to fit in one more.
template <class T, int N>
constexpr int kThreadBlocks = 65536 / kBlock / (((2 * N * N + 7 * N) * (int)sizeof(T) / 4 + 56) / 8 * 8);
template <class T, int N>
constexpr int kTeamBlocks = 65536 / kBlock / ((4 * TeamSvd<T, N>::rows * (int)sizeof(T) / 4 + 104) / 8 * 8);

// The matrices of a group as columns at least as long as many: transposed where they are wide.
template <class T>
struct Columns {
    T *data;
    int64_t row, col, batch;
    int rows, cols;

    __device__ Columns(const fedlora_block &block, bool transposed)
        : data(reinterpret_cast<T *>(block.data)),
          row(transposed ? block.col_stride : block.row_stride),
          col(transposed ? block.row_stride : block.col_stride),
          batch(block.batch_stride),
          rows((int)(transposed ? block.cols : block.rows)),
          cols((int)(transposed ? block.rows : block.cols)) {}

    __device__ T &at(int64_t matrix, int i, int c) const { return data[matrix * batch + i * row + c * col]; }
    // Whether neighbours in memory are neighbours in a row.
    __device__ bool by_rows() const { return (col < 0 ? -col : col) <= (row < 0 ? -row : row); }
};

// X = C, or C^T where C is wide, and the columns of X J = (left) diag(s) and of J (right). Made where they are needed: they would
// take the registers of the iteration.
__device__ inline bool is_wide(const SvdGroup &group) { return group.C.rows < group.C.cols; }
template <class T>
__device__ Columns<const T> input_of(const SvdGroup &group) {
    return {group.C, is_wide(group)};
}
template <class T>
__device__ Columns<T> left_of(const SvdGroup &group) {
    return {is_wide(group) ? group.Vh : group.U, is_wide(group)};
}
template <class T>
__device__ Columns<T> right_of(const SvdGroup &group) {
    return {is_wide(group) ? group.U : group.Vh, !is_wide(group)};
}

// Elements first, first + pace, ... of `count` matrices of N x N in memory order: f(matrix, i, c) where there is an element.
template <int N, class T, class F>
__device__ void each_element(const Columns<T> &of, int count, int first, int pace, F &&f) {
    const bool by_rows = of.by_rows();
    for (int e = first; e < count * N * N; e += pace) {
        const int matrix = e / (N * N), slow = e % (N * N) / N, fast = e % N;
        const int i = by_rows ? slow : fast, c = by_rows ? fast : slow;
        if (i < of.rows && c < of.cols) f(matrix, i, c);
    }
}

// What is to be said of a matrix of which the iteration and its largest singular value are known.
template <class T, class Solver>
__device__ void write_codes(const SvdGroup &group, int64_t matrix, const Solver &solver, T largest) {
    const int trouble = (isinf(largest) ? FEDLORA_INFO_OVERFLOW : 0) | (solver.converged() ? 0 : FEDLORA_INFO_NOT_CONVERGED);
    *address<int32_t>(group.info, matrix) = solver.finite() ? trouble : FEDLORA_INFO_NONFINITE;
    *address<int32_t>(group.notes, matrix) = solver.zero() ? FEDLORA_NOTE_ZERO : 0;
}

template <class T>
__device__ void fill(T *values, int count, int first, int pace, T value) {
    for (int e = first; e < count; e += pace) values[e] = value;
}

template <class T>
__device__ T not_a_number() {
    return (T)nan("");
}

// Lengths without positive values at the end.
template <class T>
__device__ int rank_of(const T *values, int cols) {
    int rank = 0;
    while (rank < cols && values[rank] > T(0)) ++rank;
    return rank;
}

template <int N>
constexpr int kMatrixStep = N * N + N + (N * N + N + 1) % 2; // odd: threads meet no bank twice

// A thread per matrix. A block has its threads' matrices in shared memory, N x N each, then the values.
template <class T, int N>
__global__ void __launch_bounds__(kBlock, kThreadBlocks<T, N>) thread_svd(SvdList list, int max_sweeps) {
    FEDLORA_DYNAMIC_SHARED(T, shared);
    constexpr int step = kMatrixStep<N>;
    const int64_t g = group_of(list, blockIdx.x), begin = ((int64_t)blockIdx.x - list.first[g]) * kBlock;
    const SvdGroup &group = list.groups[g];
    const int me = (int)threadIdx.x, rows = input_of<T>(group).rows, cols = input_of<T>(group).cols;
    const int count = (int)(group.C.batch - begin < kBlock ? group.C.batch - begin : kBlock);
    T *const own = shared + me * step, *const values = own + N * N;
    const auto each = [&](const auto &of, auto &&f) {
        each_element<N>(of, count, me, kBlock, [&](int matrix, int i, int c) {
            if (is_active(group, begin + matrix)) f(of.at(begin + matrix, i, c), shared[matrix * step + c * N + i]);
        });
    };

    fill(own, step, 0, 1, T(0));
    __syncthreads();
    each(input_of<T>(group), [](const T &from, T &to) { to = from; });
    __syncthreads();

    ThreadSvd<T, N> solver;
    solver.load(own, cols);
    solver.iterate(max_sweeps);
    solver.finish(cols, is_wide(group));
    solver.put_values(values, cols);
    solver.put_x(own, cols);
    complete_columns<1>(own, N, rows, rank_of(values, cols), cols, 0, 0);
    for (int c = 0; c < cols; ++c) values[c] = scaled_by(values[c], solver.exponent());
    if (me < count && is_active(group, begin + me)) write_codes(group, begin + me, solver, values[0]);
    if (!solver.finite()) fill(own, step, 0, 1, not_a_number<T>());
    __syncthreads();
    each(left_of<T>(group), [](T &to, const T &from) { to = from; });
    const Columns<T> S(group.S, false);
    for (int e = me; e < count * N; e += kBlock)
        if (e % N < cols && is_active(group, begin + e / N)) S.at(begin + e / N, 0, e % N) = shared[e / N * step + N * N + e % N];
    __syncthreads();
    if (solver.finite()) solver.put_j(own, cols);
    __syncthreads();
    each(right_of<T>(group), [](T &to, const T &from) { to = from; });
}

// A team per matrix, its columns and values in shared memory.
template <class T, int N>
__global__ void __launch_bounds__(kBlock, kTeamBlocks<T, N>) team_svd(SvdList list, int max_sweeps) {
    FEDLORA_DYNAMIC_SHARED(T, shared);
    using Team = TeamSvd<T, N>;
    constexpr int step = Team::step, lanes = Team::lanes, teams = kBlock / lanes;
    const int64_t g = group_of(list, blockIdx.x);
    const SvdGroup &group = list.groups[g];
    const int team = (int)threadIdx.x / lanes, rows = input_of<T>(group).rows, cols = input_of<T>(group).cols;
    const int64_t matrix = ((int64_t)blockIdx.x - list.first[g]) * teams + team;
    const bool mine = matrix < group.C.batch && is_active(group, matrix);
    T *const own = shared + team * (N * step + N), *const values = own + N * step;

    Team solver;
    const int me = solver.lane();
    const auto each = [&](const auto &of, auto &&f) {
        if (mine) each_element<N>(of, 1, me, lanes, [&](int, int i, int c) { f(of.at(matrix, i, c), own[c * step + i]); });
    };
    fill(own, N * step, me, lanes, T(0));
    __syncwarp();
    each(input_of<T>(group), [](const T &from, T &to) { to = from; });
    __syncwarp();
    solver.load(own);
    solver.iterate(rows, max_sweeps, mine);
    solver.finish(cols, is_wide(group));
    __syncwarp();
    solver.put_x(own);
    solver.put_values(values);
    __syncwarp();
    const int rank = rank_of(values, cols);
    if (mine && rank < cols) complete_columns<lanes>(own, step, rows, rank, cols, me, solver.mask());
    __syncwarp();
    const bool finite = solver.finite();
    const auto answer = [finite](T &to, const T &from) { to = finite ? from : not_a_number<T>(); };
    each(left_of<T>(group), answer);
    const Columns<T> S(group.S, false);
    for (int c = me; mine && c < cols; c += lanes) answer(S.at(matrix, 0, c), scaled_by(values[c], solver.exponent()));
    if (mine && me == 0) write_codes(group, matrix, solver, scaled_by(values[0], solver.exponent()));
    __syncwarp();
    solver.put_j(own);
    __syncwarp();
    each(right_of<T>(group), answer);
}

} // namespace

// A kernel for matrices of up to `side` rows and columns, its matrices in a block of 64 threads, and the shared memory of that.
struct SmallScheme {
    int64_t dtype, side;
    void (*kernel)(SvdList, int);
    int64_t matrices, shared_bytes;
};

namespace {

template <class T>
constexpr int64_t kDtype = sizeof(T) == 4 ? FEDLORA_FLOAT32 : FEDLORA_FLOAT64;

template <class T, int N>
constexpr SmallScheme by_thread() {
    return {kDtype<T>, N, thread_svd<T, N>, kBlock, (int64_t)sizeof(T) * kBlock * kMatrixStep<N>};
}

template <class T, int N>
constexpr SmallScheme by_team() {
    constexpr int64_t teams = kBlock / TeamSvd<T, N>::lanes;
    return {kDtype<T>, N, team_svd<T, N>, teams, (int64_t)sizeof(T) * teams * N * (TeamSvd<T, N>::step + 1)};
}

// By size for each dtype: the first that is large enough takes a matrix. 7 x 7 in float64 does not fit the registers of a thread.
const SmallScheme kSchemes[] = {
    by_thread<float, 2>(), by_thread<float, 3>(), by_thread<float, 4>(), by_thread<float, 5>(), by_thread<float, 6>(),
    by_thread<float, 7>(), by_thread<float, 8>(), by_team<float, 16>(), by_team<float, 32>(),
    by_thread<double, 2>(), by_thread<double, 3>(), by_thread<double, 4>(), by_thread<double, 5>(), by_thread<double, 6>(),
    by_team<double, 8>(), by_team<double, 16>(), by_team<double, 32>(),
};

const SmallScheme &scheme_of(const fedlora_block &C) {
    const int64_t side = C.rows > C.cols ? C.rows : C.cols;
    const SmallScheme *scheme = kSchemes;
    while (scheme->dtype != C.dtype || scheme->side < side) ++scheme;
    return *scheme;
}

} // namespace

SmallSvd::SmallSvd(const std::vector<SvdGroup> &groups, Workspace &, Upload &upload) {
    for (const SmallScheme &scheme : kSchemes) {
        std::vector<SvdGroup> members;
        std::vector<int64_t> first = {0};
        for (const SvdGroup &group : groups)
            if (&scheme_of(group.C) == &scheme) {
                members.push_back(group);
                first.push_back(first.back() + (group.C.batch + scheme.matrices - 1) / scheme.matrices);
            }
        if (!members.empty()) shares_.push_back({&scheme, upload_groups(upload, members, first), first.back()});
    }
}

void SmallSvd::launch(int64_t max_sweeps, void *stream) const {
    const int guard = max_sweeps > 0 ? (int)max_sweeps : kRawSweeps;
    for (const Share &share : shares_) {
        const SmallScheme &scheme = *share.scheme;
        const dim3 grid((unsigned)share.blocks);
        fedlora::launch(scheme.kernel, grid, dim3(kBlock), scheme.shared_bytes, stream, share.list, guard);
    }
}

} // namespace fedlora
