// fedlora_product_svd: the whole pass over stacked Grams in one parallel region (docs/numerics.md, One pass).
//
// A wave is a few matrices of one group whose state lies in the workspace. One thread takes a wave through all steps, so that
// its factors are still in a cache when they are read again; what is left when the waves do not share out evenly is done by all
// threads together, chunk by chunk. Chunks do not depend on any of this, nor do the bits.
#include <omp.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <vector>

#include "../include/fedlora.h"
#include "cholesky.h"
#include "direct_svd.h"
#include "gram.h"
#include "mixed_sum.h"
#include "panel.h"
#include "partial.h"
#include "spectrum.h"
#include "svd.h"

namespace {

#include "element.hpp"
#include "strips.hpp"
#include "signs.hpp"
#include "small_algebra.hpp"

using fedlora::Certificate;
using fedlora::Gram;
using fedlora::MixedSum;
using fedlora::Rule;
using fedlora::Spectrum;
using fedlora::exponent_of;
using fedlora::pow2;
using fedlora::scale_pow2;

constexpr double kRoundoff = 0x1p-53;
constexpr int64_t kFarApart = 200;  // exponents between weights whose squares, times those of float32, might leave the range
constexpr int64_t kExponentOfZero = -10000;  // below all others, so that a column of zeros never decides the scale
constexpr int64_t kWaveBytes = 16 << 20;     // of the state of a wave that all threads share, and of its Grams that wait

enum { kB = 0, kA = 1 };  // the sides
enum Stage { kGrams, kCores, kLeft, kRight, kStages };

struct Call {
    Rule rule;
    double powers[2];  // of the singular values that left and right carry
};

struct Group {
    const fedlora_block *X[2];  // blocks of B, and of A turned: rows x r_k
    const fedlora_block *A;     // as given
    int64_t count, R;
    fedlora_block weights, out[2], S, values, codes, balance;  // out: left, and right turned

    int64_t rows(int side) const { return out[side].rows; }
    int64_t batch() const { return out[kB].batch; }
    int64_t room() const { return out[kB].cols; }  // p_max
    int64_t most() const { return smaller(smaller(R, room()), smaller(rows(kB), rows(kA))); }  // columns ever written
    int64_t chunks(int side) const { return chunks_of(rows(side)); }
    bool small() const { return R <= fedlora::kSmallSvdMax; }
};

fedlora_block block_at(const void *data, int64_t rows, int64_t cols, int64_t row, int64_t col, int64_t batch, int64_t step) {
    return {(int64_t)data, rows, cols, row, col, FEDLORA_FLOAT64, batch, step};
}

fedlora_block turned(fedlora_block b) {
    const fedlora_block t = {b.data, b.cols, b.rows, b.col_stride, b.row_stride, b.dtype, b.batch, b.batch_stride};
    return t;
}

struct Facts {
    int64_t e, live, rank[2], p;
    int32_t scaled[2], bad, info, svd_info, svd_notes;
    double energy, energy_abs, floor, norm;
    Certificate found;
};

// The state of one matrix. Matrices R x R have rows, or columns, `ld` apart; what they hold changes as named.
struct Module {
    int64_t R, ld, k;
    double *G[2];  // Grams, then the core by columns and a turned factor, then coefficients K^T
    double *L[2];  // Cholesky factors by columns
    double *W[2];  // singular vectors of the core by columns, then coefficients K by rows
    double *s, *factor, *sign, *om, *ones, *balance[2], *scale[2];
    int64_t *exponent[2], *index;
    fedlora_block *mixers[2];
    Records *records;
    uint8_t *overflow[2];
    Facts *facts;

    Module(const Group &g, char *memory)
        : R(g.R), ld(padded(R) | fedlora::kPad), k(smaller(R, smaller(g.rows(kB), g.rows(kA)))), next_((uintptr_t)memory) {
        for (int side = 0; side < 2; ++side) {
            G[side] = take<double>(R * ld);
            L[side] = take<double>(fedlora::factor_stride(R) * R);
            W[side] = take<double>(R * ld);
            balance[side] = take<double>(R);
            scale[side] = take<double>(R);
            exponent[side] = take<int64_t>(R);
            mixers[side] = take<fedlora_block>(g.count);
            overflow[side] = take<uint8_t>(g.chunks(side));
        }
        s = take<double>(R);
        factor = take<double>(R);
        sign = take<double>(R);
        om = take<double>(R);
        ones = take<double>(R);
        index = take<int64_t>(R);
        records = take<Records>(g.chunks(kB) * g.most());
        facts = take<Facts>(1);
    }

