// Runs fedlora_calibrate in both types, and hands it what it must refuse.
#include <cstdio>
#include <initializer_list>

#include "fedlora.h"

int check_calibrate() {
    int wrong = 0;
    double one = -1, two = -1, nothing = -1;
    for (const int dtype : {FEDLORA_FLOAT32, FEDLORA_FLOAT64}) {
        wrong += fedlora_calibrate(dtype, 1000, &one, 1, nullptr) != FEDLORA_OK;
        wrong += fedlora_calibrate(dtype, 500, &two, 2, nullptr) != FEDLORA_OK;
        wrong += fedlora_calibrate(dtype, 0, &nothing, 1, nullptr) != FEDLORA_OK;
        wrong += !(one > 1000 && one == two && nothing == 0);
    }
    wrong += fedlora_calibrate(FEDLORA_FLOAT16, 10, &one, 1, nullptr) != FEDLORA_BAD_DTYPE;
    wrong += fedlora_calibrate(FEDLORA_FLOAT64, -1, &one, 1, nullptr) != FEDLORA_BAD_ARGUMENT;
    wrong += fedlora_calibrate(FEDLORA_FLOAT64, 10, &one, 0, nullptr) != FEDLORA_BAD_ARGUMENT;
    wrong += fedlora_calibrate(FEDLORA_FLOAT64, 10, nullptr, 1, nullptr) != FEDLORA_BAD_ARGUMENT;
    if (wrong) std::printf("calibrate: %d wrong\n", wrong);
    return wrong;
}
