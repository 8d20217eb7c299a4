// Kernels that try the simulated device, right ones and wrong ones, behind C functions that a test loads.
#include "simt.h"

enum { kNone, kNoBarrier, kShiftedRead, kShiftedWrite, kShiftedShared };

#define API extern "C" __attribute__((visibility("default")))

namespace {

thread_local std::string host_note = "not touched by any block, and too long to be kept in place";

int finish() { return static_cast<int>(cudaGetLastError()); }

template <class T>
__global__ void shuffle_all(const T* values, const int* kind, const int* lanes, const int* width, T* out, int calls) {
    const int t = threadIdx.x;
    for (int c = 0; c < calls; ++c) {
        const T value = values[t];
        T got = value;
        switch (kind[c]) {
            case 0: got = __shfl_sync(~0u, value, lanes[c], width[c]); break;
            case 1: got = __shfl_up_sync(~0u, value, lanes[c], width[c]); break;
            case 2: got = __shfl_down_sync(~0u, value, lanes[c], width[c]); break;
            default: got = __shfl_xor_sync(~0u, value, lanes[c], width[c]);
        }
        out[c * blockDim.x + t] = got;
    }
}

// Three parts of a warp, each among itself and at its own pace.
__global__ void shuffle_parts(const double* values, double* out) {
    const int t = threadIdx.x;
    double sum = values[t];
    if (t < 8) {
        for (int o = 4; o; o >>= 1) sum += __shfl_xor_sync(0xffu, sum, o);
    } else if (t < 12) {
        for (int o = 2; o; o >>= 1) sum += __shfl_xor_sync(0xf00u, sum, o);
    } else {
        const unsigned mask = 0xfffff000u;
        for (int o = 1; o < 20; ++o) sum += __shfl_sync(mask, values[t], 12 + (t - 12 + o) % 20);
    }
    __syncwarp();
    out[t] = sum;
}

__global__ void votes(const int* values, unsigned* out) {
    const int t = threadIdx.x, v = values[t];
    const unsigned mask = t % 2 ? 0xaaaaaaaau : 0x55555555u;
    int same = 0;
    unsigned* mine = out + t * 12;
    if (t % 2) {
        mine[0] = __ballot_sync(mask, v > 3);
        mine[1] = __any_sync(mask, v > 3);
        mine[2] = __all_sync(mask, v > -9);
    } else {
        mine[0] = __ballot_sync(mask, v > 3);
        mine[1] = __any_sync(mask, v > 99);
        mine[2] = __all_sync(mask, v > 3);
    }
    mine[3] = __match_any_sync(~0u, v);
    mine[4] = __match_all_sync(~0u, v, &same);
    mine[5] = __reduce_add_sync(~0u, v);
    mine[6] = __reduce_min_sync(~0u, v);
    mine[7] = __reduce_max_sync(~0u, v);
    mine[8] = __reduce_and_sync(~0u, (unsigned)v);
    mine[9] = __reduce_or_sync(~0u, (unsigned)v);
    mine[10] = __reduce_xor_sync(~0u, (unsigned)v);
    mine[11] = __match_all_sync(~0u, v - v, &same) + same - 1;
}

// The first `gone` threads return before the barriers.
__global__ void barriers(int gone, const int* values, int* out) {
    const int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    if (t < gone) return;
    const int count = __syncthreads_count(values[t] > 3);
    const int any = __syncthreads_or(values[t] > 99);
    const int all = __syncthreads_and(values[t] > -9);
    __syncthreads();
    out[t * 3] = count, out[t * 3 + 1] = any, out[t * 3 + 2] = all;
}

__global__ void indices(unsigned* out) {
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1 + thread + 1000 * block;
}

__global__ void count_up(int* integer, unsigned long long* wide, double* real, int* least, int* won) {
    atomicAdd(integer, 1);
    atomicAdd(wide, 1ull << 33);
    atomicAdd(real, 0.5);
    atomicMin(least, -static_cast<int>(blockIdx.x));
    if (atomicCAS(won, 0, 1) == 0) atomicAdd(integer, 1000000);
}

// What a block finds in shared memory that nobody has written.
template <class T>
__global__ void look(unsigned char* out) {
    __shared__ T statics[7];
    T* const dynamic = static_cast<T*>(simt::dynamic_shared());
    if (threadIdx.x == 0) {
        memcpy(out + blockIdx.x * 14 * sizeof(T), statics, sizeof statics);
        memcpy(out + (blockIdx.x * 14 + 7) * sizeof(T), dynamic, 7 * sizeof(T));
    }
    __syncthreads();
    if (threadIdx.x < 7) statics[threadIdx.x] = dynamic[threadIdx.x] = T(5);
}

// Sums of rows by a tree in shared memory, a block per row: the kernel with faults.
constexpr int kTree = 64;
template <int fault>
__global__ void row_sums(const double* values, int n, double* out) {
    __shared__ double part[kTree];
    const int t = threadIdx.x;
    double sum = 0.0;
    for (int i = t; i < n; i += kTree) sum += values[(fault == kShiftedRead ? 1 : 0) + (int64_t)blockIdx.x * n + i];
    part[t] = sum;
    __syncthreads();
    for (int half = kTree / 2; half; half /= 2) {
        if (t < half) part[t] += part[t + half + (fault == kShiftedShared ? 1 : 0)];
        if (fault != kNoBarrier) __syncthreads();
    }
    if (t == 0) out[blockIdx.x + (fault == kShiftedWrite ? 1 : 0)] = part[0];
}

__global__ void wrong(int which, double* out) {
    const int t = threadIdx.x;
    double* const dynamic = static_cast<double*>(simt::dynamic_shared());
    switch (which) {
        case 0:  // a barrier in each branch
            if (t < 32) __syncthreads();
            else __syncthreads();
            break;
        case 1:  // one warp at a barrier, the other at a warp intrinsic that half of it never reaches
            if (t < 48) __syncthreads();
            else out[t] = __shfl_sync(~0u, 1.0, 0);
            break;
        case 2: out[t] = __shfl_sync(0xfffeu, 1.0, 3); break;
        case 3:
            if (t == 5) return;
            __syncwarp();
            break;
        case 4:
            if (t < 16) out[t] = __shfl_sync(0xffffu, 1.0, 20);
            break;
        case 5:
            if (t < 16) out[t] = __shfl_sync(~0u, 1.0, 0);
            else out[t] = __shfl_sync(~0u, 2.0, 0);
            break;
        case 6:
            __syncwarp(t % 2 ? 0xfffffffeu : 0xffffffffu);
            break;
        case 7: dynamic[t + 1] = 1.0; break;
        case 8:
            if (t < 32) __syncthreads();
            else __syncthreads_or(1);
            break;
        case 9: out[t] = __shfl_up_sync(~0u, 1.0, 1, 16) + __shfl_down_sync(~0u, 1.0, 40, 32); break;  // nothing wrong
    }
}

__global__ void small_functions(const float* x, const float* y, float* out, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float* mine = out + 8 * i;
        mine[0] = min(x[i], y[i]), mine[1] = max(x[i], y[i]);
        mine[2] = rsqrtf(fabsf(x[i])), mine[3] = __fmaf_rn(x[i], y[i], x[i]);
        mine[4] = __int_as_float(__float_as_int(x[i])), mine[5] = (float)__longlong_as_double(__double_as_longlong(x[i]));
        mine[6] = (float)__hiloint2double(__double2hiint(x[i]), __double2loint(x[i]));
        mine[7] = (float)(__popc(i) + 100 * __clz(i) + 10000 * __ffs(i));
    }
}