    static int64_t bytes(const Group &g) { return (int64_t)Module(g, nullptr).next_; }

  private:
    uintptr_t next_;

    template <class T>
    T *take(int64_t count) {
        T *here = (T *)next_;
        next_ += ((uintptr_t)(count * (int64_t)sizeof(T)) + 63) / 64 * 64;
        return here;
    }
};

// Some matrices of a group, and the steps that they go through.
struct Wave {
    const Call &call;
    const Group &g;
    int64_t first, count;
    char *modules;
    int64_t step;  // bytes of a module

    Module module(int64_t at) const { return Module(g, modules + at * step); }
    fedlora_block shared(const double *of_first, int64_t rows, int64_t cols, int64_t row) const {
        // entry i of the batch belongs to matrix i of the group
        return block_at((const char *)of_first - first * step, rows, cols, row, 1, g.batch(), step / 8);
    }

    Gram gram(int side, bool scaled) const {
        const Module m = module(0);
        return {g.X[side], g.count, shared(m.scale[side], scaled ? 1 : 0, m.R, m.ld), shared(m.G[side], m.R, m.R, m.ld)};
    }

    void prepare(int64_t at, int side) const;  // which columns are scaled on reading, and how
    void weigh(int64_t at, double *scratch) const;  // balanced Grams and their factors
    void fill_lane(int64_t at) const;
    void decompose_lanes(int64_t begin, double *scratch) const;
    void decompose(int64_t at, double *scratch) const;
    void judge(const Module &m) const;
    void expand(int64_t at) const;
    void write(int64_t at, int side, int64_t chunk, double *scratch) const;
    void orient(int64_t at) const;
    void turn(int64_t at, int64_t chunk) const;
    void report(int64_t at) const;
};

int64_t lanes_of(const Group &g) {
    const fedlora_block C = block_at(nullptr, g.R, g.R, 1, g.R, 1, 0);
    return fedlora::svd_variant(C).matrices_per_task(C);
}

double rho_max(const Group &g) { return g.out[kB].dtype == FEDLORA_FLOAT64 ? 16 : 1e4; }

double weight(const Group &g, int64_t i, int64_t k) {
    return ((const double *)g.weights.data)[i * g.weights.row_stride + k * g.weights.col_stride];
}

void Wave::prepare(int64_t at, int side) const {
    const Module m = module(at);
    int64_t low = INT64_MAX, high = INT64_MIN;
    bool wide = false;
    for (int64_t k = 0; k < g.count; ++k) {
        const int64_t e = exponent_of(weight(g, first + at, k));
        low = smaller(low, e);
        high = larger(high, e);
        wide |= g.X[side][k].dtype == FEDLORA_FLOAT64;
    }
    // Weights far apart: the greatest may belong to a column of zeros, and then must not set the scale.
    m.facts->scaled[side] = wide || high - low > kFarApart;
    if (!m.facts->scaled[side]) return;
    double *largest = m.scale[side];
    for (int64_t k = 0; k < g.count; largest += g.X[side][k].cols, ++k) column_maxima(g.X[side][k], first + at, largest);
    for (int64_t j = 0; j < m.R; ++j) {
        const double x = m.scale[side][j];
        m.exponent[side][j] = x == 0 ? kExponentOfZero : larger(-1022, smaller(exponent_of(x), 1022));
        m.scale[side][j] = pow2(-m.exponent[side][j]);
    }
}

void Wave::weigh(int64_t at, double *scratch) const {
    const Module m = module(at);
    Facts &f = *m.facts;
    f.bad = f.info = f.svd_info = 0;
    f.live = f.p = f.rank[kB] = f.rank[kA] = 0;
    f.energy = f.energy_abs = f.floor = f.norm = 0;
    for (int64_t j = 0; j < m.R; ++j) m.s[j] = 0;
    const auto exponent = [&](int64_t j) {
        return (f.scaled[kB] ? m.exponent[kB][j] : 0) + (f.scaled[kA] ? m.exponent[kA][j] : 0);
    };
    f.e = INT64_MIN;
    for (int64_t k = 0, j = 0; k < g.count; ++k)
        for (const int64_t end = j + g.X[kB][k].cols; j < end; ++j) {
            m.om[j] = weight(g, first + at, k);
            m.ones[j] = 1;
            f.e = larger(f.e, exponent(j) + exponent_of(m.om[j]));
        }
    f.e += f.e & 1;  // even, so that its root is a power of two
    for (int64_t j = 0; j < m.R; ++j) {
        m.om[j] = scale_pow2(m.om[j], exponent(j) - f.e);
        const double b = m.G[kB][j * (m.ld + 1)], a = m.G[kA][j * (m.ld + 1)] * (m.om[j] * m.om[j]);
        f.bad |= !(std::fabs(b) <= DBL_MAX && std::fabs(a) <= DBL_MAX);
        const bool live = b > 0 && a > 0;
        // Ties go up, not to even: then scaling B by a power of four shifts every exponent alike and no bit changes.
        const int64_t shift = live ? (exponent_of(a) - exponent_of(b) + 2) >> 2 : 0;
        m.balance[kB][j] = pow2(shift);
        m.balance[kA][j] = pow2(-shift);
        if (live) m.index[f.live++] = j;
    }
    if (f.bad) f.live = 0;
    if (f.live == 0) return;
    double bound[2];
    const double *weights[2] = {m.ones, m.om};
    for (int side = 0; side < 2; ++side)
        bound[side] = balance(m.G[side], m.ld, m.R, m.index, f.live, weights[side], m.balance[side]);
    f.norm = std::sqrt(bound[kB] * bound[kA]);
    inner_product(m.G[kB], m.G[kA], m.ld, f.live, f.energy, f.energy_abs);
    f.floor = 4 * (double)f.live * kRoundoff * f.norm;
    for (int side = 0; side < 2; ++side)
        f.rank[side] = fedlora::pivoted_cholesky(m.G[side], m.ld, 1, f.live, (double)f.live, m.L[side], scratch);
}

// C = L_x^T L_y by columns.
void core_product(const Module &m, int x) {
    const Facts &f = *m.facts;
    const int64_t stride = fedlora::factor_stride(f.live), rows = f.rank[x], cols = f.rank[1 - x];
    transpose(m.L[x], stride, f.live, rows, m.G[1], m.ld);
    fedlora::panel().add(m.G[0], m.ld, m.L[1 - x], stride, 1, m.G[1], m.ld, cols, f.live, padded(rows));
}

// Rank and certificate from the singular values.
void Wave::judge(const Module &m) const {
    Facts &f = *m.facts;
    f.found = fedlora::certify({m.s, m.k, f.live, m.R, f.energy, f.energy_abs, f.floor, f.norm, f.e, false}, call.rule, rho_max(g));
    f.p = f.bad || f.found.doubtful ? 0 : smaller(f.found.rank, g.room());
}

// All vectors at once, one-sided Jacobi.
void jacobi(const Module &m, int x, double *scratch) {
    Facts &f = *m.facts;
    const int64_t rows = f.rank[x], cols = f.rank[1 - x];
    const fedlora_block C = block_at(m.G[0], rows, cols, 1, m.ld, 1, 0);
    fedlora_block info = block_at(&f.svd_info, 1, 1, 1, 1, 1, 0), notes = block_at(&f.svd_notes, 1, 1, 1, 1, 1, 0);
    info.dtype = notes.dtype = FEDLORA_INT32;
    fedlora::svd_variant(C).run({C, block_at(m.W[x], rows, cols, 1, m.ld, 1, 0), block_at(m.s, 1, cols, m.ld, 1, 1, 0),
                               block_at(m.W[1 - x], cols, cols, m.ld, 1, 1, 0), info, notes},
                              0, 0, scratch);
}

// Singular values of the core, the rank, and as many singular vectors.
void Wave::decompose(int64_t at, double *scratch) const {
    const Module m = module(at);
    Facts &f = *m.facts;
    const int x = f.rank[kB] >= f.rank[kA] ? kB : kA;  // the side whose vectors are longer
    const int64_t rows = f.rank[x], cols = f.rank[1 - x];
    std::memset(m.G[0], 0, sizeof(double) * (size_t)(cols * m.ld));
    if (cols > 0) core_product(m, x);
    const double largest = largest_of(m.G[0], m.ld, rows, cols);
    if (largest == 0) return judge(m);
    const int64_t e = exponent_of(largest);
    scale_columns(m.G[0], m.ld, rows, cols, pow2(-(e >> 1)), pow2((e >> 1) - e));
    const auto judge_values = [&] {
        for (int64_t i = 0; i < cols; ++i) m.s[i] = scale_pow2(m.s[i], e);
        judge(m);
    };
    const fedlora::DirectSvd &direct = fedlora::direct_svd();
    if (direct.values(m.G[0], m.ld, rows, cols, m.s, scratch)) {
        judge_values();
        if (f.p == 0 || direct.vectors(f.p, m.W[x], m.ld, m.W[1 - x], m.ld, scratch)) return;
    }
    jacobi(m, x, scratch);
    judge_values();
}

// The core among zeros, for a lane of the small SVD.
void Wave::fill_lane(int64_t at) const {
    const Module m = module(at);
    std::memset(m.G[0], 0, sizeof(double) * (size_t)(m.R * m.ld));
    if (m.facts->rank[kB] > 0 && m.facts->rank[kA] > 0) core_product(m, kB);
}

void Wave::decompose_lanes(int64_t begin, double *scratch) const {
    const Module m = module(0);
    const int64_t R = m.R, each = step / 8;
    fedlora_block info = block_at(&m.facts->svd_info, 1, 1, 1, 1, count, step / 4);
    fedlora_block notes = block_at(&m.facts->svd_notes, 1, 1, 1, 1, count, step / 4);
    info.dtype = notes.dtype = FEDLORA_INT32;
    const fedlora_block C = block_at(m.G[0], R, R, 1, m.ld, count, each);
    fedlora::svd_variant(C).run({C, block_at(m.W[kB], R, R, 1, m.ld, count, each), block_at(m.s, 1, R, m.ld, 1, count, each),
                                 block_at(m.W[kA], R, R, m.ld, 1, count, each), info, notes},
                                begin, 0, scratch);
}

// K = diag(gauge) L W S^(power - 1) for both sides, and its rows as the mixers of the blocks.
void Wave::expand(int64_t at) const {
    const Module m = module(at);
    Facts &f = *m.facts;
    if (f.p == 0) return;
    const int64_t stride = fedlora::factor_stride(f.live);
    for (int side = 0; side < 2; ++side) {
        const int other = 1 - side;  // U = B L_A V S^-1
        std::memset(m.G[side], 0, sizeof(double) * (size_t)(f.p * m.ld));
        fedlora::panel().add(m.G[side], m.ld, m.W[other], m.ld, 1, m.L[other], stride, f.p, f.rank[other], padded(f.live));
    }
    for (int side = 0; side < 2; ++side) {
        const double power = call.powers[side];
        const int64_t e = (int64_t)((double)f.e * power);
        const double one = pow2(e >> 1), two = pow2(e - (e >> 1));
        if (f.live < m.R) std::memset(m.W[side], 0, sizeof(double) * (size_t)(m.R * m.ld));
        for (int64_t j = 0; j < f.p; ++j) m.factor[j] = power == 0 ? 1 / m.s[j] : power == 1 ? 1 : 1 / std::sqrt(m.s[j]);
        expand_rows(m.G[side], m.ld, m.index, f.live, f.p, side == kB ? m.ones : m.om, m.balance[side], m.factor, one, two,
                    m.W[side]);
        double *rows = m.W[side];
        for (int64_t k = 0; k < g.count; rows += g.X[side][k].cols * m.ld, ++k)
            m.mixers[side][k] = block_at(rows, g.X[side][k].cols, f.p, m.ld, 1, g.batch(), 0);
    }
}

// Numbers of float64 that the left factor of a chunk takes in float32.
int64_t beside_size(int64_t p) { return kChunk * p / 2; }

// The chunk of left or right, left without its signs.
void Wave::write(int64_t at, int side, int64_t chunk, double *scratch) const {
    const Module m = module(at);
    const Facts &f = *m.facts;
    const fedlora_block &out = g.out[side];
    const int64_t i = first + at, begin = chunk * kChunk, rows = smaller(kChunk, g.rows(side) - begin);
    m.overflow[side][chunk] = 0;
    if (f.bad) return fill_any(out, i, begin, rows, NAN);
    if (f.p == 0) return;
    const bool beside = side == kB && is_half(out.dtype);  // a half has too few bits to tell which element is the largest
    fedlora_block sum = out;
    sum.cols = f.p;
    double *const rest = beside ? scratch + beside_size(f.p) : scratch;
    float *const floats = (float *)scratch;
    if (beside) sum = {(int64_t)floats - begin * f.p * 4, g.rows(side), f.p, f.p, 1, FEDLORA_FLOAT32, g.batch(), 0};
    fedlora::Partial said;
    const fedlora_block scale = block_at(m.scale[side], f.scaled[side] ? 1 : 0, m.R, m.R, 1, g.batch(), 0);
    MixedSum{g.X[side], m.mixers[side], g.count, scale, sum}.run(i, chunk, rest, said);
    m.overflow[side][chunk] = said.overflow != 0;
    if (side == kA) return;
    Records *const records = m.records + chunk * f.p;
    char *const to = address(out, i, begin);
    const int64_t row = out.row_stride, col = out.col_stride;
    for (int64_t j = 0; j < f.p; j += kColumns) {
        const int64_t cols = smaller(kColumns, f.p - j);
        if (beside)
            record_float32(floats + j, f.p, 1, rows, cols, records + j);
        else if (out.dtype == FEDLORA_FLOAT32)
            record_float32((float *)to + j * col, row, col, rows, cols, records + j);
        else
            record_float64((double *)to + j * col, row, col, rows, cols, records + j);
    }
    if (!beside) return;
    if (out.dtype == FEDLORA_BFLOAT16)
        narrow_bfloat16(floats, f.p, rows, f.p, (Bfloat16 *)to, row, col);
    else
        narrow_float16(floats, f.p, rows, f.p, (Float16 *)to, row, col);
    for (int64_t j = 0; j < f.p; ++j) m.overflow[side][chunk] |= is_beyond(records[j].largest, out.dtype);
}

// Signs from the records of all chunks, into K of the right side.
void Wave::orient(int64_t at) const {
    const Module m = module(at);
    const Facts &f = *m.facts;
    for (int64_t j = 0; j < f.p; ++j) m.sign[j] = sign_of(m.records + j, g.chunks(kB), f.p);
    for (int64_t r = 0; f.p > 0 && r < m.R; ++r)
        for (int64_t j = 0; j < f.p; ++j) m.W[kA][r * m.ld + j] *= m.sign[j];
}

void Wave::turn(int64_t at, int64_t chunk) const {
    const Module m = module(at);
    const int64_t begin = chunk * kChunk;
    if (m.facts->p > 0) turn_any(g.out[kB], first + at, begin, smaller(kChunk, g.rows(kB) - begin), m.facts->p, m.sign);
}

// Everything but the factors.
void Wave::report(int64_t at) const {
    const Module m = module(at);
    const Facts &f = *m.facts;
    const int64_t i = first + at;
    double *const S = (double *)address(g.S, i, 0), *const values = (double *)address(g.values, i, 0);
    double *const gauge = (double *)address(g.balance, i, 0);
    int32_t *const codes = (int32_t *)g.codes.data + i * g.codes.batch_stride;
    bool overflow = false;
    for (int64_t j = 0; j < g.room(); ++j) {
        const double x = f.bad ? NAN : j < smaller(f.found.rank, m.k) ? scale_pow2(m.s[j], f.e) : 0;
        overflow |= std::isinf(x);
        S[j * g.S.col_stride] = x;
    }
    for (int side = 0; side < 2; ++side)
        for (int64_t c = 0; call.powers[side] != 0 && c < g.chunks(side); ++c) overflow |= m.overflow[side][c] != 0;
    for (int64_t j = 0; j < m.R; ++j) gauge[j * g.balance.col_stride] = m.balance[kB][j];
    const Certificate &c = f.found;
    const double said[FEDLORA_PRODUCT_VALUES] = {scale_pow2(f.energy, 2 * f.e), c.error, c.error_bound, c.rho, c.sigma_err,
                                                 scale_pow2(f.energy_abs, 2 * f.e), f.energy_abs, f.norm, f.floor};
    const int64_t info = f.bad ? FEDLORA_INFO_NONFINITE : (f.svd_info | (overflow ? FEDLORA_INFO_OVERFLOW : 0));
    const int64_t told[FEDLORA_PRODUCT_CODES] = {c.rank, c.numerical_rank, 1, info, info ? 0 : c.notes, c.doubtful};
    for (int64_t v = 0; v < FEDLORA_PRODUCT_VALUES; ++v) values[v * g.values.row_stride] = f.bad ? NAN : said[v];
    for (int64_t v = 0; v < FEDLORA_PRODUCT_CODES; ++v) codes[v * g.codes.row_stride] = (int32_t)(f.bad && v != 3 ? 0 : told[v]);
}

// How the tasks of a step are shared out: a thread by itself, or all threads of the region, who wait for each other.
struct Alone {
    template <class Task>
    void each(int64_t tasks, const Task &task) const {
        for (int64_t t = 0; t < tasks; ++t) task(t);
    }
};

struct Together {
    template <class Task>
    void each(int64_t tasks, const Task &task) const {
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < tasks; ++t) task(t);
    }
};

