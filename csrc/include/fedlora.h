/* The C ABI of the native libraries, one for CPUs and one for CUDA: the only header that both sides share.
 *
 * Conventions
 *   - Every array is handed over as a descriptor, `fedlora_block`: all fields are int64, strides count elements and
 *     may be zero or negative. One descriptor stands for `batch` equally shaped matrices that lie `batch_stride`
 *     elements apart, so a dense call needs one descriptor and a ragged batch one per shape; entry i of every table of
 *     a call belongs to group i.
 *   - Ops return a FEDLORA_* status. Trouble with single matrices is no status: it is written to `info`, per matrix.
 *   - Scratch memory belongs to the caller: ask the `_workspace` function first. Its content does not matter.
 *   - The CUDA library takes device memory: what descriptors point to, but weights, and the scratch memory. Tables, counts, units and
 *     weights lie on the host for both, and are read before a call returns. It has nothing that reads files or calibrates, waits for
 *     nothing, and ignores the number of threads.
 *   - The stream comes last; the CPU library ignores it.
 *   - No result depends on the batch, the slot of a matrix in it, the number of threads or former calls, bit for bit.
 *
 * Python computes the stamp `fedlora_abi()` from the bytes of this file and refuses a library built from other bytes.
 */
#ifndef FEDLORA_H
#define FEDLORA_H

#include <stdint.h>

#define FEDLORA_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct fedlora_block {
    int64_t data; /* address of element (0, 0) of the first matrix */
    int64_t rows;
    int64_t cols;
    int64_t row_stride;
    int64_t col_stride;
    int64_t dtype; /* FEDLORA_FLOAT32, ... */
    int64_t batch;
    int64_t batch_stride;
} fedlora_block;

/* One matrix by rows in a file; the bytes of a number are in the order of the machine. */
typedef struct fedlora_range {
    int64_t file;   /* a descriptor open for reading; where it stands does not matter and does not change */
    int64_t offset; /* of element (0, 0), in bytes; need not be aligned */
    int64_t rows;
    int64_t cols;
    int64_t dtype;
} fedlora_range;

enum { FEDLORA_FLOAT32 = 0, FEDLORA_FLOAT64 = 1, FEDLORA_INT32 = 2, FEDLORA_BFLOAT16 = 3, FEDLORA_FLOAT16 = 4, FEDLORA_BOOL = 5 };

/* Status of a call. */
enum {
    FEDLORA_OK = 0,
    FEDLORA_BAD_SHAPE = 1,     /* descriptors of one group do not fit each other, or a size is not served */
    FEDLORA_BAD_DTYPE = 2,     /* a dtype that the op does not take, or several in one group */
    FEDLORA_BAD_WORKSPACE = 3, /* fewer bytes than the workspace query answers */
    FEDLORA_BAD_ARGUMENT = 4,  /* a null table, a negative count, fewer than one thread */
    FEDLORA_UNREADABLE = 5,    /* a file ends before a matrix that should lie in it, or cannot be read; outputs are undefined */
    FEDLORA_DEVICE_ERROR = 6   /* the device refused a launch or an allocation: see fedlora_message */
};

/* Per matrix: info is trouble, notes are facts (docs/numerics.md, special inputs). */
enum { FEDLORA_INFO_NONFINITE = 1, FEDLORA_INFO_NOT_CONVERGED = 2, FEDLORA_INFO_OVERFLOW = 4 };
enum {
    FEDLORA_NOTE_ZERO = 1,
    FEDLORA_NOTE_RANK_DEFICIENT = 2,
    FEDLORA_NOTE_TWO_PASS = 4,
    FEDLORA_NOTE_CAPPED = 16,
    FEDLORA_NOTE_LOW_ACCURACY = 32,
    FEDLORA_NOTE_ILL_CONDITIONED = 64
};

/* Largest dimension that fedlora_core_svd serves. */
enum { FEDLORA_CORE_SVD_MAX = 512 };

/* Stamp of this header; see above. */
FEDLORA_API uint64_t fedlora_abi(void);

