// Householder QR of one matrix by one block of threads, with column pivoting or without (docs/numerics.md, Core SVD).
//
// Every warp reads the column that is to be reflected and forms the reflection for itself, then turns the columns that are its
// own, up to four at a time: one barrier a step. Columns stay where they are; pivoting only keeps a list.
#pragma once

#include <climits>

#include "jacobi.cuh"
#include "warp_sums.cuh"

namespace fedlora::block {

// The warps of a block, and where a thread stands in it.
struct Team {
    int lane, warp, warps;
    __device__ Team()
        : lane((int)threadIdx.x % kWarp), warp((int)threadIdx.x / kWarp), warps((int)blockDim.x / kWarp) {}
};

// Every lane keeps what is to be known of one column of its warp.
constexpr int kMostWarps = 16, kMostColumns = kMostWarps * kWarp;

template <class T>
struct Columns {
    T *data;
    int step;
    __device__ T *operator[](int c) const { return data + c * step; }
};

template <class T>
__device__ __forceinline__ void copy_columns(const Columns<T> &from, const Columns<T> &to, int rows, int cols) {
    const Team team;
    for (int c = team.warp; c < cols; c += team.warps)
        for (int i = team.lane; i < rows; i += kWarp) to[c][i] = from[c][i];
}

// 1 - tau v v^T maps x, rows k and on, onto beta e_k; v is x but for its first element, `head`. tau is 0 where there is nothing to map.
template <class T>
struct Reflection {
    T head, tau, beta;
};

template <class T>
__device__ __forceinline__ Reflection<T> reflection(const T *x, int k, int rows, int lane) {
    T tail = 0;
    for (int i = k + 1 + lane; i < rows; i += kWarp) tail += x[i] * x[i];
    tail = warp_sum(tail);
    const T alpha = x[k], square = tail + alpha * alpha;
    if (!(square > Real<T>::smallest)) return {T(1), T(0), T(0)};
    const T size = sqrt(square), beta = alpha < 0 ? size : -size, head = alpha - beta;
    // From the rounded v: what tau and v lack together would make every vector longer or shorter.
    return {head, T(2) / (tail + head * head), beta};
}

// K columns a <- a - tau v (v . a). With kSquares, part j of the warp answers what is then the square of the j-th below row k.
template <int K, bool kSquares, class T>
__device__ __forceinline__ T reflect(const T *v, const Reflection<T> &r, int k, int rows, T *const (&a)[K], int lane) {
    T dot[K], square[K];
#pragma unroll
    for (int j = 0; j < K; ++j) {
        dot[j] = lane == 0 ? r.head * a[j][k] : T(0);
        square[j] = 0;
    }
#pragma unroll 2
    for (int i = k + 1 + lane; i < rows; i += kWarp) {
        const T x = v[i];
#pragma unroll
        for (int j = 0; j < K; ++j) dot[j] += x * a[j][i];
    }
    const T share = part_sums<K>(dot) * r.tau;
    T along[K];
#pragma unroll
    for (int j = 0; j < K; ++j) along[j] = of_part<K>(share, j);
    if (lane == 0) {
#pragma unroll
        for (int j = 0; j < K; ++j) a[j][k] -= along[j] * r.head;
    }
#pragma unroll 2
    for (int i = k + 1 + lane; i < rows; i += kWarp) {
        const T x = v[i];
#pragma unroll
        for (int j = 0; j < K; ++j) {
            const T y = a[j][i] - along[j] * x;
            a[j][i] = y;
            if constexpr (kSquares) square[j] += y * y;
        }
    }
    return kSquares ? part_sums<K>(square) : T(0);
}

// Lengths as integers that rise with them; of float64 the upper half, which is close enough to choose a pivot by.
__device__ __forceinline__ int rising(float square) { return __float_as_int(square); }
__device__ __forceinline__ int rising(double square) { return __double2hiint(square); }

// The columns of this warp in an elimination, c = warp + warps * lane, and what they have left.
template <class T>
class OwnColumns {
  public:
    __device__ OwnColumns(const Columns<T> &W, int rows, int cols) : W_(W), rows_(rows) {
        for (int c = team_.warp, at = 0; c < cols; c += team_.warps, ++at) live_ |= 1u << at;
    }

    __device__ void measure() {
        for (unsigned left = live_; left; left &= left - 1) {
            const int at = __ffs((int)left) - 1;
            const T *const column = W_[team_.warp + team_.warps * at];
            T square = 0;
            for (int i = team_.lane; i < rows_; i += kWarp) square += column[i] * column[i];
            square = warp_sum(square);
            if (team_.lane == at) square_ = square;
        }
    }

    // The longest of them, the first of equal ones; the length of none is 0.
    __device__ int longest(int &column) const {
        const bool live = (live_ >> team_.lane & 1u) != 0;
        const int length = live ? rising(square_) : 0;
        const int most = (int)__reduce_max_sync(kAllLanes, length);
        const unsigned found = __ballot_sync(kAllLanes, live && length == most);
        column = found ? team_.warp + team_.warps * (__ffs((int)found) - 1) : INT_MAX;
        return found ? most : 0;
    }

    __device__ void remove(int column) {
        if (column % team_.warps == team_.warp) live_ &= ~(1u << (column / team_.warps));
    }

    template <bool kSquares>
    __device__ void reflect_all(const T *v, const Reflection<T> &r, int k) {
        unsigned left = live_;
        int count = __popc(left);
        for (; count >= 4; count -= 4) reflect_next<4, kSquares>(left, v, r, k);
        if (count >= 2) reflect_next<2, kSquares>(left, v, r, k);
        if (count % 2) reflect_next<1, kSquares>(left, v, r, k);
    }

