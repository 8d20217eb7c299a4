// Large outputs on huge pages.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "fedlora.h"

namespace fedlora {

// Asks for huge pages under a batch that is about to be written: fresh memory is cleared at its first touch, and page by page of
// 4 KiB that takes as long as a small kernel. A wish: nothing depends on it.
inline void prefer_huge_pages(const fedlora_block &block, int64_t element) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr int64_t kPage = 4096, kWorthwhile = 4 << 20;
    if (block.batch < 1 || block.batch_stride < 0 || block.row_stride < 0 || block.col_stride < 0) return;
    const int64_t last = (block.batch - 1) * block.batch_stride + (block.rows - 1) * block.row_stride + (block.cols - 1) * block.col_stride;
    const int64_t first = (block.data + kPage - 1) / kPage * kPage, end = (block.data + (last + 1) * element) / kPage * kPage;
    if (end - first >= kWorthwhile) madvise((void *)first, (size_t)(end - first), MADV_HUGEPAGE);
#else
    (void)block, (void)element;
#endif
}

}  // namespace fedlora
