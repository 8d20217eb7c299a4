// The one door to the device: CUDA under nvcc, the simulated device of csrc/simt under any other compiler.
#pragma once

#include <cstdint>

#include "fedlora.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// Shared memory of the size that the launch gives, as an array of T. One name, so all kernels declare it alike.
#define FEDLORA_DYNAMIC_SHARED(T, name)                                     \
    extern __shared__ __align__(16) unsigned char fedlora_dynamic_shared[]; \
    T *const name = reinterpret_cast<T *>(fedlora_dynamic_shared)
#else
#include "simt.h"
#define FEDLORA_DYNAMIC_SHARED(T, name) T *const name = reinterpret_cast<T *>(simt::dynamic_shared())
#endif

namespace fedlora {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// What the current device can hold; the simulated one takes its shared memory from FEDLORA_SIMT_SHARED_BYTES.
struct Limits {
    int64_t shared_bytes; // of a block that asks for it
    int64_t processors;
};
Limits limits();

// FEDLORA_OK, or FEDLORA_DEVICE_ERROR where a launch since the last call was refused; fedlora_message then says why.
int finish();

// Bytes of shared memory that a launch has without asking: half of 48 KiB, as what a kernel declares itself counts among those.
constexpr int64_t kGrantedShared = 24 << 10;

// Lets a kernel have so many on the current device from now on. What it may have never shrinks: another thread may be about to
// launch it.
void grant_shared(const void *kernel, int64_t bytes);

// Runs kernel(arguments...) on grid blocks; nothing for an empty grid. The stream is that of the caller of the library.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, void *stream, Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef __CUDACC__
    if (shared_bytes > kGrantedShared) grant_shared(reinterpret_cast<const void *>(kernel), shared_bytes);
    kernel<<<grid, block, (size_t)shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
#else
    simt::launch(grid, block, (size_t)shared_bytes, [&] { kernel(arguments...); });
#endif
}

} // namespace fedlora
