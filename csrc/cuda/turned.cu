// X Q in the dtype of X. Memory sets the pace: numbers are fetched and written sixteen bytes at a time whichever way they lie, by
// way of shared memory, where they lie by columns.
//
// A block of threads turns tiles of 128 rows. A thread adds up four rows by twice four columns, in the order of the columns of X,
// by fused multiply-add: float64 in float64, all else in float32.
#include "turned.cuh"

#include <algorithm>

#include "quads.cuh"
#include "slots.cuh"

namespace fedlora {

struct TurnedTask {
    Turned turned;
    int64_t tiles, each, blocks; // tiles of rows of a matrix, those that a block takes, and its blocks
};

namespace {

constexpr int kTurnStrip = 32;

// What numbers of a dtype are multiplied in.
template <class S>
struct ArithmeticOf {
    using Type = float;
};
template <>
struct ArithmeticOf<double> {
    using Type = double;
};

// Columns of a strip of X or of the answer, and rows of a strip of Q: four more than whole lines, so that few lanes meet in a
// bank.
template <class T>
struct alignas(16) TurnShared {
    static constexpr int kLine = kTurnTile + 4, kRow = kTurnStrip + 4;
    T tile[kTurnStrip][kLine], Q[kTurnStrip][kRow];
};

template <class S>
class TileTurn {
  public:
    using T = typename ArithmeticOf<S>::Type;

    __device__ TileTurn(const fedlora_block &X, const fedlora_block &Q, const fedlora_block &out, int64_t matrix, TurnShared<T> &shared)
        : X_(X), Q_(Q), out_(out), matrix_(matrix), r_((int)X.cols), shared_(shared) {}

    __device__ bool is_identity() const {
        bool same = true;
        for (int e = (int)threadIdx.x; e < r_ * r_; e += kTurnThreads) same &= q(e / r_, e % r_) == (e / r_ == e % r_ ? 1.0 : 0.0);
        return __syncthreads_and(same);
    }

    // Rows [first, first + rows), bit for bit; whether they are finite.
    __device__ bool copy(int64_t first, int rows) const {
        bool finite = true;
        for_quads(X_, rows, r_, [&](int row, int column, int64_t along, int count, bool down) {
            Four four;
            S x;
            load_four(four, at(X_, first + row, column), along, count);
            store_four(four, at(out_, first + row, column), down ? out_.row_stride : out_.col_stride, count);
            for (int i = 0; i < 4; ++i) take(four, i, x), finite &= i >= count || is_finite(widen(x));
        });
        return finite;
    }

    // The same of X Q.
    __device__ bool turn(int64_t first, int rows) const {
        bool finite = true;
        for (int column = 0; column < r_; column += kTurnStrip) {
            const int columns = min(r_ - column, kTurnStrip);
            T sums[2][4][4] = {};
            for (int depth = 0; depth < r_; depth += kTurnStrip) {
                const int deep = min(r_ - depth, kTurnStrip);
                __syncthreads();
                fetch(first, rows, depth, deep);
                fetch_Q(depth, deep, column, columns);
                __syncthreads();
                multiply(sums, deep, columns);
            }
            __syncthreads();
#pragma unroll
            for (int g = 0; g < 2; ++g)
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    four_at(&shared_.tile[own_column(g) + c][4 * lane()]) = {{sums[g][0][c], sums[g][1][c], sums[g][2][c], sums[g][3][c]}};
            __syncthreads();
            finite &= write(first, rows, column, columns);
        }
        return finite;
    }

  private:
    struct alignas(16) Fours {
        T of[4];
    };
    __device__ static Fours &four_at(T *x) { return *reinterpret_cast<Fours *>(x); }

    __device__ static int lane() { return (int)threadIdx.x % kWarp; }
    __device__ static int warp() { return (int)threadIdx.x / kWarp; }

    __device__ double q(int row, int column) const {
        return address<double>(Q_, matrix_)[row * Q_.row_stride + column * Q_.col_stride];
    }