/* Instruction set that the library picked on this machine, e.g. "x86-64-v4"; of the CUDA library, those that it was built for. */
FEDLORA_API const char *fedlora_isa(void);

/* What went wrong in the last call of this thread that returned FEDLORA_DEVICE_ERROR. CUDA alone. */
FEDLORA_API const char *fedlora_message(void);

/* The GPUs that the driver offers; 0 where there is no driver. CUDA alone. */
FEDLORA_API int fedlora_devices(int64_t *count);

/* Independent chains of fused multiply-adds (a product and a sum where there is no such instruction) in registers, ``steps``
 * long on each thread, in float32 or float64; flops gets the number of operations. Timed by the caller, this is the peak rate.
 */
FEDLORA_API int fedlora_calibrate(int64_t dtype, int64_t steps, double *flops, int64_t threads, void *stream);

/* Bytes of scratch that fedlora_core_svd needs for the groups C[0..groups) with so many threads. */
FEDLORA_API int fedlora_core_svd_workspace(const fedlora_block *C, int64_t groups, int64_t threads, int64_t *bytes);

/* C = U diag(S) Vh for every matrix of every group, k = min(p, q), S descending, U and Vh complete.
 *
 *   C      p x q, float32 or float64, read only          U     p x k, as C
 *   S      1 x k, as C                                   Vh    k x q, as C
 *   info   1 x 1, int32                                  notes 1 x 1, int32
 *
 * max_sweeps is the guard of the Jacobi iteration; 0 takes the default (60). A matrix with NaN or Inf answers NaN.
 * The first entry of (nearly) largest magnitude of each column of U is positive.
 */
FEDLORA_API int fedlora_core_svd(const fedlora_block *C, const fedlora_block *U, const fedlora_block *S,
                                 const fedlora_block *Vh, const fedlora_block *info, const fedlora_block *notes,
                                 int64_t groups, int64_t max_sweeps, void *workspace, int64_t workspace_bytes,
                                 int64_t threads, void *stream);

/* Bytes of scratch that fedlora_weighted_sum needs for these groups with so many threads. */
FEDLORA_API int fedlora_weighted_sum_workspace(const int64_t *counts, const fedlora_block *sum, int64_t groups, int64_t threads,
                                               int64_t *bytes);

/* sum = sum_k w_k X_k for every matrix of every group, the blocks of a group lying on the top left corner of the sum.
 *
 *   X         blocks of all groups one after the other, counts[g] of group g: p_k x q_k, any float dtype, read only
 *   weights   one descriptor per group, batch x counts[g] float64 (batch 1)
 *   sum       p x q, p >= p_k, q >= q_k, any float dtype; rounded once from float64 (halves by way of float32)
 *   norm      1 x 1 float64, Frobenius norm of the sum       rounding  1 x 1 float64, of what the dtype took away
 *   info      1 x 1, int32                                    notes     1 x 1, int32
 *
 * Products and sums are float64, in the order of the blocks, without fused multiply-add.
 */
FEDLORA_API int fedlora_weighted_sum(const fedlora_block *X, const int64_t *counts, const fedlora_block *weights,
                                     const fedlora_block *sum, const fedlora_block *norm, const fedlora_block *rounding,
                                     const fedlora_block *info, const fedlora_block *notes, int64_t groups,
                                     void *workspace, int64_t workspace_bytes, int64_t threads, void *stream);

/* Bytes of scratch that fedlora_read_sum needs for the groups sum[0..groups) with so many threads. */
FEDLORA_API int fedlora_read_sum_workspace(const fedlora_block *sum, int64_t groups, int64_t threads, int64_t *bytes);

/* fedlora_weighted_sum of matrices that lie in files, read on the way, bit for bit.
 *
 *   X         for every matrix of every group one after the other, counts[g] ranges: p_k x q_k, any float dtype
 *   weights   batch x counts[g] float64 (batch 1); what has weight 0 is not read
 *   sum       p x q by rows without gaps, p >= p_k, q >= q_k, any float dtype
 *   norm, rounding, info, notes  as for fedlora_weighted_sum
 */
