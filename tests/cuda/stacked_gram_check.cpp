// The first way of stacked QR from given Grams, for a test: where it fails, the second answers, and nothing shows.
#include "stacked_task.cuh"

extern "C" FEDLORA_API int check_stacked_gram(const fedlora_block *G, const fedlora_block *R, const fedlora_block *codes, double *mixers,
                                              int32_t *hard, int32_t *ranks) {
    using namespace fedlora;
    const int64_t width = R->cols, N = R->batch;
    const std::vector<int32_t> block_of((size_t)width, 0);
    const double one = 1;
    std::vector<double> scale((size_t)(N * width)), factors((size_t)(N * stacked_gram_size(width)) + 2);
    std::vector<int32_t> exponents(scale.size());
    StackedTask task = {};
    task.count = 1, task.rows = R->rows, task.width = task.k = width, task.batch = N;
    task.block_of = block_of.data(), task.weights = &one;
    task.R = task.Q = *R, task.rank = codes[0], task.info = codes[1], task.notes = codes[2];
    task.G = reinterpret_cast<const double *>(G->data), task.mixers = mixers, task.ranks = ranks;
    const uintptr_t room = (reinterpret_cast<uintptr_t>(factors.data()) + 15) / 16 * 16;
    task.factors = stacked_gram_size(width) ? reinterpret_cast<double *>(room) : nullptr;
    task.scale = scale.data(), task.exponents = exponents.data(), task.hard = hard;
    const int64_t first[2] = {0, N};
    launch_stacked_gram({&task, first, 1, N}, stacked_gram_bytes(width), nullptr);
    return finish();
}
