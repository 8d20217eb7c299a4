// Runs the panel kernel of every instruction set, fedlora_mixed_sum and fedlora_cross_products on awkward sizes and layouts,
// in buffers of exactly the right length, against the definition. Numbers are small integers: every sum is exact.
#include "panel.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fedlora.h"
#include "mixed_sum.h"

namespace {

double number(size_t i) { return (double)((int)(i * 37 % 23) - 11); }

std::vector<const fedlora::Panel *> variants() {
    std::vector<const fedlora::Panel *> found = {&fedlora::panel_base()};
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&fedlora::panel_v3());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back(&fedlora::panel_v4());
#endif
    return found;
}

// Rows of C and Q start at multiples of 64 bytes, and the buffers end with their last number.
double *aligned(size_t count) { return (double *)std::aligned_alloc(64, (count * 8 + 63) / 64 * 64); }

int check_panel(const fedlora::Panel &panel, int rows, int depth, int cols, bool turned) {
    double *C = aligned(rows * cols), *Q = aligned(depth * cols);
    std::vector<double> P(rows * depth);
    for (int i = 0; i < rows * cols; ++i) C[i] = number(i + 5);
    for (int i = 0; i < depth * cols; ++i) Q[i] = number(i + 2);
    for (size_t i = 0; i < P.size(); ++i) P[i] = number(i);
    const int row = turned ? 1 : depth, step = turned ? rows : 1;
    panel.add(C, cols, P.data(), row, step, Q, cols, rows, depth, cols);
    int wrong = 0;
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < cols; ++j) {
            double total = number(i * cols + j + 5);
            for (int d = 0; d < depth; ++d) total += P[i * row + d * step] * Q[d * cols + j];
            wrong += C[i * cols + j] != total;
        }
    std::free(C);
    std::free(Q);
    return wrong;
}

// Tiles that overwrite C, then one that adds to it.
int check_tile(const fedlora::Panel &panel, int depth, int width) {
    const int gap = 8 * depth + 8;
    double *C = aligned(64 * width), *P = aligned(8 * depth), *Q = aligned(gap * width);
    for (int i = 0; i < 64 * width; ++i) C[i] = NAN;
    for (int i = 0; i < 8 * depth; ++i) P[i] = number(i);
    for (int i = 0; i < gap * width; ++i) Q[i] = number(i + 3);
    panel.tile(C, P, Q, gap, depth, width, false);
    panel.tile(C, P, Q, gap, depth, width, true);
    int wrong = 0;
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8 * width; ++j) {
            double total = 0;
            for (int d = 0; d < depth; ++d) total += P[d * 8 + i] * Q[j / 8 * gap + d * 8 + j % 8];
            wrong += C[i * 8 * width + j] != 2 * total;
        }
    std::free(C), std::free(P), std::free(Q);
    return wrong;
}

void put(float &to, double x) { to = (float)x; }
void put(double &to, double x) { to = x; }
void put(uint16_t &to, double x) {  // bfloat16
    const float narrow = (float)x;
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    to = (uint16_t)(bits >> 16);
}

// A part of a matrix by rows, by columns, or with gaps; what lies outside of the part is not written.
template <class T>
int check_widen(const fedlora::Panel &panel, int64_t dtype, int rows, int cols, int layout) {
    const int row = layout == 1 ? 1 : layout == 0 ? cols : 2 * cols, col = layout == 0 ? 1 : layout == 1 ? rows : 2, ld = cols + 3;
    const size_t offset = 5, last = rows && cols ? (size_t)(rows - 1) * row + (size_t)(cols - 1) * col + 1 : 0;
    std::vector<T> x(offset + last);
    for (size_t i = 0; i < x.size(); ++i) put(x[i], number(i));
    std::vector<double> out((size_t)rows * ld, -7.0);
    const fedlora_block X = {(int64_t)x.data(), rows, cols, row, col, dtype, 1, 0};
    panel.widen(out.data(), ld, X, (int64_t)offset, rows, cols);
    int wrong = 0;
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < ld; ++j) wrong += out[i * ld + j] != (j < cols ? number(offset + i * row + j * col) : -7.0);
    return wrong;
}

double value(float x) { return x; }
double value(double x) { return x; }
double value(uint16_t bits) {  // bfloat16
    const uint32_t all = (uint32_t)bits << 16;
    float x;
    std::memcpy(&x, &all, 4);
    return x;
}

