// Row-echelon form by reflections of rows. Where no column has been left out the triangle has it already, but for signs.
#include "echelon.h"

#include <cmath>
#include <cstring>

namespace {

#ifdef __x86_64__
#define FEDLORA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FEDLORA_CLONES
#endif

// Columns [first, width) of `count` rows from F on lose their part along v = (top, column `at` of the rows below).
FEDLORA_CLONES void reflect(double *F, int64_t count, int64_t width, int64_t at, double top, double tau, double *part) {
    const int64_t first = at + 1;
    for (int64_t j = first; j < width; ++j) part[j] = top * F[j];
    for (int64_t i = 1; i < count; ++i) {
        const double v = F[i * width + at], *const row = F + i * width;
        for (int64_t j = first; j < width; ++j) part[j] += v * row[j];
    }
    for (int64_t i = 0; i < count; ++i) {
        const double v = tau * (i ? F[i * width + at] : top);
        double *const row = F + i * width;
        for (int64_t j = first; j < width; ++j) row[j] -= v * part[j];
    }
}

}  // namespace

namespace fedlora {

int64_t echelon(double *F, int64_t rows, int64_t cols, double tolerance, double *scratch) {
    const int64_t width = cols + rows;
    int64_t rank = 0;
    for (int64_t j = 0; j < cols && rank < rows; ++j) {
        const int64_t last = j < rows ? j : rows - 1;
        double *const row = F + rank * width;
        double squares = 0;
        for (int64_t i = rank; i <= last; ++i) squares += F[i * width + j] * F[i * width + j];
        const double length = std::sqrt(squares), alpha = row[j];
        if (length <= tolerance) {
            for (int64_t i = rank; i <= last; ++i) F[i * width + j] = 0;
            continue;
        }
        if (last > rank) {
            const double top = alpha < 0 ? alpha - length : alpha + length, tau = 1 / (length * (length + std::fabs(alpha)));
            reflect(row, last - rank + 1, width, j, top, tau, scratch);
            row[j] = alpha < 0 ? length : -length;
            for (int64_t i = rank + 1; i <= last; ++i) F[i * width + j] = 0;
        }
        if (row[j] < 0)
            for (int64_t e = j; e < width; ++e) row[e] = -row[e];
        ++rank;
    }
    std::memset(F + rank * width, 0, sizeof(double) * (size_t)((rows - rank) * width));
    return rank;
}

}  // namespace fedlora
