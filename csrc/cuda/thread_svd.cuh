// One-sided Jacobi SVD of one tiny matrix by one thread, in registers: cyclic, unrolled (docs/numerics.md, Core SVD).
#pragma once

#include "jacobi.cuh"

namespace fedlora {

// X J = U diag(s) for X of N rows and at most N columns, filled up with zeros.
template <class T, int N>
class ThreadSvd {
  public:
    __device__ int exponent() const { return exponent_; }
    __device__ bool finite() const { return finite_; }
    __device__ bool zero() const { return zero_; }
    __device__ bool converged() const { return !rotating_; }

    // X from its columns, N elements each; J the identity. Powers of two bring the largest element into [1/2, 1); a matrix with
    // NaN or Inf becomes zero.
    __device__ void load(const T *columns, int cols) {
        T largest = 0, probe = 0;
#pragma unroll
        for (int c = 0; c < N; ++c)
#pragma unroll
            for (int i = 0; i < N; ++i) {
                x_[c][i] = c < cols ? columns[c * N + i] : T(0);
                j_[c][i] = i == c ? T(1) : T(0);
                largest = larger(fabs(x_[c][i]), largest);
                probe += x_[c][i] - x_[c][i];
            }
        finite_ = probe == T(0);
        zero_ = finite_ && largest == T(0);
        exponent_ = finite_ && !zero_ ? exponent_of(largest) : 0;
#pragma unroll
        for (int c = 0; c < N; ++c)
#pragma unroll
            for (int i = 0; i < N; ++i) x_[c][i] = finite_ ? scaled_by(x_[c][i], -exponent_) : T(0);
    }

    __device__ void iterate(int max_sweeps) {
        const T tolerance = jacobi_tolerance<T>(N);
        rotating_ = true;
#pragma unroll
        for (int c = 0; c < N; ++c) state_[c] = {T(0), T(1), T(0)};
#pragma unroll 1
        for (int sweep = 0; sweep < max_sweeps && rotating_; ++sweep) {
            begin_sweep();
            rotating_ = false;
#pragma unroll
            for (int a = 0; a + 1 < N; ++a)
#pragma unroll
                for (int b = a + 1; b < N; ++b) meet(a, b, tolerance);
        }
        if (rotating_) begin_sweep();
    }

    // Unit columns in X and J by the sign rule, of J or of X; singular values of the scaled matrix, and the places of the columns
    // by falling value: equal values keep their order.
    __device__ void finish(int cols, bool by_j) {
#pragma unroll
        for (int c = 0; c < N; ++c) {
            const T x_norm = sqrt(dot(x_[c], x_[c])), j_norm = sqrt(dot(j_[c], j_[c]));
            const T x_sign = sign_of(x_[c]), j_sign = sign_of(j_[c]), sign = by_j ? j_sign : x_sign;
            const T x_factor = sign / (x_norm > T(0) ? x_norm : T(1)), j_factor = sign / j_norm;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                x_[c][i] = x_[c][i] * x_factor + T(0); // no zero with a sign
                j_[c][i] = j_[c][i] * j_factor + T(0);
            }
            value_[c] = c < cols ? x_norm / j_norm : T(-1);
        }
#pragma unroll
        for (int c = 0; c < N; ++c) {
            place_[c] = 0;
#pragma unroll
            for (int o = 0; o < N; ++o) place_[c] += o < c ? value_[o] >= value_[c] : value_[o] > value_[c];
        }
    }

    // The first `cols` columns to their places, N elements each, and the values.
    __device__ void put_x(T *columns, int cols) const { put(x_, columns, cols); }
    __device__ void put_j(T *columns, int cols) const { put(j_, columns, cols); }
    __device__ void put_values(T *values, int cols) const {
#pragma unroll
        for (int c = 0; c < N; ++c)
            if (c < cols) values[place_[c]] = value_[c];
    }

  private:
    __device__ static T dot(const T (&x)[N], const T (&y)[N]) {
        T even = 0, odd = 0;
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            even += x[i] * y[i];
            if (i + 1 < N) odd += x[i + 1] * y[i + 1];
        }
        return even + odd;
    }

    // Fresh norms.
    __device__ void begin_sweep() {
#pragma unroll
        for (int c = 0; c < N; ++c) {
            ColumnState<T> &state = state_[c];
            if (is_light(state)) {
                const T d = sqrt(state.weight);
                state.weight = T(1);
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    x_[c][i] *= d;
                    j_[c][i] *= d;
                }
            }
            state.norm = dot(x_[c], x_[c]) * state.weight;
            if (is_dust(state)) {
                state.norm = T(0);
#pragma unroll
                for (int i = 0; i < N; ++i) x_[c][i] = T(0);
            }
            state.start = state.norm;
        }
    }

    __device__ void meet(int a, int b, T tolerance) {
        T first, second;
        if (!plan_rotation(state_[a], state_[b], dot(x_[a], x_[b]), tolerance, first, second)) return;
        rotating_ = true;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            turn(x_[a][i], x_[b][i], first, second);
            turn(j_[a][i], j_[b][i], first, second);
        }
    }

    __device__ static void turn(T &x, T &y, T first, T second) {
        const T old = x;
        x -= first * y;
        y += second * old;
    }

    // 1 or -1: what makes the first nearly largest element positive.
    __device__ static T sign_of(const T (&u)[N]) {
        T largest = 0, first = 0;
#pragma unroll
        for (int i = 0; i < N; ++i) largest = larger(fabs(u[i]), largest);
        const T limit = largest * kNearly<T>;
#pragma unroll
        for (int i = N - 1; i >= 0; --i) first = limit > fabs(u[i]) ? first : u[i];
        return first < T(0) ? T(-1) : T(1);
    }

    __device__ void put(const T (&u)[N][N], T *columns, int cols) const {
#pragma unroll
        for (int c = 0; c < N; ++c)
            if (c < cols)
#pragma unroll
                for (int i = 0; i < N; ++i) columns[place_[c] * N + i] = u[c][i];
    }

    T x_[N][N], j_[N][N], value_[N];
    ColumnState<T> state_[N];
    int place_[N], exponent_;
    bool finite_, zero_, rotating_;
};

} // namespace fedlora
