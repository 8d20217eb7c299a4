// Rotation of one small correlation by a part of a warp, on top of its SVD (docs/numerics.md, Procrustes).
//
// Q = U V^T is made orthogonal to the last bits by one Newton-Schulz step. Where singular values count as zero, a second SVD
// turns the null bases U2 and V2 so that the trace is largest; a blend takes one or two more. All of these are the same code,
// which teams of a warp go through together, each with a matrix of its own stage.
#pragma once

#include "completion.cuh"
#include "polar_rule.cuh"
#include "team_svd.cuh"

namespace fedlora {

template <int N>
class TeamPolar {
  public:
    using Solver = TeamSvd<double, N, (N < 16 ? 1 : 2)>;
    static constexpr int lanes = Solver::lanes, step = Solver::step;

    // Doubles of shared memory of a team: enough for matrices of full rank that are not blended, and for all.
    static constexpr int kPlain = 8 + 4 * N + 2 * N * step, kWhole = 8 + 4 * N + 4 * N * step;

    // Teams that are not present take part in the steps of the warp and touch no memory but to read what they throw away.
    __device__ TeamPolar(double *room, int r, bool present)
        : room_(room), r_(r), lane_((int)threadIdx.x % lanes), present_(present) {}

    // Where M goes, by columns `step` apart, its other elements zero, and where Q is found.
    __device__ double *matrix() const { return room_ + 8 + 4 * N; }
    // Those of M 2^-exponent.
    __device__ double *singular_values() const { return room_ + 8; }
    __device__ int lane() const { return lane_; }
    __device__ unsigned mask() const {
        return lanes == kWarp ? kAllLanes : ((1u << (lanes % kWarp)) - 1u) << ((int)threadIdx.x % kWarp / lanes * lanes);
    }
    __device__ bool finite() const { return state().finite; }
    __device__ bool converged() const { return state().converged; }
    __device__ int exponent() const { return state().exponent; }
    __device__ double size() const { return state().size; }
    __device__ const Verdict &verdict() const { return state().verdict; }

    // The rotation, for data of this size beside M; all lanes of the warp. False, with nothing to be found, where the room for
    // all is needed and `whole` says that it is not there.
    __device__ bool rotate(double size, const PolarOptions &options, bool whole) {
        if (present_)
            update([&](State &now) { now = {{0, false, 0}, options, size, 0, 0, kFirst, whole, false, true, false, true}; });
#pragma unroll 1
        while (__any_sync(kAllLanes, stage() != kDone)) {
            Solver solver;
            const int n = completing() ? r_ - state().rank : r_;
            solver.load(completing() ? P() : U());
            solver.iterate(n, kPolarSweeps, stage() != kDone);
            room_ = anew(room_);
            r_ = anew(r_);
            lane_ = anew(lane_);
            solver.finish(completing() ? r_ - state().rank : r_, false);
            __syncwarp();
            if (stage() != kDone) advance(solver);
            __syncwarp();
        }
        return present_ && state().served;
    }

  private:
    static constexpr int kPolarSweeps = 60;
    enum Stage { kFirst, kCompletion, kBlend, kBlendCompletion, kDone };

    // What is known of the matrix. In shared memory: registers are the columns'.
    struct State {
        Verdict verdict;
        PolarOptions options;
        double size;
        int exponent, rank, stage;
        bool whole, finite, converged, reflected, served;
    };
    static_assert(sizeof(State) <= 64, "the room does not hold the state");

    __device__ State &state() const { return *reinterpret_cast<State *>(room_); }
    __device__ double *values() const { return room_ + 8 + N; }
    __device__ double *last_u() const { return room_ + 8 + 2 * N; } // the smallest direction, u doubled
    __device__ double *last_v() const { return room_ + 8 + 3 * N; }
    // By columns.
    __device__ double *U() const { return matrix(); }
    __device__ double *V() const { return matrix() + N * step; }
    __device__ double *P() const { return matrix() + 2 * N * step; }
    __device__ double *R() const { return matrix() + 3 * N * step; }

    __device__ int stage() const { return present_ ? state().stage : (int)kDone; }
    __device__ bool completing() const { return stage() == kCompletion || stage() == kBlendCompletion; }
    __device__ bool blending() const { return stage() == kBlend || stage() == kBlendCompletion; }
    __device__ void proceed(Stage to) const {
        update([to](State &now) { now.stage = to; });
    }

