// Shared memory: nothing of the block before may be seen. Dynamic and static memory is filled with ones (NaN, -1, wild indices)
// before each block; dynamic memory is guarded behind its end as well.
//
// A static __shared__ array is a thread-local variable of its function. Which bytes of the thread-local storage those are, the
// symbol table of this very library tells: its mangled name begins with _ZZ. So do function-local thread_local variables of the
// host, which therefore must not be.
#pragma once

#include <elf.h>
#include <fcntl.h>
#include <link.h>

#include "block.h"

namespace simt {

constexpr unsigned char poison = 0xff, guard_byte = 0xc5;
constexpr size_t guard_bytes = 64;

struct Range {
    size_t begin, end;
};

// The module that holds this very function.
struct Module {
    std::string path;
    char* storage = nullptr;  // thread-local, of the calling OS thread
};

inline Module own_module() {
    Module found;
    dl_iterate_phdr(
        [](dl_phdr_info* module, size_t, void* data) {
            const uintptr_t code = reinterpret_cast<uintptr_t>(&own_module);
            bool ours = false;
            for (int i = 0; i < module->dlpi_phnum; ++i) {
                const ElfW(Phdr)& part = module->dlpi_phdr[i];
                const uintptr_t start = module->dlpi_addr + part.p_vaddr;
                ours |= part.p_type == PT_LOAD && code >= start && code < start + part.p_memsz;
            }
            if (ours) *static_cast<Module*>(data) = {module->dlpi_name, static_cast<char*>(module->dlpi_tls_data)};
            return static_cast<int>(ours);
        },
        &found);
    if (found.path.empty()) found.path = "/proc/self/exe";
    return found;
}

// Where the __shared__ variables lie in the thread-local storage; throws where the library has lost its symbols.
inline std::vector<Range> shared_ranges(const std::string& path) {
    std::FILE* const file = std::fopen(path.c_str(), "rb");
    const auto read = [&](size_t offset, auto* to, size_t count) {
        if (!file || std::fseek(file, static_cast<long>(offset), SEEK_SET) || std::fread(to, sizeof *to, count, file) != count)
            throw std::runtime_error("cannot read the symbols of " + path);
    };
    ElfW(Ehdr) header;
    read(0, &header, 1);
    std::vector<ElfW(Shdr)> sections(header.e_shnum);
    read(header.e_shoff, sections.data(), sections.size());
    std::vector<Range> ranges;
    bool complete = false;
    for (const ElfW(Shdr)& section : sections) {
        if (section.sh_type != SHT_SYMTAB) continue;
        complete = true;
        std::vector<ElfW(Sym)> symbols(section.sh_size / sizeof(ElfW(Sym)));
        read(section.sh_offset, symbols.data(), symbols.size());
        std::vector<char> names(sections[section.sh_link].sh_size);
        read(sections[section.sh_link].sh_offset, names.data(), names.size());
        for (const ElfW(Sym)& symbol : symbols)
            if ((symbol.st_info & 15) == STT_TLS && symbol.st_shndx != SHN_UNDEF && !strncmp(&names[symbol.st_name], "_ZZ", 3))
                ranges.push_back({symbol.st_value, symbol.st_value + symbol.st_size});
    }
    std::fclose(file);
    if (!complete) throw std::runtime_error(path + " has no symbol table: build it without stripping");
    return ranges;
}

inline const std::vector<Range>& static_shared() {
    static const std::vector<Range> ranges = shared_ranges(own_module().path);
    return ranges;
}

inline void poison_shared(char* storage, const std::vector<Range>& ranges) {
    for (const Range& range : ranges) memset(storage + range.begin, poison, range.end - range.begin);
    memset(block->dynamic_base, poison, block->dynamic_bytes);
    memset(block->dynamic_base + block->dynamic_bytes, guard_byte, guard_bytes);
}

inline bool guard_holds() {
    const char* guard = block->dynamic_base + block->dynamic_bytes;
    return std::all_of(guard, guard + guard_bytes, [](char byte) { return static_cast<unsigned char>(byte) == guard_byte; });
}

inline void* dynamic_shared() { return block->dynamic_base; }

}  // namespace simt
