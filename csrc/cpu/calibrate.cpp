// fedlora_calibrate: chains of fused multiply-adds that nothing holds up, the rate that floors are counted in.
#include <cstdint>

#include "../include/fedlora.h"

namespace {

// Enough chains to hide the latency of two units, few enough that all of them stay in registers.
constexpr int kChains = 10;

template <class T, int kBytes>
inline __attribute__((always_inline)) T chains(int64_t steps, T seed) {
    typedef T V __attribute__((vector_size(kBytes)));
    constexpr int kLanes = kBytes / (int)sizeof(T);
    V sum[kChains];
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) sum[c] = V{} + seed * (T)(c + 1);
    const V factor = V{} + (T)0.5, term = V{} + seed;
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
        for (int c = 0; c < kChains; ++c) sum[c] = sum[c] * factor + term;
    }
    V all{};
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) all += sum[c];
    T total = 0;
    for (int l = 0; l < kLanes; ++l) total += all[l];
    return total;
}

struct Variant {
    int bytes;
    float (*single_chains)(int64_t, float);
    double (*double_chains)(int64_t, double);
};

#ifdef __x86_64__
#define FEDLORA_V4 __attribute__((target("avx512f,avx512vl,fma")))
#define FEDLORA_V3 __attribute__((target("avx2,fma")))
FEDLORA_V4 float single_v4(int64_t steps, float seed) { return chains<float, 64>(steps, seed); }
FEDLORA_V4 double double_v4(int64_t steps, double seed) { return chains<double, 64>(steps, seed); }
FEDLORA_V3 float single_v3(int64_t steps, float seed) { return chains<float, 32>(steps, seed); }
FEDLORA_V3 double double_v3(int64_t steps, double seed) { return chains<double, 32>(steps, seed); }
#endif
float single_base(int64_t steps, float seed) { return chains<float, 16>(steps, seed); }
double double_base(int64_t steps, double seed) { return chains<double, 16>(steps, seed); }

const Variant &variant() {
    static const Variant chosen = [] {
#ifdef __x86_64__
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) return Variant{64, single_v4, double_v4};
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Variant{32, single_v3, double_v3};
#endif
        return Variant{16, single_base, double_base};
    }();
    return chosen;
}

}  // namespace

extern "C" int fedlora_calibrate(int64_t dtype, int64_t steps, double *flops, int64_t threads, void *) {
    if (dtype != FEDLORA_FLOAT32 && dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    if (!flops || steps < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    const Variant &run = variant();
    const int lanes = run.bytes / (dtype == FEDLORA_FLOAT32 ? 4 : 8);
    double total = 0;
#pragma omp parallel for num_threads((int)threads) schedule(static, 1) reduction(+ : total)
    for (int64_t t = 0; t < threads; ++t)
        total += dtype == FEDLORA_FLOAT32 ? (double)run.single_chains(steps, 1.0f) : run.double_chains(steps, 1.0);
    // the sum is a number: no compiler may leave the chains out
    *flops = total > 0 ? 2.0 * kChains * lanes * (double)steps * (double)threads : 0;
    return FEDLORA_OK;
}
