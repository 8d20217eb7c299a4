// Cholesky of a Gram in panels of eight columns, and the inverse of the factor.
#include "cholesky_qr.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#include "reflectors.h"

namespace {

using fedlora::CholeskyQR;
using fedlora::kGroup;

// The eight rows of a diagonal block become upper triangular; false where it is not positive definite.
bool factor_block(double *D) {
    for (int k = 0; k < 8; ++k) {
        const double square = D[k * 8 + k];
        if (!(square > 0)) return false;
        const double inverse = 1 / std::sqrt(square);
        for (int j = 0; j < 8; ++j) D[k * 8 + j] = j < k ? 0 : D[k * 8 + j] * inverse;
        for (int i = k + 1; i < 8; ++i)
            for (int j = i; j < 8; ++j) D[i * 8 + j] -= D[k * 8 + i] * D[k * 8 + j];
    }
    return true;
}

// B = D^-T B for eight rows of a panel.
void solve_block(const double *D, double *B) {
    for (int k = 0; k < 8; ++k) {
        for (int i = 0; i < k; ++i)
            for (int j = 0; j < 8; ++j) B[k * 8 + j] -= D[i * 8 + k] * B[i * 8 + j];
        for (int j = 0; j < 8; ++j) B[k * 8 + j] /= D[k * 8 + k];
    }
}

// N = -D^-1, upper triangular.
void invert_block(const double *D, double *N) {
    for (int j = 0; j < 8; ++j)
        for (int i = 7; i >= 0; --i) {
            double sum = i == j ? -1 : 0;
            for (int k = i + 1; k <= j; ++k) sum -= D[i * 8 + k] * N[k * 8 + j];
            N[i * 8 + j] = i <= j ? sum / D[i * 8 + i] : 0;
        }
}

bool cholesky(const CholeskyQR &qr, double *U, double *turned) {
    const int64_t panels = qr.panels(), gap = qr.gap();
    for (int64_t p = 0; p < panels; ++p) {
        double *const D = U + p * gap + 64 * p;
        if (!factor_block(D)) return false;
        std::memset(D + 64, 0, sizeof(double) * 64 * (size_t)(panels - 1 - p));
        for (int64_t j = p + 1; j < panels; ++j) {
            double *const B = U + j * gap + 64 * p;
            solve_block(D, B);
            for (int i = 0; i < 8; ++i)
                for (int k = 0; k < 8; ++k) turned[64 * j + i * 8 + k] = B[k * 8 + i];
        }
        for (int64_t j = p + 1, width = 0; j < panels; j += width) {
            width = panels - j < kGroup ? panels - j : kGroup;
            double *const column = U + j * gap + 64 * p;
            fedlora::reflectors().update(column + 64, gap, turned + 64 * (p + 1), 8 * (j + width - p - 1), column, gap, width);
        }
    }
    return true;
}

// Column after column: U^-1 above a diagonal block is what stands left of it times U times the block's own inverse, negative.
void invert(const CholeskyQR &qr, const double *U, double *negative, double *sum) {
    const int64_t panels = qr.panels(), gap = qr.gap();
    for (int64_t j = 0; j < panels; ++j) {
        double *const N = negative + j * gap;
        std::memset(N, 0, sizeof(double) * 64 * (size_t)panels);
        std::memset(sum, 0, sizeof(double) * 64 * (size_t)panels);
        invert_block(U + j * gap + 64 * j, N + 64 * j);
        for (int64_t p = 0; p < j; ++p)
            fedlora::reflectors().update(sum, 0, negative + p * gap, 8 * (p + 1), U + j * gap + 64 * p, 0, 1);
        fedlora::reflectors().update(N, 0, sum, 8 * j, N + 64 * j, 0, 1);
    }
}

double squares(const CholeskyQR &qr, const double *A) {
    double lanes[8] = {}, sum = 0;
    for (int64_t p = 0; p < qr.panels(); ++p)
        for (int64_t i = 0; i < 8 * (p + 1); ++i)
            for (int64_t j = 0; j < 8; ++j) lanes[j] += A[p * qr.gap() + 8 * i + j] * A[p * qr.gap() + 8 * i + j];
    for (const double lane : lanes) sum += lane;
    return sum - (double)(8 * qr.panels() - qr.R);  // without the identity that fills the last panel
}

}  // namespace

namespace fedlora {

double CholeskyQR::factor(double *U, double *negative, double *scratch) const {
    if (!cholesky(*this, U, scratch)) return INFINITY;
    invert(*this, U, negative, scratch);
    return squares(*this, U) * squares(*this, negative);
}

}  // namespace fedlora
