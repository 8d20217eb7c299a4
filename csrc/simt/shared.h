// Shared memory: nothing of the block before may be seen. Static arrays are thread-local variables without an initialiser, so
// they lie in the .tbss part of this library's thread-local storage; that part is filled with ones (NaN, -1, wild indices)
// before each block, but for the two pointers of the shim. Dynamic memory is filled as well and guarded behind its end.
#pragma once

#include <link.h>

#include "block.h"

namespace simt {

constexpr unsigned char poison = 0xff;
constexpr size_t guard_bytes = 64;
constexpr unsigned char guard_byte = 0xc5;

struct Range {
    char* begin = nullptr;
    size_t bytes = 0;
};

// The .tbss of the calling thread in the module that holds this very function.
inline Range static_shared() {
    struct Search {
        uintptr_t code;
        Range found;
    } search{reinterpret_cast<uintptr_t>(&static_shared), {}};
    dl_iterate_phdr(
        [](dl_phdr_info* module, size_t, void* data) {
            Search& wanted = *static_cast<Search*>(data);
            bool ours = false;
            const ElfW(Phdr)* storage = nullptr;
            for (int i = 0; i < module->dlpi_phnum; ++i) {
                const ElfW(Phdr)& part = module->dlpi_phdr[i];
                const uintptr_t start = module->dlpi_addr + part.p_vaddr;
                ours |= part.p_type == PT_LOAD && wanted.code >= start && wanted.code < start + part.p_memsz;
                if (part.p_type == PT_TLS) storage = &part;
            }
            if (ours && storage && module->dlpi_tls_data)
                wanted.found = {static_cast<char*>(module->dlpi_tls_data) + storage->p_filesz, storage->p_memsz - storage->p_filesz};
            return static_cast<int>(ours);
        },
        &search);
    return search.found;
}

inline void poison_shared(const Range& statics) {
    Block* const kept = block;
    Fiber* const kept_self = self;
    memset(statics.begin, poison, statics.bytes);
    block = kept;
    self = kept_self;
    memset(kept->dynamic_base, poison, kept->dynamic_bytes);
    memset(kept->dynamic_base + kept->dynamic_bytes, guard_byte, guard_bytes);
}

inline bool guard_holds() {
    const char* guard = block->dynamic_base + block->dynamic_bytes;
    return std::all_of(guard, guard + guard_bytes, [](char byte) { return static_cast<unsigned char>(byte) == guard_byte; });
}

template <class T>
T* dynamic_shared() {
    return reinterpret_cast<T*>(block->dynamic_base);
}

}  // namespace simt
