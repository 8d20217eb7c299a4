// Runs CUDA C++ on the CPU: for tests, not for speed. Included instead of cuda_runtime.h where nvcc does not compile.
//
// Every CUDA thread is a fiber, a block runs on one OS thread, blocks run one after the other (or over a few OS threads).
// A thread runs until it waits at a barrier or for its warp; then the schedule picks the next: forward, reverse or shuffled
// (FEDLORA_SIMT_SCHEDULE), so that a missing barrier shows as another result. What hardware would hang on, or leave undefined,
// is an error with the place in the source: see block.h and warp.h. No kernel may wait for another block.
//
// A launch that goes wrong leaves its message for cudaGetLastError and cudaGetErrorString, as on a device.
#pragma once

#include "vectors.h"

#include "atomics.h"
#include "half.h"
#include "scalar.h"
#include "warp.h"

#include "launch.h"
#include "runtime_api.h"