// Seconds that the processor gave to a thread, by stage.
struct Clock {
    bool runs;
    double since, spent[kStages] = {};
    explicit Clock(bool runs) : runs(runs), since(runs ? now() : 0) {}
    static double now() {
        timespec t;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
        return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    }
    void stop(Stage stage) {
        if (!runs) return;
        const double then = since;
        since = now();
        spent[stage] += since - then;
    }
};

// All chunks of all Grams of a wave, `places` of them at a time.
template <class Team>
void form_grams(const Wave &w, const Team &team, double *scratch, double *leavings, int64_t places) {
    const int64_t of_B = w.gram(kB, false).chunks(), each = of_B + w.gram(kA, false).chunks(), tasks = each * w.count;
    const int64_t size = w.gram(kB, false).leaving();
    const auto side_of = [&](int64_t t) { return t % each < of_B ? kB : kA; };
    const auto gram_of = [&](int64_t t) { return w.gram(side_of(t), w.module(t / each).facts->scaled[side_of(t)] != 0); };
    const auto chunk_of = [&](int64_t t) { return t % each - (side_of(t) == kB ? 0 : of_B); };
    const auto pair_of = [&](int64_t t) { return 2 * (t / each) + side_of(t); };
    for (int64_t begin = 0; begin < tasks; begin += places) {
        const int64_t end = smaller(begin + places, tasks);
        team.each(end - begin, [&](int64_t t) {
            gram_of(begin + t).run(w.first + (begin + t) / each, chunk_of(begin + t), scratch, leavings + t * size);
        });
        team.each(pair_of(end - 1) - pair_of(begin) + 1, [&](int64_t pair) {
            pair += pair_of(begin);
            const int64_t from = pair / 2 * each + (pair % 2 ? of_B : 0), to = pair / 2 * each + (pair % 2 ? each : of_B);
            for (int64_t t = larger(from, begin); t < smaller(to, end); ++t)
                gram_of(t).add(w.first + t / each, chunk_of(t), leavings + (t - begin) * size);
        });
    }
}

