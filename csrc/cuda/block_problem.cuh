// One matrix on its way through a block of threads: where its parts lie, how it comes in and what goes out (docs/numerics.md, Core SVD).
#pragma once

#include "block_qr.cuh"
#include "block_svd.cuh"

namespace fedlora::block {

// A matrix of a descriptor, seen as columns: transposed where the work is.
template <class T>
struct View {
    T *data;
    int64_t row, col;
    __device__ View(const fedlora_block &block, int64_t matrix, bool transposed)
        : data(reinterpret_cast<T *>(block.data) + matrix * block.batch_stride),
          row(transposed ? block.col_stride : block.row_stride), col(transposed ? block.row_stride : block.col_stride) {}
    __device__ T &operator()(int i, int c) const { return data[i * row + c * col]; }
    // Neighbours in memory are neighbours in a column.
    __device__ bool by_columns() const { return row == 1 || col != 1; }
};

// What a matrix X of rows >= cols takes of shared and of global memory.
struct BlockSizes {
    int rows, cols;
    __host__ __device__ explicit BlockSizes(const fedlora_block &C)
        : rows((int)(C.rows < C.cols ? C.cols : C.rows)), cols((int)(C.rows < C.cols ? C.rows : C.cols)) {}

    // Squares, starts, signs and turned; order and places.
    __host__ __device__ int64_t list_bytes(int64_t element) const { return (4 * element + 2 * (int64_t)sizeof(int)) * cols; }
    // All columns, an odd number of elements apart: rows meet no bank of shared memory twice.
    __host__ __device__ int64_t whole_bytes(int64_t element) const { return list_bytes(element) + element * (rows | 1) * cols; }
    // So many columns of the square matrix of the iteration fit: all of them, or two panels of what is answered.
    __host__ __device__ int panel(int64_t element, int64_t shared_bytes) const {
        const int64_t room = (shared_bytes - list_bytes(element)) / (element * cols);
        return room >= cols ? cols : room >= 4 ? (int)(room / 2) : 2;
    }
    __host__ __device__ int64_t panel_bytes(int64_t element, int64_t shared_bytes) const {
        const int width = panel(element, shared_bytes);
        return list_bytes(element) + element * cols * (width < cols ? 2 * width : cols);
    }
    // X, X V and V.
    __host__ __device__ int64_t scratch() const { return 2 * (int64_t)rows * cols + (int64_t)cols * cols; }
};

// What is known of a matrix, in shared memory: registers are dear. Addresses of dynamic shared memory are formed from its name, or
// the compiler would not know them for such. kShared: the columns that are eliminated lie there.
template <class T, bool kShared>
struct BlockProblem {
    SvdGroup group;
    int64_t matrix;
    T *scratch;
    int rows, cols, panel, exponent;
    bool wide;

    __device__ View<T> left() const { return View<T>(wide ? group.Vh : group.U, matrix, wide); }
    __device__ View<T> right() const { return View<T>(wide ? group.U : group.Vh, matrix, !wide); }
    __device__ View<T> values() const { return View<T>(group.S, matrix, false); }

    // Of the columns in the iteration; starts also hold tau, and turned the signs of the diagonal of R.
    __device__ T *squares() const {
        FEDLORA_DYNAMIC_SHARED(T, shared);
        return shared;
    }
    __device__ T *starts() const { return squares() + cols; }
    __device__ T *sign() const { return squares() + 2 * cols; }
    __device__ T *turned() const { return squares() + 3 * cols; }
    __device__ int *order() const { return reinterpret_cast<int *>(squares() + 4 * cols); }
    __device__ int *place() const { return order() + cols; }
    // An even number of integers stands before it.
    __device__ T *room() const { return reinterpret_cast<T *>(order() + 2 * cols); }

    __device__ Columns<T> X() const { return {scratch, rows}; }
    __device__ Columns<T> product() const { return {scratch + rows * cols, rows}; }
    __device__ Columns<T> V() const { return {scratch + 2 * rows * cols, cols}; }
    // What is eliminated.
    __device__ Columns<T> W() const { return kShared ? Columns<T>{room(), rows | 1} : product(); }
    // What the iteration turns, where all of it fits into shared memory; else that is V.
    __device__ bool whole() const { return kShared || panel == cols; }
    __device__ Columns<T> Y() const { return {room(), kShared ? cols | 1 : cols}; }