FEDLORA_API int fedlora_read_sum(const fedlora_range *X, const int64_t *counts, const fedlora_block *weights,
                                 const fedlora_block *sum, const fedlora_block *norm, const fedlora_block *rounding,
                                 const fedlora_block *info, const fedlora_block *notes, int64_t groups, void *workspace,
                                 int64_t workspace_bytes, int64_t threads, void *stream);

/* Bytes of scratch that fedlora_read_alike needs with so many threads. */
FEDLORA_API int fedlora_read_alike_workspace(int64_t threads, int64_t *bytes);

/* Whether matrices in files are the same: counts[i] ranges for each of so many comparisons.
 *
 *   alike     1 where every matrix of a comparison holds, bit for bit, as many of the first rows of its first matrix as it has
 *             rows; 0 where one does not, or has other columns, more rows or another dtype
 */
FEDLORA_API int fedlora_read_alike(const fedlora_range *X, const int64_t *counts, int64_t matrices, int32_t *alike,
                                   void *workspace, int64_t workspace_bytes, int64_t threads, void *stream);

/* Bytes of scratch that fedlora_mixed_sum needs for these groups with so many threads. */
FEDLORA_API int fedlora_mixed_sum_workspace(const fedlora_block *mixers, const int64_t *counts, const fedlora_block *sum,
                                            int64_t groups, int64_t threads, int64_t *bytes);

/* sum = sum_k X_k M_k for every matrix of every group.
 *
 *   X         blocks of all groups one after the other, counts[g] of group g: p x q_k, any float dtype, read only
 *   mixers    one for every block: q_k x q, float64, read only
 *   sum       p x q, any float dtype; rounded once from float64 (halves by way of float32)
 *   norm, rounding, info, notes  as for fedlora_weighted_sum
 *
 * Float64 products are added up over the columns of all blocks, with fused multiply-add where the instruction set has it, in
 * an order that the shapes alone decide. A block whose mixer is zero is not read.
 */
FEDLORA_API int fedlora_mixed_sum(const fedlora_block *X, const fedlora_block *mixers, const int64_t *counts,
                                  const fedlora_block *sum, const fedlora_block *norm, const fedlora_block *rounding,
                                  const fedlora_block *info, const fedlora_block *notes, int64_t groups, void *workspace,
                                  int64_t workspace_bytes, int64_t threads, void *stream);

/* Bytes of scratch that fedlora_gram needs for these groups with so many threads. */
FEDLORA_API int fedlora_gram_workspace(const fedlora_block *X, const int64_t *counts, const fedlora_block *G, int64_t groups,
                                       int64_t threads, int64_t *bytes);

/* G = X^T X of X = [X_1 | ... | X_K] diag(scale) for every matrix of every group, in float64.
 *
 *   X         blocks of all groups one after the other, counts[g] of group g: p x q_k, any float dtype, read only
 *   scale     one per group: 1 x R float64, R the sum of all q_k; one without rows leaves the columns as they are
 *   G         one per group: R x R float64
 *
 * Columns are multiplied before anything else: powers of two bring float64 columns into range exactly. NaN or Inf in a column of X
 * reaches its row and column of G alone, and always the diagonal.
 */
FEDLORA_API int fedlora_gram(const fedlora_block *X, const int64_t *counts, const fedlora_block *scale, const fedlora_block *G,
                             int64_t groups, void *workspace, int64_t workspace_bytes, int64_t threads, void *stream);

/* Bytes of scratch that fedlora_fast_gram needs for these groups with so many threads. CUDA alone. */
FEDLORA_API int fedlora_fast_gram_workspace(const fedlora_block *X, const int64_t *counts, const fedlora_block *G, int64_t groups,
                                            int64_t threads, int64_t *bytes);

/* fedlora_gram of bfloat16 or float16 blocks with sums of 64 rows in float32, relative errors of 1e-7, not 1e-16: squares of columns
 * of 1e19 and more overflow, whatever the scale. CUDA alone.
 */