// A part of a sum; whatever lies in the padding of its strip is not seen, and nothing is written outside of the part.
template <class T>
int check_narrow(const fedlora::Panel &panel, int64_t dtype, int rows, int cols, int layout) {
    const int row = layout == 1 ? 1 : layout == 0 ? cols : 2 * cols, col = layout == 0 ? 1 : layout == 1 ? rows : 2;
    const int ld = (cols + 7) / 8 * 8;
    const size_t offset = 3, last = rows && cols ? (size_t)(rows - 1) * row + (size_t)(cols - 1) * col + 1 : 0;
    std::vector<T> out(offset + last, (T)7);
    std::vector<double> x((size_t)rows * ld, NAN);
    double squares = 1;
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < cols; ++j) x[i * ld + j] = number(i * cols + j), squares += x[i * ld + j] * x[i * ld + j];
    const fedlora_block S = {(int64_t)out.data(), rows, cols, row, col, dtype, 1, 0};
    fedlora::Partial partial = {1, 0, 0, 0, 0};
    panel.narrow(x.data(), ld, S, (int64_t)offset, rows, cols, partial);
    int wrong = partial.squares != squares || partial.lost_squares || partial.nonfinite || partial.overflow;
    wrong += partial.nonzero != (squares > 1);
    std::vector<T> wanted(out.size(), (T)7);
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < cols; ++j) put(wanted[offset + i * row + j * col], number(i * cols + j));
    for (size_t i = 0; i < out.size(); ++i) wrong += value(out[i]) != value(wanted[i]);
    for (int i = 0; i < rows && cols; ++i) {  // trouble in one number
        partial = {};
        const double before = x[i * ld + cols - 1];
        x[i * ld + cols - 1] = i % 2 ? 1e300 : INFINITY;
        panel.narrow(x.data(), ld, S, (int64_t)offset, rows, cols, partial);
        wrong += partial.nonfinite != (i % 2 == 0) || partial.overflow != (i % 2 == 0 || sizeof(T) < 8);
        x[i * ld + cols - 1] = before;
    }
    return wrong;
}

// A float32 matrix by rows, or by columns.
struct Matrix {
    int rows, cols, batch;
    bool by_columns;
    std::vector<float> data;
    Matrix(int rows, int cols, int batch, bool by_columns, int seed)
        : rows(rows), cols(cols), batch(batch), by_columns(by_columns), data((size_t)rows * cols * batch) {
        for (size_t i = 0; i < data.size(); ++i) data[i] = (float)number(i + seed);
    }
    size_t at(int b, int i, int j) const { return (size_t)b * rows * cols + (by_columns ? (size_t)j * rows + i : (size_t)i * cols + j); }
    fedlora_block block() const {
        return {(int64_t)data.data(), rows, cols, by_columns ? 1 : cols, by_columns ? rows : 1, FEDLORA_FLOAT32, batch, (int64_t)rows * cols};
    }
};

fedlora_block doubles(const std::vector<double> &data, int rows, int cols, int batch) {
    return {(int64_t)data.data(), rows, cols, cols, 1, FEDLORA_FLOAT64, batch, (int64_t)rows * cols};
}

int check_mixed(int p, const std::vector<int> &ranks, int q, int batch, bool by_columns, int threads) {
    std::vector<Matrix> blocks;
    std::vector<std::vector<double>> mixing;
    std::vector<fedlora_block> X, M;
    X.reserve(ranks.size() + 1), M.reserve(ranks.size() + 1);  // tables are not null
    for (const int r : ranks) {
        blocks.emplace_back(p, r, batch, by_columns, r);
        mixing.emplace_back((size_t)r * q * batch);
        for (size_t i = 0; i < mixing.back().size(); ++i) mixing.back()[i] = number(i + 3 * r);
    }
    for (size_t k = 0; k < ranks.size(); ++k) {
        X.push_back(blocks[k].block());
        M.push_back(doubles(mixing[k], ranks[k], q, batch));
    }
    Matrix sum(p, q, batch, by_columns, 0);
    std::vector<double> norm(batch), rounding(batch);
    std::vector<int32_t> info(batch), notes(batch);
    const fedlora_block out = sum.block(), n = doubles(norm, 1, 1, batch), lost = doubles(rounding, 1, 1, batch);
    const fedlora_block i32 = {(int64_t)info.data(), 1, 1, 1, 1, FEDLORA_INT32, batch, 1}, z = {(int64_t)notes.data(), 1, 1, 1, 1, FEDLORA_INT32, batch, 1};
    const int64_t count = (int64_t)ranks.size();
    int64_t bytes = 0;
    if (fedlora_mixed_sum_workspace(M.data(), &count, &out, 1, threads, &bytes)) return 1;
    std::vector<char> workspace(bytes);
    if (fedlora_mixed_sum(X.data(), M.data(), &count, &out, &n, &lost, &i32, &z, 1, workspace.data(), bytes, threads, nullptr)) return 1;
    if (fedlora_mixed_sum(X.data(), M.data(), &count, &out, &n, &lost, &i32, &z, 1, workspace.data(), bytes - 1, threads, nullptr) != FEDLORA_BAD_WORKSPACE)
        return 1;
    int wrong = 0;
    for (int b = 0; b < batch; ++b)
        for (int i = 0; i < p; ++i)
            for (int j = 0; j < q; ++j) {
                double total = 0;
                for (size_t k = 0; k < ranks.size(); ++k)
                    for (int d = 0; d < ranks[k]; ++d) total += blocks[k].data[blocks[k].at(b, i, d)] * mixing[k][((size_t)b * ranks[k] + d) * q + j];
                wrong += sum.data[sum.at(b, i, j)] != (float)total;
            }
    return wrong;
}

