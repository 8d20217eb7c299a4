// Orthonormal columns beside those that an iteration has found (docs/numerics.md, Core SVD).
#pragma once

#include "jacobi.cuh"

namespace fedlora {

template <int Lanes, class T>
__device__ inline T sum_over(T x, unsigned mask) {
#pragma unroll
    for (int o = Lanes / 2; o > 0; o /= 2) x += __shfl_xor_sync(mask, x, o);
    return x;
}

template <int Lanes, class T>
__device__ inline T largest_over(T x, unsigned mask) {
#pragma unroll
    for (int o = Lanes / 2; o > 0; o /= 2) x = larger(x, __shfl_xor_sync(mask, x, o));
    return x;
}

template <int Lanes>
__device__ inline int least_over(int x, unsigned mask) {
#pragma unroll
    for (int o = Lanes / 2; o > 0; o /= 2) {
        const int other = __shfl_xor_sync(mask, x, o);
        x = other < x ? other : x;
    }
    return x;
}

// Columns rank .. cols - 1 beside the first `rank` ones, `step` elements apart in shared memory: each time the unit vector that
// sticks out most, made orthogonal twice. Signs follow the sign rule. For the lanes of `mask` alone, which are Lanes neighbours;
// each of them has its rows to itself.
template <int Lanes, class T>
__device__ void complete_columns(T *u, int step, int rows, int rank, int cols, int lane, unsigned mask) {
    for (int c = rank; c < cols; ++c) {
        T *const rest = u + c * step;
        T largest = -1;
        int best = 0;
        for (int i = lane; i < rows; i += Lanes) {
            T out = 1;
            for (int k = 0; k < c; ++k) out -= u[k * step + i] * u[k * step + i];
            if (out > largest) largest = out, best = i;
        }
        const T farthest = largest_over<Lanes>(largest, mask);
        best = least_over<Lanes>(largest == farthest ? best : rows, mask);
        for (int i = lane; i < rows; i += Lanes) rest[i] = i == best ? T(1) : T(0);
        for (int pass = 0; pass < 2; ++pass)
            for (int k = 0; k < c; ++k) {
                T along = 0;
                for (int i = lane; i < rows; i += Lanes) along += u[k * step + i] * rest[i];
                along = sum_over<Lanes>(along, mask);
                for (int i = lane; i < rows; i += Lanes) rest[i] -= along * u[k * step + i];
            }
        T norm2 = 0, size = 0;
        for (int i = lane; i < rows; i += Lanes) {
            norm2 += rest[i] * rest[i];
            size = larger(fabs(rest[i]), size);
        }
        norm2 = sum_over<Lanes>(norm2, mask);
        const T limit = largest_over<Lanes>(size, mask) * kNearly<T>;
        int first = rows;
        for (int i = rows - 1; i >= 0; --i)
            if (i % Lanes == lane && fabs(rest[i]) >= limit) first = i;
        first = least_over<Lanes>(first, mask);
        const int turned = first % Lanes == lane && rest[first] < T(0) ? -1 : 1;
        const T inverse = (T)least_over<Lanes>(turned, mask) / sqrt(norm2);
        for (int i = lane; i < rows; i += Lanes) rest[i] *= inverse;
    }
}

} // namespace fedlora