FEDLORA_API int fedlora_fast_gram(const fedlora_block *X, const int64_t *counts, const fedlora_block *scale, const fedlora_block *G,
                                  int64_t groups, void *workspace, int64_t workspace_bytes, int64_t threads, void *stream);

/* Bytes of scratch that fedlora_update_gram needs for these groups with so many threads. CUDA alone. */
FEDLORA_API int fedlora_update_gram_workspace(const fedlora_block *B, const fedlora_block *A, const int64_t *counts,
                                              const fedlora_block *inner, int64_t groups, int64_t threads, int64_t *bytes);

/* inner[i, j] = w_i w_j <B_i A_i, B_j A_j> for every matrix of every group, in float64. CUDA alone.
 *
 *   B, A      blocks of all groups one after the other, counts[g] of group g: m x r_k and r_k x n, any float dtype, read only
 *   weights   one descriptor per group, batch x counts[g] float64 (batch 1), finite
 *   inner     one per group: counts[g] x counts[g] float64; NaN in row and column of a client that holds NaN or Inf
 */
FEDLORA_API int fedlora_update_gram(const fedlora_block *B, const fedlora_block *A, const int64_t *counts, const fedlora_block *weights,
                                    const fedlora_block *inner, int64_t groups, void *workspace, int64_t workspace_bytes,
                                    int64_t threads, void *stream);

/* Columns of X turned, in place, so that the first of their (nearly) largest entries is positive.
 *
 *   X         one per group: p x q, float32 or float64
 *   signs     one per group: 1 x q float64, what the columns were multiplied with
 */
FEDLORA_API int fedlora_orient(const fedlora_block *X, const fedlora_block *signs, int64_t groups, int64_t threads, void *stream);

/* Bytes of scratch that fedlora_cross_products needs for these groups with so many threads. */
FEDLORA_API int fedlora_cross_products_workspace(const fedlora_block *X, const int64_t *counts, const fedlora_block *Y,
                                                 int64_t groups, int64_t threads, int64_t *bytes);

/* products_k = X_k^T Y 2^-exponent for every matrix of every group, in float64.
 *
 *   X         blocks of all groups one after the other, counts[g] of group g: p x q_k, any float dtype, read only
 *   Y         one per group: p x q, any float dtype, read only
 *   products  one for every block: q_k x q, float64
 *   sizes     one for every block: 1 x 1 float64, |X_k| |Y| 2^-exponent, NaN or Inf where one of them is not finite
 *   exponents one for every block: 1 x 1, int32; 0 unless X_k or Y is float64, whose squares may leave the range
 */
FEDLORA_API int fedlora_cross_products(const fedlora_block *X, const int64_t *counts, const fedlora_block *Y,
                                       const fedlora_block *products, const fedlora_block *sizes, const fedlora_block *exponents,
                                       int64_t groups, void *workspace, int64_t workspace_bytes, int64_t threads, void *stream);

/* Bytes of scratch that fedlora_polar needs for the groups M[0..groups) with so many threads. */
FEDLORA_API int fedlora_polar_workspace(const fedlora_block *M, int64_t groups, int64_t threads, int64_t *bytes);

/* Rotations from correlations M 2^exponent = X^T Y: with M = U diag(s) V^T, Q = U V^T (docs/numerics.md, Procrustes).
 *
 *   M         r x r float64, read only
 *   size      1 x 1 float64, |X| |Y| 2^-exponent; NaN or Inf marks data that are not finite
 *   exponent  1 x 1, int32
 *   unit      one number per group, the unit roundoff of what X and Y are stored in
 *   rotations six per group: Q, r x r float64; singular values of M 2^exponent, 1 x r float64, falling; unique, 1 x 1 bool;
 *             condition, 1 x 1 float64; info and notes, 1 x 1 int32
 *
 * special keeps Q in SO(r). blend in [0, 1] answers the polar factor of (1 - blend) 1 + blend Q instead.
 */
