// QR of tall stacks of blocks in float64 by Householder reflections, any number of them in one launch: what fedlora_tall_qr
// runs, the second pass of fedlora_product_svd, and the stacks of fedlora_stacked_qr that their Gram does not serve
// (docs/numerics.md, Stacked QR).
//
// TSQR: the rows of a matrix are cut into leaves, each of which one block of threads reduces to a triangle, eight columns at a
// time; of two neighbours the block that comes last merges their triangles, and so on up the tree. Nobody waits. Leaves and
// tree are decided by m and R alone, and what fits into shared memory decides where numbers lie, never their bits.
//
// Plans take scratch and add tables when they are made, and launch once the tables were sent; over a workspace without memory
// they are only made. Tables of blocks may go as soon as the plan is there. Nothing looks at the device's memory.
#pragma once

#include <vector>

#include "workspace.cuh"

namespace fedlora {

// [X_1 | ... | X_count] diag(scale) = Q R for a batch of matrices, Q orthonormal whatever the rank, R upper triangular with a
// diagonal of any sign. m and the width are at least 1; numbers are finite and scaled columns shorter than 2^500; shorter than
// 2^-450 counts as zero.
struct TallStack {
    const fedlora_block *X; // count blocks m x q_k, any float dtype; the table is on the host
    int64_t count;
    fedlora_block scale;   // 1 x width float64; without rows, columns stay as they are
    fedlora_block R;       // k x width float64, k = min(m, width), zero below the diagonal
    const int32_t *active; // on the device, one per matrix: where it is 0 nothing is read or written; null: all are active
    bool keep;             // what products are made of
};

// out = Q C of a stack, for all its active matrices.
struct TallProduct {
    int64_t stack;        // which; it keeps what products are made of
    fedlora_block C;      // k x p float64; without rows: the identity
    fedlora_block out;    // m x p, any float dtype; rounded once (halves by way of float32)
    const int32_t *ranks; // on the device, one per matrix: so many columns are formed and the others not touched; null: all p
    bool upper;           // C is zero below its diagonal
    const int32_t *triangular = nullptr; // on the device, one per matrix: whether its C is; null: as `upper` says
};

struct TallFactors; // what the device keeps of a stack
struct TallShare;   // and of a product

class TallQR {
  public:
    TallQR(const std::vector<TallStack> &stacks, Workspace &workspace, Upload &upload);
    // Two launches: counters to zero; then R of all stacks, and the reflections that Q is made of.
    void launch(void *stream) const;

  private:
    friend class TallProducts;
    std::vector<int64_t> rows_, cols_; // of the stacks
    const TallFactors *factors_;
    const int64_t *first_; // leaf of each stack
    int32_t *arrivals_;    // of blocks at the nodes of all trees
    int64_t leaves_, shared_bytes_;
};

class TallProducts {
  public:
    TallProducts(const TallQR &qr, const std::vector<TallProduct> &products, Workspace &workspace, Upload &upload);
    // One launch, after that of the stacks.
    void launch(void *stream) const;

  private:
    const TallFactors *factors_;
    const TallShare *shares_;
    const int64_t *first_; // block of each product
    int64_t count_, blocks_, shared_bytes_, threads_;
};

} // namespace fedlora
