// How many launches the simulated device has taken, for tests of how few a call makes.
#include "runtime.cuh"

extern "C" FEDLORA_API int64_t check_launches(void) { return simt::launches; }