FEDLORA_API int fedlora_polar(const fedlora_block *M, const fedlora_block *size, const fedlora_block *exponent, const double *unit,
                              const fedlora_block *rotations, int64_t groups, int64_t special, double blend, void *workspace,
                              int64_t workspace_bytes, int64_t threads, void *stream);

/* Bytes of scratch that fedlora_read_turned needs for these matrices with so many threads. */
FEDLORA_API int fedlora_read_turned_workspace(const fedlora_range *X, const fedlora_range *reference, int64_t side, int64_t count,
                                              const fedlora_block *sum, int64_t threads, int64_t *bytes);

/* Means of pairs that lie in files, turned towards a reference: sum_k w_k B_k Q_k and sum_k w'_k Q_k^T A_k, with Q_k the rotation of
 * B_k^T B_ref (side 0) or A_k A_ref^T (side 1), for every matrix of a batch, bit for bit as fedlora_cross_products, fedlora_polar
 * and fedlora_mixed_sum have them.
 *
 *   X         count ranges m x r of each matrix, B; then count ranges r x n of each, A; any float dtype
 *   reference one range of each matrix, as the factor on that side
 *   weights   two: batch x count float64 (batch 1) for B, and for A; what has weight 0 counts for the rotation only
 *   sum       two: m x r and r x n by rows without gaps, any float dtype
 *   norm, rounding, info, notes  two each, as for fedlora_weighted_sum
 *   plain     batch int32: 1 where all rotations are the identity, or one is in trouble; sums and what is said of them are undefined
 *
 * unit, special and blend as for fedlora_polar.
 */
FEDLORA_API int fedlora_read_turned(const fedlora_range *X, const fedlora_range *reference, int64_t side, int64_t count,
                                    const fedlora_block *weights, const fedlora_block *sum, const fedlora_block *norm,
                                    const fedlora_block *rounding, const fedlora_block *info, const fedlora_block *notes, double unit,
                                    int64_t special, double blend, int32_t *plain, void *workspace, int64_t workspace_bytes,
                                    int64_t threads, void *stream);

/* Bytes of scratch that fedlora_turned needs for these groups with so many threads. */
FEDLORA_API int fedlora_turned_workspace(const fedlora_block *X, const fedlora_block *Q, const fedlora_block *out, int64_t groups,
                                         int64_t threads, int64_t *bytes);

/* out = X Q for every matrix of every group; X itself, bit for bit, where Q is the identity.
 *
 *   X    p x r, any float dtype, read only    Q    r x r float64, read only    out  p x r, as X
 *
 * float64 is multiplied in float64, all else in float32 by Q rounded to it, in the order of the columns of X, with fused
 * multiply-add where the instruction set has it.
 */
FEDLORA_API int fedlora_turned(const fedlora_block *X, const fedlora_block *Q, const fedlora_block *out, int64_t groups, void *workspace,
                               int64_t workspace_bytes, int64_t threads, void *stream);

/* Bytes of scratch that fedlora_align_factors needs for these groups with so many threads. */
FEDLORA_API int fedlora_align_factors_workspace(const fedlora_block *B, const fedlora_block *A, const fedlora_block *B_ref,
                                                const fedlora_block *A_ref, double alpha, double beta, const fedlora_block *BQ,
                                                const fedlora_block *QA, const fedlora_block *rotations, int64_t groups, int64_t threads,
                                                int64_t *bytes);

/* Rotation of alpha A A_ref^T + beta B^T B_ref, and the pair turned by it, for every pair of every group.
 *
 *   B, BQ      m x r, any float dtype, the same for both     B_ref  m x r, any float dtype; not looked at, and may be null, for beta = 0
 *   A, QA      r x n, any float dtype, the same for both     A_ref  r x n, any float dtype; not looked at, and may be null, for alpha = 0
 *   rotations  six per group, as for fedlora_polar
 *
 * BQ = B Q and QA = Q^T A as fedlora_turned answers them. A pair or reference with NaN or Inf answers NaN. special, blend as for
 * fedlora_polar.
 */