  private:
    template <int K, bool kSquares>
    __device__ void reflect_next(unsigned &left, const T *v, const Reflection<T> &r, int k) {
        T *columns[K];
        int at[K];
#pragma unroll
        for (int j = 0; j < K; ++j) {
            at[j] = __ffs((int)left) - 1;
            left &= left - 1;
            columns[j] = W_[team_.warp + team_.warps * at[j]];
        }
        const T squares = reflect<K, kSquares>(v, r, k, rows_, columns, team_.lane);
        if constexpr (kSquares) {
#pragma unroll
            for (int j = 0; j < K; ++j) {
                const T square = of_part<K>(squares, j);
                if (team_.lane == at[j]) square_ = square;
            }
        }
    }

    const Columns<T> W_;
    const int rows_;
    const Team team_;
    unsigned live_ = 0;
    T square_ = 0;
};

// W P = Q R by reflections, of which only R is kept: R[k, k] = diagonal[k], and R[k, c] in row k of column order[c] for c > k.
// Answers how many rows of R are not zero. Ends with a barrier.
template <class T>
__device__ int pivoted_qr(const Columns<T> &W, int rows, int cols, int *order, T *diagonal) {
    const Team team;
    __shared__ int lengths[2][kMostWarps], columns[2][kMostWarps];
    OwnColumns<T> own(W, rows, cols);
    own.measure();
    int k = 0;
    for (; k < cols; ++k) {
        int column;
        const int length = own.longest(column);
        if (team.lane == 0) {
            lengths[k % 2][team.warp] = length;
            columns[k % 2][team.warp] = column;
        }
        __syncthreads();
        const int there = team.lane < team.warps ? lengths[k % 2][team.lane] : 0;
        const int most = (int)__reduce_max_sync(kAllLanes, there);
        if (most <= rising(Real<T>::smallest)) break;
        const int candidate = team.lane < team.warps && there == most ? columns[k % 2][team.lane] : INT_MAX;
        const int pivot = (int)__reduce_min_sync(kAllLanes, candidate);
        const Reflection<T> r = reflection(W[pivot], k, rows, team.lane);
        if (threadIdx.x == 0) {
            order[k] = pivot;
            diagonal[k] = r.beta;
        }
        own.remove(pivot);
        own.template reflect_all<true>(W[pivot], r, k);
    }
    __syncthreads();
    // Columns that nothing is left of come last, as they stand.
    for (int c = (int)threadIdx.x; k < cols && c < cols; c += (int)blockDim.x) {
        int before = 0;
        bool taken = false;
        for (int i = 0; i < k; ++i) {
            taken |= order[i] == c;
            before += order[i] < c;
        }
        if (!taken) order[k + c - before] = c;
    }
    __syncthreads();
    return k;
}

// W = Q R by reflections: v_k and tau[k] take the place of column k, and sign[k] that of R[k, k]; the rest of R is lost. Ends with a
// barrier.
template <class T>
__device__ void plain_qr(const Columns<T> &W, int rows, int cols, T *tau, T *sign) {
    const Team team;
    OwnColumns<T> own(W, rows, cols);
    T head = 0;
    for (int k = 0; k < cols; ++k) {
        __syncthreads();
        // Nobody looks at the column before any more.
        if (k > 0 && threadIdx.x == 0) W[k - 1][k - 1] = head;
        const Reflection<T> r = reflection(W[k], k, rows, team.lane);
        if (threadIdx.x == 0) {
            tau[k] = r.tau;
            sign[k] = r.beta < 0 ? T(-1) : T(1);
        }
        head = r.head;
        own.remove(k);
        own.template reflect_all<false>(W[k], r, k);
    }
    __syncthreads();
    if (cols > 0 && threadIdx.x == 0) W[cols - 1][cols - 1] = head;
    __syncthreads();
}

// Columns first .. first + K - 1 of Q = H_0 H_1 ..., reflections as plain_qr leaves them: u[j][i] is element i * 32 + lane of the j-th.
template <int K, int CH, class T>
__device__ __forceinline__ void form_columns(const Columns<T> &H, const T *tau, int rows, int count, int first, T (&u)[K][CH], int lane) {
#pragma unroll
    for (int j = 0; j < K; ++j)
#pragma unroll
        for (int i = 0; i < CH; ++i) u[j][i] = i * kWarp + lane == first + j ? T(1) : T(0);
    constexpr bool held = CH * (int)sizeof(T) <= 64; // more would not fit the registers beside u
    const int last = first + K < count ? first + K : count;
    for (int k = last - 1; k >= 0; --k) {
        const T *const h = H[k] + lane;
        const auto element = [&](int i) { return i * kWarp + lane >= k && i * kWarp + lane < rows ? h[i * kWarp] : T(0); };
        T v[CH], dot[K];
#pragma unroll
        for (int j = 0; j < K; ++j) dot[j] = 0;
#pragma unroll
        for (int i = 0; i < CH; ++i) {
            v[i] = element(i);
#pragma unroll
            for (int j = 0; j < K; ++j) dot[j] += v[i] * u[j][i];
        }
        const T share = part_sums<K>(dot) * tau[k];
        T along[K];
#pragma unroll
        for (int j = 0; j < K; ++j) along[j] = of_part<K>(share, j);
        if constexpr (!held) __syncwarp();
#pragma unroll
        for (int i = 0; i < CH; ++i) {
            if constexpr (!held) v[i] = element(i);
#pragma unroll
            for (int j = 0; j < K; ++j) u[j][i] -= along[j] * v[i];
        }
    }
}

} // namespace fedlora::block
