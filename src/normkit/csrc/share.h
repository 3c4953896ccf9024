// What rows.cpp and channels.cpp share: splitting work among threads, and scratch memory. Baseline code only.
// May include: core.h, the standard library.
// Read next: rows.cpp.
#pragma once

#include <memory>

#include "core.h"

namespace normkit {

// work(first, last) over ranges that cover 0..n, one per thread.
template <class Work>
void share(int64_t n, int threads, const Work& work) {
    const auto task = [](void* context, int64_t first, int64_t last) {
        (*static_cast<const Work*>(context))(first, last);
    };
    parallel_ranges(n, threads, task, const_cast<Work*>(&work));
}

// `n` values, not initialized, unlike std::vector's.
template <class T>
using Scratch = std::unique_ptr<T[]>;
template <class T>
Scratch<T> scratch(int64_t n) {
    return Scratch<T>(new T[static_cast<size_t>(n)]);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t storage_bytes(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }
inline int64_t accumulation_bytes(int dtype) { return dtype == kFloat64 ? 8 : 4; }

}  // namespace normkit
