// Stacks by reflections: columns brought to ordinary size before, and their triangle to row-echelon form after (docs/numerics.md,
// Stacked QR).
#include "slots.cuh"
#include "stacked_task.cuh"

namespace fedlora {
namespace {

// The bits of the largest numbers of the columns of a piece of rows: as integers they are in order, with what is not finite
// above all.
template <class T>
__device__ void raise_block(const fedlora_block &X, int64_t matrix, int64_t begin, int rows, unsigned long long *largest) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const T *const source = address<T>(X, matrix) + begin * X.row_stride;
    // patches of four rows by eight columns; of each eight columns the rows go to all warps
    const int across = ((int)X.cols + 7) / 8;
    for (int patch = 0; patch < across; ++patch) {
        const int col = patch * 8 + lane / 4;
        unsigned long long most = 0;
        for (int row = 4 * warp + lane % 4; row < rows && col < X.cols; row += 4 * kStackedWarps) {
            const double x = fabs(widen(source[row * X.row_stride + col * X.col_stride]));
            most = max(most, (unsigned long long)__double_as_longlong(x));
        }
        for (int apart = 1; apart < 4; apart *= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, apart));
        if (lane % 4 == 0 && col < X.cols) atomicMax(largest + col, most);
    }
}

__global__ void __launch_bounds__(kStackedThreads) find_largest(const StackedTask *tasks, const int64_t *first, int64_t count) {
    FEDLORA_DYNAMIC_SHARED(unsigned long long, largest);
    const int64_t g = slot_group(first, count, blockIdx.x), slot = blockIdx.x - first[g];
    const StackedTask &task = tasks[g];
    const int64_t matrix = slot / task.pieces, begin = slot % task.pieces * kPieceRows;
    const int rows = (int)min(kPieceRows, task.rows - begin);
    for (int j = threadIdx.x; j < task.width; j += kStackedThreads) largest[j] = 0;
    __syncthreads();
    unsigned long long *own = largest;
    for (int64_t k = 0; k < task.count; own += task.X[k++].cols)
        with_float(task.X[k].dtype, [&](auto type) { raise_block<decltype(type)>(task.X[k], matrix, begin, rows, own); });
    __syncthreads();
    for (int j = threadIdx.x; j < task.width; j += kStackedThreads) task.largest[slot * task.width + j] = largest[j];
}

// Columns are scaled so that the largest numbers are from 1 on and below 2, as far as a power of two can do that.
__global__ void __launch_bounds__(kStackedThreads) find_scale(const StackedTask *tasks, const int64_t *first, int64_t count) {
    const int64_t g = slot_group(first, count, blockIdx.x), matrix = blockIdx.x - first[g];
    const StackedTask &task = tasks[g];
    bool finite = true;
    for (int j = threadIdx.x; j < task.width; j += kStackedThreads) {
        uint64_t bits = 0;
        for (int64_t piece = 0; piece < task.pieces; ++piece)
            bits = max(bits, task.largest[(matrix * task.pieces + piece) * task.width + j]);
        const double most = __longlong_as_double((long long)bits);
        finite &= most <= kLargest;
        const int e = max(-1022, min(1022, exponent_of(most)));
        task.exponents[matrix * task.width + j] = e;
        task.scale[matrix * task.width + j] = copysign(ldexp(1.0, -e), task.weight(matrix, j));
    }
    const bool nonfinite = __syncthreads_or(!finite);
    if (threadIdx.x == 0) task.hard[matrix] = !nonfinite;
    if (!nonfinite) return;
    say_nonfinite(task, matrix);
    if (!task.wants_q()) return;
    const double nan = __longlong_as_double(0x7ff8000000000000ll);
    if (task.Q.dtype == FEDLORA_FLOAT64)
        fill_with<double>(task.Q, matrix, nan);
    else
        fill_with<float>(task.Q, matrix, (float)nan);
}

// Rows of F, `width` apart: those from `rank` to `last` are reflected so that only the first has something in column j.
__device__ void reflect(double *F, int width, int rank, int last, int j, double length) {
    double *const row = F + (int64_t)rank * width;
    const double alpha = row[j], top = alpha + copysign(length, alpha), tau = 1 / (length * (length + fabs(alpha)));
    for (int e = j + 1 + threadIdx.x; e < width; e += kStackedThreads) {
        double part = top * row[e];
        for (int i = rank + 1; i <= last; ++i) part += F[(int64_t)i * width + j] * F[(int64_t)i * width + e];
        part *= tau;
        row[e] -= part * top;
        for (int i = rank + 1; i <= last; ++i) F[(int64_t)i * width + e] -= part * F[(int64_t)i * width + j];
    }
    __syncthreads();
    if (threadIdx.x == 0) row[j] = alpha < 0 ? length : -length;
    for (int i = rank + 1 + threadIdx.x; i <= last; i += kStackedThreads) F[(int64_t)i * width + j] = 0;
    __syncthreads();
}

