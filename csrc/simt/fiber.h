// Fibers: a stack each, switched by hand. By a few instructions on x86-64; by ucontext elsewhere and under AddressSanitizer,
// which has to be told of every switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) || defined(__SANITIZE_ADDRESS__)
#define SIMT_UCONTEXT 1
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

constexpr size_t stack_bytes = 256 << 10;

// Stacks in one mapping, a page that faults below each: memory comes with the first touch.
class Stacks {
public:
    explicit Stacks(size_t count) : bytes_(count * stack_bytes) {
        void* base = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED) throw std::bad_alloc();
        base_ = static_cast<char*>(base);
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        for (size_t i = 0; i < count; ++i) mprotect(base_ + i * stack_bytes, page, PROT_NONE);
    }
    ~Stacks() { munmap(base_, bytes_); }
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;

    char* operator[](size_t i) const { return base_ + i * stack_bytes; }

private:
    char* base_;
    size_t bytes_;
};

#ifdef SIMT_UCONTEXT

struct Context {
    ucontext_t machine;
    void* fake = nullptr;
    const void* bottom = nullptr;
    size_t size = 0;
};

// What ASan must hear when a context is on the processor again; the first switch tells it the stack of the OS thread.
inline void arrived(Context& now, [[maybe_unused]] Context& home) {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(now.fake, &bottom, &size);
    if (!home.bottom) home.bottom = bottom, home.size = size;
#else
    (void)now;
#endif
}

// Leaves `from` for `to`; `last` where nobody comes back to `from`.
inline void change(Context& from, Context& to, Context& home, [[maybe_unused]] bool last = false) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake, to.bottom, to.size);
#endif
    swapcontext(&from.machine, &to.machine);
    arrived(from, home);
}

inline void prepare(Context& fiber, char* stack, [[maybe_unused]] size_t index, void (*entry)()) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack + 65536, stack_bytes - 65536);
#endif
    fiber.fake = nullptr;
    fiber.bottom = stack;
    fiber.size = stack_bytes;
    getcontext(&fiber.machine);
    fiber.machine.uc_stack.ss_sp = stack;
    fiber.machine.uc_stack.ss_size = stack_bytes;
    fiber.machine.uc_link = nullptr;
    makecontext(&fiber.machine, entry, 0);
}

#else

struct Context {
    void* stack = nullptr;
};

// The jump instead of a return lets the processor foresee it: all lanes wait at the same place. noipa: the compiler must not learn
// from these few instructions which registers and variables a switch leaves alone.
__attribute__((naked, noinline, noipa)) inline void exchange(void** /*from*/, void* /*to*/) {
    asm("pop %rcx\n\t"
        "push %rbp\n\tpush %rbx\n\tpush %r12\n\tpush %r13\n\tpush %r14\n\tpush %r15\n\t"
        "push %rcx\n\t"
        "mov %rsp, (%rdi)\n\t"
        "mov %rsi, %rsp\n\t"
        "pop %rcx\n\t"
        "pop %r15\n\tpop %r14\n\tpop %r13\n\tpop %r12\n\tpop %rbx\n\tpop %rbp\n\t"
        "jmp *%rcx");
}

inline void arrived(Context&, Context&) {}

inline void change(Context& from, Context& to, Context& /*home*/, bool /*last*/ = false) { exchange(&from.stack, to.stack); }

// Tops of stacks are staggered, or the lanes of a warp would all want the same lines of the first-level cache.
inline void prepare(Context& fiber, char* stack, size_t index, void (*entry)()) {
    uintptr_t top = reinterpret_cast<uintptr_t>(stack) + stack_bytes - index % 16 * 320;
    void** slot = reinterpret_cast<void**>(top & ~uintptr_t(15));
    *--slot = nullptr;  // where a return address would be: keeps the alignment of a called function
    for (int i = 0; i < 6; ++i) *--slot = nullptr;
    *--slot = reinterpret_cast<void*>(entry);
    fiber.stack = slot;
}

#endif

}  // namespace simt
