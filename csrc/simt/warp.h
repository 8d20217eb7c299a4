// Warp intrinsics. The lanes of a mask hand in their values; the last of them computes what all get.
//
// Errors: a lane outside its own mask, a mask that names a lane which has returned, lanes of one mask at different places, a
// shuffle that reads a lane outside the mask. Lanes that the block does not have are dropped from masks, as on a device.
#pragma once

#include "block.h"

namespace simt {

enum class Exchange { sync, shuffle, ballot, match_any, match_all, add, min, max, min_signed, max_signed, bit_and, bit_or, bit_xor };

template <class F>
__attribute__((always_inline)) inline void for_lanes(uint32_t mask, F&& body) {
    if (mask == ~0u) {
        for (unsigned k = 0; k < warp_size; ++k) body(k);
        return;
    }
    for (; mask; mask &= mask - 1) body(static_cast<unsigned>(__builtin_ctz(mask)));
}

template <class T, class F>
inline void reduce(Warp& warp, uint32_t mask, F&& combine) {
    T result = static_cast<T>(warp.value[__builtin_ctz(mask)]);
    for_lanes(mask & (mask - 1), [&](unsigned k) { result = combine(result, static_cast<T>(warp.value[k])); });
    for_lanes(mask, [&](unsigned k) { warp.out[k] = static_cast<uint64_t>(result); });
}

inline void complete_rare(Warp& warp, uint32_t mask, Exchange what) {
    using S = int32_t;
    using U = uint32_t;
    switch (what) {
        case Exchange::match_any:
        case Exchange::match_all:
            for_lanes(mask, [&](unsigned k) {
                uint32_t same = 0;
                for_lanes(mask, [&](unsigned i) { same |= static_cast<uint32_t>(warp.value[i] == warp.value[k]) << i; });
                warp.out[k] = what == Exchange::match_any || same == mask ? same : 0;
            });
            break;
        case Exchange::add: reduce<U>(warp, mask, [](U a, U b) { return a + b; }); break;
        case Exchange::min: reduce<U>(warp, mask, [](U a, U b) { return a < b ? a : b; }); break;
        case Exchange::max: reduce<U>(warp, mask, [](U a, U b) { return a < b ? b : a; }); break;
        case Exchange::min_signed: reduce<S>(warp, mask, [](S a, S b) { return a < b ? a : b; }); break;
        case Exchange::max_signed: reduce<S>(warp, mask, [](S a, S b) { return a < b ? b : a; }); break;
        case Exchange::bit_and: reduce<U>(warp, mask, [](U a, U b) { return a & b; }); break;
        case Exchange::bit_or: reduce<U>(warp, mask, [](U a, U b) { return a | b; }); break;
        default: reduce<U>(warp, mask, [](U a, U b) { return a ^ b; });
    }
}

inline void complete(Warp& warp, uint32_t mask, Exchange what) {
    if (what == Exchange::shuffle) {
        uint32_t strangers = 0;
        for_lanes(mask, [&](unsigned k) {
            strangers |= static_cast<uint32_t>(~mask >> warp.source[k] & 1) << k;
            warp.out[k] = warp.value[warp.source[k]];
        });
        if (strangers) {
            const int k = __builtin_ctz(strangers);
            fail([&] {
                return text(warp.place[k]) + text(" of lane %d reads lane %d, which is not in mask 0x%08x", k, warp.source[k], mask);
            });
        }
    } else if (what == Exchange::ballot) {
        uint64_t votes = 0;
        for_lanes(mask, [&](unsigned k) { votes |= warp.value[k] << k; });
        for_lanes(mask, [&](unsigned k) { warp.out[k] = votes; });
    } else if (what != Exchange::sync) {
        complete_rare(warp, mask, what);
    }
}

// Whether the lanes of a mask, all of them waiting, wait for each other. Where they do, they must do so at one place.
inline bool agree(const Warp& warp, uint32_t mask) {
    bool same = true;
    for_lanes(mask, [&](unsigned k) { same &= warp.mask[k] == mask; });
    if (!same) return false;
    const unsigned first = static_cast<unsigned>(__builtin_ctz(mask));
    for_lanes(mask, [&](unsigned k) {
        if (warp.place[k] != warp.place[first])
            fail([&] {
                return text("lanes %u and %u of mask 0x%08x meet at ", first, k, mask) + text(warp.place[first]) + " and " +
                       text(warp.place[k]);
            });
    });
    return true;
}

// Hands in a value, waits for the lanes of the mask, answers what the exchange has for this lane.
inline uint64_t exchange(uint32_t mask, Exchange what, uint64_t value, int source, Place place) {
    Warp& warp = block->warps[self->warp];
    const unsigned lane = self->lane;
    const uint32_t bit = 1u << lane;
    if (!(mask & bit)) fail([&] { return text(place) + text(" by lane %u, which is not in its own mask 0x%08x", lane, mask); });
    mask &= warp.present;
    const uint32_t gone = mask & ~warp.live;
    if (gone) fail([&] { return text(place) + text(" with mask 0x%08x, but lanes 0x%08x have returned", mask, gone); });
    warp.value[lane] = value;
    warp.source[lane] = source;
    warp.mask[lane] = mask;
    warp.place[lane] = place;
    // Nearly always all lanes that wait want the same; what each wants is looked at only where they do not.
    if (!warp.arrived) warp.alike = true;
    else if (warp.alike) warp.alike = mask == warp.mask[warp.latest] && !(place != warp.place[warp.latest]);
    warp.latest = lane;
    warp.arrived |= bit;
    if ((warp.arrived & mask) == mask && (warp.alike || agree(warp, mask))) {
        complete(warp, mask, what);
        warp.arrived &= ~mask;
        set_ready(self->warp, mask);
    } else {
        set_waiting(self->warp, bit);
    }
    yield();
    return warp.out[lane];
}

template <class T>
inline T shuffle(uint32_t mask, T value, int source, Place place) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "shuffles carry up to 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = exchange(mask, Exchange::shuffle, bits, source, place);
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline int lane() { return static_cast<int>(self->lane); }

}  // namespace simt