// Blocks scaled by column, chunk by chunk; block 1 has no part in the sum and is not read.
int check_scaled(int p, int q, bool by_columns) {
    const int ranks[] = {5, 3, 300};
    std::vector<Matrix> blocks;
    std::vector<std::vector<double>> mixing;
    std::vector<fedlora_block> X, M;
    std::vector<double> factors(308);
    for (size_t j = 0; j < factors.size(); ++j) factors[j] = std::ldexp(1.0, (int)(j % 5) - 2);
    for (int k = 0; k < 3; ++k) {
        blocks.emplace_back(p, ranks[k], 1, by_columns, k);
        mixing.emplace_back((size_t)ranks[k] * q);
        for (size_t i = 0; i < mixing[k].size(); ++i) mixing[k][i] = k == 1 ? 0.0 : number(i + k);
    }
    for (float &x : blocks[1].data) x = NAN;
    for (int k = 0; k < 3; ++k) X.push_back(blocks[k].block()), M.push_back(doubles(mixing[k], ranks[k], q, 1));
    Matrix sum(p, q, 1, by_columns, 0);
    const fedlora::MixedSum mixed = {X.data(), M.data(), 3, doubles(factors, 1, 308, 1), sum.block()};
    if (mixed.status() || fedlora::MixedSum{X.data(), M.data(), 3, doubles(factors, 1, 307, 1), sum.block()}.status() != FEDLORA_BAD_SHAPE)
        return 1;
    double *const scratch = aligned((size_t)mixed.scratch());
    std::memset(scratch, 0xff, (size_t)mixed.scratch() * 8);
    fedlora::Partial partial;
    for (int64_t chunk = 0; chunk < mixed.chunks(); ++chunk) mixed.run(0, chunk, scratch, partial);
    std::free(scratch);
    int wrong = 0;
    for (int i = 0; i < p; ++i)
        for (int j = 0; j < q; ++j) {
            double total = 0;
            for (int k = 0, at = 0; k < 3; at += ranks[k], ++k)
                for (int d = 0; k != 1 && d < ranks[k]; ++d)
                    total += blocks[k].data[blocks[k].at(0, i, d)] * factors[at + d] * mixing[k][(size_t)d * q + j];
            wrong += sum.data[sum.at(0, i, j)] != (float)total;
        }
    return wrong;
}