template <class Team>
void run_wave(const Wave &w, const Team &team, double *scratch, double *leavings, int64_t places, Clock &clock) {
    const int64_t n = w.count, left = w.g.chunks(kB), both = left + w.g.chunks(kA);
    team.each(2 * n, [&](int64_t t) { w.prepare(t / 2, (int)(t % 2)); });
    form_grams(w, team, scratch, leavings, places);
    clock.stop(kGrams);
    if (w.g.small()) {
        team.each(n, [&](int64_t t) { w.weigh(t, scratch), w.fill_lane(t); });
        const int64_t lanes = lanes_of(w.g);
        team.each((n + lanes - 1) / lanes, [&](int64_t t) { w.decompose_lanes(t * lanes, scratch); });
        team.each(n, [&](int64_t t) { w.judge(w.module(t)), w.expand(t); });
    } else {
        team.each(n, [&](int64_t t) { w.weigh(t, scratch), w.decompose(t, scratch), w.expand(t); });
    }
    clock.stop(kCores);
    team.each(n * left, [&](int64_t t) { w.write(t / left, kB, t % left, scratch); });
    team.each(n, [&](int64_t t) { w.orient(t); });
    clock.stop(kLeft);
    team.each(n * both, [&](int64_t t) {
        t % both < left ? w.turn(t / both, t % both) : w.write(t / both, kA, t % both - left, scratch);
    });
    team.each(n, [&](int64_t t) { w.report(t); });
    clock.stop(kRight);
}