    // By all threads, and a barrier.
    __device__ void set(const BlockTask &task, const SvdGroup &of, int64_t index) {
        constexpr int words = sizeof(SvdGroup) / sizeof(int64_t);
        for (int i = (int)threadIdx.x; i < words; i += (int)blockDim.x)
            reinterpret_cast<int64_t *>(&group)[i] = reinterpret_cast<const int64_t *>(&of)[i];
        if (threadIdx.x == 0) {
            const BlockSizes size(of.C);
            matrix = index;
            scratch = reinterpret_cast<T *>(task.scratch + blockIdx.x * task.scratch_bytes);
            rows = size.rows;
            cols = size.cols;
            panel = size.panel(sizeof(T), task.shared_bytes);
            wide = of.C.rows < of.C.cols;
        }
        __syncthreads();
    }

    __device__ void store_codes(int32_t info, int32_t notes) const {
        if (threadIdx.x > 0) return;
        *View<int32_t>(group.info, matrix, false).data = info;
        *View<int32_t>(group.notes, matrix, false).data = notes;
    }
};

// f(i, c) for all elements of rows x cols, spread over the block.
template <class F>
__device__ __forceinline__ void for_all(int rows, int cols, bool by_columns, const F &f) {
    const int fast = by_columns ? rows : cols, total = rows * cols;
    for (int t = (int)threadIdx.x; t < total; t += (int)blockDim.x) {
        const int outer = t / fast, inner = t - outer * fast;
        by_columns ? f(inner, outer) : f(outer, inner);
    }
}

// The answers for a matrix with NaN or Inf, and for zero.
template <class T, bool kShared>
__device__ void answer_plain(const BlockProblem<T, kShared> &p, bool finite) {
    const T nan = from_bits((BitsOf<T>)(sizeof(T) == 8 ? 0x7ff8000000000000ll : 0x7fc00000ll));
    const T diagonal = finite ? T(1) : nan, rest = finite ? T(0) : nan;
    const View<T> L = p.left(), R = p.right(), S = p.values();
    for_all(p.rows, p.cols, L.by_columns(), [&](int i, int c) { L(i, c) = i == c ? diagonal : rest; });
    for_all(p.cols, p.cols, R.by_columns(), [&](int i, int c) { R(i, c) = i == c ? diagonal : rest; });
    for (int c = (int)threadIdx.x; c < p.cols; c += (int)blockDim.x) S(0, c) = rest;
    p.store_codes(finite ? 0 : FEDLORA_INFO_NONFINITE, finite ? FEDLORA_NOTE_ZERO : 0);
}

// X scaled by a power of two, the largest element in [1/2, 1), in scratch and in W. False where nothing is left to do.
template <class T, bool kShared>
__device__ bool load(BlockProblem<T, kShared> &p) {
    __shared__ int not_finite;
    __shared__ T largest[kMostWarps];
    const Team team;
    const View<const T> C(p.group.C, p.matrix, p.wide);
    T most = 0, probe = 0;
    for_all(p.rows, p.cols, C.by_columns(), [&](int i, int c) {
        const T x = C(i, c);
        most = larger<T>(fabs(x), most);
        probe += x - x;
    });
    most = warp_largest(most);
    if (threadIdx.x == 0) not_finite = 0;
    __syncthreads();
    if (!(probe == T(0))) not_finite = 1;
    if (team.lane == 0) largest[team.warp] = most;
    __syncthreads();
    for (int w = 0; w < team.warps; ++w) most = larger(largest[w], most);
    if (not_finite || most == T(0)) {
        answer_plain(p, !not_finite);
        return false;
    }
    const int exponent = exponent_of(most);
    if (threadIdx.x == 0) p.exponent = exponent;
    for_all(p.rows, p.cols, C.by_columns(), [&](int i, int c) { p.X()[c][i] = scaled_by(C(i, c), -exponent); });
    __syncthreads();
    copy_columns(p.X(), p.W(), p.rows, p.cols);
    __syncthreads();
    return true;
}

// Whether a value is beyond the range, in any thread: a barrier.
template <class T, bool kShared>
__device__ bool store_values(const BlockProblem<T, kShared> &p) {
    const View<T> S = p.values();
    bool overflow = false;
    for (int c = (int)threadIdx.x; c < p.cols; c += (int)blockDim.x) {
        const T value = scaled_by(p.squares()[p.place()[c]], p.exponent);
        overflow |= isinf(value);
        S(0, c) = value;
    }
    return __syncthreads_or(overflow) != 0;
}

template <class T, bool kShared>
__device__ void store_right(const BlockProblem<T, kShared> &p) {
    const View<T> R = p.right();
    for_all(p.cols, p.cols, R.by_columns(), [&](int i, int c) { R(i, c) = p.V()[c][i] * p.sign()[c]; });
}

} // namespace fedlora::block
