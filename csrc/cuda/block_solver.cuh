// One matrix after the other in one block of threads (docs/numerics.md, Core SVD).
//
// X = C, or C^T where C is wide, scaled by a power of two:
//
//   X P = Q T          Householder with column pivoting; Q is never formed
//   T^T J = Z diag(s)  one-sided Jacobi; J is never formed
//   V = P Z            and X V = U R, Householder without pivoting, columns by falling s: R is diag(s) up to rounding
//
// U is orthogonal to rounding however small its singular value, and what the columns of X V lack in orthogonality falls on
// those of smaller s, where it weighs nothing. The rows of T^T carry the scales of the columns of X, and rotations from
// the right keep errors within rows: that is why small singular values come out relatively accurate.
#pragma once

#include "block_jacobi.cuh"
#include "block_problem.cuh"

namespace fedlora::block {

// Calls f with a number of elements that is enough for a lane of a warp that holds so many rows, as an integral constant up to `most`.
template <int CH>
struct Chunks {
    static constexpr int value = CH;
};
template <int most, int CH = 2, class F>
__device__ __forceinline__ void with_chunks(int rows, const F &f) {
    constexpr int next = CH < 4 ? CH + 1 : CH < 8 ? CH + 2 : 2 * CH;
    if constexpr (next <= most) {
        if (rows > CH * kWarp) return with_chunks<most, next>(rows, f);
    }
    f(Chunks<CH>{});
}

// Of T^T as many columns as are not zero, in the scratch of V.
template <class T, bool kShared>
__device__ __forceinline__ int eliminate(const BlockProblem<T, kShared> &p) {
    const Team team;
    const int kept = pivoted_qr(p.W(), p.rows, p.cols, p.order(), p.starts());
    for (int r = team.warp; r < kept; r += team.warps)
        for (int c = team.lane; c < p.cols; c += kWarp) p.V()[r][c] = c < r ? T(0) : c == r ? p.starts()[r] : p.W()[p.order()[c]][r];
    __syncthreads();
    return kept;
}

// Z diag(s) in Y, squares of s; those from `kept` on are zero. Whether it came to rest.
template <int kCols, class T, bool kShared>
__device__ __forceinline__ bool iterate(const BlockProblem<T, kShared> &p, int kept, int max_sweeps) {
    bool converged = false;
    if (p.whole()) {
        copy_columns(p.V(), p.Y(), p.cols, kept);
        __syncthreads();
    }
    with_chunks<kCols>(p.cols, [&](auto chunks) {
        constexpr int CH = decltype(chunks)::value;
        Jacobi<CH, T> jacobi(p.cols, kept, p.squares(), p.starts());
        if (p.whole())
            converged = jacobi.iterate(p.Y(), max_sweeps);
        else if constexpr (!kShared)
            converged = jacobi.iterate(p.V(), p.room(), p.panel, max_sweeps);
    });
    for (int c = kept + (int)threadIdx.x; c < p.cols; c += (int)blockDim.x) p.squares()[c] = T(0);
    __syncthreads();
    return converged;
}

// Values and their order: place[c] is the column of Z that comes c-th, equal ones in the order they have. How many are not zero.
template <class T, bool kShared>
__device__ __forceinline__ int sort(const BlockProblem<T, kShared> &p) {
    int rank = 0;
    for (int c = (int)threadIdx.x; c < p.cols; c += (int)blockDim.x) {
        const T square = p.squares()[c];
        int before = 0;
        for (int o = 0; o < p.cols; ++o) before += p.squares()[o] > square || (p.squares()[o] == square && o < c);
        p.place()[before] = c;
    }
    for (int c = 0; c < p.cols; ++c) rank += p.squares()[c] > T(0);
    __syncthreads();
    for (int c = (int)threadIdx.x; c < p.cols; c += (int)blockDim.x) p.squares()[c] = sqrt(p.squares()[c]);
    __syncthreads();
    return rank;
}

// V = P Z in its scratch, `rank` columns by falling value; by way of other scratch, as Z may lie there.
template <class T, bool kShared>
__device__ __forceinline__ void form_right(const BlockProblem<T, kShared> &p, int rank) {
    const Team team;
    const Columns<T> to = {p.product().data, p.cols};
    for (int c = team.warp; c < rank; c += team.warps) {
        const T *const z = p.whole() ? p.Y()[p.place()[c]] : p.V()[p.place()[c]];
        const T value = p.squares()[p.place()[c]];
        for (int i = team.lane; i < p.cols; i += kWarp) to[c][p.order()[i]] = z[i] / value;
    }
    __syncthreads();
    copy_columns(to, p.V(), p.cols, rank);
    __syncthreads();
}

// Orthonormal columns from `rank` on beside the first ones of V.
template <class T, bool kShared>
__device__ __forceinline__ void complete_right(const BlockProblem<T, kShared> &p, int rank) {
    const Team team;
    copy_columns(p.V(), p.W(), p.cols, rank);
    __syncthreads();
    plain_qr(p.W(), p.cols, rank, p.starts(), p.turned());
    for (int c = rank + team.warp; c < p.cols; c += team.warps) {
        T *const column[1] = {p.V()[c]};
        for (int i = team.lane; i < p.cols; i += kWarp) column[0][i] = i == c ? T(1) : T(0);
        for (int k = rank - 1; k >= 0; --k) {
            __syncwarp();
            reflect<1, false>(p.W()[k], {p.W()[k][k], p.starts()[k], T(0)}, k, p.cols, column, team.lane);
        }
    }
    __syncthreads();
}

// 1 or -1, the same in all lanes: what makes the first nearly largest element positive; at(i) are those of this lane, i * 32 + lane.
template <int CH, class T, class F>
__device__ __forceinline__ T sign_of(int rows, int lane, const F &at) {
    T most = 0;
#pragma unroll
    for (int i = 0; i < CH; ++i)
        if (i * kWarp + lane < rows) most = larger<T>(fabs(at(i)), most);
    const T bound = warp_largest(most) * kNearly<T>;
    int first = INT_MAX;
    bool negative = false;
#pragma unroll
    for (int i = CH - 1; i >= 0; --i)
        if (i * kWarp + lane < rows && fabs(at(i)) >= bound) {
            first = i * kWarp + lane;
            negative = at(i) < T(0);
        }
    const int row = (int)__reduce_min_sync(kAllLanes, first);
    return __any_sync(kAllLanes, first == row && negative) ? T(-1) : T(1);
}

template <int kCols, class T, bool kShared>
__device__ __forceinline__ void sign_right(const BlockProblem<T, kShared> &p) {
    const Team team;
    with_chunks<kCols>(p.cols, [&](auto chunks) {
        for (int c = team.warp; c < p.cols; c += team.warps) {
            const T *const v = p.V()[c];
            const T sign = sign_of<decltype(chunks)::value, T>(p.cols, team.lane, [&](int i) { return v[i * kWarp + team.lane]; });
            if (team.lane == 0) p.sign()[c] = sign;
        }
    });
    __syncthreads();
}

// W = X V: a warp forms 64 rows of four columns at a time.
template <class T, bool kShared>
__device__ __forceinline__ void multiply(const BlockProblem<T, kShared> &p) {
    constexpr int high = 2, across = 4;
    const Team team;
    const int rows = p.rows, cols = p.cols, tiles = (rows + high * kWarp - 1) / (high * kWarp), groups = (cols + across - 1) / across;
    for (int t = team.warp; t < tiles * groups; t += team.warps) {
        const int top = t % tiles * high * kWarp + team.lane, first = t / tiles * across;
        const T *x[high], *v[across];
#pragma unroll
        for (int h = 0; h < high; ++h) x[h] = p.X().data + (top + h * kWarp < rows ? top + h * kWarp : 0);
#pragma unroll
        for (int j = 0; j < across; ++j) v[j] = p.V()[first + j < cols ? first + j : first];
        T sum[high][across] = {};
#pragma unroll 2
        for (int k = 0; k < cols; ++k)
#pragma unroll
            for (int j = 0; j < across; ++j) {
                const T factor = v[j][k];
#pragma unroll
                for (int h = 0; h < high; ++h) sum[h][j] += x[h][k * rows] * factor;
            }
#pragma unroll
        for (int j = 0; j < across; ++j)
#pragma unroll
            for (int h = 0; h < high; ++h)
                if (first + j < cols && top + h * kWarp < rows) p.W()[first + j][top + h * kWarp] = sum[h][j];
    }
    __syncthreads();
}

// U from its reflections, and the signs of all columns unless V has decided them.
template <int kRows, class T, bool kShared>
__device__ __forceinline__ void form_left(const BlockProblem<T, kShared> &p) {
    const Team team;
    with_chunks<kRows>(p.rows, [&](auto chunks) {
        constexpr int CH = decltype(chunks)::value, K = CH * (int)sizeof(T) <= 32 ? 2 : 1;
        const View<T> U = p.left();
        for (int first = team.warp * K; first < p.cols; first += team.warps * K) {
            T u[K][CH];
            form_columns<K, CH>(p.W(), p.starts(), p.rows, p.cols, first, u, team.lane);
#pragma unroll
            for (int j = 0; j < K; ++j) {
                const int c = first + j < p.cols ? first + j : first;
                const T rule = p.wide ? p.sign()[c] : p.turned()[c] * sign_of<CH, T>(p.rows, team.lane, [&](int i) { return u[j][i]; });
                const T sign = rule * p.turned()[c];
                if (first + j >= p.cols) continue;
                if (!p.wide && team.lane == 0) p.sign()[c] = rule;
                T *to = &U(team.lane, c);
#pragma unroll
                for (int i = 0; i < CH; ++i, to += kWarp * U.row)
                    if (i * kWarp + team.lane < p.rows) *to = u[j][i] * sign;
            }
        }
    });
    __syncthreads();
}

template <int kRows, int kCols, class T, bool kShared>
__device__ __forceinline__ void solve(BlockProblem<T, kShared> &p, int max_sweeps) {
    if (!load(p)) return;
    const int kept = eliminate(p);
    const bool converged = iterate<kCols>(p, kept, max_sweeps);
    const int rank = sort(p);
    const bool overflow = store_values(p);
    p.store_codes((overflow ? FEDLORA_INFO_OVERFLOW : 0) | (converged ? 0 : FEDLORA_INFO_NOT_CONVERGED), 0);
    form_right(p, rank);
    if (rank < p.cols) complete_right(p, rank);
    if (p.wide) sign_right<kCols>(p);
    multiply(p);
    plain_qr(p.W(), p.rows, p.cols, p.starts(), p.turned());
    form_left<kRows>(p);
    store_right(p);
}

// kShared: what is eliminated lies in shared memory. kRows, kCols: elements of the longest columns of U and V in a lane.
template <class T, bool kShared, int kRows, int kCols>
__device__ __forceinline__ void solve_all(const BlockTask &task, int max_sweeps) {
    __shared__ BlockProblem<T, kShared> problem;
    for (int64_t i = blockIdx.x; i < task.matrices; i += gridDim.x) {
        const int64_t g = group_of(task.list, i), matrix = i - task.list.first[g];
        const SvdGroup &group = task.list.groups[g];
        if (!is_active(group, matrix)) continue;
        problem.set(task, group, matrix);
        solve<kRows, kCols>(problem, max_sweeps);
        __syncthreads();
    }
}

} // namespace fedlora::block
