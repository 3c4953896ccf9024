// What the core asks of the system: threads, and huge pages for fresh memory.
// Read next: rows.cpp, channels.cpp.
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <fstream>
#include <string>

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

// Bytes of the first core's cache of this level. From sysfs: sysconf adds up what a virtual machine's processor has in
// all (320 MiB where one core sees 32).
static int64_t cache_bytes(int level, int64_t otherwise) {
    for (int index = 0; index < 8; ++index) {
        const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
        std::ifstream level_file(folder + "level"), size_file(folder + "size");
        int found = 0;
        int64_t size = 0;
        char unit = 0;
        if (level_file >> found && found == level && size_file >> size && size > 0)
            return size_file >> unit && unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : size;
    }
    return otherwise;
}

// Whether this many bytes are more than the last cache holds.
bool beyond_cache(int64_t bytes) {
    static const int64_t cache = cache_bytes(3, int64_t(32) << 20);
    return bytes > cache;
}

// Whether this many bytes, read once, are still in a core's own cache when they are read again.
bool within_core_cache(int64_t bytes) {
    static const int64_t cache = cache_bytes(2, int64_t(1) << 20);
    return bytes <= cache - cache / 8;
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
