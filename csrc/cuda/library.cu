// The library itself: its stamp, the device it meets, and the tables that calls bring along.
#include "runtime.cuh"

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "workspace.cuh"

namespace fedlora {
namespace {

thread_local std::string message;

// A launch takes at most 32 764 bytes of parameters.
constexpr int kPieces = 160, kPayload = 30 << 10;

struct Parcel {
    int64_t there[kPieces];
    int32_t begin[kPieces + 1];
    int32_t count;
    unsigned char payload[kPayload];
};
static_assert(sizeof(Parcel) <= 32764, "the parcel does not fit the parameters of a launch");

__global__ void unpack(const __grid_constant__ Parcel parcel) {
    for (int i = blockIdx.x; i < parcel.count; i += gridDim.x) {
        unsigned char *const there = reinterpret_cast<unsigned char *>(parcel.there[i]);
        const int begin = parcel.begin[i], bytes = parcel.begin[i + 1] - begin;
        for (int k = threadIdx.x; k < bytes; k += blockDim.x) there[k] = parcel.payload[begin + k];
    }
}

} // namespace

Limits limits() {
    int device = 0, shared = 0, processors = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    return {shared, processors};
}

#ifdef __CUDACC__
void grant_shared(const void *kernel, int64_t bytes) {
    static std::mutex mutex;
    static std::map<std::pair<const void *, int>, int64_t> granted;
    int device = 0;
    cudaGetDevice(&device);
    const std::lock_guard<std::mutex> lock(mutex);
    int64_t &most = granted[{kernel, device}];
    if (bytes <= most) return;
    // A refusal is kept for finish(), as that of the launch will be.
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes) == cudaSuccess) most = bytes;
}
#endif

int finish() {
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) return FEDLORA_OK;
    message = cudaGetErrorString(error);
    return FEDLORA_DEVICE_ERROR;
}

void Upload::send(void *stream) {
    Parcel parcel;
    parcel.count = 0;
    parcel.begin[0] = 0;
    const auto post = [&] {
        launch(unpack, dim3((unsigned)parcel.count), dim3(256), 0, stream, parcel);
        parcel.count = 0;
    };
    for (const Piece &piece : pieces_)
        for (int64_t sent = 0; sent < piece.bytes;) {
            const int32_t begin = parcel.begin[parcel.count];
            const int64_t bytes = std::min<int64_t>(piece.bytes - sent, kPayload - begin);
            parcel.there[parcel.count] = (int64_t)piece.there + sent;
            std::memcpy(parcel.payload + begin, bytes_.data() + piece.begin + sent, (size_t)bytes);
            parcel.begin[++parcel.count] = begin + (int32_t)bytes;
            sent += bytes;
            if (parcel.count == kPieces || parcel.begin[parcel.count] == kPayload) post();
        }
    if (parcel.count) post();
    pieces_.clear();
    bytes_.clear();
}

} // namespace fedlora

extern "C" {

uint64_t fedlora_abi(void) { return FEDLORA_ABI_STAMP; }

const char *fedlora_isa(void) { return FEDLORA_CUDA_ARCHITECTURES; }

const char *fedlora_message(void) { return fedlora::message.c_str(); }

int fedlora_devices(int64_t *count) {
    if (!count) return FEDLORA_BAD_ARGUMENT;
    int devices = 0;
    // Without a driver the call fails: that is no GPU, and no error to keep.
    if (cudaGetDeviceCount(&devices) != cudaSuccess) {
        cudaGetLastError();
        devices = 0;
    }
    *count = devices;
    return FEDLORA_OK;
}

} // extern "C"
