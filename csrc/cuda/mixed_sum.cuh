// Stacked blocks times small matrices in float64, any number of them in one launch: what fedlora_mixed_sum runs, and the
// back-transform of fedlora_product_svd (docs/numerics.md, One pass).
//
// Both plans take scratch and add tables when they are made, and launch once the tables were sent; over a workspace without
// memory they are only made. Tables of blocks may go as soon as the plan is there. Nothing in either looks at the device's
// memory.
#pragma once

#include <vector>

#include "sum_answers.cuh"
#include "workspace.cuh"

namespace fedlora {

// sum = [X_1 | ... | X_K] diag(scale) [M_1; ...; M_K] for a batch of matrices. What lies by columns in memory (the right factor
// of a product, described as it is transposed) is as fast as what lies by rows.
struct MixedSum {
    const fedlora_block *X;      // count blocks p x q_k, any float dtype; the table is on the host
    const fedlora_block *mixers; // one for every block: q_k x q float64; the table is on the host
    int64_t count;
    fedlora_block scale;  // 1 x R float64, R the columns of all blocks; without rows, columns stay as they are
    fedlora_block sum;    // p x q, any float dtype; rounded once (halves by way of float32)
    const int32_t *ranks; // on the device, one per matrix: so many columns are formed and the others not touched; kNoNumbers: all of
                          // the sum is NaN, and nothing is read. Null: all columns
};

constexpr int32_t kNoNumbers = -1;

struct MixedTable;

// The tiles of all sums of a call, for one launch.
struct MixedTiles {
    const MixedTable *tables;
    const int64_t *first; // tile of each table, count + 1 of them
    int64_t count, tiles;
    bool narrow; // no sum has more than 32 columns
};

struct MixedSieve;

// Sums of many groups, of which blocks with a zero mixer are not read; ranks are not looked at.
class MixedSums {
  public:
    MixedSums(const std::vector<MixedSum> &sums, const std::vector<SumAnswers> &answers, Workspace &workspace, Upload &upload);
    // Three launches: which blocks count, the sums, what is said of them.
    void launch(void *stream) const;

  private:
    MixedTiles tiles_;
    const MixedSieve *sieves_;
    const int64_t *first_; // matrix of each group
    int64_t count_, matrices_;
    AnswersPlan answers_;
};

// Two factors with one rank each: left, m x p_max, and right^T, n x p_max.
struct FactorPair {
    MixedSum left, right;
    fedlora_block info, notes; // 1 x 1 int32, there already: overflow in one of the factors joins the info and clears the notes
};

struct PairToTurn;

// Both factors of every matrix of every pair, signs by the rule: the first element of a column of the left factor that is within
// a factor 1 - 2^-20 of the largest in magnitude is positive. Magnitudes are compared in 24 bits, before they are rounded to
// halves.
class BackTransform {
  public:
    BackTransform(const std::vector<FactorPair> &pairs, Workspace &workspace, Upload &upload);
    // Two launches: all of left and right, whose signs are whatever they are; then the columns of both that are to be turned.
    void launch(void *stream) const;

  private:
    MixedTiles tiles_; // of left and right factors by turns
    const PairToTurn *pairs_;
    const int64_t *first_; // part of each pair, to be turned
    int64_t count_, parts_;
};

} // namespace fedlora