#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_PLACE \
    simt::Place { file, line, __func__ }

inline void __syncwarp(unsigned mask = ~0u, SIMT_HERE) { simt::exchange(mask, simt::Exchange::sync, 0, 0, SIMT_PLACE); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_HERE) {
    return simt::shuffle(mask, value, (simt::lane() & ~(width - 1)) | (source & (width - 1)), SIMT_PLACE);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_HERE) {
    const int from = simt::lane() ^ lanes;  // a group may read those before it, as hardware has it
    return simt::shuffle(mask, value, from <= (simt::lane() | (width - 1)) ? from : simt::lane(), SIMT_PLACE);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32, SIMT_HERE) {
    const int from = simt::lane() + static_cast<int>(lanes);
    return simt::shuffle(mask, value, from <= (simt::lane() | (width - 1)) ? from : simt::lane(), SIMT_PLACE);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32, SIMT_HERE) {
    const int from = simt::lane() - static_cast<int>(lanes);
    return simt::shuffle(mask, value, from >= (simt::lane() & ~(width - 1)) ? from : simt::lane(), SIMT_PLACE);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_HERE) {
    return static_cast<unsigned>(simt::exchange(mask, simt::Exchange::ballot, predicate != 0, 0, SIMT_PLACE));
}
inline int __any_sync(unsigned mask, int predicate, SIMT_HERE) {
    return simt::exchange(mask, simt::Exchange::ballot, predicate != 0, 0, SIMT_PLACE) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_HERE) {
    return simt::exchange(mask, simt::Exchange::ballot, predicate == 0, 0, SIMT_PLACE) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, SIMT_HERE) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return static_cast<unsigned>(simt::exchange(mask, simt::Exchange::match_any, bits, 0, SIMT_PLACE));
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* same, SIMT_HERE) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    const unsigned lanes = static_cast<unsigned>(simt::exchange(mask, simt::Exchange::match_all, bits, 0, SIMT_PLACE));
    *same = lanes != 0;
    return lanes;
}

#define SIMT_REDUCE(name, signed_form, unsigned_form)                                                        \
    inline int name(unsigned mask, int value, SIMT_HERE) {                                                   \
        return static_cast<int>(simt::exchange(mask, simt::Exchange::signed_form, static_cast<unsigned>(value), 0, SIMT_PLACE)); \
    }                                                                                                        \
    inline unsigned name(unsigned mask, unsigned value, SIMT_HERE) {                                         \
        return static_cast<unsigned>(simt::exchange(mask, simt::Exchange::unsigned_form, value, 0, SIMT_PLACE)); \
    }
SIMT_REDUCE(__reduce_add_sync, add, add)
SIMT_REDUCE(__reduce_min_sync, min_signed, min)
SIMT_REDUCE(__reduce_max_sync, max_signed, max)
SIMT_REDUCE(__reduce_and_sync, bit_and, bit_and)
SIMT_REDUCE(__reduce_or_sync, bit_or, bit_or)
SIMT_REDUCE(__reduce_xor_sync, bit_xor, bit_xor)
#undef SIMT_REDUCE

// Nothing promises that the lanes of a warp run together: only this one is sure to.
inline unsigned __activemask() { return 1u << simt::lane(); }
