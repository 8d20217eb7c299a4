// fedlora_update_gram: inner products of client updates, <B_i A_i, B_j A_j> = sum((B_i^T B_j) o (A_i A_j^T)), from two Grams.
//
// Both Grams of all groups come from one launch. Where a group holds float64, its columns are brought near 1 first, by powers of
// two that are put back onto the sums: squares would leave the range, though the update itself may be harmless.
#include <memory>

#include "element.cuh"
#include "gram.cuh"
#include "slots.cuh"
#include "spectrum.h"

namespace fedlora {
namespace {

constexpr int kThreads = 128;
constexpr int kExponentOfZero = -10000; // below all others: a column of zeros never decides the scale of its client

struct UpdateTask {
    fedlora_block inner, left, right;      // Grams of B and of A^T
    const double *weights;                 // batch x clients
    const int64_t *first;                  // column of each client, clients + 1 of them
    fedlora_block left_sizes, right_sizes; // of float64 columns; without rows nothing is scaled
    fedlora_block left_scale, right_scale;
    int64_t *exponents; // matrix by matrix, what the scales took from each client
    int64_t clients;
};

__device__ inline double at(const fedlora_block &block, int64_t matrix, int64_t row, int64_t col) {
    return address<double>(block, matrix)[row * block.row_stride + col * block.col_stride];
}

__device__ int exponent_of_column(const fedlora_block &sizes, int64_t matrix, int64_t column) {
    if (!sizes.rows) return 0;
    const double *size = address<double>(sizes, matrix) + column;
    double largest = 0.0;
    for (int piece = 0; piece < (int)sizes.rows; ++piece, size += sizes.row_stride) largest = fmax(largest, *size);
    const int e = (int)exponent_of(largest);
    return largest == 0.0 ? kExponentOfZero : e < -1022 ? -1022 : e > 1022 ? 1022 : e;
}

// One thread for every client: B takes the scale of each column away, A as much as makes the heaviest column of the client near 1.
__global__ void __launch_bounds__(kThreads) client_scales(const UpdateTask *tasks, const int64_t *first, int64_t count, int64_t clients) {
    const int64_t slot = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    if (slot >= clients) return;
    const int64_t t = slot_group(first, count, slot);
    const UpdateTask &task = tasks[t];
    const uint32_t item = (uint32_t)(slot - first[t]), clients_of_task = (uint32_t)task.clients;
    const int64_t client = item % clients_of_task, matrix = item / clients_of_task;
    const int64_t begin = task.first[client], end = task.first[client + 1];
    double *const left = address<double>(task.left_scale, matrix), *const right = address<double>(task.right_scale, matrix);
    int e = begin < end ? 2 * kExponentOfZero : 0;
    for (int64_t column = begin; column < end; ++column) {
        const int own = exponent_of_column(task.left_sizes, matrix, column);
        e = max(e, own + exponent_of_column(task.right_sizes, matrix, column));
        left[column] = pow2(-own), right[column] = own;
    }
    task.exponents[item] = e;
    for (int64_t column = begin; column < end; ++column) right[column] = pow2((int64_t)right[column] - e);
}

// One block for every pair of clients.
__global__ void __launch_bounds__(kThreads) client_products(const UpdateTask *tasks, const int64_t *first, int64_t count) {
    __shared__ double sums[kThreads / kWarp];
    const int64_t t = slot_group(first, count, blockIdx.x);
    const UpdateTask &task = tasks[t];
    const uint32_t item = (uint32_t)(blockIdx.x - first[t]), pairs = (uint32_t)(task.clients * (task.clients + 1) / 2);
    const int64_t matrix = item / pairs;
    int64_t i = item % pairs, j = (int64_t)((sqrt(8.0 * (double)i + 1.0) - 1.0) / 2.0);
    while (j * (j + 1) / 2 > i) --j; // the root may be off by one
    while ((j + 1) * (j + 2) / 2 <= i) ++j;
    i -= j * (j + 1) / 2;

    const uint32_t rows = (uint32_t)(task.first[i + 1] - task.first[i]), cols = (uint32_t)(task.first[j + 1] - task.first[j]);
    double sum = 0.0;
    for (uint32_t n = threadIdx.x; n < rows * cols; n += kThreads) {
        const int64_t row = task.first[i] + n / cols, col = task.first[j] + n % cols;
        sum += at(task.left, matrix, row, col) * at(task.right, matrix, row, col);
    }
    // What is not finite always reaches the diagonal of its Gram.
    const auto is_bad = [&](int64_t client) {
        int bad = 0;
        for (int64_t column = task.first[client] + threadIdx.x; column < task.first[client + 1]; column += kThreads)
            bad |= !isfinite(at(task.left, matrix, column, column)) || !isfinite(at(task.right, matrix, column, column));
        return bad;
    };
    for (int distance = kWarp / 2; distance; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
    const int bad = __syncthreads_or(is_bad(i) | is_bad(j));
    if (threadIdx.x) return;

    const double *const weights = task.weights + matrix * task.clients;
    const double w_i = weights[i], w_j = weights[j];
    const int64_t e_i = exponent_of(w_i), e_j = exponent_of(w_j);
    int64_t e = e_i + e_j;
    if (task.exponents) e += task.exponents[matrix * task.clients + i] + task.exponents[matrix * task.clients + j];
    const double total = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * scale_pow2(w_i, -e_i) * scale_pow2(w_j, -e_j);
    const double answer = bad ? NAN : scale_pow2(total, e) + 0.0; // no zeros with a sign
    double *const inner = address<double>(task.inner, matrix);
    inner[i * task.inner.row_stride + j * task.inner.col_stride] = answer;
    inner[j * task.inner.row_stride + i * task.inner.col_stride] = answer;
}

fedlora_block matrices(double *data, int64_t batch, int64_t rows, int64_t cols) {
    return {reinterpret_cast<int64_t>(data), rows, cols, cols, 1, FEDLORA_FLOAT64, batch, rows * cols};
}

struct UpdateGroup {
    const fedlora_block *B, *A;
    int64_t count;
    fedlora_block weights, inner; // weights lie on the host; a query knows none

    // All of a matrix side by side.
    std::vector<double> packed_weights() const {
        std::vector<double> all((size_t)(inner.batch * count));
        for (int64_t n = 0; weights.data && n < inner.batch * count; ++n)
            all[(size_t)n] = address<const double>(weights, 0)[n / count * weights.row_stride + n % count * weights.col_stride];
        return all;
    }
    int status() const {
        const int64_t batch = inner.batch;
        if (inner.dtype != FEDLORA_FLOAT64 || weights.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
        if (count < 0 || batch < 0 || inner.rows != count || inner.cols != count) return FEDLORA_BAD_SHAPE;
        if (weights.batch != 1 || weights.rows != batch || weights.cols != count) return FEDLORA_BAD_SHAPE;
        for (int64_t k = 0; k < count; ++k) {
            if (!is_float(B[k].dtype) || !is_float(A[k].dtype)) return FEDLORA_BAD_DTYPE;
            if (B[k].batch != batch || A[k].batch != batch || B[k].cols != A[k].rows || B[k].cols < 0) return FEDLORA_BAD_SHAPE;
            if (B[k].rows != B[0].rows || A[k].cols != A[0].cols || B[k].rows < 0 || A[k].cols < 0) return FEDLORA_BAD_SHAPE;
        }
        return FEDLORA_OK;
    }
};

bool has_float64(const fedlora_block *X, int64_t count) {
    for (int64_t k = 0; k < count; ++k)
        if (X[k].dtype == FEDLORA_FLOAT64) return true;
    return false;
}

// All launches of a call.
class UpdateGrams {
  public:
    UpdateGrams(const std::vector<UpdateGroup> &groups, Workspace &workspace, Upload &upload) {
        std::vector<std::vector<fedlora_block>> turned; // tables of A^T, until the plans are made
        std::vector<GramStack> stacks;
        std::vector<ColumnSizes> sizes;
        std::vector<UpdateTask> tasks, scaled;
        std::vector<int64_t> first, first_scaled;
        for (const UpdateGroup &group : groups) {
            const int64_t K = group.count, batch = group.inner.batch;
            if (!K || !batch) continue;
            std::vector<int64_t> columns(1, 0);
            turned.emplace_back();
            for (int64_t k = 0; k < K; ++k) {
                columns.push_back(columns.back() + group.B[k].cols);
                turned.back().push_back(transposed(group.A[k]));
            }
            const int64_t R = columns.back();
            UpdateTask task = {};
            task.weights = upload.add(group.packed_weights()), task.inner = group.inner, task.clients = K;
            task.left = matrices(workspace.take<double>(batch * R * R), batch, R, R);
            task.right = matrices(workspace.take<double>(batch * R * R), batch, R, R);
            task.first = upload.add(columns);
            const auto sizes_of = [&](const fedlora_block *X) {
                if (!has_float64(X, K)) return fedlora_block{};
                const int64_t pieces = pieces_of(X[0].rows);
                sizes.push_back({X, K, matrices(workspace.take<double>(batch * pieces * R), batch, pieces, R)});
                return sizes.back().largest;
            };
            task.left_sizes = sizes_of(group.B);
            task.right_sizes = sizes_of(turned.back().data());
            if (task.left_sizes.rows || task.right_sizes.rows) {
                task.left_scale = matrices(workspace.take<double>(batch * R), batch, 1, R);
                task.right_scale = matrices(workspace.take<double>(batch * R), batch, 1, R);
                task.exponents = workspace.take<int64_t>(batch * K);
                scaled.push_back(task);
                first_scaled.push_back(clients_);
                clients_ += batch * K;
            }
            stacks.push_back({group.B, K, task.left_scale, task.left});
            stacks.push_back({turned.back().data(), K, task.right_scale, task.right});
            tasks.push_back(task);
            first.push_back(pairs_);
            pairs_ += batch * (K * (K + 1) / 2);
        }
        count_ = (int64_t)tasks.size();
        scaled_count_ = (int64_t)scaled.size();
        tasks_ = upload.add(tasks), scaled_ = upload.add(scaled);
        first_ = upload.add(first), first_scaled_ = upload.add(first_scaled);
        sizes_ = ColumnSizesOf(sizes, upload);
        grams_ = std::make_unique<Grams>(stacks, workspace, upload);
    }

    // Three launches, two more where a group holds float64.
    void launch(void *stream) const {
        sizes_.launch(stream);
        const dim3 threads(kThreads);
        fedlora::launch(client_scales, dim3((unsigned)((clients_ + kThreads - 1) / kThreads)), threads, 0, stream, scaled_, first_scaled_,
                        scaled_count_, clients_);
        grams_->launch(stream);
        fedlora::launch(client_products, dim3((unsigned)pairs_), threads, 0, stream, tasks_, first_, count_);
    }

  private:
    const UpdateTask *tasks_, *scaled_;
    const int64_t *first_, *first_scaled_; // pair of each task; client of each scaled one
    int64_t count_ = 0, scaled_count_ = 0, pairs_ = 0, clients_ = 0;
    ColumnSizesOf sizes_;
    std::unique_ptr<Grams> grams_;
};

std::vector<UpdateGroup> groups_of(const fedlora_block *B, const fedlora_block *A, const int64_t *counts, const fedlora_block *weights,
                                   const fedlora_block *inner, int64_t groups) {
    std::vector<UpdateGroup> all;
    for (int64_t g = 0; g < groups; B += counts[g], A += counts[g], ++g)
        all.push_back({B, A, counts[g], weights ? weights[g] : fedlora_block{}, inner[g]});
    return all;
}

} // namespace
} // namespace fedlora

extern "C" {

using namespace fedlora;

int fedlora_update_gram_workspace(const fedlora_block *B, const fedlora_block *A, const int64_t *counts, const fedlora_block *inner,
                                  int64_t groups, int64_t, int64_t *bytes) {
    if (!B || !A || !counts || !inner || !bytes || groups < 0) return FEDLORA_BAD_ARGUMENT;
    Workspace workspace;
    Upload upload(workspace);
    UpdateGrams(groups_of(B, A, counts, nullptr, inner, groups), workspace, upload);
    *bytes = workspace.bytes();
    return FEDLORA_OK;
}

int fedlora_update_gram(const fedlora_block *B, const fedlora_block *A, const int64_t *counts, const fedlora_block *weights,
                        const fedlora_block *inner, int64_t groups, void *memory, int64_t memory_bytes, int64_t, void *stream) {
    if (!B || !A || !counts || !weights || !inner || !memory || groups < 0) return FEDLORA_BAD_ARGUMENT;
    const std::vector<UpdateGroup> all = groups_of(B, A, counts, weights, inner, groups);
    for (const UpdateGroup &group : all)
        if (const int status = group.status()) return status;
    Workspace workspace(memory, memory_bytes);
    Upload upload(workspace);
    const UpdateGrams plan(all, workspace, upload);
    if (!workspace.fits()) return FEDLORA_BAD_WORKSPACE;
    upload.send(stream);
    plan.launch(stream);
    return finish();
}

} // extern "C"