    __device__ S *at(const fedlora_block &b, int64_t row, int64_t column) const { return element<S>(b, matrix_, row, column); }

    __device__ void fetch(int64_t first, int rows, int depth, int deep) const {
        for_quads(X_, rows, deep, [&](int row, int column, int64_t along, int count, bool down) {
            Four four;
            S x;
            load_four(four, at(X_, first + row, depth + column), along, count);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                take(four, i, x);
                if (i < count) shared_.tile[column + (down ? 0 : i)][row + (down ? i : 0)] = (T)widen(x);
            }
        });
    }

    __device__ void fetch_Q(int depth, int deep, int column, int columns) const {
        for (int e = (int)threadIdx.x; e < deep * columns; e += kTurnThreads)
            shared_.Q[e / columns][e % columns] = (T)q(depth + e / columns, column + e % columns);
    }

    // A warp has two groups of four columns, a lane four rows.
    __device__ static int own_column(int group) { return 4 * (warp() + kTurnWarps * group); }

    __device__ void multiply(T (&sums)[2][4][4], int deep, int columns) const {
        const int groups = own_column(1) < columns ? 2 : own_column(0) < columns ? 1 : 0;
#pragma unroll 2
        for (int i = 0; i < deep; ++i) {
            const Fours x = four_at(&shared_.tile[i][4 * lane()]);
#pragma unroll
            for (int g = 0; g < 2; ++g) {
                if (g >= groups) continue;
                const Fours q = four_at(&shared_.Q[i][own_column(g)]);
#pragma unroll
                for (int r = 0; r < 4; ++r)
#pragma unroll
                    for (int c = 0; c < 4; ++c) sums[g][r][c] = fma(x.of[r], q.of[c], sums[g][r][c]);
            }
        }
    }

    __device__ bool write(int64_t first, int rows, int column, int columns) const {
        bool finite = true;
        for_quads(out_, rows, columns, [&](int row, int c, int64_t along, int count, bool down) {
            Four four;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                S rounded = S{};
                if (i < count) narrow((double)shared_.tile[c + (down ? 0 : i)][row + (down ? i : 0)], rounded);
                finite &= is_finite(widen(rounded));
                put(four, i, rounded);
            }
            store_four(four, at(out_, first + row, column + c), along, count);
        });
        return finite;
    }

    const fedlora_block &X_, &Q_, &out_;
    const int64_t matrix_;
    const int r_;
    TurnShared<T> &shared_;
};

// Float64 is another kernel, since it takes twice the registers and shared memory.
template <bool Wide>
__global__ void __launch_bounds__(kTurnThreads, Wide ? 3 : 4) turn_tiles(const TurnedTask *tasks, const int64_t *first, int64_t count) {
    FEDLORA_DYNAMIC_SHARED(unsigned char, shared);
    const int64_t slot = blockIdx.x, g = slot_group(first, count, slot);
    const TurnedTask &task = tasks[g];
    const int64_t matrix = (slot - first[g]) / task.blocks, begin = (slot - first[g]) % task.blocks * task.each;
    with_float(task.turned.X.dtype, [&](auto kind) {
        if constexpr (Wide != std::is_same_v<decltype(kind), double>) return;
        using Tile = TileTurn<decltype(kind)>;
        const Tile tile(task.turned.X, task.turned.Q, task.turned.out, matrix, *reinterpret_cast<TurnShared<typename Tile::T> *>(shared));
        const bool same = tile.is_identity();
        bool finite = true;
        for (int64_t t = begin; t < min(begin + task.each, task.tiles); ++t) {
            const int rows = (int)min(task.turned.X.rows - t * kTurnTile, (int64_t)kTurnTile);
            finite &= same ? tile.copy(t * kTurnTile, rows) : tile.turn(t * kTurnTile, rows);
        }
        if (task.turned.marks && __syncthreads_or(!finite) && threadIdx.x == 0) atomicOr(task.turned.marks + matrix, kTurnedBad);
    });
}

