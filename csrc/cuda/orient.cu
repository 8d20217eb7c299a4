// fedlora_orient: columns turned, in place, so that the first of their (nearly) largest elements is positive.
#include "element.cuh"
#include "signs.cuh"

namespace fedlora {
namespace {

constexpr int kThreads = 256;
constexpr int kSector = 32; // bytes that memory hands over at once

// A block of threads has the columns that lie in a sector of every row, or one where columns lie together.
template <class T>
__global__ void __launch_bounds__(kThreads) orient(const fedlora_block X, const fedlora_block signs, int64_t chunks, int columns) {
    __shared__ T found[kThreads];
    __shared__ int64_t places[kThreads];
    const int64_t matrix = blockIdx.x / chunks, column = blockIdx.x % chunks * columns + threadIdx.x % columns;
    const int share = (int)threadIdx.x / columns, shares = kThreads / columns, own = (int)threadIdx.x % columns;
    const bool there = column < X.cols;
    T *const x = address<T>(X, matrix) + column * X.col_stride;
    T largest = 0;
    for (int64_t i = share; there && i < X.rows; i += shares) {
        const T size = fabs(x[i * X.row_stride]);
        largest = size > largest ? size : largest;
    }
    found[threadIdx.x] = largest;
    __syncthreads();
    for (int s = 0; s < shares; ++s) largest = max(largest, found[s * columns + own]);
    const T bar = largest * (T)kSignWindow;
    int64_t place = X.rows;
    for (int64_t i = share; there && i < X.rows && place == X.rows; i += shares)
        if (fabs(x[i * X.row_stride]) >= bar) place = i;
    places[threadIdx.x] = place;
    __syncthreads();
    for (int s = 0; s < shares; ++s) place = min(place, places[s * columns + own]);
    const bool turned = there && place < X.rows && x[place * X.row_stride] < 0;
    if (there && share == 0) address<double>(signs, matrix)[column * signs.col_stride] = turned ? -1.0 : 1.0;
    __syncthreads(); // all have seen the element that decides
    if (!turned) return;
    for (int64_t i = share; i < X.rows; i += shares) x[i * X.row_stride] = -x[i * X.row_stride];
}

int status_of(const fedlora_block &X, const fedlora_block &signs) {
    if ((X.dtype != FEDLORA_FLOAT32 && X.dtype != FEDLORA_FLOAT64) || signs.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    if (X.batch < 0 || X.rows < 0 || X.cols < 0) return FEDLORA_BAD_SHAPE;
    return signs.batch == X.batch && signs.rows == 1 && signs.cols == X.cols ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

} // namespace
} // namespace fedlora

extern "C" int fedlora_orient(const fedlora_block *X, const fedlora_block *signs, int64_t groups, int64_t, void *stream) {
    using namespace fedlora;
    if (!X || !signs || groups < 0) return FEDLORA_BAD_ARGUMENT;
    for (int64_t g = 0; g < groups; ++g)
        if (const int status = status_of(X[g], signs[g])) return status;
    for (int64_t g = 0; g < groups; ++g) {
        const bool wide = X[g].dtype == FEDLORA_FLOAT64, by_rows = X[g].col_stride == 1;
        const int columns = by_rows ? kSector / (wide ? 8 : 4) : 1;
        const int64_t chunks = (X[g].cols + columns - 1) / columns;
        launch(wide ? orient<double> : orient<float>, dim3((unsigned)(X[g].batch * chunks)), dim3(kThreads), 0, stream, X[g], signs[g],
               chunks, columns);
    }
    return finish();
}