    template <class F>
    __device__ void update(F &&f) const {
        __syncwarp(mask());
        if (lane() == 0) f(state());
        __syncwarp(mask());
    }

    // Elements ti + k (N / tall), tj + k (N / wide) of an N x N product are a lane's.
    static constexpr int tall = N < 4 ? N : 4, wide = N * N / lanes / tall;

    struct Tile {
        double sum[tall][wide];
    };

    // From an SVD to the next one, or to the end.
    __device__ void advance(const Solver &solver) {
        if (completing()) {
            store(solver, r_ - state().rank, P(), R());
            turn_base(U() + state().rank * step, P());
            turn_base(V() + state().rank * step, R());
            form(state().options.special);
            return next();
        }
        store(solver, r_, U(), V());
        weigh(solver);
        if (!state().finite) return proceed(kDone);
        const int rank = state().rank;
        if (rank > 0 && rank < r_ && state().options.blend > 0) {
            if (state().whole) compare_bases();
            update([&](State &now) {
                now.served = now.whole;
                now.stage = !now.whole ? kDone : now.stage == kFirst ? kCompletion : kBlendCompletion;
            });
            return;
        }
        // Q must be known for itself, or for its determinant.
        if (state().options.blend > 0 || (state().options.special && rank == r_)) form(state().options.special && !blending());
        next();
    }

    __device__ int row_of(int k) const { return lane() / (N / wide) + k * (N / tall); }
    __device__ int col_of(int k) const { return lane() % (N / wide) + k * (N / wide); }

    // sum_c a(c, i) b(c, j), element (c, i) of a at a[c * a_step + i * a_gap], and so on.
    __device__ Tile product(const double *a, int a_step, int a_gap, const double *b, int b_step, int b_gap, int depth) const {
        Tile tile;
#pragma unroll
        for (int i = 0; i < tall; ++i)
#pragma unroll
            for (int j = 0; j < wide; ++j) tile.sum[i][j] = 0;
#pragma unroll 1
        for (int c = 0; c < depth; ++c) {
            double left[tall];
#pragma unroll
            for (int i = 0; i < tall; ++i) left[i] = a[c * a_step + row_of(i) * a_gap];
#pragma unroll
            for (int j = 0; j < wide; ++j) {
                const double right = b[c * b_step + col_of(j) * b_gap];
#pragma unroll
                for (int i = 0; i < tall; ++i) tile.sum[i][j] += left[i] * right;
            }
        }
        __syncwarp(mask()); // what was read may now be written over
        return tile;
    }

    template <class F>
    __device__ void each(F &&f) const {
#pragma unroll
        for (int i = 0; i < tall; ++i)
#pragma unroll
            for (int j = 0; j < wide; ++j) f(i, j, row_of(i), col_of(j));
        __syncwarp(mask());
    }

    // Both sides, complete, and the values.
    __device__ void store(const Solver &solver, int n, double *left, double *right) const {
        solver.put_x(left);
        solver.put_j(right);
        solver.put_values(values());
        update([&](State &now) { now.converged = now.converged && solver.converged(); });
        int positive = 0;
        while (positive < n && values()[positive] > 0) ++positive;
        complete_columns<lanes>(left, step, n, positive, n, lane(), mask());
        __syncwarp(mask());
    }

    // What the singular values of M or of a blend say.
    __device__ void weigh(const Solver &solver) const {
        if (blending()) {
            const double threshold = times_power(kSingularBlend, -solver.exponent());
            update([&](State &now) { now.rank = judge(values(), r_, threshold, false, state().options.special).rank; });
            return;
        }
        update([&](State &now) {
            now.finite = solver.finite() && isfinite(now.size);
            now.exponent = solver.exponent();
            now.size = now.finite ? times_power(now.size, -now.exponent) : 0.0;
            now.rank = judge(values(), r_, polar_threshold(r_, now.size), false, state().options.special).rank;
            for (int c = 0; c < r_; ++c) singular_values()[c] = values()[c];
        });
    }

