// Rotations beyond 32 x 32: the SVD of the block scheme between kernels of one block of threads to each matrix, which add Q up.
//
// Where singular values count as zero, U2^T V2 is decomposed as well, beside a multiple of the identity in the place of the other
// directions: the product of its vectors leaves those alone and turns the null bases so that the trace is largest.
#include "polar.cuh"
#include "tile.cuh"

namespace fedlora {

// What lies in the workspace for the matrices of a group, each array r x r to a matrix unless said otherwise.
struct LargePolarGroup {
    PolarGroup polar;
    double *A, *U, *Vh, *W1, *W2;
    double *S, *S2, *singular; // r
    struct LargePolarState *state;
    int32_t *active, *deficient, *info, *notes, *info2, *notes2; // 1
};

struct LargePolarState {
    double size;
    int exponent, rank;
    bool converged, reflected;
};

namespace {

constexpr int kBlock = 256, kMost = FEDLORA_CORE_SVD_MAX;
constexpr double kKept = 4; // above every singular value of U2^T V2

// The matrix of a block.
struct Place {
    const LargePolarGroup &group;
    int64_t matrix;
    int r;
    __device__ explicit Place(const GroupList<LargePolarGroup> &list, int64_t g)
        : group(list.groups[g]), matrix((int64_t)blockIdx.x - list.first[g]), r((int)group.polar.M.rows) {}
    __device__ double *square(double *all) const { return all + matrix * r * r; }
    __device__ double *row(double *all) const { return all + matrix * r; }
    __device__ LargePolarState &state() const { return group.state[matrix]; }
};

template <class F>
__device__ void each(int count, F &&f) {
    for (int e = (int)threadIdx.x; e < count; e += kBlock) f(e);
}

// write(i, j, sum_k left(i, k) right(k, j)) for all i, j < r, tiles of 32 x 16 to a warp; a barrier at the end.
template <class Left, class Right, class Write>
__device__ void product(int r, const Left &left, const Right &right, const Write &write) {
    const LaneOfTile lane;
    const int wide = (r + 15) / 16, tiles = (r + 31) / 32 * wide;
    for (int tile = (int)threadIdx.x / kWarp; tile < tiles; tile += kBlock / kWarp) {
        const int top = tile / wide * 32, first = tile % wide * 16;
        double c[2][2][4] = {};
        for (int k = 0; k < r; k += 16)
            multiply<4>(
                c, [&](int i, int s) { return top + i < r && k + s < r ? left(top + i, k + s) : 0.0; },
                [&](int s, int j) { return k + s < r && first + j < r ? right(k + s, first + j) : 0.0; });
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int i = top + 16 * m + lane.row(e), j = first + 8 * n + lane.col(e);
                    if (i < r && j < r) write(i, j, c[m][n][e]);
                }
    }
    __syncthreads();
}

__device__ void write_rotation(const Place &at, const double *Q) {
    const fedlora_block &to = at.group.polar.Q;
    double *const out = address<double>(to, at.matrix);
    each(at.r * at.r, [&](int e) {
        const int i = e / at.r, j = e % at.r;
        out[i * to.row_stride + j * to.col_stride] = Q ? Q[e] : i == j ? 1.0 : 0.0;
    });
}

// A = M 2^-exponent with a largest element in [1/2, 1), and what is known of it; a matrix that is not finite is done with.
__global__ void __launch_bounds__(kBlock) prepare(GroupList<LargePolarGroup> list) {
    __shared__ double largest[kBlock / kWarp];
    const Place at(list, group_of(list, blockIdx.x));
    const PolarGroup &polar = at.group.polar;
    const double *const M = address<const double>(polar.M, at.matrix);
    const auto element = [&](int e) { return M[e / at.r * polar.M.row_stride + e % at.r * polar.M.col_stride]; };
    const double size = scalar_of<const double>(polar.size, at.matrix);
    double most = 0;
    bool bad = !isfinite(size);
    each(at.r * at.r, [&](int e) {
        const double x = element(e);
        bad |= !isfinite(x);
        most = larger(fabs(x), most);
    });
    for (int o = kWarp / 2; o > 0; o /= 2) most = larger(most, __shfl_xor_sync(kAllLanes, most, o));
    if (threadIdx.x % kWarp == 0) largest[threadIdx.x / kWarp] = most;
    bad = __syncthreads_or(bad) != 0;
    for (int w = 0; w < kBlock / kWarp; ++w) most = larger(most, largest[w]);
    const int exponent = !bad && most > 0 ? exponent_of(most) : 0;
    if (threadIdx.x == 0) {
        at.state() = {times_power(size, -exponent), exponent, 0, true, false};
        at.group.active[at.matrix] = !bad;
        if (bad) write_nonfinite(polar, at.matrix);
    }
    double *const A = at.square(at.group.A), *const S = address<double>(polar.singular_values, at.matrix);
    double *const Q = address<double>(polar.Q, at.matrix);
    each(at.r * at.r, [&](int e) {
        if (bad)
            Q[e / at.r * polar.Q.row_stride + e % at.r * polar.Q.col_stride] = nan("");
        else
            A[e] = scaled_by(element(e), -exponent);
    });
    if (bad) each(at.r, [&](int c) { S[c * polar.singular_values.col_stride] = nan(""); });
}

// The rank of what was decomposed, M or its blend; where it is not full, A for the second SVD.
__global__ void __launch_bounds__(kBlock) weigh(GroupList<LargePolarGroup> list, PolarOptions options, bool blending) {
    const Place at(list, group_of(list, blockIdx.x));
    const int r = at.r;
    if (!at.group.active[at.matrix]) {
        if (threadIdx.x == 0) at.group.deficient[at.matrix] = 0;
        return;
    }
    const double *const S = at.row(at.group.S);
    LargePolarState &state = at.state();
    const double threshold = blending ? kSingularBlend : polar_threshold(r, state.size);
    const int rank = judge(S, r, threshold, false, options.special).rank;
    const bool deficient = rank > 0 && rank < r && options.blend > 0;
    if (!blending) each(r, [&](int c) { at.row(at.group.singular)[c] = S[c]; });
    if (threadIdx.x == 0) {
        state.rank = rank;
        state.converged = state.converged && !(at.group.info[at.matrix] & FEDLORA_INFO_NOT_CONVERGED);
        at.group.deficient[at.matrix] = deficient;
    }
    if (!deficient) return;
    const double *const U = at.square(at.group.U), *const Vh = at.square(at.group.Vh);
    double *const A = at.square(at.group.A);
    product(
        r, [&](int i, int k) { return U[k * r + i]; }, [&](int k, int j) { return Vh[j * r + k]; },
        [&](int i, int j, double x) { A[i * r + j] = i >= rank && j >= rank ? x : i == j ? kKept : 0.0; });
}

// Whether det Q < 0: see TeamPolar. Q is used up.
__device__ bool reflects(double *Q, int r) {
    bool negative = false;
    for (int k = 0; k < r; ++k) {
        const double *const pivot = Q + k * r;
        const double own = copysign(1.0, pivot[k]), inverse = 1.0 / (pivot[k] + own);
        negative ^= own < 0;
        for (int i = k + 1 + (int)threadIdx.x / kWarp; i < r; i += kBlock / kWarp) {
            double *const row = Q + i * r;
            const double factor = row[k] * inverse;
            for (int c = k + 1 + (int)threadIdx.x % kWarp; c < r; c += kWarp) row[c] -= factor * pivot[c];
        }
        __syncthreads();
    }
    return negative;
}

// Q of M or of its blend in W1, of which nothing else is kept.
__device__ void add_up(const Place &at, bool special, bool blending) {
    __shared__ double last_u[kMost], last_v[kMost]; // the smallest direction
    const int r = at.r, rank = at.state().rank;
    double *const A = at.square(at.group.A), *const U = at.square(at.group.U), *const Vh = at.square(at.group.Vh);
    double *const W1 = at.square(at.group.W1), *const W2 = at.square(at.group.W2);
    if (rank == 0) {
        each(r * r, [&](int e) { W1[e] = e % (r + 1) == 0; });
        __syncthreads();
        return;
    }
    const bool deficient = at.group.deficient[at.matrix] != 0;
    each(r, [&](int i) {
        double u = deficient ? 0 : U[i * r + r - 1], v = deficient ? 0 : Vh[(r - 1) * r + i];
        for (int k = 0; deficient && k < r; ++k) {
            u += U[i * r + k] * W1[k * r + r - 1];
            v += W2[(r - 1) * r + k] * Vh[k * r + i];
        }
        last_u[i] = u;
        last_v[i] = v;
    });
    __syncthreads();
    const auto multiplied = [r](const double *P, const double *R, double *out) {
        product(
            r, [=](int i, int k) { return P[i * r + k]; }, [=](int k, int j) { return R[k * r + j]; },
            [=](int i, int j, double x) { out[i * r + j] = x; });
    };
    if (deficient) {
        multiplied(W1, W2, A);
        multiplied(U, A, W1);
    }
    multiplied(deficient ? W1 : U, Vh, W2);
    if (special && (deficient || !blending)) {
        each(r * r, [&](int e) { A[e] = W2[e]; });
        __syncthreads();
        if (reflects(A, r)) {
            each(r * r, [&](int e) { W2[e] -= 2 * last_u[e / r] * last_v[e % r]; });
            if (threadIdx.x == 0) at.state().reflected = at.state().reflected || !deficient;
            __syncthreads();
        }
    }
    product(
        r, [=](int i, int k) { return W2[k * r + i]; }, [=](int k, int j) { return W2[k * r + j]; },
        [=](int i, int j, double x) { A[i * r + j] = 0.5 * ((i == j ? 1.0 : 0.0) - x); });
    product(
        r, [=](int i, int k) { return W2[i * r + k]; }, [=](int k, int j) { return A[k * r + j]; },
        [=](int i, int j, double x) { W1[i * r + j] = W2[i * r + j] + x; });
}

// From the vectors on: Q, then the answers, or the blend to decompose.
__global__ void __launch_bounds__(kBlock) form(GroupList<LargePolarGroup> list, PolarOptions options, bool blending) {
    const Place at(list, group_of(list, blockIdx.x));
    const int r = at.r;
    if (!at.group.active[at.matrix]) return;
    const PolarGroup &polar = at.group.polar;
    const double *const W1 = at.square(at.group.W1);
    if (options.blend > 0 || (options.special && at.state().rank == r)) add_up(at, options.special, blending);
    if (options.mixes() && !blending) {
        double *const A = at.square(at.group.A);
        each(r * r, [&](int e) { A[e] = (e % (r + 1) == 0 ? 1 - options.blend : 0.0) + options.blend * W1[e]; });
        return;
    }
    write_rotation(at, options.blend > 0 ? W1 : nullptr);
    const LargePolarState state = at.state();
    const double *const singular = at.row(at.group.singular);
    const int64_t shift = state.exponent + (int64_t)scalar_of<const int32_t>(polar.exponent, at.matrix);
    double *const S = address<double>(polar.singular_values, at.matrix);
    bool overflow = false;
    each(r, [&](int c) {
        const double value = times_power(singular[c], shift);
        overflow |= isinf(value);
        S[c * polar.singular_values.col_stride] = value;
    });
    overflow = __syncthreads_or(overflow) != 0;
    if (threadIdx.x > 0) return;
    const Verdict verdict = judge(singular, r, polar_threshold(r, state.size), state.reflected, options.special);
    write_verdict(polar, at.matrix, verdict, state.size, overflow, state.converged);
}

fedlora_block squares(double *data, int64_t r, int64_t batch) {
    return {(int64_t)data, r, r, r, 1, FEDLORA_FLOAT64, batch, r * r};
}
fedlora_block rows(double *data, int64_t r, int64_t batch) { return {(int64_t)data, 1, r, r, 1, FEDLORA_FLOAT64, batch, r}; }
fedlora_block codes(int32_t *data, int64_t batch) { return {(int64_t)data, 1, 1, 1, 1, FEDLORA_INT32, batch, 1}; }

std::vector<LargePolarGroup> with_room(const std::vector<PolarGroup> &groups, Workspace &workspace) {
    std::vector<LargePolarGroup> all;
    for (const PolarGroup &group : groups) {
        const int64_t r = group.M.rows, batch = group.M.batch;
        const auto square = [&] { return workspace.take<double>(batch * r * r); };
        const auto row = [&] { return workspace.take<double>(batch * r); };
        const auto code = [&] { return workspace.take<int32_t>(batch); };
        LargePolarGroup one = {};
        one.polar = group;
        one.A = square(), one.U = square(), one.Vh = square(), one.W1 = square(), one.W2 = square();
        one.S = row(), one.S2 = row(), one.singular = row();
        one.state = workspace.take<LargePolarState>(batch);
        one.active = code(), one.deficient = code();
        one.info = code(), one.notes = code(), one.info2 = code(), one.notes2 = code();
        all.push_back(one);
    }
    return all;
}

std::vector<int64_t> starts(const std::vector<LargePolarGroup> &groups) {
    std::vector<int64_t> first = {0};
    for (const LargePolarGroup &group : groups) first.push_back(first.back() + group.polar.M.batch);
    return first;
}

std::vector<SvdGroup> svds(const std::vector<LargePolarGroup> &groups, bool second) {
    std::vector<SvdGroup> all;
    for (const LargePolarGroup &g : groups) {
        const int64_t r = g.polar.M.rows, batch = g.polar.M.batch;
        all.push_back({squares(g.A, r, batch), squares(second ? g.W1 : g.U, r, batch), rows(second ? g.S2 : g.S, r, batch),
                       squares(second ? g.W2 : g.Vh, r, batch), codes(second ? g.info2 : g.info, batch),
                       codes(second ? g.notes2 : g.notes, batch), second ? g.deficient : g.active});
    }
    return all;
}

} // namespace

LargePolar::LargePolar(const std::vector<PolarGroup> &groups, const PolarOptions &options, Workspace &workspace, Upload &upload)
    : LargePolar(with_room(groups, workspace), options, workspace, upload) {}

LargePolar::LargePolar(const std::vector<LargePolarGroup> &groups, const PolarOptions &options, Workspace &workspace,
                       Upload &upload)
    : options_(options),
      matrices_(starts(groups).back()),
      list_(upload_groups(upload, groups, starts(groups))),
      first_(svds(groups, false), workspace, upload),
      second_(svds(groups, true), workspace, upload) {}

void LargePolar::launch(void *stream) const {
    const dim3 grid((unsigned)matrices_), block(kBlock);
    fedlora::launch(prepare, grid, block, 0, stream, list_);
    for (const bool blending : {false, true}) {
        if (blending && !options_.mixes()) return;
        first_.launch(0, stream);
        fedlora::launch(weigh, grid, block, 0, stream, list_, options_, blending);
        second_.launch(0, stream);
        fedlora::launch(form, grid, block, 0, stream, list_, options_, blending);
    }
}

} // namespace fedlora