int64_t svd_scratch(const Group &g) {
    const auto bytes = [](int64_t rows) {
        const fedlora_block C = block_at(nullptr, rows, rows, 1, rows, 1, 0);
        return fedlora::svd_variant(C).scratch_bytes(C);
    };
    if (g.small()) return bytes(g.R);
    // factors that lack rank may have a core for the small SVD
    return larger(fedlora::direct_svd().scratch_bytes(g.R, g.R), larger(bytes(g.R), bytes(fedlora::kSmallSvdMax)));
}

Gram gram_of(const Group &g, int side) { return {g.X[side], g.count, {}, block_at(nullptr, g.R, g.R, g.R, 1, g.batch(), 0)}; }

int64_t mixed_scratch(const Group &g, int side) {
    fedlora_block sum = g.out[side];
    sum.cols = g.most();
    const int64_t beside = side == kB && is_half(sum.dtype) ? beside_size(sum.cols) : 0;
    return 8 * (MixedSum{g.X[side], g.A, g.count, {}, sum}.scratch() + beside);  // A has the rows of the mixers
}

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// How a call is cut up: bytes of the states of a wave and of the scratch of a thread, Grams that a thread may leave waiting.
struct Plan {
    int64_t threads = 1, waves = 0, wave = 0, scratch = 0, leaving = 0, places = 1;

