// Rotated factors, any number of them in one launch: what fedlora_turned runs, and fedlora_align_factors where it is not fused.
#pragma once

#include <vector>

#include "workspace.cuh"

namespace fedlora {

// out = X Q for a batch of matrices, p x r times r x r float64, X itself to the bit where Q is the identity; X and out of one
// float dtype.
struct Turned {
    fedlora_block X, Q, out;
    int32_t *marks; // on the device, one per matrix, or null: kTurnedBad joins it where something that is written is not finite
};

constexpr int32_t kTurnedBad = 1;

// Whether the descriptors fit each other.
int status_of(const Turned &turned);

struct TurnedTask;

struct TurnedList {
    const TurnedTask *tasks;
    const int64_t *first; // block of each task
    int64_t count, blocks;
};

class Turns {
  public:
    Turns(const std::vector<Turned> &all, Upload &upload);
    void launch(void *stream) const; // one launch for float64 and one for all else, where there is any

  private:
    TurnedList lists_[2];
};

} // namespace fedlora