FEDLORA_API int fedlora_align_factors(const fedlora_block *B, const fedlora_block *A, const fedlora_block *B_ref, const fedlora_block *A_ref,
                                      double alpha, double beta, const fedlora_block *BQ, const fedlora_block *QA,
                                      const fedlora_block *rotations, int64_t groups, int64_t special, double blend, void *workspace,
                                      int64_t workspace_bytes, int64_t threads, void *stream);

/* Bytes of scratch that fedlora_cholesky needs for the groups G[0..groups) with so many threads. */
FEDLORA_API int fedlora_cholesky_workspace(const fedlora_block *G, int64_t groups, int64_t threads, int64_t *bytes);

/* L L^T = G up to a remainder below width u max(diag G), u = 2^-53, for every matrix of every group.
 *
 *   G      R x R float64, positive semidefinite, read only
 *   width  1 x 1 float64, the number of columns of G that are not zero
 *   L      R x R float64: rows in the order of G, columns in order of elimination, zero from the numerical rank on
 *
 * Every pivot is the largest diagonal left, the first of equal ones. A NaN on the diagonal ends the elimination.
 */
FEDLORA_API int fedlora_cholesky(const fedlora_block *G, const fedlora_block *width, const fedlora_block *L, int64_t groups,
                                 void *workspace, int64_t workspace_bytes, int64_t threads, void *stream);

/* Rank rules, and what the left and the right factor of a product carry: 1 and 1, S and 1, or the root of S each. */
enum {
    FEDLORA_RULE_ENERGY = 0,
    FEDLORA_RULE_RANK = 1,
    FEDLORA_RULE_SV_RATIO = 2,
    FEDLORA_RULE_ABSOLUTE = 3,
    FEDLORA_RULE_SV_SUM = 4
};
enum { FEDLORA_OUTPUT_USV = 0, FEDLORA_OUTPUT_LEFT = 1, FEDLORA_OUTPUT_BALANCED = 2 };

/* Rows of `values` and `codes` of fedlora_product_svd. */
enum { FEDLORA_PRODUCT_VALUES = 9, FEDLORA_PRODUCT_CODES = 6 };

/* Largest number of stacked columns that fedlora_product_svd serves. */
enum { FEDLORA_PRODUCT_SVD_MAX = FEDLORA_CORE_SVD_MAX };

/* Bytes of scratch that fedlora_product_svd needs for these groups with so many threads. */
FEDLORA_API int fedlora_product_svd_workspace(const fedlora_block *B, const fedlora_block *A, const int64_t *counts,
                                              const fedlora_block *left, const fedlora_block *right, int64_t groups,
                                              int64_t threads, int64_t *bytes);

/* Truncated SVD of sum_k w_k B_k A_k for every matrix of every group, in one pass over Grams (docs/numerics.md, One pass).
 *
 *   B, A      blocks of all groups one after the other, counts[g] of group g: m x r_k and r_k x n, any float dtype, read only
 *   weights   one descriptor per group, batch x counts[g] float64 (batch 1), finite and not zero
 *   left      m x p_max, any float dtype                  right  p_max x n, as left
 *   S         1 x p_max float64
 *   values    FEDLORA_PRODUCT_VALUES x 1 float64: energy, error, error_bound, rho, sigma_err, energy_abs; then energy_abs, norm and
 *             floor in the scale of the pass, where sums of squares are 2^-2e of the true ones
 *   codes     FEDLORA_PRODUCT_CODES x 1 int32: rank, numerical_rank, passes, info, notes, doubtful
 *   balance   1 x R float64, R the sum of all r_k: what the columns of B were multiplied with and the rows of A divided by
 *
 * R is from 1 to FEDLORA_PRODUCT_SVD_MAX, m, n and p_max are at least 1. The caller clears left and right: columns of left and rows
 * of right from the rank on are not written. A doubtful matrix needs a second pass; its left and right are not written, and the
 * rest is what one pass knows. The CUDA library does the second pass itself, so that no matrix of its answers is doubtful. A matrix
 * with NaN or Inf answers NaN everywhere.
 *
 *   rule, value, cap   FEDLORA_RULE_* with its number; cap 0 for none
 *   output             FEDLORA_OUTPUT_*
 *   seconds            null, or four float64: what the threads spent on Grams, cores, left and right factors is added there
 */
