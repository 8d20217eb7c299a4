// What the kernels of fedlora_stacked_qr see of a group, and how they answer.
#pragma once

#include "element.cuh"
#include "workspace.cuh"

namespace fedlora {

constexpr int kStackedThreads = 256, kStackedWarps = kStackedThreads / kWarp;
constexpr double kUnitRoundoff = 0x1p-53, kLargest = 0x1.fffffffffffffp1023;

// Easy groups go by their Gram first, which tells the matrices that are hard; of all others every matrix is hard.
struct StackedTask {
    const fedlora_block *X; // on the device
    int64_t count, rows, width, k, batch;
    const int32_t *block_of; // of every column
    const double *weights;   // of every block, those of matrix i from i * weight_step on
    int64_t weight_step;
    fedlora_block Q, R, rank, info, notes; // Q without rows is not wanted
    const double *G;                       // easy: Grams
    double *factors;                       // and room for their factors and inverses, null if that is in shared memory
    double *mixers;                        // Q = X mixer
    int32_t *ranks;                        // easy: columns of Q = X mixer, all or none, or kNoNumbers
    uint64_t *largest;                     // other: bits of the largest numbers of every column of every piece of rows
    int64_t pieces;
    double *scale;       // width of a matrix: what columns of X are multiplied with
    int32_t *exponents;  // width of a matrix: and what brings their lengths back
    int32_t *hard;       // whether a matrix goes by reflections
    const double *T;     // k x width of a matrix, by rows: of those
    double *echelon;     // k x (width + k) of a matrix, by rows: [R | Q^T] of T
    int32_t *triangular; // whether that Q is

    __host__ __device__ bool wants_q() const { return Q.rows > 0; }
    __device__ double weight(int64_t matrix, int column) const { return weights[matrix * weight_step + block_of[column]]; }
};

template <class T>
__device__ inline T *row_of(const fedlora_block &block, int64_t matrix, int64_t row) {
    return address<T>(block, matrix) + row * block.row_stride;
}

template <class T>
__device__ inline void fill_with(const fedlora_block &M, int64_t matrix, T x) {
    for (int64_t e = threadIdx.x; e < M.rows * M.cols; e += blockDim.x)
        row_of<T>(M, matrix, e / M.cols)[e % M.cols * M.col_stride] = x;
}

__device__ inline void say(const StackedTask &task, int64_t matrix, int rank, int32_t info) {
    if (threadIdx.x != 0) return;
    const int32_t zero = rank == 0 ? FEDLORA_NOTE_ZERO : 0, deficient = rank < task.width ? FEDLORA_NOTE_RANK_DEFICIENT : 0;
    *address<int32_t>(task.rank, matrix) = rank;
    *address<int32_t>(task.info, matrix) = info;
    *address<int32_t>(task.notes, matrix) = info & FEDLORA_INFO_NONFINITE ? 0 : zero | deficient;
}

// NaN for R; what becomes of Q is for the caller to say.
__device__ inline void say_nonfinite(const StackedTask &task, int64_t matrix) {
    const double nan = __longlong_as_double(0x7ff8000000000000ll);
    if (task.R.dtype == FEDLORA_FLOAT64)
        fill_with<double>(task.R, matrix, nan);
    else
        fill_with<float>(task.R, matrix, (float)nan);
    say(task, matrix, 0, FEDLORA_INFO_NONFINITE);
}

// x 2^e |weight| into R; whether it stays finite. -0 becomes 0.
__device__ inline bool write_entry(const StackedTask &task, int64_t matrix, int i, int j, double x, int e) {
    const double number = ldexp(x, e) * fabs(task.weight(matrix, j));
    const bool narrow = task.R.dtype != FEDLORA_FLOAT64;
    const double kept = narrow ? (double)(float)number : number;
    if (narrow)
        row_of<float>(task.R, matrix, i)[j * task.R.col_stride] = (float)number + 0.0f;
    else
        row_of<double>(task.R, matrix, i)[j * task.R.col_stride] = number + 0.0;
    return fabs(kept) <= kLargest;
}

// e with 2^e <= x < 2^(e + 1); 0 where there is none.
__device__ inline int exponent_of(double x) { return x > 0 && x <= kLargest ? ilogb(x) : 0; }

// The sum over a block, for all of it, in an order that nothing decides but the number of threads; `room` has one number for a
// warp.
__device__ inline double sum_of_block(double x, double *room) {
    for (int apart = kWarp / 2; apart; apart /= 2) x += __shfl_xor_sync(kAllLanes, x, apart);
    if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = x;
    __syncthreads();
    double sum = 0;
    for (int w = 0; w < kStackedWarps; ++w) sum += room[w];
    __syncthreads();
    return sum;
}

// Kernels over all matrices of some groups: `tasks`, and the matrix that each begins with.
struct StackedList {
    const StackedTask *tasks;
    const int64_t *first;
    int64_t count, matrices;
};

// One launch each. By Grams: R of the matrices that one pass serves, mixers for their Q, and who is hard.
bool stacked_gram_fits(int64_t width);     // whether all of a matrix has room in shared memory
int64_t stacked_gram_bytes(int64_t width); // of shared memory that it takes
int64_t stacked_gram_size(int64_t width);  // numbers of room in the workspace where there is none
void launch_stacked_gram(const StackedList &list, int64_t shared_bytes, void *stream);
// By reflections: how large columns are (`pieces` of rows, as the tasks have them); what they are scaled with; and R.
constexpr int64_t kPieceRows = 2048;
void launch_stacked_largest(const StackedList &list, const int64_t *first_piece, int64_t pieces, int64_t widest, void *stream);
void launch_stacked_scale(const StackedList &list, void *stream);
void launch_stacked_echelon(const StackedList &list, void *stream);

} // namespace fedlora
