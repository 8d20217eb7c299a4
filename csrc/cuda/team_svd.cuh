// One-sided Jacobi SVD of one small matrix by a part of a warp, in registers (docs/numerics.md, Core SVD).
//
// The work is X J = U diag(s) for a square X of N columns, filled up with zeros. A team of N/2 lanes holds two columns each, so
// that inner products need no reduction; where two columns of X and J are too much for the registers of a lane, two lanes share
// them by halves of the rows. Column b of a lane visits all lanes of its group in the order of a Gray code while column a rests:
// one column moves per rotation. Then a group splits: one half keeps the columns that rested, the other those that travelled. N -
// 1 steps let every pair meet once.
#pragma once

#include "jacobi.cuh"

namespace fedlora {

// Columns of a matrix in shared memory lie so far apart, one element more than they are long: lanes that walk along rows or
// columns meet no bank twice.
template <int N>
constexpr int kColumnStep = N + 1;

template <class T, int N, int Halves = (N * sizeof(T) > 128 ? 2 : 1)>
class TeamSvd {
  public:
    static constexpr int pairs = N / 2, halves = Halves, lanes = pairs * halves, rows = N / halves;
    static constexpr int step = kColumnStep<N>;
    static_assert(kWarp % lanes == 0, "teams must share a warp evenly");

    __device__ TeamSvd() : lane_(anew((int)threadIdx.x) & (kWarp - 1)), pair_(lane_ % pairs), half_(lane_ / pairs % halves) {}

    // Index within the team, and the lanes of the team.
    __device__ int lane() const { return lane_ % lanes; }
    __device__ unsigned mask() const {
        return lanes == kWarp ? kAllLanes : ((1u << (lanes % kWarp)) - 1u) << (lane_ / lanes * lanes);
    }

    __device__ int exponent() const { return exponent_; }
    __device__ bool finite() const { return finite_; }
    __device__ bool zero() const { return zero_; }
    __device__ bool converged() const { return !rotating_; }

    // X from columns in shared memory, all N of them; J the identity. Powers of two bring the largest element into [1/2, 1); a
    // matrix with NaN or Inf becomes zero.
    __device__ void load(const T *columns) {
        T largest = 0, probe = 0;
        a_.tag = 2 * pair_, b_.tag = 2 * pair_ + 1;
#pragma unroll
        for (int i = 0; i < rows; ++i) {
            const int row = half_ * rows + i;
            a_.x[i] = columns[a_.tag * step + row];
            b_.x[i] = columns[b_.tag * step + row];
            a_.j[i] = a_.tag == row ? T(1) : T(0);
            b_.j[i] = b_.tag == row ? T(1) : T(0);
            largest = larger(fabs(a_.x[i]), larger(fabs(b_.x[i]), largest));
            probe += (a_.x[i] - a_.x[i]) + (b_.x[i] - b_.x[i]);
        }
        probe = probe == T(0) ? T(0) : T(1);
#pragma unroll
        for (int o = lanes / 2; o > 0; o /= 2) {
            largest = larger(largest, __shfl_xor_sync(kAllLanes, largest, o));
            probe = larger(probe, __shfl_xor_sync(kAllLanes, probe, o));
        }
        finite_ = probe == T(0);
        zero_ = finite_ && largest == T(0);
        exponent_ = finite_ && !zero_ ? exponent_of(largest) : 0;
#pragma unroll
        for (int i = 0; i < rows; ++i) {
            a_.x[i] = finite_ ? scaled_by(a_.x[i], -exponent_) : T(0);
            b_.x[i] = finite_ ? scaled_by(b_.x[i], -exponent_) : T(0);
        }
    }

    // All teams of the warp together; a team that is not to rotate only follows.
    __device__ void iterate(int length, int max_sweeps, bool rotating) {
        tolerance_ = jacobi_tolerance<T>(length);
        rotating_ = rotating;
        a_.state = b_.state = {T(0), T(1), T(0)};
        for (int sweep = 0; sweep < max_sweeps && __any_sync(kAllLanes, rotating_); ++sweep) {
            begin_sweep();
            bool turned = false;
            for (int group = pairs, visit = 0;;) {
                turned |= meet();
                if (++visit < group) {
                    travel(visit & -visit);
                } else if (group > 1) {
                    group /= 2;
                    visit = 0;
                    split(group);
                } else {
                    break;
                }
            }
            for (int bit = 1; bit < pairs; bit *= 2) split(bit);
            rotating_ = (__ballot_sync(kAllLanes, turned) & mask()) != 0;
        }
        begin_sweep();
    }

