// Grams of stacked blocks in float64, any number of them in one launch: what fedlora_gram and fedlora_update_gram run, and the first
// stage of fedlora_product_svd, B and A stacks of all modules together (docs/numerics.md, One pass).
//
// Plans take scratch and add tables when they are made, and launch once the tables were sent; over a workspace without memory they are
// only made. Tables of blocks may go as soon as the plan is there. Nothing in them looks at the device's memory.
#pragma once

#include <vector>

#include "workspace.cuh"

namespace fedlora {

// G = X^T X of X = [X_1 | ... | X_count] diag(scale) for a batch of matrices, as fedlora_gram has it: all of G is written. What lies by
// columns in memory (rows of A, described as A^T: see transposed) is as fast as what lies by rows.
struct GramStack {
    const fedlora_block *X; // p x q_k, any float dtype; the table is on the host
    int64_t count;
    fedlora_block scale; // 1 x R float64, R the columns of all blocks; without rows, columns stay as they are
    fedlora_block G;     // R x R float64
};

// The tables of fedlora_gram; no scale is one without rows.
std::vector<GramStack> stacks_of(const fedlora_block *X, const int64_t *counts, const fedlora_block *scale, const fedlora_block *G,
                                 int64_t groups);

// Whether the descriptors fit each other.
int status_of(const GramStack &stack);

struct GramTask;

class Grams {
  public:
    Grams(const std::vector<GramStack> &stacks, Workspace &workspace, Upload &upload);
    // Two launches: tiles of parts of the rows (one for every dtype there is), and their sums; the first alone where no stack has
    // more than one part.
    void launch(void *stream) const;

  private:
    static constexpr int kDtypes = FEDLORA_FLOAT16 + 1;
    const GramTask *tasks_;
    const int64_t *first_, *first_sum_; // part and sum of each task
    int64_t count_ = 0, parts_[kDtypes] = {}, sums_ = 0, shared_bytes_ = 0;
};

// The largest finite magnitudes of the columns of a stack, to bring float64 into a range where squares are safe.
struct ColumnSizes {
    const fedlora_block *X; // as above
    int64_t count;
    fedlora_block largest; // pieces_of(p) x R float64: of every so many rows; the largest of a column of it is that of the stack
};

inline int64_t pieces_of(int64_t rows) { return rows <= 2048 ? 1 : rows <= 16 * 2048 ? (rows + 2047) / 2048 : 16; }

class ColumnSizesOf {
  public:
    struct Task;
    ColumnSizesOf() = default;
    ColumnSizesOf(const std::vector<ColumnSizes> &stacks, Upload &upload);
    void launch(void *stream) const; // one launch

  private:
    const Task *tasks_ = nullptr;
    const int64_t *first_ = nullptr; // block of each task
    int64_t count_ = 0, blocks_ = 0;
};

// The same numbers with rows and columns in turn.
__host__ __device__ inline fedlora_block transposed(fedlora_block block) {
    const fedlora_block from = block;
    block.rows = from.cols, block.cols = from.rows;
    block.row_stride = from.col_stride, block.col_stride = from.row_stride;
    return block;
}

} // namespace fedlora
