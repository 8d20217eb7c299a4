// Rotations from correlations, as the instruction sets offer them to the entry points.
#pragma once

#include <cstdint>

#include "../include/fedlora.h"

namespace fedlora {

// The fields of one group's rotations, in the order of the callers' tables.
struct Rotations {
    fedlora_block Q, singular_values, unique, condition, info, notes;
};

// Correlations M 2^exponent of data of norms |X| |Y| = size 2^exponent, made of numbers of this unit roundoff.
struct Correlations {
    fedlora_block M, size, exponent;
    double unit;
};

struct PolarOptions {
    bool special;
    double blend;
};

// How many matrices one task takes, the scratch of one task (a multiple of 64 bytes, as is its address), and the task itself:
// matrices first .. first + count - 1. No result depends on the others of its task.
struct PolarVariant {
    int64_t (*matrices_per_task)(int64_t r);
    int64_t (*scratch_bytes)(int64_t r);
    void (*run)(const Correlations &from, const Rotations &to, const PolarOptions &options, int64_t first, int64_t count, void *scratch);
};

#ifdef __x86_64__
const PolarVariant &small_polar_v4();
const PolarVariant &small_polar_v3();
#endif
const PolarVariant &small_polar_base();

// The one for r x r matrices on this machine.
const PolarVariant &polar(int64_t r);

// Q (r x r, rows ld apart) from complete orthonormal U and V (columns r apart) of which the first k belong to singular values
// that count: of all solutions the one closest to the identity, in SO(r) if special.
void complete_rotation(const double *U, const double *V, int64_t r, int64_t k, bool special, double *Q, int64_t ld, void *scratch);
int64_t complete_rotation_scratch(int64_t r);

// NaN for all of rotation i, and that its data were not finite.
void spoil_rotation(const Rotations &to, int64_t i);

int check_rotations(const Rotations &to, int64_t r, int64_t batch);

}  // namespace fedlora