    // Unit columns in X and J by the sign rule, of J or of X; singular values of the scaled matrix, and the places of the columns
    // by falling value: equal values keep their order, columns from `cols` on come last.
    __device__ void finish(int cols, bool by_j) {
        finish_column(a_, cols, by_j);
        finish_column(b_, cols, by_j);
        a_.place = b_.place = 0;
#pragma unroll 1
        for (int other = 0; other < pairs; ++other) {
            count_before(__shfl_sync(kAllLanes, a_.value, other, lanes), __shfl_sync(kAllLanes, a_.tag, other, lanes));
            count_before(__shfl_sync(kAllLanes, b_.value, other, lanes), __shfl_sync(kAllLanes, b_.tag, other, lanes));
        }
    }

    // Columns to their places in shared memory, and the values; those from `cols` on are zero.
    __device__ void put_x(T *columns) const {
        put(a_.x, a_.place, T(1), columns);
        put(b_.x, b_.place, T(1), columns);
    }
    __device__ void put_j(T *columns) const {
        put(a_.j, a_.place, a_.value < T(0) ? T(0) : T(1), columns);
        put(b_.j, b_.place, b_.value < T(0) ? T(0) : T(1), columns);
    }
    __device__ void put_values(T *values) const {
        if (half_ > 0) return;
        values[a_.place] = larger(a_.value, T(0));
        values[b_.place] = larger(b_.value, T(0));
    }

  private:
    struct Column {
        T x[rows], j[rows], value;
        ColumnState<T> state;
        int tag, place;
    };

    // A sum over the rows, of which this lane has its half.
    __device__ static T whole(T part) {
        if constexpr (halves == 2) part += __shfl_xor_sync(kAllLanes, part, pairs);
        return part;
    }

    __device__ static T dot(const T (&x)[rows], const T (&y)[rows]) {
        T even = 0, odd = 0;
#pragma unroll
        for (int i = 0; i < rows; i += 2) {
            even += x[i] * y[i];
            if (i + 1 < rows) odd += x[i + 1] * y[i + 1];
        }
        return even + odd;
    }

    // Fresh norms.
    __device__ void begin_sweep() {
        if (rotating_) {
            fold(a_);
            fold(b_);
        }
        measure(a_);
        measure(b_);
    }

    __device__ static void fold(Column &c) {
        if (!is_light(c.state)) return;
        const T d = sqrt(c.state.weight);
        c.state.weight = T(1);
#pragma unroll
        for (int i = 0; i < rows; ++i) {
            c.x[i] *= d;
            c.j[i] *= d;
        }
    }

    __device__ void measure(Column &c) {
        c.state.norm = whole(dot(c.x, c.x)) * c.state.weight;
        if (rotating_ && is_dust(c.state)) {
            c.state.norm = T(0);
#pragma unroll
            for (int i = 0; i < rows; ++i) c.x[i] = T(0);
        }
        c.state.start = c.state.norm;
    }

    __device__ bool meet() {
        T first, second;
        const T g = whole(dot(a_.x, b_.x));
        const bool swap = rotating_ && b_.state.norm > a_.state.norm;
        if (__any_sync(kAllLanes, swap)) swap_columns(swap);
        if (!rotating_ || !plan_rotation(a_.state, b_.state, g, tolerance_, first, second)) return false;
#pragma unroll
        for (int i = 0; i < rows; ++i) {
            turn(a_.x[i], b_.x[i], first, second);
            turn(a_.j[i], b_.j[i], first, second);
        }
        return true;
    }

    __device__ void swap_columns(bool swap) {
#pragma unroll
        for (int i = 0; i < rows; ++i) {
            swap_where(swap, a_.x[i], b_.x[i]);
            swap_where(swap, a_.j[i], b_.j[i]);
        }
        swap_where(swap, a_.state.norm, b_.state.norm);
        swap_where(swap, a_.state.weight, b_.state.weight);
        swap_where(swap, a_.state.start, b_.state.start);
        swap_where(swap, a_.tag, b_.tag);
    }