    // P = U2^T V2 over the columns that do not count.
    __device__ void compare_bases() const {
        const int rank = state().rank;
        const Tile tile = product(U(), 1, step, V(), 1, step, r_);
        for (int e = lane(); e < N * step; e += lanes) P()[e] = 0;
        __syncwarp(mask());
        each([&](int i, int j, int row, int col) {
            if (row >= rank && col >= rank && row < r_ && col < r_) P()[(col - rank) * step + row - rank] = tile.sum[i][j];
        });
    }

    // U2 <- U2 P, or V2 <- V2 R.
    __device__ void turn_base(double *base, const double *turn) const {
        const Tile tile = product(base, step, 1, turn, 1, step, r_ - state().rank);
        each([&](int i, int j, int row, int col) {
            if (col < r_ - state().rank) base[col * step + row] = tile.sum[i][j];
        });
    }

    // Q in the place of U, of which V is used up. flip: the smallest direction is turned round where that takes Q into SO(r).
    __device__ void form(bool flip) const {
        if (state().rank == 0) return set_identity();
        for (int i = lane(); i < r_; i += lanes) {
            last_u()[i] = 2 * U()[(r_ - 1) * step + i];
            last_v()[i] = V()[(r_ - 1) * step + i];
        }
        const Tile q = product(U(), step, 1, V(), step, 1, r_);
        each([&](int i, int j, int row, int col) { U()[col * step + row] = V()[col * step + row] = q.sum[i][j]; });
        if (flip && reflects()) {
            update([&](State &now) { now.reflected = now.rank == r_; });
            for (int e = lane(); e < r_ * r_; e += lanes) U()[e / r_ * step + e % r_] -= last_u()[e % r_] * last_v()[e / r_];
            __syncwarp(mask());
        }
        orthonormalise();
    }

    // Whether det Q < 0, from an elimination without pivoting of Q + diag(signs), stable for orthogonal Q: the signs of the
    // pivots multiply to it. The copy in V is used up.
    __device__ bool reflects() const {
        bool negative = false;
        for (int k = 0; k < r_; ++k) {
            const double *const pivot = V() + k * step;
            const double own = copysign(1.0, pivot[k]), inverse = 1.0 / (pivot[k] + own);
            negative ^= own < 0;
            for (int i = lane(); i < r_; i += lanes) {
                if (i <= k) continue;
                double *const row = V() + i * step;
                const double factor = row[k] * inverse;
                for (int c = k + 1; c < r_; ++c) row[c] -= factor * pivot[c];
            }
            __syncwarp(mask());
        }
        return negative;
    }

    // Q <- Q + Q (1 - Q^T Q) / 2: singular vectors miss orthogonality by a multiple of u that grows with r.
    __device__ void orthonormalise() const {
        const Tile gram = product(U(), 1, step, U(), 1, step, r_);
        each([&](int i, int j, int row, int col) { V()[col * step + row] = 0.5 * ((row == col ? 1.0 : 0.0) - gram.sum[i][j]); });
        const Tile change = product(U(), step, 1, V(), 1, step, r_);
        each([&](int i, int j, int row, int col) { U()[col * step + row] += change.sum[i][j]; });
    }

    __device__ void set_identity() const {
        __syncwarp(mask());
        for (int e = lane(); e < N * step; e += lanes) U()[e] = e % (step + 1) == 0 && e / step < r_ ? 1.0 : 0.0;
        __syncwarp(mask());
    }

    // From Q on: the blend, if there is one to make.
    __device__ void next() const {
        if (blending()) return proceed(kDone);
        update([&](State &now) {
            now.verdict = judge(singular_values(), r_, polar_threshold(r_, now.size), now.reflected, now.options.special);
            now.stage = now.options.mixes() ? kBlend : kDone;
        });
        if (state().options.blend == 0) set_identity();
        if (!state().options.mixes()) return;
        for (int e = lane(); e < N * N; e += lanes) {
            const int row = e % N, col = e / N;
            const double part = state().options.blend * U()[col * step + row];
            U()[col * step + row] = row == col && row < r_ ? (1.0 - state().options.blend) + part : part;
        }
        __syncwarp(mask());
    }

    double *room_;
    int r_, lane_;
    const bool present_;
};

} // namespace fedlora
