// What memory.h promises.
#include "memory.h"

#include <mutex>
#include <vector>
#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#else
#include <stdlib.h>
#endif

namespace normkit {
namespace {

constexpr int64_t kPage = int64_t(2) << 20;  // a huge page

// Never destroyed: tensors may outlive the module at exit.
struct Kept {
    std::mutex mutex;
    std::vector<Block> blocks;  // oldest first
    int64_t bytes = 0;
    int64_t limit = 0;
};
Kept& kept() {
    static Kept* const all = [] {
#ifdef __linux__
        // A child of fork gets the mutex free, whoever held it.
        pthread_atfork([] { kept().mutex.lock(); }, [] { kept().mutex.unlock(); }, [] { kept().mutex.unlock(); });
#endif
        return new Kept;
    }();
    return *all;
}

Block map(int64_t bytes) {
#ifdef __linux__
    // One page more than asked for, and what stands over on both sides given back: blocks start at a huge page.
    void* mapped = mmap(nullptr, size_t(bytes + kPage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return {nullptr, 0};
    const uintptr_t first = uintptr_t(mapped), start = (first + kPage - 1) / kPage * kPage,
                    end = start + uintptr_t(bytes);
    if (start > first) munmap(mapped, start - first);
    if (first + uintptr_t(bytes + kPage) > end)
        munmap(reinterpret_cast<void*>(end), first + uintptr_t(bytes + kPage) - end);
#ifdef MADV_HUGEPAGE
    (void)madvise(reinterpret_cast<void*>(start), size_t(bytes), MADV_HUGEPAGE);
#endif
    return {reinterpret_cast<void*>(start), bytes};
#else
    return {aligned_alloc(64, size_t(bytes)), bytes};
#endif
}

void unmap(Block block) {
#ifdef __linux__
    munmap(block.data, size_t(block.bytes));
#else
    free(block.data);
#endif
}

// Oldest first, until at most `bytes` are kept. The mutex is held.
void shrink(Kept& all, int64_t bytes) {
    size_t gone = 0;
    while (all.bytes > bytes) {
        all.bytes -= all.blocks[gone].bytes;
        unmap(all.blocks[gone++]);
    }
    all.blocks.erase(all.blocks.begin(), all.blocks.begin() + int64_t(gone));
}

}  // namespace

// The mutex is only tried: two threads that come at once are no reason for one to wait.
Block take_block(int64_t bytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
    Kept& all = kept();
    const std::unique_lock<std::mutex> lock(all.mutex, std::try_to_lock);
    if (lock.owns_lock()) {
        if (all.limit == 0) return {nullptr, 0};  // nothing is kept: torch's own memory will do
        // The newest that fits with less than a quarter over: its pages are the likeliest to be in a cache.
        for (size_t i = all.blocks.size(); i-- > 0;) {
            const Block block = all.blocks[i];
            if (block.bytes < bytes || block.bytes - bytes > bytes / 4) continue;
            all.blocks.erase(all.blocks.begin() + int64_t(i));
            all.bytes -= block.bytes;
            return block;
        }
        // What is kept does not fit: it makes room, so that what is in use and what is kept grow no higher than they
        // would with one size alone.
        shrink(all, all.bytes > bytes ? all.bytes - bytes : 0);
    }
    return map(bytes);
}

void give_block(Block block) {
    Kept& all = kept();
    const std::unique_lock<std::mutex> lock(all.mutex, std::try_to_lock);
    if (!lock.owns_lock() || block.bytes > all.limit) return unmap(block);
    shrink(all, all.limit - block.bytes);
    all.blocks.push_back(block);
    all.bytes += block.bytes;
}

int64_t set_block_limit(int64_t bytes) {
    Kept& all = kept();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const int64_t before = all.limit;
    all.limit = bytes;
    shrink(all, bytes);
    return before;
}

int64_t kept_bytes() {
    Kept& all = kept();
    const std::lock_guard<std::mutex> lock(all.mutex);
    return all.bytes;
}

}  // namespace normkit