    template <class V>
    __device__ static void swap_where(bool where, V &a, V &b) {
        const V old = a;
        a = where ? b : a;
        b = where ? old : b;
    }

    __device__ static void turn(T &x, T &y, T first, T second) {
        const T old = x;
        x -= first * y;
        y += second * old;
    }

    // Column b to the lane whose number differs in these bits.
    __device__ void travel(int bits) {
#pragma unroll
        for (int i = 0; i < rows; ++i) {
            b_.x[i] = __shfl_xor_sync(kAllLanes, b_.x[i], bits);
            b_.j[i] = __shfl_xor_sync(kAllLanes, b_.j[i], bits);
        }
        b_.state.norm = __shfl_xor_sync(kAllLanes, b_.state.norm, bits);
        b_.state.weight = __shfl_xor_sync(kAllLanes, b_.state.weight, bits);
        b_.state.start = __shfl_xor_sync(kAllLanes, b_.state.start, bits);
        b_.tag = __shfl_xor_sync(kAllLanes, b_.tag, bits);
    }

    // Column b of a lane in the lower half changes places with column a of its partner in the upper half.
    __device__ void split(int bit) {
        const bool upper = (pair_ & bit) != 0;
#pragma unroll
        for (int i = 0; i < rows; ++i) {
            exchange(a_.x[i], b_.x[i], bit, upper);
            exchange(a_.j[i], b_.j[i], bit, upper);
        }
        exchange(a_.state.norm, b_.state.norm, bit, upper);
        exchange(a_.state.weight, b_.state.weight, bit, upper);
        exchange(a_.state.start, b_.state.start, bit, upper);
        exchange(a_.tag, b_.tag, bit, upper);
    }

    template <class V>
    __device__ static void exchange(V &a, V &b, int bit, bool upper) {
        const V got = __shfl_xor_sync(kAllLanes, upper ? a : b, bit);
        a = upper ? got : a;
        b = upper ? b : got;
    }

    __device__ void finish_column(Column &c, int cols, bool by_j) {
        const T x_norm = sqrt(whole(dot(c.x, c.x))), j_norm = sqrt(whole(dot(c.j, c.j)));
        const T x_sign = sign_of(c.x), j_sign = sign_of(c.j), sign = by_j ? j_sign : x_sign;
        const T x_factor = sign / (x_norm > T(0) ? x_norm : T(1)), j_factor = sign / j_norm;
#pragma unroll
        for (int i = 0; i < rows; ++i) {
            c.x[i] = c.x[i] * x_factor + T(0); // no zero with a sign
            c.j[i] = c.j[i] * j_factor + T(0);
        }
        c.value = c.tag < cols ? x_norm / j_norm : T(-1);
    }

    // 1 or -1: what makes the first nearly largest element positive.
    __device__ T sign_of(const T (&u)[rows]) const {
        T largest = 0, first = 0;
#pragma unroll
        for (int i = 0; i < rows; ++i) largest = larger(fabs(u[i]), largest);
        if constexpr (halves == 2) largest = larger(largest, __shfl_xor_sync(kAllLanes, largest, pairs));
        const T limit = largest * kNearly<T>;
#pragma unroll
        for (int i = rows - 1; i >= 0; --i) first = limit > fabs(u[i]) ? first : u[i];
        if constexpr (halves == 2) {
            const T other = __shfl_xor_sync(kAllLanes, first, pairs), upper = half_ > 0 ? other : first;
            first = upper != T(0) ? upper : half_ > 0 ? first : other;
        }
        return first < T(0) ? T(-1) : T(1);
    }

    __device__ void count_before(T value, int tag) {
        a_.place += value > a_.value || (value == a_.value && tag < a_.tag);
        b_.place += value > b_.value || (value == b_.value && tag < b_.tag);
    }

    __device__ void put(const T (&u)[rows], int place, T factor, T *columns) const {
#pragma unroll
        for (int i = 0; i < rows; ++i) columns[place * step + half_ * rows + i] = u[i] * factor;
    }

    const int lane_, pair_, half_;
    Column a_, b_;
    T tolerance_;
    int exponent_;
    bool finite_, zero_, rotating_;
};

} // namespace fedlora
