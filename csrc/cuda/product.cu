// fedlora_product_svd: one pass over the Grams of all groups in at most ten launches, and a second one whose blocks return at once where
// it is not needed (docs/numerics.md, One pass, Second pass).
//
// Tables, column scales, Grams and their sums, weights and Cholesky, cores, their SVD, rank and coefficients, left and right, signs: where
// blocks are float64, or weights far apart, scales are there too. More launches are needed where a call mixes dtypes, or sizes that the
// SVD treats differently, or brings more than 30 KiB of tables. Those of the second pass are sent after the first.
#include <algorithm>
#include <memory>
#include <vector>

#include "cholesky.cuh"
#include "gram.cuh"
#include "mixed_sum.cuh"
#include "product_scale.cuh"
#include "product_state.cuh"
#include "svd.cuh"
#include "tall_qr.cuh"

namespace fedlora {
namespace {

constexpr int64_t kFarApart = 200; // exponents between weights whose squares, times those of float32, might leave the range

// What the caller says of one group.
struct ProductCall {
    const fedlora_block *B, *A;
    int64_t count, R;
    fedlora_block weights, left, S, right, values, codes, balance;

    int64_t batch() const { return left.batch; }
    int64_t room() const { return left.cols; }
    double weight(int64_t i, int64_t k) const {
        return reinterpret_cast<const double *>(weights.data)[i * weights.row_stride + k * weights.col_stride];
    }
};

int check_factors(ProductCall &call) {
    const fedlora_block &left = call.left, &right = call.right;
    if (!is_float(left.dtype) || right.dtype != left.dtype) return FEDLORA_BAD_DTYPE;
    if (left.batch < 0 || left.rows < 1 || left.cols < 1 || right.cols < 1) return FEDLORA_BAD_SHAPE;
    if (right.batch != left.batch || right.rows != left.cols || call.count < 1) return FEDLORA_BAD_SHAPE;
    call.R = 0;
    for (int64_t k = 0; k < call.count; ++k) {
        const fedlora_block &B = call.B[k], &A = call.A[k];
        if (!is_float(B.dtype) || !is_float(A.dtype)) return FEDLORA_BAD_DTYPE;
        if (B.batch != left.batch || A.batch != left.batch || B.rows != left.rows || A.cols != right.cols) return FEDLORA_BAD_SHAPE;
        if (B.cols != A.rows || B.cols < 0 || B.cols > FEDLORA_PRODUCT_SVD_MAX) return FEDLORA_BAD_SHAPE;
        call.R += B.cols;
        if (call.R > FEDLORA_PRODUCT_SVD_MAX) return FEDLORA_BAD_SHAPE;
    }
    // From twice the shorter side on the update itself is smaller than its stacks: it is to be formed, which is not done here.
    return call.R > 0 && call.R < 2 * std::min(left.rows, right.cols) ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

int check_rest(const ProductCall &call) {
    if (call.weights.dtype != FEDLORA_FLOAT64 || call.S.dtype != FEDLORA_FLOAT64 || call.values.dtype != FEDLORA_FLOAT64 ||
        call.balance.dtype != FEDLORA_FLOAT64 || call.codes.dtype != FEDLORA_INT32)
        return FEDLORA_BAD_DTYPE;
    const auto fits = [&](const fedlora_block &block, int64_t rows, int64_t cols) {
        return block.rows == rows && block.cols == cols && block.batch == call.batch();
    };
    const bool fit = call.weights.rows == call.batch() && call.weights.cols == call.count && fits(call.S, 1, call.room()) &&
                     fits(call.values, FEDLORA_PRODUCT_VALUES, 1) && fits(call.codes, FEDLORA_PRODUCT_CODES, 1) &&
                     fits(call.balance, 1, call.R);
    return fit ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

fedlora_block matrices(const void *data, int64_t rows, int64_t cols, int64_t row, int64_t col, int64_t batch, int64_t step) {
    return {reinterpret_cast<int64_t>(data), rows, cols, row, col, FEDLORA_FLOAT64, batch, step};
}

fedlora_block numbers(const int32_t *data, int64_t batch) {
    return {reinterpret_cast<int64_t>(data), 1, 1, 1, 1, FEDLORA_INT32, batch, 1};
}

// Row `at` of the codes.
fedlora_block code(const fedlora_block &codes, int64_t at) {
    fedlora_block one = codes;
    one.rows = 1;
    one.data += at * codes.row_stride * (int64_t)sizeof(int32_t);
    return one;
}

// All launches of a call.
class Products {
  public:
    Products(const std::vector<ProductCall> &calls, Workspace &workspace) : upload_(workspace), second_upload_(workspace) {
        stacks_.reserve(calls.size());
        for (const ProductCall &call : calls) {
            if (call.batch() == 0) continue;
            stacks_.push_back({});
            add(call, workspace, upload_);
        }
        scales_ = {upload_.add(scaling_), upload_.add(first_scaling_), (int64_t)scaling_.size(), scaling_blocks_};
        const ProductGroup *const all = upload_.add(groups_);
        weighing_ = list(upload_, [](const ProductGroup &g) { return 2 * g.batch; });
        multiplying_ = list(upload_, [](const ProductGroup &g) { return g.batch * product_tiles(g.R) * product_tiles(g.R); });
        judging_ = list(upload_, [](const ProductGroup &g) {
            return 2 * g.batch * product_tiles(g.R) * product_tiles(std::min(g.least(), g.room));
        });
        weighing_.groups = multiplying_.groups = judging_.groups = all;
        grams_ = std::make_unique<Grams>(grams_of_, workspace, upload_);
        core_svd_ = std::make_unique<CoreSvd>(cores_, workspace, upload_);
        factors_ = std::make_unique<BackTransform>(pairs_, workspace, upload_);
        tall_ = std::make_unique<TallQR>(tall_stacks_, workspace, second_upload_);
        turned_ = std::make_unique<TallProducts>(*tall_, tall_products_, workspace, second_upload_);
        second_svd_ = std::make_unique<CoreSvd>(second_cores_, workspace, second_upload_);
        second_factors_ = std::make_unique<BackTransform>(second_pairs_, workspace, second_upload_);
    }

    bool empty() const { return groups_.empty(); }

    void launch(const ProductWish &wish, void *stream) {
        upload_.send(stream);
        scale_columns(scales_, stream);
        grams_->launch(stream);
        weigh_products(weighing_, weighing_bytes_, stream);
        multiply_cores(multiplying_, 1, stream);
        core_svd_->launch(0, stream);
        judge_products(judging_, wish, 1, stream);
        factors_->launch(stream);

        second_upload_.send(stream);
        tall_->launch(stream);
        multiply_cores(multiplying_, 2, stream);
        second_svd_->launch(0, stream);
        judge_products(judging_, wish, 2, stream);
        turned_->launch(stream);
        second_factors_->launch(stream);
    }

  private:
    // Tables of blocks of one group, as long as the plans are being made.
    struct Stacks {
        std::vector<fedlora_block> X[2], mixers[2];
        fedlora_block product[2], diagonal[2];
    };

    template <class Blocks>
    ProductList list(Upload &upload, const Blocks &blocks) const {
        std::vector<int64_t> first = {0};
        for (const ProductGroup &group : groups_) first.push_back(first.back() + blocks(group));
        return {nullptr, upload.add(first), (int64_t)groups_.size(), first.back()};
    }

    void add(const ProductCall &call, Workspace &workspace, Upload &upload) {
        ProductGroup g = {};
        g.R = call.R, g.m = call.left.rows, g.n = call.right.cols, g.batch = call.batch(), g.clients = call.count, g.room = call.room();
        g.step = g.R * std::max(g.R, g.room);
        g.rho_max = call.left.dtype == FEDLORA_FLOAT64 ? 16 : 1e4;
        g.S = call.S, g.values = call.values, g.codes = call.codes, g.balance = call.balance;
        upload_weights(call, g, upload);
        const int64_t R = g.R, N = g.batch, beside = cholesky::beside(R) * 8;
        const bool whole = R * R * 8 + beside <= limits().shared_bytes - kStatic;
        weighing_bytes_ = std::max(weighing_bytes_, whole ? R * R * 8 + beside : beside);
        for (int side = 0; side < 2; ++side) {
            g.G[side] = workspace.take<double>(N * g.step);
            g.F[side] = workspace.take<double>(N * R * R);
            g.W[side] = workspace.take<double>(N * R * R);
            g.left[side] = whole ? nullptr : g.W[side];
            g.gauge[side] = workspace.take<double>(N * R);
            g.stretch[side] = workspace.take<double>(N * R);
            g.ranks[side] = workspace.take<int32_t>(N);
        }
        g.C = workspace.take<double>(N * R * R);
        g.s = workspace.take<double>(N * R);
        g.svd_info = workspace.take<int32_t>(N);
        g.again = workspace.take<int32_t>(N);
        g.facts = workspace.take<ProductFacts>(N);
        Stacks &stacks = stacks_.back();
        for (int64_t k = 0; k < call.count; ++k) {
            stacks.X[kB].push_back(call.B[k]);
            stacks.X[kA].push_back(transposed(call.A[k]));
        }
        scale(call, stacks, g, workspace, upload);
        add_first_pass(call, stacks, g, workspace);
        add_second_pass(call, stacks, g, workspace);
        groups_.push_back(g);
    }

    static void upload_weights(const ProductCall &call, ProductGroup &g, Upload &upload) {
        std::vector<double> weights;
        std::vector<int32_t> client;
        for (int64_t i = 0; i < g.batch; ++i)
            for (int64_t k = 0; k < call.count; ++k) weights.push_back(call.weights.data ? call.weight(i, k) : 0);
        for (int64_t k = 0; k < call.count; ++k) client.insert(client.end(), (size_t)call.B[k].cols, (int32_t)k);
        g.weights = upload.add(weights);
        g.client = upload.add(client);
    }

    // Columns of float64, and those of weights far apart, are scaled; a query, which does not know the weights, counts the room for it.
    void scale(const ProductCall &call, const Stacks &stacks, ProductGroup &g, Workspace &workspace, Upload &upload) {
        const int64_t R = g.R, N = g.batch;
        const bool is_query = !call.weights.data;
        bool any = is_query;
        std::vector<uint8_t> apart((size_t)N, 0);
        for (int64_t i = 0; i < N && !is_query; ++i) {
            int64_t low = INT64_MAX, high = INT64_MIN;
            for (int64_t k = 0; k < call.count; ++k) {
                const int64_t e = exponent_of(call.weight(i, k));
                low = std::min(low, e);
                high = std::max(high, e);
            }
            apart[(size_t)i] = high - low > kFarApart;
            any |= high - low > kFarApart;
        }
        for (int side = 0; side < 2; ++side) {
            bool wide = false;
            for (const fedlora_block &X : stacks.X[side]) wide |= X.dtype == FEDLORA_FLOAT64;
            if (!wide && !any) continue;
            g.exponents[side] = workspace.take<int32_t>(N * R);
            g.scale[side] = workspace.take<double>(N * R);
            const uint8_t *const scaled = upload.add(wide ? std::vector<uint8_t>((size_t)N, 1) : apart);
            const StackReading reading = reading_of(stacks.X[side].data(), call.count, upload);
            scaling_.push_back({reading, stacks.X[side][0].rows, scaled, g.exponents[side], g.scale[side]});
            first_scaling_.push_back(scaling_blocks_ += N * ((R + kWarp - 1) / kWarp));
        }
    }

    static fedlora_block scale_of(const ProductGroup &g, int side) {
        return matrices(g.scale[side], g.scale[side] ? 1 : 0, g.R, g.R, 1, g.batch, g.R);
    }

    void add_first_pass(const ProductCall &call, Stacks &stacks, const ProductGroup &g, Workspace &workspace) {
        const int64_t R = g.R, N = g.batch;
        for (int side = 0; side < 2; ++side) {
            grams_of_.push_back({stacks.X[side].data(), call.count, scale_of(g, side), matrices(g.G[side], R, R, R, 1, N, g.step)});
            double *K = g.G[side];
            for (const fedlora_block &X : stacks.X[side]) {
                stacks.mixers[side].push_back(matrices(K, X.cols, g.room, g.room, 1, N, g.step));
                K += X.cols * g.room;
            }
        }
        cores_.push_back({matrices(g.C, R, R, R, 1, N, R * R), matrices(g.W[kB], R, R, 1, R, N, R * R), matrices(g.s, 1, R, R, 1, N, R),
                          matrices(g.W[kA], R, R, R, 1, N, R * R), numbers(g.svd_info, N), numbers(workspace.take<int32_t>(N), N), nullptr});
        const auto sum = [&](int side, const fedlora_block &out) {
            return MixedSum{stacks.X[side].data(), stacks.mixers[side].data(), call.count, scale_of(g, side), out, g.ranks[0]};
        };
        pairs_.push_back({sum(kB, call.left), sum(kA, transposed(call.right)), code(call.codes, 3), code(call.codes, 4)});
    }

    void add_second_pass(const ProductCall &call, Stacks &stacks, const ProductGroup &g, Workspace &workspace) {
        const int64_t R = g.R, N = g.batch, most = std::min(g.least(), g.room), rows = g.rows(kB, 2), cols = g.rows(kA, 2), k = g.least();
        for (int side = 0; side < 2; ++side) {
            const int64_t length = side == kB ? g.m : g.n;
            const fedlora_block stretch = matrices(g.stretch[side], 1, R, R, 1, N, R);
            stacks.product[side] = matrices(workspace.take<double>(N * length * most), length, most, most, 1, N, length * most);
            stacks.diagonal[side] = matrices(g.G[side], most, g.room, g.room, 1, N, g.step);
            tall_products_.push_back({(int64_t)tall_stacks_.size(), matrices(g.W[side], g.rows(side, 2), most, 1, R, N, R * R),
                                      stacks.product[side], nullptr, false});
            tall_stacks_.push_back({stacks.X[side].data(), call.count, stretch, matrices(g.G[side], g.rows(side, 2), R, R, 1, N, g.step),
                                    g.again, true});
        }
        second_cores_.push_back({matrices(g.C, rows, cols, R, 1, N, R * R), matrices(g.W[kB], rows, k, 1, R, N, R * R),
                                 matrices(g.s, 1, k, R, 1, N, R), matrices(g.W[kA], k, cols, R, 1, N, R * R), numbers(g.svd_info, N),
                                 cores_.back().notes, g.again});
        const auto sum = [&](int side, const fedlora_block &out) {
            return MixedSum{&stacks.product[side], &stacks.diagonal[side], 1, {}, out, g.ranks[1]};
        };
        second_pairs_.push_back({sum(kB, call.left), sum(kA, transposed(call.right)), code(call.codes, 3), code(call.codes, 4)});
    }

    static constexpr int64_t kStatic = 1 << 10; // bytes of shared memory that weighing takes beside

    Upload upload_, second_upload_; // tables of the passes
    std::vector<ProductGroup> groups_;
    std::vector<Stacks> stacks_;
    std::vector<ScaleTask> scaling_;
    std::vector<int64_t> first_scaling_ = {0};
    std::vector<GramStack> grams_of_;
    std::vector<SvdGroup> cores_, second_cores_;
    std::vector<FactorPair> pairs_, second_pairs_;
    std::vector<TallStack> tall_stacks_;
    std::vector<TallProduct> tall_products_;
    int64_t scaling_blocks_ = 0, weighing_bytes_ = 0;
    ScaleList scales_ = {};
    ProductList weighing_ = {}, multiplying_ = {}, judging_ = {};
    std::unique_ptr<Grams> grams_;
    std::unique_ptr<CoreSvd> core_svd_, second_svd_;
    std::unique_ptr<BackTransform> factors_, second_factors_;
    std::unique_ptr<TallQR> tall_;
    std::unique_ptr<TallProducts> turned_;
};

// The groups of a call without their answers, or a status.
int calls_of(const fedlora_block *B, const fedlora_block *A, const int64_t *counts, const fedlora_block *left, const fedlora_block *right,
             int64_t groups, std::vector<ProductCall> &calls) {
    for (int64_t g = 0, k = 0; g < groups; k += counts[g], ++g) {
        calls.push_back({B + k, A + k, counts[g], 0, {}, left[g], {}, right[g], {}, {}, {}});
        if (const int status = check_factors(calls.back())) return status;
    }
    return FEDLORA_OK;
}

} // namespace
} // namespace fedlora

extern "C" {

using namespace fedlora;

int fedlora_product_svd_workspace(const fedlora_block *B, const fedlora_block *A, const int64_t *counts, const fedlora_block *left,
                                  const fedlora_block *right, int64_t groups, int64_t threads, int64_t *bytes) {
    if (!B || !A || !counts || !left || !right || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    std::vector<ProductCall> calls;
    if (const int status = calls_of(B, A, counts, left, right, groups, calls)) return status;
    Workspace workspace;
    const Products counted(calls, workspace);
    *bytes = workspace.bytes();
    return FEDLORA_OK;
}

int fedlora_product_svd(const fedlora_block *B, const fedlora_block *A, const int64_t *counts, const fedlora_block *weights,
                        const fedlora_block *left, const fedlora_block *S, const fedlora_block *right, const fedlora_block *values,
                        const fedlora_block *codes, const fedlora_block *balance, int64_t groups, int64_t rule, double value, int64_t cap,
                        int64_t output, double *, void *memory, int64_t memory_bytes, int64_t threads, void *stream) {
    if (!B || !A || !counts || !weights || !left || !S || !right || !values || !codes || !balance || groups < 0 || threads < 1 ||
        rule < FEDLORA_RULE_ENERGY || rule > FEDLORA_RULE_SV_SUM || !(value >= 0) || cap < 0 || output < FEDLORA_OUTPUT_USV ||
        output > FEDLORA_OUTPUT_BALANCED)
        return FEDLORA_BAD_ARGUMENT;
    std::vector<ProductCall> calls;
    if (const int status = calls_of(B, A, counts, left, right, groups, calls)) return status;
    for (int64_t g = 0; g < groups; ++g) {
        ProductCall &call = calls[(size_t)g];
        call.weights = weights[g];
        call.S = S[g];
        call.values = values[g];
        call.codes = codes[g];
        call.balance = balance[g];
        if (const int status = check_rest(call)) return status;
    }
    Workspace workspace(memory, memory_bytes);
    Products products(calls, workspace);
    if (products.empty()) return FEDLORA_OK;
    if (!memory || !workspace.fits()) return FEDLORA_BAD_WORKSPACE;
    static constexpr double powers[3][2] = {{0, 0}, {1, 0}, {0.5, 0.5}};
    products.launch({{rule, value, cap}, {powers[output][0], powers[output][1]}}, stream);
    return finish();
}

} // extern "C"
