// Runs fedlora_cholesky on awkward sizes in buffers of exactly the right length, and checks L L^T = G.
#include <cmath>
#include <cstdio>
#include <vector>

#include "fedlora.h"

namespace {

int check_one(int R, int rank, int batch, int threads) {
    std::vector<double> X(rank * R), G(batch * R * R), L(batch * R * R, -1.0), width(batch, R);
    unsigned state = 99u + R * 7 + rank;
    for (double &x : X) x = ((int)((state = state * 1664525u + 1013904223u) >> 8) - (1 << 23)) / 1e6;
    double largest = 0;
    for (int b = 0; b < batch; ++b)
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < R; ++j) {
                double sum = 0;
                for (int k = 0; k < rank; ++k) sum += X[k * R + i] * X[k * R + j];
                G[(b * R + i) * R + j] = sum;
                largest = std::fmax(largest, sum);
            }
    const fedlora_block grams{(int64_t)G.data(), R, R, R, 1, FEDLORA_FLOAT64, batch, R * R};
    const fedlora_block factors{(int64_t)L.data(), R, R, R, 1, FEDLORA_FLOAT64, batch, R * R};
    const fedlora_block widths{(int64_t)width.data(), 1, 1, 1, 1, FEDLORA_FLOAT64, batch, 1};
    int64_t bytes = -1;
    int wrong = fedlora_cholesky_workspace(&grams, 1, threads, &bytes) != FEDLORA_OK;
    std::vector<char> workspace(bytes);
    wrong += fedlora_cholesky(&grams, &widths, &factors, 1, workspace.data(), bytes, threads, nullptr) != FEDLORA_OK;
    wrong += fedlora_cholesky(&grams, &widths, &factors, 1, workspace.data(), bytes - 1, threads, nullptr) !=
             (batch ? FEDLORA_BAD_WORKSPACE : FEDLORA_OK);
    for (int b = 0; b < batch; ++b)
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < R; ++j) {
                double sum = 0;
                for (int k = 0; k < R; ++k) sum += L[(b * R + i) * R + k] * L[(b * R + j) * R + k];
                wrong += !(std::fabs(sum - G[(b * R + i) * R + j]) <= 4 * R * 0x1p-53 * largest);
            }
    if (wrong) std::printf("cholesky: R %d, rank %d, batch %d: %d wrong\n", R, rank, batch, wrong);
    return wrong;
}

}  // namespace

int check_cholesky() {
    int failures = 0;
    for (const int R : {1, 2, 7, 8, 33, 64, 71, 130})
        for (const int rank : {1, R / 2 + 1, R})
            for (const int batch : {0, 1, 3}) failures += check_one(R, rank, batch, 2);
    return failures;
}