FEDLORA_API int fedlora_product_svd(const fedlora_block *B, const fedlora_block *A, const int64_t *counts,
                                    const fedlora_block *weights, const fedlora_block *left, const fedlora_block *S,
                                    const fedlora_block *right, const fedlora_block *values, const fedlora_block *codes,
                                    const fedlora_block *balance, int64_t groups, int64_t rule, double value, int64_t cap,
                                    int64_t output, double *seconds, void *workspace, int64_t workspace_bytes, int64_t threads,
                                    void *stream);

/* Widest stack that fedlora_stacked_qr serves. */
enum { FEDLORA_STACKED_QR_MAX = 1024 };

/* Bytes of scratch that fedlora_stacked_qr needs for these groups with so many threads. */
FEDLORA_API int fedlora_stacked_qr_workspace(const fedlora_block *X, const int64_t *counts, const fedlora_block *weights,
                                             const fedlora_block *Q, const fedlora_block *R, const fedlora_block *rank,
                                             const fedlora_block *info, const fedlora_block *notes, int64_t groups,
                                             int64_t threads, int64_t *bytes);

/* X = Q R of X = [w_1 X_1 | ... | w_K X_K] for every matrix of every group, R in row-echelon form with positive leading entries.
 *
 *   X         blocks of all groups one after the other, counts[g] of group g: m x q_k, any float dtype, read only
 *   weights   one descriptor per group, batch x counts[g] float64 (batch 1), finite and not zero
 *   Q         m x k, as R, with k = min(m, width); a null table: Q is not wanted
 *   R         k x width, width the sum of all q_k; float64 if a block of the group is, else float32
 *   rank      1 x 1, int32; rows of R and columns of Q are zero from there on
 *   info      1 x 1, int32                                    notes     1 x 1, int32
 *
 * A column is dependent if what is left of it is at most 16 width u of its length, within a factor 2, u = 2^-53. A matrix with NaN
 * or Inf answers NaN.
 */
FEDLORA_API int fedlora_stacked_qr(const fedlora_block *X, const int64_t *counts, const fedlora_block *weights,
                                   const fedlora_block *Q, const fedlora_block *R, const fedlora_block *rank,
                                   const fedlora_block *info, const fedlora_block *notes, int64_t groups, void *workspace,
                                   int64_t workspace_bytes, int64_t threads, void *stream);

/* Bytes of scratch that fedlora_tall_qr needs for these groups with so many threads. */
FEDLORA_API int fedlora_tall_qr_workspace(const fedlora_block *X, const int64_t *counts, const fedlora_block *scale,
                                          const fedlora_block *Q, const fedlora_block *R, int64_t groups, int64_t threads,
                                          int64_t *bytes);

/* [X_1 | ... | X_K] diag(scale) = Q R for every matrix of every group by reflections, Q orthonormal whatever the rank, R upper
 * triangular with a diagonal of any sign.
 *
 *   X         blocks of all groups one after the other, counts[g] >= 1 of group g: m x q_k, any float dtype, read only
 *   scale     1 x width float64, width the sum of all q_k
 *   Q         m x k float64, k = min(m, width)                R         k x width float64
 *
 * m and width are at least 1; the CUDA library serves widths up to 16384. Numbers are finite and scaled columns shorter than 2^500;
 * those shorter than 2^-450 count as zero.
 */
FEDLORA_API int fedlora_tall_qr(const fedlora_block *X, const int64_t *counts, const fedlora_block *scale,
                                const fedlora_block *Q, const fedlora_block *R, int64_t groups, void *workspace,
                                int64_t workspace_bytes, int64_t threads, void *stream);

#ifdef __cplusplus
}
#endif

#endif
