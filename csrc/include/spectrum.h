// Rank and certified errors of a spectrum (docs/numerics.md, Floor and certificate, Rank rules), on CPUs and GPUs alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fedlora.h"

#ifndef FEDLORA_DEVICE
#ifdef __CUDACC__
#define FEDLORA_DEVICE __host__ __device__
#else
#define FEDLORA_DEVICE
#endif
#endif

namespace fedlora {

struct Rule {
    int64_t code;  // FEDLORA_RULE_ENERGY, ...
    double value;
    int64_t cap;  // 0: none
};

// What is known of an update, all of it in a scale of 2^-e.
struct Spectrum {
    const double *s;  // `count` singular values, falling; zeros where the factors give no more
    int64_t count, live, width;  // columns that are not zero, and all columns
    double energy, energy_abs, floor, norm;
    int64_t e;
    bool second;  // over orthogonal factors, not over Grams
};

struct Certificate {
    int64_t rank, numerical_rank, notes;
    double error, error_bound, rho, sigma_err;
    bool doubtful;  // a second pass has to follow
};

// Exactly 2^e, for exponents of normal numbers; others are clamped to them.
FEDLORA_DEVICE inline double pow2(int64_t e) {
    const int64_t bits = ((e < -1022 ? -1022 : e > 1023 ? 1023 : e) + 1023) << 52;
    double x;
    std::memcpy(&x, &bits, 8);
    return x;
}

// x 2^e, where 2^e itself may leave the range.
FEDLORA_DEVICE inline double scale_pow2(double x, int64_t e) {
    const int64_t half = e >> 1;
    return x * pow2(half) * pow2(e - half);
}

// e with 2^e <= |x| < 2^(e + 1); 0 where x is zero or not finite.
FEDLORA_DEVICE inline int64_t exponent_of(double x) {
    const bool usable = x != 0 && x - x == 0;
    return usable ? (int64_t)std::ilogb(x) : 0;
}

namespace spectrum {

constexpr double kRoundoff = 0x1p-53, kSlack = 1e-12, kLowAccuracy = 1e-6;

FEDLORA_DEVICE inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FEDLORA_DEVICE inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The singular values as the rule sees them: those from `first` to `last` stand for what one pass cannot see.
struct Values {
    const Spectrum &spectrum;
    int64_t first, last;
    double hidden;
    FEDLORA_DEVICE double operator[](int64_t i) const { return i >= first && i < last ? hidden : spectrum.s[i]; }
    FEDLORA_DEVICE int64_t count() const { return spectrum.count; }
    FEDLORA_DEVICE int64_t above(double x) const {
        int64_t found = 0;
        for (int64_t i = 0; i < count(); ++i) found += (*this)[i] > x;
        return found;
    }
};

// Smallest count of values whose sum, or sum of squares, reaches the goal; all of them and one more if none does.
FEDLORA_DEVICE inline int64_t first_reaching(const Values &s, bool squares, double goal) {
    int64_t reached = 1;
    double sum = 0;
    for (int64_t i = 0; i < s.count(); ++i) {
        sum += squares ? s[i] * s[i] : s[i];
        reached += sum < goal;
    }
    return reached;
}

FEDLORA_DEVICE inline double total(const Values &s) {
    double sum = 0;
    for (int64_t i = 0; i < s.count(); ++i) sum += s[i];
    return sum;
}

FEDLORA_DEVICE inline bool all_finite(const Values &s) {
    double probe = s.spectrum.energy - s.spectrum.energy + (s.spectrum.floor - s.spectrum.floor);
    for (int64_t i = 0; i < s.count(); ++i) probe += s[i] - s[i];
    return probe == 0;
}

FEDLORA_DEVICE inline int64_t asked(const Values &s, const Rule &rule, int64_t numerical) {
    switch (rule.code) {
        case FEDLORA_RULE_RANK: return rule.value < (double)s.count() ? (int64_t)rule.value : s.count();
        case FEDLORA_RULE_SV_RATIO: return larger(1, s.above(s[0] / rule.value));
        case FEDLORA_RULE_SV_SUM:
            return rule.value >= 1 ? numerical : first_reaching(s, false, (rule.value - kSlack) * total(s));
        default: return rule.value >= 1 ? numerical : first_reaching(s, true, (rule.value - kSlack) * s.spectrum.energy);
    }
}

// The rank that the rule asks for, but for its cap.
FEDLORA_DEVICE inline int64_t wanted(const Values &s, const Rule &rule) {
    if (s.count() == 0) return 0;
    if (rule.code == FEDLORA_RULE_ABSOLUTE) {
        // The only rule that knows a scale; a value beyond float64 is above every cutoff.
        int64_t found = 0;
        for (int64_t i = 0; i < s.count(); ++i)
            found += scale_pow2(s[i], s.spectrum.e) > rule.value && s[i] > s.spectrum.floor;
        return found;
    }
    const int64_t numerical = s.above(s.spectrum.floor);
    return all_finite(s) ? smaller(asked(s, rule, numerical), numerical) : 0;
}

FEDLORA_DEVICE inline int64_t capped(int64_t rank, const Rule &rule) { return rule.cap ? smaller(rank, rule.cap) : rank; }

// Whether the rule might keep values that one pass cannot see: the Cholesky drops what lies below some sqrt(u) of the largest
// column. The rule is asked again with as many values of that size as are missing.
FEDLORA_DEVICE inline bool overlooked(const Spectrum &known, const Rule &rule, const Certificate &found) {
    const int64_t numerical = found.numerical_rank;
    const double least = numerical > 0 ? known.s[numerical - 1] : 0;
    const double unseen = (double)known.width * std::sqrt(kRoundoff) * known.norm;
    const Values more = {known, numerical, known.live, least < unseen ? least : unseen};
    return capped(wanted(more, rule), rule) > found.rank;
}

// What the relative square of the truncation error may be off by.
FEDLORA_DEVICE inline double doubt_of(const Spectrum &known) {
    return known.second ? kRoundoff * (256 + 16 * known.norm / known.s[0]) : 18 * kRoundoff * known.energy_abs / known.energy;
}

}  // namespace spectrum

FEDLORA_DEVICE inline Certificate certify(const Spectrum &known, const Rule &rule, double rho_max) {
    using namespace spectrum;
    const Values s = {known, 0, 0, 0};
    const int64_t wish = wanted(s, rule), numerical = s.above(known.floor);
    Certificate found = {capped(wish, rule), numerical, 0, 0, 0, HUGE_VAL, HUGE_VAL, false};
    if (found.rank > 0) {
        found.rho = known.norm / known.s[found.rank - 1];
        found.sigma_err = kRoundoff * (known.second ? 128 + 4 * found.rho : 256 + 4 * found.rho * found.rho);
    }
    if (known.energy > 0) {
        double tail = 0;
        for (int64_t i = found.rank; i < known.count; ++i) tail += known.s[i] * known.s[i];
        found.error = std::sqrt(tail / known.energy);
        found.error_bound = std::sqrt(found.error * found.error + doubt_of(known));
    }
    found.notes = (numerical == 0 ? FEDLORA_NOTE_ZERO : 0) |
                  (numerical > 0 && numerical < known.width ? FEDLORA_NOTE_RANK_DEFICIENT : 0) |
                  (found.rank < wish ? FEDLORA_NOTE_CAPPED : 0) | (known.second ? FEDLORA_NOTE_TWO_PASS : 0) |
                  (known.second && found.rank > 0 && found.sigma_err > kLowAccuracy ? FEDLORA_NOTE_LOW_ACCURACY : 0);
    const bool doubt = found.rho > rho_max || !(known.energy > 0) || overlooked(known, rule, found);
    found.doubtful = !known.second && doubt && known.energy_abs > 0;
    return found;
}

}  // namespace fedlora
