// Rotations up to 32 x 32. A first launch serves matrices of full rank in little shared memory; one with room for everything
// takes what that leaves, and all blends.
#include "polar.cuh"
#include "team_polar.cuh"

namespace fedlora {
namespace {

constexpr int kBlock = 64;

template <class Team>
__device__ void write(const Team &polar, const PolarGroup &group, int64_t matrix) {
    constexpr int lanes = Team::lanes, step = Team::step;
    const int r = (int)group.M.rows;
    const bool finite = polar.finite();
    double *const Q = address<double>(group.Q, matrix), *const S = address<double>(group.singular_values, matrix);
    for (int e = polar.lane(); e < r * r; e += lanes) {
        const int i = e / r, c = e % r;
        Q[i * group.Q.row_stride + c * group.Q.col_stride] = finite ? polar.matrix()[c * step + i] : nan("");
    }
    const int64_t shift = polar.exponent() + (int64_t)scalar_of<const int32_t>(group.exponent, matrix);
    bool overflow = false;
    for (int c = polar.lane(); c < r; c += lanes) {
        const double value = finite ? times_power(polar.singular_values()[c], shift) : nan("");
        overflow |= isinf(value);
        S[c * group.singular_values.col_stride] = value;
    }
    overflow = __ballot_sync(polar.mask(), overflow) != 0;
    if (polar.lane() > 0) return;
    if (finite)
        write_verdict(group, matrix, polar.verdict(), polar.size(), overflow, polar.converged());
    else
        write_nonfinite(group, matrix);
}

// Blocks that a multiprocessor should hold: what the columns leave of its 64 K registers.
template <int N>
constexpr int kBlocks = 65536 / kBlock / ((8 * TeamPolar<N>::Solver::rows + 104) / 8 * 8);

// The matrix of a team.
struct Place {
    const PolarGroup &group;
    int64_t slot, matrix;
    __device__ Place(const GroupList<PolarGroup> &list, int64_t g, int64_t teams, int64_t team)
        : group(list.groups[g]), slot((int64_t)anew((int)blockIdx.x) * teams + team), matrix(slot - list.first[g] * teams) {}
};

template <int N>
__global__ void __launch_bounds__(kBlock, kBlocks<N>)
    polar_teams(GroupList<PolarGroup> list, PolarOptions options, int32_t *left, bool whole) {
    FEDLORA_DYNAMIC_SHARED(double, shared);
    using Team = TeamPolar<N>;
    constexpr int lanes = Team::lanes, step = Team::step, teams = kBlock / lanes;
    const auto place = [&] {
        const int64_t g = group_of(list, anew((int)blockIdx.x));
        return Place(list, g, teams, anew((int)threadIdx.x) / lanes);
    };
    const Place from = place();
    const int r = (int)from.group.M.rows;
    const bool mine = from.matrix < from.group.M.batch && !(whole && left && !left[from.slot]);
    if (!__any_sync(kAllLanes, mine)) return;

    const int team = (int)threadIdx.x / lanes;
    Team polar(shared + team * (whole ? Team::kWhole : Team::kPlain), r, mine);
    double size = 0;
    if (mine) {
        const fedlora_block &M = from.group.M;
        const double *const data = address<const double>(M, from.matrix);
        size = scalar_of<const double>(from.group.size, from.matrix);
        for (int e = polar.lane(); e < N * step; e += lanes) {
            const int i = e % step, c = e / step;
            polar.matrix()[e] = i < r && c < r ? data[i * M.row_stride + c * M.col_stride] : 0.0;
        }
    }
    __syncwarp();
    const bool served = polar.rotate(size, options, whole);
    const Place to = place();
    if (mine && left && !whole && polar.lane() == 0) left[to.slot] = !served;
    if (mine && served) write(polar, to.group, to.matrix);
}

} // namespace

// A kernel for matrices of up to `side` rows, and the doubles of shared memory that a team takes without and with completion.
struct PolarScheme {
    int64_t side;
    void (*kernel)(GroupList<PolarGroup>, PolarOptions, int32_t *, bool);
    int64_t teams, plain_bytes, whole_bytes;
};

namespace {

template <int N>
constexpr PolarScheme by_team() {
    using Team = TeamPolar<N>;
    constexpr int64_t teams = kBlock / Team::lanes;
    return {N, polar_teams<N>, teams, 8 * teams * Team::kPlain, 8 * teams * Team::kWhole};
}

const PolarScheme kSchemes[] = {by_team<2>(), by_team<4>(), by_team<8>(), by_team<16>(), by_team<32>()};

const PolarScheme &scheme_of(int64_t r) {
    const PolarScheme *scheme = kSchemes;
    while (scheme->side < r) ++scheme;
    return *scheme;
}

} // namespace

SmallPolar::SmallPolar(const std::vector<PolarGroup> &groups, const PolarOptions &options, Workspace &workspace, Upload &upload)
    : options_(options) {
    for (const PolarScheme &scheme : kSchemes) {
        std::vector<PolarGroup> members;
        std::vector<int64_t> first = {0};
        for (const PolarGroup &group : groups)
            if (&scheme_of(group.M.rows) == &scheme) {
                members.push_back(group);
                first.push_back(first.back() + (group.M.batch + scheme.teams - 1) / scheme.teams);
            }
        if (members.empty()) continue;
        const int64_t blocks = first.back();
        int32_t *const left = workspace.take<int32_t>(blocks * scheme.teams);
        shares_.push_back({&scheme, upload_groups(upload, members, first), blocks, left});
    }
}

void SmallPolar::launch(void *stream) const {
    for (const Share &share : shares_) {
        const PolarScheme &scheme = *share.scheme;
        int32_t *const left = options_.mixes() ? nullptr : share.left;
        const auto serve = [&](int64_t shared_bytes, bool whole) {
            const dim3 grid((unsigned)share.blocks);
            fedlora::launch(scheme.kernel, grid, dim3(kBlock), shared_bytes, stream, share.list, options_, left, whole);
        };
        if (left) serve(scheme.plain_bytes, false);
        serve(scheme.whole_bytes, true);
    }
}

} // namespace fedlora
