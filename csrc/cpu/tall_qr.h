// QR of tall stacks of blocks in float64 by Householder reflections (docs/numerics.md, Stacked QR), for callers with a parallel
// region of their own.
#pragma once

#include <cstdint>

#include "../include/fedlora.h"

namespace fedlora {

// X = [X_1 | ... | X_count] diag(scale) = Q T with Q m x R and T upper triangular, R x R; its diagonal has any sign. Where m < R, rows
// of T and columns of Q are zero from m on. The rows of X are cut into chains, as many as m and R say. Each is reduced to a triangle,
// strip by strip; then the triangles are merged in a tree. Chains of a matrix may run at the same time.
//
// Triangles, squares and strips lie in panels of eight columns: row i of panel p starts at `at(p, i)`, panels gap numbers apart. All
// memory is float64, starts at multiples of 64 bytes and need not be clean. Nothing is checked: X is finite, and columns of
// X diag(scale) are of lengths whose squares are no trouble.
struct TallQR {
    const fedlora_block *X;
    int64_t count, rows, R;

    static int64_t at(int64_t gap, int64_t panel, int64_t row);
    int64_t panels() const;
    int64_t gap() const;        // of triangles and squares
    int64_t triangle() const;   // numbers of one
    int64_t chains() const;     // of a matrix, at least one
    int64_t strip_gap() const;  // of a strip in scratch
    int64_t strip() const;      // numbers of that
    int64_t kept() const;       // numbers that the reflections of a chain take

    // Rows of X, unscaled, in panels gap apart; zero beyond the last column, and up to `height` rows.
    struct Rows {
        int64_t begin, end;
    };
    void pack(int64_t i, const Rows &rows, double *strip, int64_t gap, int64_t height) const;
    // The bits of the largest |x| of every column of X in this chain, unscaled, rounded up to whole panels.
    void largest(int64_t i, int64_t chain, int64_t *bits, double *strip) const;
    // The triangle of a chain of matrix i, `scale` null (all 1) or rounded up to whole panels; its reflections go to `keep`, or,
    // where that is null, nowhere.
    void factor(int64_t i, int64_t chain, const double *scale, double *triangle, double *keep, double *strip) const;
    // T in the first of all triangles, which lie one after the other; the others keep reflections.
    void merge(double *triangles) const;
    // The chains' shares of Q C from the square C, which stands first of all squares and is upper triangular if so said.
    void split(const double *triangles, double *squares, bool upper) const;
    // Rows of Q C: strips from the last one to the first, each from what the one before has left of the chain's share.
    int64_t strips(int64_t chain) const;
    Rows rows_of(int64_t chain, int64_t s) const;
    void apply(int64_t chain, int64_t s, const double *kept, double *square, bool upper, double *strip) const;
};

}  // namespace fedlora