int check_cross(int p, const std::vector<int> &ranks, int q, int batch, bool by_columns, bool target_by_columns, int threads) {
    std::vector<Matrix> blocks;
    std::vector<std::vector<double>> products;
    std::vector<std::vector<double>> sizes(ranks.size(), std::vector<double>(batch, NAN));
    std::vector<std::vector<int32_t>> exponents(ranks.size(), std::vector<int32_t>(batch, -1));
    std::vector<fedlora_block> X, M, norms, powers;
    for (auto *table : {&X, &M, &norms, &powers}) table->reserve(ranks.size() + 1);  // tables are not null
    for (const int r : ranks) {
        blocks.emplace_back(p, r, batch, by_columns, r);
        products.emplace_back((size_t)r * q * batch, NAN);
    }
    for (size_t k = 0; k < ranks.size(); ++k) {
        X.push_back(blocks[k].block());
        M.push_back(doubles(products[k], ranks[k], q, batch));
        norms.push_back(doubles(sizes[k], 1, 1, batch));
        powers.push_back({(int64_t)exponents[k].data(), 1, 1, 1, 1, FEDLORA_INT32, batch, 1});
    }
    const Matrix target(p, q, batch, target_by_columns, 1);
    const int64_t count = (int64_t)ranks.size();
    const fedlora_block Y = target.block();
    int64_t bytes = 0;
    if (fedlora_cross_products_workspace(X.data(), &count, &Y, 1, threads, &bytes)) return 1;
    std::vector<char> workspace(bytes);
    if (fedlora_cross_products(X.data(), &count, &Y, M.data(), norms.data(), powers.data(), 1, workspace.data(), bytes, threads, nullptr)) return 1;
    if (fedlora_cross_products(X.data(), &count, &Y, M.data(), norms.data(), powers.data(), 1, workspace.data(), bytes - 1, threads, nullptr) !=
        FEDLORA_BAD_WORKSPACE)
        return 1;
    int wrong = 0;
    for (int b = 0; b < batch; ++b)
        for (size_t k = 0; k < ranks.size(); ++k) {
            double squares[2] = {0, 0};
            for (const Matrix *x : {(const Matrix *)&blocks[k], &target})
                for (int i = 0; i < p; ++i)
                    for (int d = 0; d < x->cols; ++d) squares[x == &target] += (double)x->data[x->at(b, i, d)] * x->data[x->at(b, i, d)];
            wrong += sizes[k][b] != std::sqrt(squares[0]) * std::sqrt(squares[1]) || exponents[k][b] != 0;
            for (int d = 0; d < ranks[k]; ++d)
                for (int j = 0; j < q; ++j) {
                    double total = 0;
                    for (int i = 0; i < p; ++i) total += (double)blocks[k].data[blocks[k].at(b, i, d)] * target.data[target.at(b, i, j)];
                    wrong += products[k][((size_t)b * ranks[k] + d) * q + j] != total;
                }
        }
    return wrong;
}

}  // namespace

int check_panels() {
    int failures = 0;
    for (const fedlora::Panel *panel : variants())
        for (int rows = 0; rows <= 17; ++rows)
            for (const int depth : {0, 1, 5, 64})
                for (const int cols : {0, 8, 16, 40})
                    for (const bool turned : {false, true}) failures += check_panel(*panel, rows, depth, cols, turned) != 0;
    for (const fedlora::Panel *panel : variants()) {
        for (const int depth : {0, 1, 5, 64})
            for (const int width : {1, 2, 3}) failures += check_tile(*panel, depth, width) != 0;
        for (const int rows : {0, 1, 7, 8, 13, 32})
            for (int cols = 0; cols <= 21; ++cols)
                for (const int layout : {0, 1, 2}) {
                    failures += check_widen<float>(*panel, FEDLORA_FLOAT32, rows, cols, layout) != 0;
                    failures += check_widen<double>(*panel, FEDLORA_FLOAT64, rows, cols, layout) != 0;
                    failures += check_widen<uint16_t>(*panel, FEDLORA_BFLOAT16, rows, cols, layout) != 0;
                    failures += check_narrow<float>(*panel, FEDLORA_FLOAT32, rows, cols, layout) != 0;
                    failures += check_narrow<double>(*panel, FEDLORA_FLOAT64, rows, cols, layout) != 0;
                    failures += check_narrow<uint16_t>(*panel, FEDLORA_BFLOAT16, rows, cols, layout) != 0;
                }
    }
    const std::vector<std::vector<int>> ranks = {{1}, {4, 4}, {3, 0, 9}, {16, 16, 16}, {33, 2}, {0}, {}};
    for (const int p : {0, 1, 63, 64, 65, 2049})
        for (const auto &r : ranks)
            for (const int q : {0, 1, 7, 16, 34})
                for (const bool by_columns : {false, true}) {
                    if (p > 1000 && q > 16) continue;
                    failures += check_mixed(p, r, q, 2, by_columns, 1 + q % 3) != 0;
                    failures += check_cross(p, r, q, 2, by_columns, q % 2 == 0, 1 + q % 3) != 0;
                }
    for (const int p : {1, 130, 2050})
        for (const int q : {1, 9, 25})
            for (const bool by_columns : {false, true}) failures += check_scaled(p, q, by_columns) != 0;
    failures += check_mixed(5, {3}, 4, 0, false, 2) != 0;
    failures += check_cross(5, {3}, 4, 0, false, true, 2) != 0;
    std::printf("panels:");
    for (const fedlora::Panel *panel : variants()) std::printf(" %s", panel->isa);
    std::printf("; %d problems wrong\n", failures);
    return failures;
}
