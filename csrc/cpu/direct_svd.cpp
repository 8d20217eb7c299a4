// Picks the direct SVD for this machine.
#include "direct_svd.h"

namespace fedlora {

const DirectSvd &direct_svd() {
    static const DirectSvd &chosen = []() -> const DirectSvd & {
#ifdef __x86_64__
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return direct_svd_v4();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
            return direct_svd_v3();
#endif
        return direct_svd_base();
    }();
    return chosen;
}

}  // namespace fedlora
