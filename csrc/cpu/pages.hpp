// Large outputs on huge pages.
#pragma once

#include <initializer_list>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "fedlora.h"

namespace fedlora {

// Bytes of a batch in memory; none where it runs backwards.
struct Extent {
    int64_t first = 0, end = 0;
    Extent(int64_t first, int64_t end) : first(first), end(end) {}
    Extent(const fedlora_block &b, int64_t element) {
        if (b.batch < 1 || b.rows < 1 || b.cols < 1 || b.batch_stride < 0 || b.row_stride < 0 || b.col_stride < 0) return;
        const int64_t last = (b.batch - 1) * b.batch_stride + (b.rows - 1) * b.row_stride + (b.cols - 1) * b.col_stride;
        first = b.data;
        end = first + (last + 1) * element;
    }
    int64_t bytes() const { return end - first; }
};

// Asks for huge pages, whole ones of 4 KiB outwards. A wish: nothing depends on it.
inline void prefer_huge_pages(const Extent &extent) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr int64_t kPage = 4096, kWorthwhile = 2 << 20;
    const int64_t first = extent.first / kPage * kPage, end = (extent.end + kPage - 1) / kPage * kPage;
    if (extent.bytes() >= kWorthwhile) madvise((void *)first, (size_t)(end - first), MADV_HUGEPAGE);
#else
    (void)extent;
#endif
}

// The same for batches that are about to be written: fresh memory is cleared at its first touch, and 4 KiB at a time that takes
// as long as a small kernel. Neighbours are asked for together, as a huge page may lie under both.
inline void prefer_huge_pages(std::initializer_list<Extent> batches) {
    int64_t first = INT64_MAX, end = 0, bytes = 0;
    for (const Extent &batch : batches) {
        if (batch.bytes() == 0) continue;
        first = batch.first < first ? batch.first : first;
        end = batch.end > end ? batch.end : end;
        bytes += batch.bytes();
    }
    if (end - first <= bytes + bytes / 8) return prefer_huge_pages(Extent(first, end));
    for (const Extent &batch : batches) prefer_huge_pages(batch);
}

}  // namespace fedlora
