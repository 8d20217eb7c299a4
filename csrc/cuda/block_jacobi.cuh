// One-sided Jacobi on the columns of one matrix by one block of threads (docs/numerics.md, Core SVD): Y J = Z diag(s), J is not formed.
//
// Round robin: all pairs of a step are disjoint, each is turned by one warp from registers, and one barrier ends the step. A warp takes
// several pairs at once, and each part of it plans the rotation of one. Columns that do not fit into shared memory all at once come in
// panels: one stays while those after it pass by.
#pragma once

#include "block_qr.cuh"

namespace fedlora::block {

// To 2^-20 or better, over the whole range; the simulated device is as coarse as a real one.
__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.0f, x); }
__device__ __forceinline__ float reciprocal_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double reciprocal(double x) {
#ifdef __CUDA_ARCH__
    double y;
    asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
    return y;
#else
    return __hiloint2double(__double2hiint(1 / x), 0);
#endif
}
__device__ __forceinline__ double reciprocal_root(double x) {
#ifdef __CUDA_ARCH__
    double y;
    asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
    return y;
#else
    return __hiloint2double(__double2hiint(1 / sqrt(x)), 0);
#endif
}

// Squares of cosines. Pairs are turned from `turn` on, near the rounding of a product, because what the columns of Z lack in
// orthogonality becomes residual; but only a pair above `rest`, which rounding cannot reach, keeps the iteration going.
template <class T>
struct Thresholds {
    T turn, rest;
    __device__ explicit Thresholds(int rows)
        : turn(9 * Real<T>::roundoff * Real<T>::roundoff), rest(T(rows + 10) * Real<T>::roundoff * Real<T>::roundoff) {}
};

// x <- x - sine (y + half x), y <- y + sine (x - half y): sine = 2 half / (1 + half^2), half the tangent of half the angle.
template <class T>
struct Turn {
    T sine, half;
};

// The turn for two columns of squares a and b, which become the new ones, and product g; the longer column grows. No turn where
// the cosine is not above the threshold; a NaN never is. Everything is divided by a power of two near a + b, so that no square leaves
// the range. The angle may be a little off, which leaves that share of the product for the next sweep; but the turn must be one.
template <class T>
__device__ __forceinline__ Turn<T> plan_turn(T &a, T &b, T g, const Thresholds<T> &thresholds, bool &restless) {
    const T cosine = g * rsqrt_estimate(a) * rsqrt_estimate(b), square = cosine * cosine;
    if (!(square > thresholds.turn)) return {T(0), T(0)};
    restless |= square > thresholds.rest;
    const T f = inverse_power(a + b), delta = (b - a) * f, twice = (g + g) * f;
    const T sum = delta * delta + twice * twice, h = sum * reciprocal_root(sum);
    const T tangent = twice * reciprocal(delta + copysign(h, delta));
    const T secant2 = T(1) + tangent * tangent;
    const T half = tangent * reciprocal(T(1) + secant2 * reciprocal_root(secant2));
    const T whole = T(1) + half * half, guess = reciprocal(whole), error = T(1) - whole * guess;
    const T sine = T(2) * half * (guess + guess * (error + error * error));
    const T shift = sine * (sine * (a - b) + (g + g) * (T(1) - sine * half));
    a = larger(a - shift, T(0));
    b = larger(b + shift, T(0));
    return {sine, half};
}

// Columns in shared memory and their squares.
template <class T>
struct Side {
    Columns<T> columns;
    T *squares;
};

// Two columns that meet, x < y within one side; none where x < 0.
struct Pair {
    int x, y;
};

// All pairs among `count` columns, step by step: pair k of a step, for k up to half of them.
struct RoundRobin {
    int count;
    __device__ int steps() const { return (count + count % 2) - 1; }
    __device__ int pairs() const { return (count + count % 2) / 2; }
    __device__ Pair pair(int step, int k) const {
        const int ring = steps(), up = step + k, down = step - k;
        const int one = k == 0 ? ring : up < ring ? up : up - ring, other = down < 0 ? down + ring : down;
        const int low = one < other ? one : other, high = one < other ? other : one;
        return {high < count ? low : -1, high}; // an odd column rests
    }
};

// All pairs of one of `left` with one of `right` columns.
struct Crossing {
    int left, right;
    __device__ int steps() const { return left > right ? left : right; }
    __device__ int pairs() const { return left; }
    __device__ Pair pair(int step, int k) const {
        const int ring = steps(), up = step + k, y = up < ring ? up : up - ring;
        return {y < right ? k : -1, y};
    }
};