int64_t tiles_of(const Turned &t) { return t.X.cols ? (t.X.rows + kTurnTile - 1) / kTurnTile : 0; }

} // namespace

int status_of(const Turned &t) {
    if (!is_float(t.X.dtype) || t.out.dtype != t.X.dtype || t.Q.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    if (t.X.rows < 0 || t.X.cols < 0 || t.X.batch < 0) return FEDLORA_BAD_SHAPE;
    if (t.out.rows != t.X.rows || t.out.cols != t.X.cols || t.out.batch != t.X.batch) return FEDLORA_BAD_SHAPE;
    return t.Q.rows == t.X.cols && t.Q.cols == t.X.cols && t.Q.batch == t.X.batch ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

namespace {

TurnedList list_of(const std::vector<Turned> &all, bool wide, int64_t each, Upload &upload) {
    std::vector<TurnedTask> tasks;
    std::vector<int64_t> first = {0};
    for (const Turned &turned : all) {
        if ((turned.X.dtype == FEDLORA_FLOAT64) != wide) continue;
        const int64_t tiles = tiles_of(turned);
        tasks.push_back({turned, tiles, each, (tiles + each - 1) / each});
        first.push_back(first.back() + turned.X.batch * tasks.back().blocks);
    }
    return {upload.add(tasks), upload.add(first), (int64_t)tasks.size(), first.back()};
}

} // namespace

Turns::Turns(const std::vector<Turned> &all, Upload &upload) {
    int64_t tiles = 0;
    for (const Turned &turned : all) tiles += turned.X.batch * tiles_of(turned);
    // several tiles to a block where there are enough of them: each has to look at all of Q
    const int64_t each = std::clamp<int64_t>(tiles / (32 * limits().processors), 1, 8);
    for (int wide = 0; wide < 2; ++wide) lists_[wide] = list_of(all, wide, each, upload);
}

void Turns::launch(void *stream) const {
    const TurnedList &narrow = lists_[0], &wide = lists_[1];
    fedlora::launch(turn_tiles<false>, dim3((unsigned)narrow.blocks), dim3(kTurnThreads), sizeof(TurnShared<float>), stream,
                    narrow.tasks, narrow.first, narrow.count);
    fedlora::launch(turn_tiles<true>, dim3((unsigned)wide.blocks), dim3(kTurnThreads), sizeof(TurnShared<double>), stream, wide.tasks,
                    wide.first, wide.count);
}

} // namespace fedlora

extern "C" {

int fedlora_turned_workspace(const fedlora_block *X, const fedlora_block *Q, const fedlora_block *out, int64_t groups, int64_t,
                             int64_t *bytes) {
    using namespace fedlora;
    if (!X || !Q || !out || !bytes || groups < 0) return FEDLORA_BAD_ARGUMENT;
    std::vector<Turned> all;
    for (int64_t g = 0; g < groups; ++g) all.push_back({X[g], Q[g], out[g], nullptr});
    Workspace counted;
    Upload upload(counted);
    const Turns plan(all, upload);
    *bytes = counted.bytes();
    return FEDLORA_OK;
}

int fedlora_turned(const fedlora_block *X, const fedlora_block *Q, const fedlora_block *out, int64_t groups, void *workspace,
                   int64_t workspace_bytes, int64_t, void *stream) {
    using namespace fedlora;
    if (!X || !Q || !out || !workspace || groups < 0) return FEDLORA_BAD_ARGUMENT;
    std::vector<Turned> all;
    for (int64_t g = 0; g < groups; ++g) {
        all.push_back({X[g], Q[g], out[g], nullptr});
        if (const int status = status_of(all.back())) return status;
    }
    Workspace memory(workspace, workspace_bytes);
    Upload upload(memory);
    const Turns plan(all, upload);
    if (!memory.fits()) return FEDLORA_BAD_WORKSPACE;
    upload.send(stream);
    plan.launch(stream);
    return finish();
}

} // extern "C"