template <class T>
int shuffles(const void* values, const int* kind, const int* lanes, const int* width, void* out, int calls, int threads) {
    simt::launch(1, threads, 0, [&] { shuffle_all<T>((const T*)values, kind, lanes, width, (T*)out, calls); });
    return finish();
}

}  // namespace

API int run_shuffles(int type, const void* values, const int* kind, const int* lanes, const int* width, void* out, int calls, int threads) {
    switch (type) {
        case 0: return shuffles<signed char>(values, kind, lanes, width, out, calls, threads);
        case 1: return shuffles<unsigned short>(values, kind, lanes, width, out, calls, threads);
        case 2: return shuffles<int>(values, kind, lanes, width, out, calls, threads);
        case 3: return shuffles<int64_t>(values, kind, lanes, width, out, calls, threads);
        case 4: return shuffles<float>(values, kind, lanes, width, out, calls, threads);
        default: return shuffles<double>(values, kind, lanes, width, out, calls, threads);
    }
}
API int run_parts(const double* values, double* out) {
    simt::launch(1, 32, 0, [&] { shuffle_parts(values, out); });
    return finish();
}
API int run_votes(const int* values, unsigned* out) {
    simt::launch(1, 32, 0, [&] { votes(values, out); });
    return finish();
}
API int run_barriers(int x, int y, int z, int gone, const int* values, int* out) {
    simt::launch(1, dim3(x, y, z), 0, [&] { barriers(gone, values, out); });
    return finish();
}
API int run_indices(const unsigned* grid, const unsigned* block, unsigned* out) {
    simt::launch(dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0, [&] { indices(out); });
    return finish();
}
API int run_counts(int blocks, int threads, int* integer, unsigned long long* wide, double* real, int* least, int* won) {
    simt::launch(blocks, threads, 0, [&] { count_up(integer, wide, real, least, won); });
    return finish();
}
API int run_look(int wide, int blocks, unsigned char* out) {
    if (wide) simt::launch(blocks, 32, 7 * sizeof(double), [&] { look<double>(out); });
    else simt::launch(blocks, 32, 7 * sizeof(short), [&] { look<short>(out); });
    return finish();
}
API int run_row_sums(int fault, const double* values, int rows, int n, double* out) {
    simt::launch(rows, kTree, 0, [&] {
        switch (fault) {
            case kNoBarrier: return row_sums<kNoBarrier>(values, n, out);
            case kShiftedRead: return row_sums<kShiftedRead>(values, n, out);
            case kShiftedWrite: return row_sums<kShiftedWrite>(values, n, out);
            case kShiftedShared: return row_sums<kShiftedShared>(values, n, out);
            default: return row_sums<kNone>(values, n, out);
        }
    });
    return finish();
}
API int run_wrong(int which, int blocks, int threads, int64_t shared_bytes, double* out) {
    simt::launch(blocks, threads, (size_t)shared_bytes, [&] { wrong(which, out); });
    return finish();
}
API int run_small_functions(const float* x, const float* y, float* out, int n) {
    simt::launch(1, 32, 0, [&] { small_functions(x, y, out, n); });
    return finish();
}
API void half_to_float(const unsigned short* x, float* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] = __half2float(__ushort_as_half(x[i]));
}
API void float_to_half(const float* x, unsigned short* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] = __half_as_ushort(__float2half_rn(x[i]));
}
API int attribute(int which) {
    int value = -1;
    return cudaDeviceGetAttribute(&value, (cudaDeviceAttr)which, 0) == cudaSuccess ? value : -(int)cudaGetLastError();
}
API const char* message() { return cudaGetErrorString(cudaErrorLaunchFailure); }
API const char* note() { return host_note.c_str(); }

#ifdef MAIN
// Right and wrong kernels in turn, since an error leaves fibers that nobody comes back to; then sums with the fault of that number.
int main(int, char** words) {
    std::vector<double> out(1024);
    for (int which = 0; which < 10; ++which) {
        if ((run_wrong(which, 2, which == 7 ? 32 : 64, 256, out.data()) == 0) != (which == 9)) return 1;
    }
    const int rows = 5, n = 130;
    double* const values = new double[rows * n];
    double* const sums = new double[rows];
    std::fill_n(values, rows * n, 1.0);
    if (run_row_sums(atoi(words[1]), values, rows, n, sums) || std::count(sums, sums + rows, double(n)) != rows) return 2;
    delete[] values;
    delete[] sums;
    return 0;
}
#endif