    int64_t bytes() const { return threads * (wave + scratch) + places * leaving + 64; }
    int64_t alone() const { return waves / threads * threads; }  // the first waves; matrices beyond are done together
};

int64_t matrices_of(const Group &g) { return smaller(g.small() ? lanes_of(g) : 1, g.batch()); }
int64_t waves_of(const Group &g) { return g.batch() ? (g.batch() + matrices_of(g) - 1) / matrices_of(g) : 0; }

// The groups of a call. Blocks of A are described once more, turned; nothing else is allocated.
struct Groups {
    std::vector<fedlora_block> turned_A;
    std::vector<Group> all;
    int status = FEDLORA_OK;

    Groups(const fedlora_block *B, const fedlora_block *A, const int64_t *counts, const fedlora_block *left,
           const fedlora_block *right, int64_t groups) {
        int64_t blocks = 0;
        for (int64_t g = 0; g < groups && !status; ++g) {
            if (counts[g] < 1) status = FEDLORA_BAD_SHAPE;
            else blocks += counts[g];
        }
        if (status) return;
        for (int64_t k = 0; k < blocks; ++k) turned_A.push_back(turned(A[k]));
        for (int64_t g = 0, k = 0; g < groups && !status; k += counts[g], ++g) {
            all.push_back({{B + k, turned_A.data() + k}, A + k, counts[g], 0, {}, {left[g], turned(right[g])}, {}, {}, {}, {}});
            status = check_factors(all.back());
        }
    }