// K disjoint pairs of columns of X and Y, of up to 32 CH elements: part j of the warp brings the j-th.
template <int CH, int K, class T>
__device__ __forceinline__ void turn_pairs(const Side<T> &X, const Side<T> &Y, const Pair &mine, int rows, const Thresholds<T> &thresholds,
                                           bool &restless, int lane) {
    constexpr bool held = CH * (int)sizeof(T) <= 64; // more would not fit the registers beside what plans a turn
    T u[K][CH], v[K][CH], product[K];
#pragma unroll
    for (int j = 0; j < K; ++j) {
        const Pair pair = {of_part<K>(mine.x, j), of_part<K>(mine.y, j)};
        const int length = pair.x < 0 ? 0 : rows;
        const T *const x = X.columns[pair.x] + lane, *const y = Y.columns[pair.y] + lane;
        product[j] = 0;
#pragma unroll
        for (int i = 0; i < CH; ++i) {
            const bool here = i * kWarp + lane < length;
            u[j][i] = here ? x[i * kWarp] : T(0);
            v[j][i] = here ? y[i * kWarp] : T(0);
            product[j] += u[j][i] * v[j][i];
        }
    }
    const T g = part_sums<K>(product);
    T a = mine.x < 0 ? T(0) : X.squares[mine.x], b = mine.x < 0 ? T(0) : Y.squares[mine.y];
    const Turn<T> turn = plan_turn(a, b, g, thresholds, restless);
    if (!__any_sync(kAllLanes, turn.sine != T(0))) return;
    __syncwarp(); // all lanes have read the squares
    if (lane % (kWarp / K) == 0 && turn.sine != T(0)) {
        X.squares[mine.x] = a;
        Y.squares[mine.y] = b;
    }
#pragma unroll
    for (int j = 0; j < K; ++j) {
        const Pair pair = {of_part<K>(mine.x, j), of_part<K>(mine.y, j)};
        const T sine = of_part<K>(turn.sine, j), half = of_part<K>(turn.half, j);
        if (sine == T(0)) continue;
        T *const x = X.columns[pair.x] + lane, *const y = Y.columns[pair.y] + lane;
#pragma unroll
        for (int i = 0; i < CH; ++i)
            if (i * kWarp + lane < rows) {
                if constexpr (!held) u[j][i] = x[i * kWarp], v[j][i] = y[i * kWarp];
                x[i * kWarp] = u[j][i] - sine * (v[j][i] + half * u[j][i]);
                y[i * kWarp] = v[j][i] + sine * (u[j][i] - half * v[j][i]);
            }
    }
}

// Y J = Z diag(s) for Y of rows <= 32 CH and cols columns, and the squares of s; whether it came to rest.
template <int CH, class T>
class Jacobi {
  public:
    __device__ Jacobi(int rows, int cols, T *squares, T *starts)
        : rows_(rows), cols_(cols), squares_(squares), starts_(starts), thresholds_(rows) {}

    // Y in shared memory.
    __device__ __forceinline__ bool iterate(const Columns<T> &Y, int max_sweeps) {
        return sweep(Y, max_sweeps, [&] { turn_all({Y, squares_}, {Y, squares_}, RoundRobin{cols_}); });
    }

    // Y in global memory, by panels of so many columns, two of which have room in shared memory.
    __device__ __forceinline__ bool iterate(const Columns<T> &Y, T *room, int panel, int max_sweeps) {
        return sweep(Y, max_sweeps, [&] { turn_panels(Y, {room, rows_}, {room + panel * rows_, rows_}, panel); });
    }

  private:
    // How many pairs a warp turns at once: 32 registers of a thread hold them.
    static constexpr int K = CH * (int)sizeof(T) <= 16 ? 4 : CH * (int)sizeof(T) <= 32 ? 2 : 1;

    template <class TurnAll>
    __device__ __forceinline__ bool sweep(const Columns<T> &Y, int max_sweeps, const TurnAll &turn_them) {
        bool converged = false;
        for (int done = 0; done < max_sweeps && !converged; ++done) {
            measure(Y, done == 0);
            restless_ = false;
            turn_them();
            converged = __syncthreads_or(restless_) == 0;
        }
        measure(Y, false);
        return converged;
    }

    // Fresh squares. Columns become zero that the iteration might never end with: those so small that their products would underflow,
    // and those of which a sweep has left less than its own rounding errors. Ends with a barrier.
    __device__ __forceinline__ void measure(const Columns<T> &Y, bool first) const {
        const Team team;
        for (int c = team.warp; c < cols_; c += team.warps) {
            T *const y = Y[c];
            T square = 0;
            for (int i = team.lane; i < rows_; i += kWarp) square += y[i] * y[i];
            square = warp_sum(square);
            const ColumnState<T> state = {square, T(1), first ? T(0) : starts_[c]};
            __syncwarp();
            if (is_dust(state)) {
                for (int i = team.lane; i < rows_; i += kWarp) y[i] = 0;
                square = 0;
            }
            if (team.lane == 0) squares_[c] = starts_[c] = square;
        }
        __syncthreads();
    }

    // One panel stays while those after it pass by.
    __device__ __forceinline__ void turn_panels(const Columns<T> &Y, const Columns<T> &resting, const Columns<T> &passing, int panel) {
        for (int p = 0; p < cols_; p += panel) {
            const int wide = cols_ - p < panel ? cols_ - p : panel;
            copy_columns<T>({Y[p], Y.step}, resting, rows_, wide);
            __syncthreads();
            turn_all({resting, squares_ + p}, {resting, squares_ + p}, RoundRobin{wide});
            for (int q = p + panel; q < cols_; q += panel) {
                const int other = cols_ - q < panel ? cols_ - q : panel;
                copy_columns<T>({Y[q], Y.step}, passing, rows_, other);
                __syncthreads();
                turn_all({resting, squares_ + p}, {passing, squares_ + q}, Crossing{wide, other});
                copy_columns<T>(passing, {Y[q], Y.step}, rows_, other);
                __syncthreads();
            }
            copy_columns<T>(resting, {Y[p], Y.step}, rows_, wide);
            __syncthreads();
        }
    }

    // Every step ends with a barrier.
    template <class Order>
    __device__ __forceinline__ void turn_all(const Side<T> &X, const Side<T> &Y, const Order &order) {
        const Team team;
        for (int step = 0; step < order.steps(); ++step) {
            for (int first = team.warp; first < order.pairs(); first += K * team.warps) {
                const int k = first + team.lane / (kWarp / K) * team.warps;
                const Pair mine = k < order.pairs() ? order.pair(step, k) : Pair{-1, 0};
                turn_pairs<CH, K>(X, Y, mine, rows_, thresholds_, restless_, team.lane);
            }
            __syncthreads();
        }
    }

    const int rows_, cols_;
    T *const squares_, *const starts_;
    const Thresholds<T> thresholds_;
    bool restless_ = false;
};

} // namespace fedlora::block
