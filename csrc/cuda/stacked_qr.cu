// fedlora_stacked_qr: QR of blocks side by side.
//
// Stacks that are well conditioned, where float32 is the answer, go by their Gram; all others by reflections. Who goes which
// way is found out on the device: both ways are launched, and a matrix is left alone by the one that is not its own.
#include <algorithm>
#include <optional>

#include "gram.cuh"
#include "mixed_tile.cuh"
#include "stacked_task.cuh"
#include "tall_qr.cuh"

namespace fedlora {
namespace {

constexpr int64_t kWaveBytes = int64_t(1) << 30; // of scratch: matrices that take more are done in waves

struct Problem {
    const fedlora_block *X;
    int64_t count;
    fedlora_block weights, R, rank, info, notes;
    const fedlora_block *Q;

    int64_t rows() const { return R.rows && count ? X[0].rows : 0; }
    bool empty() const { return R.rows == 0 || R.cols == 0; }
    bool easy() const { return R.dtype == FEDLORA_FLOAT32 && rows() >= R.cols && !empty(); }
};

// Matrices by rows, `gap` apart, one after the other `step` apart.
fedlora_block numbers(double *data, int64_t rows, int64_t cols, int64_t gap, int64_t batch, int64_t step) {
    return {reinterpret_cast<int64_t>(data), rows, cols, gap, 1, FEDLORA_FLOAT64, batch, step};
}

// Matrices [first, first + batch) of a table.
fedlora_block part_of(fedlora_block block, int64_t first, int64_t batch) {
    block.data += first * block.batch_stride * size_of(block.dtype);
    block.batch = batch;
    return block;
}

int check(const Problem &p) {
    const int64_t batch = p.R.batch, rows = p.count ? p.X[0].rows : 0;
    if (p.count < 0 || batch < 0 || p.R.rows < 0 || p.R.cols < 0) return FEDLORA_BAD_SHAPE;
    int64_t width = 0, dtype = FEDLORA_FLOAT32;
    for (int64_t k = 0; k < p.count; ++k) {
        const fedlora_block &X = p.X[k];
        if (!is_float(X.dtype)) return FEDLORA_BAD_DTYPE;
        if (X.batch != batch || X.rows != rows || rows < 0 || X.cols < 0) return FEDLORA_BAD_SHAPE;
        width += X.cols;
        if (X.dtype == FEDLORA_FLOAT64) dtype = FEDLORA_FLOAT64;
    }
    if (p.R.dtype != dtype || p.weights.dtype != FEDLORA_FLOAT64 || (p.Q && p.Q->dtype != dtype)) return FEDLORA_BAD_DTYPE;
    const auto scalar = [&](const fedlora_block &b) {
        return b.rows == 1 && b.cols == 1 && b.batch == batch && b.dtype == FEDLORA_INT32;
    };
    const bool fit = p.R.cols == width && p.R.rows == std::min(rows, width) && width <= FEDLORA_STACKED_QR_MAX;
    const bool fit_weights = p.weights.rows == batch && p.weights.cols == p.count && p.weights.batch == 1;
    const bool fit_codes = scalar(p.rank) && scalar(p.info) && scalar(p.notes);
    const bool fit_Q = !p.Q || ((p.Q->rows == rows || !p.count) && p.Q->cols == p.R.rows && p.Q->batch == batch);
    return fit && fit_weights && fit_codes && fit_Q ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

// Some matrices of a group.
struct Share {
    Problem problem;
    int64_t first, batch;
};

// All of one call, or of one wave of it.
class StackedQR {
  public:
    StackedQR(const std::vector<Share> &shares, Workspace &workspace, Upload &upload) {
        for (const Share &share : shares) add(share, workspace, upload);
        tall_.emplace(stacks_, workspace, upload);
        products_.emplace(*tall_, turned_, workspace, upload);
        grams_.emplace(summed_, workspace, upload);
        const bool narrow = all_narrow(mixed_);
        std::vector<MixedTable> tables;
        for (const MixedSum &sum : mixed_) {
            tables.push_back(table_of(sum, narrow, upload));
            tables.back().quads = upload.add(all_quads(sum));
        }
        tiles_ = tiles_of(tables, narrow, upload);
        easy_list_ = list_of(easy_, upload);
        other_list_ = list_of(other_, upload);
        all_list_ = list_of(all_, upload);
        first_piece_ = upload.add(first_pieces_);
    }

    void launch(void *stream) const {
        grams_->launch(stream);
        launch_stacked_gram(easy_list_, shared_bytes_, stream);
        launch_tiles(tiles_, stream);
        launch_stacked_largest(other_list_, first_piece_, first_pieces_.back(), widest_, stream);
        launch_stacked_scale(other_list_, stream);
        tall_->launch(stream);
        launch_stacked_echelon(all_list_, stream);
        products_->launch(stream);
    }

  private:
    void add(const Share &share, Workspace &workspace, Upload &upload) {
        const Problem &p = share.problem;
        const int64_t R = p.R.cols, k = p.R.rows, N = share.batch, first = share.first;
        StackedTask task = {};
        task.count = p.count, task.rows = p.rows(), task.width = R, task.k = k, task.batch = N;
        task.R = part_of(p.R, first, N), task.rank = part_of(p.rank, first, N);
        task.info = part_of(p.info, first, N), task.notes = part_of(p.notes, first, N);
        if (p.Q) task.Q = part_of(*p.Q, first, N);
        if (p.empty()) {
            task.k = 0;
            all_.push_back(task);
            return;
        }
        std::vector<fedlora_block> X;
        std::vector<int32_t> block_of;
        for (int64_t b = 0; b < p.count; ++b) {
            X.push_back(part_of(p.X[b], first, N));
            block_of.insert(block_of.end(), (size_t)p.X[b].cols, (int32_t)b);
        }
        blocks_.push_back(std::move(X)); // the plans look at it until they are made
        const fedlora_block *const blocks = blocks_.back().data();
        task.X = upload.add(blocks, p.count);
        task.block_of = upload.add(block_of);
        add_weights(share, task, upload);
        task.scale = workspace.take<double>(N * R);
        task.exponents = workspace.take<int32_t>(N * R);
        task.hard = workspace.take<int32_t>(N);
        task.triangular = workspace.take<int32_t>(N);
        double *const T = workspace.take<double>(N * k * R);
        task.T = T;
        const int64_t width = R + (p.Q ? k : 0);
        task.echelon = workspace.take<double>(N * k * width);
        if (p.easy())
            add_gram(task, blocks, workspace);
        else
            add_largest(task, workspace);
        const fedlora_block scale = numbers(task.scale, 1, R, R, N, R), triangle = numbers(T, k, R, R, N, k * R);
        stacks_.push_back({blocks, p.count, scale, triangle, task.hard, p.Q != nullptr});
        if (p.Q) {
            const fedlora_block turn = transposed(numbers(task.echelon + R, k, k, width, N, k * width));
            turned_.push_back({(int64_t)stacks_.size() - 1, turn, task.Q, nullptr, false, task.triangular});
        }
        all_.push_back(task);
        (p.easy() ? easy_ : other_).push_back(task);
    }

    // Once for all matrices where they are the same.
    static void add_weights(const Share &share, StackedTask &task, Upload &upload) {
        const fedlora_block &w = share.problem.weights;
        const double *const from = reinterpret_cast<const double *>(w.data) + share.first * w.row_stride;
        std::vector<double> weights;
        for (int64_t i = 0; i < share.batch; ++i)
            for (int64_t b = 0; b < w.cols; ++b) weights.push_back(from[i * w.row_stride + b * w.col_stride]);
        bool same = true;
        for (size_t e = (size_t)w.cols; e < weights.size(); ++e) same &= weights[e] == weights[e - (size_t)w.cols];
        task.weight_step = same ? 0 : w.cols;
        task.weights = upload.add(weights.data(), same ? w.cols : (int64_t)weights.size());
    }

    void add_gram(StackedTask &task, const fedlora_block *blocks, Workspace &workspace) {
        const int64_t R = task.width, N = task.batch, room = stacked_gram_size(R);
        double *const G = workspace.take<double>(N * R * R);
        task.G = G;
        task.factors = room ? workspace.take<double>(N * room) : nullptr;
        task.ranks = workspace.take<int32_t>(N);
        shared_bytes_ = std::max(shared_bytes_, stacked_gram_bytes(R));
        summed_.push_back({blocks, task.count, {}, numbers(G, R, R, R, N, R * R)});
        if (!task.wants_q()) return;
        task.mixers = workspace.take<double>(N * R * R);
        std::vector<fedlora_block> mixers;
        double *at = task.mixers;
        for (int64_t b = 0; b < task.count; at += R * blocks[b++].cols)
            mixers.push_back(numbers(at, blocks[b].cols, R, R, N, R * R));
        blocks_.push_back(std::move(mixers));
        mixed_.push_back({blocks, blocks_.back().data(), task.count, {}, task.Q, task.ranks});
    }

    void add_largest(StackedTask &task, Workspace &workspace) {
        task.pieces = (task.rows + kPieceRows - 1) / kPieceRows;
        task.largest = workspace.take<uint64_t>(task.batch * task.pieces * task.width);
        widest_ = std::max(widest_, task.width);
        first_pieces_.push_back(first_pieces_.back() + task.batch * task.pieces);
    }

    static StackedList list_of(const std::vector<StackedTask> &tasks, Upload &upload) {
        std::vector<int64_t> first = {0};
        for (const StackedTask &task : tasks) first.push_back(first.back() + task.batch);
        return {upload.add(tasks), upload.add(first), (int64_t)tasks.size(), first.back()};
    }

    std::vector<std::vector<fedlora_block>> blocks_;
    std::vector<StackedTask> easy_, other_, all_;
    std::vector<GramStack> summed_;
    std::vector<MixedSum> mixed_;
    std::vector<TallStack> stacks_;
    std::vector<TallProduct> turned_;
    std::vector<int64_t> first_pieces_ = {0};
    int64_t shared_bytes_ = 0, widest_ = 0;
    std::optional<TallQR> tall_;
    std::optional<TallProducts> products_;
    std::optional<Grams> grams_;
    MixedTiles tiles_;
    StackedList easy_list_, other_list_, all_list_;
    const int64_t *first_piece_;
};

int64_t scratch_of(const std::vector<Share> &shares) {
    Workspace counted;
    Upload upload(counted);
    const StackedQR plan(shares, counted, upload);
    return counted.bytes();
}

// Matrices that are done together, in order. Their answers do not depend on it.
std::vector<std::vector<Share>> waves_of(const std::vector<Problem> &problems) {
    std::vector<std::vector<Share>> waves(1);
    int64_t taken = 0;
    for (const Problem &p : problems) {
        if (!p.R.batch) continue;
        const int64_t each = scratch_of({{p, 0, 1}});
        for (int64_t first = 0, batch = 0; first < p.R.batch; first += batch) {
            if (taken + each > kWaveBytes && taken > 0) waves.emplace_back(), taken = 0;
            batch = std::min(p.R.batch - first, std::max<int64_t>(1, (kWaveBytes - taken) / each));
            waves.back().push_back({p, first, batch});
            taken += batch * each;
        }
    }
    return waves;
}

struct Tables {
    const fedlora_block *X;
    const int64_t *counts;
    const fedlora_block *weights, *Q, *R, *rank, *info, *notes;
    int64_t groups;

    bool given() const { return X && counts && weights && R && rank && info && notes && groups >= 0; }
    std::vector<Problem> problems() const {
        std::vector<Problem> all;
        const fedlora_block *blocks = X;
        for (int64_t g = 0; g < groups; blocks += counts[g], ++g)
            all.push_back({blocks, counts[g], weights[g], R[g], rank[g], info[g], notes[g], Q ? Q + g : nullptr});
        return all;
    }
};

int status_of(const std::vector<Problem> &problems) {
    for (const Problem &p : problems)
        if (const int status = check(p)) return status;
    return FEDLORA_OK;
}

} // namespace
} // namespace fedlora

extern "C" {

int fedlora_stacked_qr_workspace(const fedlora_block *X, const int64_t *counts, const fedlora_block *weights,
                                 const fedlora_block *Q, const fedlora_block *R, const fedlora_block *rank,
                                 const fedlora_block *info, const fedlora_block *notes, int64_t groups, int64_t threads, int64_t *bytes) {
    using namespace fedlora;
    const Tables tables = {X, counts, weights, Q, R, rank, info, notes, groups};
    if (!tables.given() || !bytes || threads < 1) return FEDLORA_BAD_ARGUMENT;
    const std::vector<Problem> problems = tables.problems();
    if (const int status = status_of(problems)) return status;
    *bytes = 0;
    for (const std::vector<Share> &wave : waves_of(problems)) *bytes = std::max(*bytes, scratch_of(wave));
    return FEDLORA_OK;
}

int fedlora_stacked_qr(const fedlora_block *X, const int64_t *counts, const fedlora_block *weights, const fedlora_block *Q,
                       const fedlora_block *R, const fedlora_block *rank, const fedlora_block *info, const fedlora_block *notes,
                       int64_t groups, void *memory, int64_t bytes, int64_t threads, void *stream) {
    using namespace fedlora;
    const Tables tables = {X, counts, weights, Q, R, rank, info, notes, groups};
    if (!tables.given() || !memory || threads < 1) return FEDLORA_BAD_ARGUMENT;
    const std::vector<Problem> problems = tables.problems();
    if (const int status = status_of(problems)) return status;
    const std::vector<std::vector<Share>> waves = waves_of(problems);
    for (const std::vector<Share> &wave : waves)
        if (bytes < scratch_of(wave)) return FEDLORA_BAD_WORKSPACE;
    for (const std::vector<Share> &wave : waves) {
        Workspace workspace(memory, bytes);
        Upload upload(workspace);
        const StackedQR plan(wave, workspace, upload);
        upload.send(stream);
        plan.launch(stream);
    }
    return finish();
}

} // extern "C"