  private:
    static int check_factors(Group &g) {
        const fedlora_block &left = g.out[kB], &right = g.out[kA];
        if (!is_float(left.dtype) || right.dtype != left.dtype) return FEDLORA_BAD_DTYPE;
        if (left.batch < 0 || left.rows < 1 || left.cols < 1) return FEDLORA_BAD_SHAPE;
        if (right.batch != left.batch || right.rows < 1 || right.cols != left.cols) return FEDLORA_BAD_SHAPE;
        for (int64_t k = 0; k < g.count; ++k) {
            for (int side = 0; side < 2; ++side) {
                const fedlora_block &X = g.X[side][k];
                if (!is_float(X.dtype)) return FEDLORA_BAD_DTYPE;
                if (X.batch != left.batch || X.rows != g.rows(side) || X.cols < 0) return FEDLORA_BAD_SHAPE;
            }
            if (g.X[kB][k].cols != g.X[kA][k].cols || g.X[kB][k].cols > FEDLORA_PRODUCT_SVD_MAX) return FEDLORA_BAD_SHAPE;
            g.R += g.X[kB][k].cols;
            if (g.R > FEDLORA_PRODUCT_SVD_MAX) return FEDLORA_BAD_SHAPE;
        }
        return g.R > 0 ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
    }
};

