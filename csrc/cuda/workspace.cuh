// The caller's scratch memory, and tables on their way from the host into it.
#pragma once

#include <cstring>
#include <vector>

#include "runtime.cuh"

namespace fedlora {

// Scratch memory handed out piece by piece. Over no memory it only counts: a layout that is run once without and once with memory
// answers the query and serves the call.
class Workspace {
  public:
    Workspace() = default;
    Workspace(void *memory, int64_t bytes) : begin_((reinterpret_cast<uintptr_t>(memory) + kLine - 1) / kLine * kLine) {
        end_ = reinterpret_cast<uintptr_t>(memory) + (uintptr_t)bytes;
    }

    // count elements from the next line of 256 bytes on; not to be touched before fits() was asked.
    template <class T>
    T *take(int64_t count) {
        const uintptr_t here = begin_ + (uintptr_t)used_;
        used_ += (count * (int64_t)sizeof(T) + kLine - 1) / kLine * kLine;
        return reinterpret_cast<T *>(here);
    }

    // Bytes to ask for, wherever they begin.
    int64_t bytes() const { return used_ + kLine; }
    bool fits() const { return begin_ + (uintptr_t)used_ <= end_; }
    // Whether there is memory behind the addresses.
    bool real() const { return end_ != 0; }

  private:
    static constexpr int64_t kLine = 256;
    uintptr_t begin_ = 0, end_ = 0;
    int64_t used_ = 0;
};

// Tables that a call brings along. They travel as parameters of launches: read before the call returns, kept by a captured graph, and
// without waiting for the device, none of which a copy from pageable memory gives.
class Upload {
  public:
    explicit Upload(Workspace &workspace) : workspace_(workspace) {}

    // Where count values will lie on the device once they were sent; the host's are not looked at again.
    template <class T>
    T *add(const T *values, int64_t count) {
        T *const there = workspace_.take<T>(count);
        if (workspace_.real() && count > 0) append(reinterpret_cast<uintptr_t>(there), values, count * (int64_t)sizeof(T));
        return there;
    }
    template <class T>
    T *add(const std::vector<T> &values) {
        return add(values.data(), (int64_t)values.size());
    }

    // Everything added so far, in order with what else is on the stream: one launch for every 30 KiB or 160 tables.
    void send(void *stream);

  private:
    struct Piece {
        uintptr_t there;
        int64_t begin, bytes;
    };
    void append(uintptr_t there, const void *values, int64_t bytes) {
        const int64_t begin = (int64_t)bytes_.size();
        bytes_.resize((size_t)(begin + bytes));
        std::memcpy(bytes_.data() + begin, values, (size_t)bytes);
        pieces_.push_back({there, begin, bytes});
    }

    Workspace &workspace_;
    std::vector<Piece> pieces_;
    std::vector<unsigned char> bytes_;
};

} // namespace fedlora
