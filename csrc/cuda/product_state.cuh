// What the launches of fedlora_product_svd hand on to each other, all of it in device memory (docs/numerics.md, One pass).
#pragma once

#include <cmath>

#include "element.cuh"
#include "spectrum.h"

namespace fedlora {

enum { kB = 0, kA = 1 }; // the sides

// What is known of one matrix, in a scale of 2^-e.
struct ProductFacts {
    int64_t e, live;
    double energy, energy_abs, bound[2]; // upper bounds of the squared 2-norms of the balanced factors
    int32_t bad;                         // NaN or Inf in a factor
    int32_t rank[2];                     // of the Cholesky factors
};

// Equally shaped updates. Of each array of R x R matrices those of a batch follow each other, `step` apart for the Grams and `R * R` for
// the others.
struct ProductGroup {
    int64_t R, m, n, batch, clients;
    int64_t room;             // p_max
    int64_t step;             // R * max(R, room)
    double rho_max;           // beyond it one pass will not do
    const double *weights;    // batch x clients
    const int32_t *client;    // of each column
    int32_t *exponents[2];    // batch x R: what the scales take away, null where no matrix is scaled on reading
    double *scale[2];         // batch x R: 2^-exponent, or null
    double *gauge[2];         // batch x R: what the columns, scaled already, are multiplied with; 0 for those without a part in the update
    double *stretch[2];       // batch x R: scale and gauge together
    double *G[2];             // Grams; then coefficients, R x room by rows; then triangles of the second pass
    double *F[2];             // factors, R x R by rows: F^T F is the balanced Gram
    double *C;                // core F_B F_A^T
    double *W[2];             // left and right singular vectors of the core, one after the other
    double *s;                // batch x R: singular values
    double *left[2];          // what is left of a Gram that does not fit shared memory, else null
    int32_t *svd_info;
    int32_t *ranks[2];        // of each matrix, for the back-transform of the first and of the second pass
    int32_t *again;           // of each matrix: a second pass follows
    ProductFacts *facts;
    fedlora_block S, values, codes, balance;

    __host__ __device__ int64_t least() const {
        const int64_t q = m < n ? m : n;
        return q < R ? q : R;
    }
    // Rows of the factor of a side: after Cholesky, and after QR.
    __host__ __device__ int64_t rows(int side, int64_t pass) const {
        const int64_t length = side == kB ? m : n;
        return pass == 1 || length > R ? R : length;
    }
};

// Groups on the device, and where their share of the blocks of a launch begins.
struct ProductList {
    const ProductGroup *groups;
    const int64_t *first; // count + 1 of them, rising from 0
    int64_t count, blocks;
};

// What the call asks for.
struct ProductWish {
    Rule rule;
    double powers[2]; // of the singular values that left and right carry
};

constexpr int kProductThreads = 256;
constexpr int kProductTile = 64; // rows and columns of a tile of a core or of coefficients

inline int64_t product_tiles(int64_t size) { return (size + kProductTile - 1) / kProductTile; }

// A block for every Gram: weights and gauges, energies and bounds, Cholesky factors.
void weigh_products(const ProductList &list, int64_t shared_bytes, void *stream);

// A block for every tile of every core.
void multiply_cores(const ProductList &list, int64_t pass, void *stream);

// A block for every tile of the coefficients of either side: rank and certificate, and what left and right are made of.
void judge_products(const ProductList &list, const ProductWish &wish, int64_t pass, void *stream);

} // namespace fedlora