int check_rest(const Group &g) {
    if (g.weights.dtype != FEDLORA_FLOAT64 || g.S.dtype != FEDLORA_FLOAT64 || g.values.dtype != FEDLORA_FLOAT64 ||
        g.balance.dtype != FEDLORA_FLOAT64 || g.codes.dtype != FEDLORA_INT32)
        return FEDLORA_BAD_DTYPE;
    const auto fits = [&](const fedlora_block &b, int64_t rows, int64_t cols) {
        return b.rows == rows && b.cols == cols && b.batch == g.batch();
    };
    const bool fit = g.weights.rows == g.batch() && g.weights.cols == g.count && fits(g.S, 1, g.room()) &&
                     fits(g.values, FEDLORA_PRODUCT_VALUES, 1) && fits(g.codes, FEDLORA_PRODUCT_CODES, 1) &&
                     fits(g.balance, 1, g.R);
    return fit ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

Plan plan_of(const Groups &groups, int64_t threads) {
    Plan plan;
    int64_t tasks = 1;
    for (const Group &g : groups.all) {
        const int64_t grams = 8 * larger(gram_of(g, kB).scratch(), gram_of(g, kA).scratch());
        const int64_t cores = larger(8 * fedlora::factor_scratch(g.R), svd_scratch(g));
        plan.waves += waves_of(g);
        plan.wave = larger(plan.wave, matrices_of(g) * Module::bytes(g));
        const int64_t factors = larger(mixed_scratch(g, kB), mixed_scratch(g, kA));
        plan.scratch = larger(plan.scratch, aligned(larger(larger(grams, cores), factors)));
        plan.leaving = larger(plan.leaving, aligned(8 * larger(gram_of(g, kB).leaving(), gram_of(g, kA).leaving())));
        tasks += g.batch() * (g.chunks(kB) + g.chunks(kA));
    }
    plan.threads = smaller(threads, tasks);
    plan.places = larger(plan.threads, smaller(4 * plan.threads, kWaveBytes / larger(plan.leaving, 1)));
    return plan;
}

void run(const Call &call, const Groups &groups, const Plan &plan, char *memory, double *seconds) {
    char *const leavings = memory + plan.threads * (plan.wave + plan.scratch);
    const int64_t alone = plan.alone();
#pragma omp parallel num_threads((int)plan.threads)
    {
        const int64_t thread = omp_get_thread_num();
        double *const scratch = (double *)(memory + plan.threads * plan.wave + thread * plan.scratch);
        Clock clock(seconds != nullptr);
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < alone; ++t) {
            int64_t wave = t, at = 0;
            while (wave >= waves_of(groups.all[at])) wave -= waves_of(groups.all[at++]);
            const Group &g = groups.all[at];
            const int64_t first = wave * matrices_of(g);
            const int64_t count = smaller(matrices_of(g), g.batch() - first);
            const Wave w = {call, g, first, count, memory + thread * plan.wave, Module::bytes(g)};
            run_wave(w, Alone{}, scratch, (double *)(leavings + thread * plan.leaving), 1, clock);
        }
        int64_t before = 0;
        for (const Group &g : groups.all) {
            const int64_t bytes = Module::bytes(g), step = larger(1, smaller(plan.threads * plan.wave, kWaveBytes) / bytes);
            int64_t first = smaller(larger(alone - before, 0) * matrices_of(g), g.batch());
            before += waves_of(g);
            for (; first < g.batch(); first += step) {
                const Wave w = {call, g, first, smaller(step, g.batch() - first), memory, bytes};
                run_wave(w, Together{}, scratch, (double *)leavings, plan.places, clock);
            }
        }
        if (seconds)
#pragma omp critical
            for (int stage = 0; stage < kStages; ++stage) seconds[stage] += clock.spent[stage];
    }
}

}  // namespace

extern "C" {

int fedlora_product_svd_workspace(const fedlora_block *B, const fedlora_block *A, const int64_t *counts,
                                  const fedlora_block *left, const fedlora_block *right, int64_t groups, int64_t threads,
                                  int64_t *bytes) {
    if (!B || !A || !counts || !left || !right || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    const Groups all(B, A, counts, left, right, groups);
    if (all.status) return all.status;
    *bytes = plan_of(all, threads).bytes();
    return FEDLORA_OK;
}

int fedlora_product_svd(const fedlora_block *B, const fedlora_block *A, const int64_t *counts, const fedlora_block *weights,
                        const fedlora_block *left, const fedlora_block *S, const fedlora_block *right,
                        const fedlora_block *values, const fedlora_block *codes, const fedlora_block *balance, int64_t groups,
                        int64_t rule, double value, int64_t cap, int64_t output, double *seconds, void *workspace,
                        int64_t workspace_bytes, int64_t threads, void *) {
    if (!B || !A || !counts || !weights || !left || !S || !right || !values || !codes || !balance || groups < 0 || threads < 1 ||
        rule < FEDLORA_RULE_ENERGY || rule > FEDLORA_RULE_SV_SUM || !(value >= 0) || cap < 0 || output < FEDLORA_OUTPUT_USV ||
        output > FEDLORA_OUTPUT_BALANCED)
        return FEDLORA_BAD_ARGUMENT;
    Groups all(B, A, counts, left, right, groups);
    if (all.status) return all.status;
    for (int64_t g = 0; g < groups; ++g) {
        Group &group = all.all[(size_t)g];
        group.weights = weights[g];
        group.S = S[g];
        group.values = values[g];
        group.codes = codes[g];
        group.balance = balance[g];
        if (const int status = check_rest(group)) return status;
    }
    const Plan plan = plan_of(all, threads);
    if (plan.waves == 0) return FEDLORA_OK;
    if (!workspace || workspace_bytes < plan.bytes()) return FEDLORA_BAD_WORKSPACE;
    static constexpr double powers[3][2] = {{0, 0}, {1, 0}, {0.5, 0.5}};
    const Call call = {{rule, value, cap}, {powers[output][0], powers[output][1]}};
    run(call, all, plan, (char *)(((uintptr_t)workspace + 63) / 64 * 64), seconds);
    return FEDLORA_OK;
}

}  // extern "C"