// The same where no column is left out: rows are turned.
__device__ void turn_rows(double *F, int rows, int width) {
    for (int i = threadIdx.x / kWarp; i < rows; i += kStackedWarps) {
        double *const row = F + (int64_t)i * width;
        const bool negative = row[i] < 0;
        __syncwarp();
        for (int e = i + threadIdx.x % kWarp; negative && e < width; e += kWarp) row[e] = -row[e];
    }
    __syncthreads();
}

// F = [T | I] becomes [R | Q^T]; the rank.
__device__ int to_echelon(double *F, int rows, int cols, int width, double tolerance, double *room) {
    int rank = 0;
    for (int j = 0; j < cols && rank < rows; ++j) {
        const int last = min(j, rows - 1);
        double *const row = F + (int64_t)rank * width;
        double squares = 0;
        for (int i = rank + threadIdx.x; i <= last; i += kStackedThreads) {
            const double x = F[(int64_t)i * width + j];
            squares += x * x;
        }
        const double length = sqrt(sum_of_block(squares, room));
        if (length <= tolerance) {
            for (int i = rank + threadIdx.x; i <= last; i += kStackedThreads) F[(int64_t)i * width + j] = 0;
            __syncthreads();
            continue;
        }
        if (last > rank) reflect(F, width, rank, last, j, length);
        const bool negative = row[j] < 0;
        __syncthreads();
        for (int e = j + threadIdx.x; negative && e < width; e += kStackedThreads) row[e] = -row[e];
        __syncthreads();
        ++rank;
    }
    for (int64_t e = (int64_t)rank * width + threadIdx.x; e < (int64_t)rows * width; e += kStackedThreads) F[e] = 0;
    __syncthreads();
    return rank;
}

__global__ void __launch_bounds__(kStackedThreads, 2) echelon(const StackedTask *tasks, const int64_t *first, int64_t count) {
    __shared__ double room[kStackedWarps];
    const int64_t g = slot_group(first, count, blockIdx.x), matrix = blockIdx.x - first[g];
    const StackedTask &task = tasks[g];
    const int rows = (int)task.k, cols = (int)task.width, width = cols + (task.wants_q() ? rows : 0);
    if (rows == 0) return say(task, matrix, 0, 0);
    if (!task.hard[matrix]) return;
    const double *const T = task.T + matrix * rows * cols;
    double *const F = task.echelon + matrix * rows * width;
    int32_t *const exponents = task.exponents + matrix * cols;
    const double tolerance = 16 * kUnitRoundoff * cols;
    // columns by their lengths; all that follows is in this scale
    bool full = true;
    for (int j = threadIdx.x; j < cols; j += kStackedThreads) {
        double squares = 0;
        for (int i = 0; i <= min(j, rows - 1); ++i) squares += T[(int64_t)i * cols + j] * T[(int64_t)i * cols + j];
        const int rest = squares > 0 ? exponent_of(sqrt(squares)) + 1 : 0;
        const double factor = ldexp(1.0, -rest);
        exponents[j] += rest;
        for (int i = 0; i < rows; ++i) F[(int64_t)i * width + j] = T[(int64_t)i * cols + j] * factor;
        if (j < rows) full &= fabs(F[(int64_t)j * width + j]) > tolerance;
    }
    for (int e = threadIdx.x; e < rows * (width - cols); e += kStackedThreads) {
        const int i = e / rows, j = e % rows;
        F[(int64_t)i * width + cols + j] = i == j;
    }
    const bool triangular = __syncthreads_and(full);
    const int rank = triangular ? rows : to_echelon(F, rows, cols, width, tolerance, room);
    if (triangular) turn_rows(F, rows, width);
    bool fits = true;
    for (int64_t e = threadIdx.x; e < (int64_t)rows * cols; e += kStackedThreads) {
        const int i = (int)(e / cols), j = (int)(e % cols);
        fits &= write_entry(task, matrix, i, j, F[(int64_t)i * width + j], exponents[j]);
    }
    if (threadIdx.x == 0) task.triangular[matrix] = triangular;
    say(task, matrix, rank, __syncthreads_or(!fits) ? FEDLORA_INFO_OVERFLOW : 0);
}

} // namespace

void launch_stacked_largest(const StackedList &list, const int64_t *first_piece, int64_t pieces, int64_t widest, void *stream) {
    launch(find_largest, dim3((unsigned)pieces), dim3(kStackedThreads), widest * (int64_t)sizeof(uint64_t), stream, list.tasks,
           first_piece, list.count);
}

void launch_stacked_scale(const StackedList &list, void *stream) {
    launch(find_scale, dim3((unsigned)list.matrices), dim3(kStackedThreads), 0, stream, list.tasks, list.first, list.count);
}

void launch_stacked_echelon(const StackedList &list, void *stream) {
    launch(echelon, dim3((unsigned)list.matrices), dim3(kStackedThreads), 0, stream, list.tasks, list.first, list.count);
}

} // namespace fedlora
