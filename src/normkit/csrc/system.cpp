// What the core asks of the system: threads, and huge pages for fresh memory.
// Read next: rows.cpp, channels.cpp.
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "core.h"

namespace normkit {

bool has_openmp() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

// Splits 0..n into one range per thread. One thread enters no parallel region at all: in a child of fork, libgomp's
// pool is gone and even a region of one thread may wait for it.
void parallel_ranges(int64_t n, int threads, Task task, void* context) {
#ifdef _OPENMP
    if (threads > 1 && n > 1) {
#pragma omp parallel num_threads(int(n < threads ? n : threads))
        {
            const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
            task(context, n * me / team, n * (me + 1) / team);
        }
        return;
    }
#endif
    (void)threads;
    task(context, 0, n);
}

// A thread earns its start (about 2 us) with 16384 elements of work.
int useful_threads(int threads, int64_t elements) {
    if (!has_openmp()) return 1;
    const int64_t useful = elements / 16384;
    return useful < 2 ? 1 : useful < threads ? int(useful) : threads;
}

// Fresh memory of some MiB comes from mmap page by page.
void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = uintptr_t(2) << 20;
    if (data == nullptr || bytes < int64_t(2 * kPage)) return;
    const uintptr_t first = (uintptr_t(data) + kPage - 1) / kPage * kPage;
    const uintptr_t last = (uintptr_t(data) + uintptr_t(bytes)) / kPage * kPage;
    if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data;
    (void)bytes;
#endif
}

}  // namespace normkit
