// Atomics on global and shared memory; a float or double is added by compare and swap.
#pragma once

#include "vectors.h"

namespace simt {

template <class T, class F>
T swap_until(T* address, F&& changed) {
    T old, fresh;
    __atomic_load(address, &old, __ATOMIC_RELAXED);
    do fresh = changed(old);
    while (!__atomic_compare_exchange(address, &old, &fresh, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

template <class T>
using Same = std::common_type_t<T>;  // keeps the second argument from deciding the type

}  // namespace simt

template <class T>
T atomicAdd(T* address, simt::Same<T> value) { return simt::swap_until(address, [=](T old) { return static_cast<T>(old + value); }); }
template <class T>
T atomicSub(T* address, simt::Same<T> value) { return simt::swap_until(address, [=](T old) { return static_cast<T>(old - value); }); }
template <class T>
T atomicMin(T* address, simt::Same<T> value) { return simt::swap_until(address, [=](T old) { return old < value ? old : value; }); }
template <class T>
T atomicMax(T* address, simt::Same<T> value) { return simt::swap_until(address, [=](T old) { return old < value ? value : old; }); }
template <class T>
T atomicAnd(T* address, simt::Same<T> value) { return simt::swap_until(address, [=](T old) { return old & value; }); }
template <class T>
T atomicOr(T* address, simt::Same<T> value) { return simt::swap_until(address, [=](T old) { return old | value; }); }
template <class T>
T atomicXor(T* address, simt::Same<T> value) { return simt::swap_until(address, [=](T old) { return old ^ value; }); }
template <class T>
T atomicExch(T* address, simt::Same<T> value) { return simt::swap_until(address, [=](T) { return value; }); }
template <class T>
T atomicCAS(T* address, simt::Same<T> expected, simt::Same<T> value) {
    __atomic_compare_exchange(address, &expected, &value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
