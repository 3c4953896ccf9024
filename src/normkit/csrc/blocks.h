// What the row kernels stand on: where a row lies, its blocks and who shares them, several rows at once, and weights in
// the accumulation dtype. No arithmetic of a norm. May include: core.h, steps.h. Compiled once per instruction set; no
// threads of its own (parallel_ranges is handed in work and never decides arithmetic). Read next: rows.h.
#pragma once

#include "core.h"
#include "steps.h"

namespace normkit::NORMKIT_ISA {

template <class T>
NORMKIT_INLINE const T* row_of(const StridedRows& rows, int64_t r) {
    const int64_t outer = r < rows.inner ? 0 : r / rows.inner;
    return static_cast<const T*>(rows.data) + outer * rows.outer_stride + (r - outer * rows.inner) * rows.inner_stride;
}

// Rows taken together, and accumulators of a row's sum: what 32, or 16, registers hold. 16 partial sums at least keep
// the rounding of 4096 additions small.
#if defined(__AVX512F__)
constexpr int kGroup = 4, kVectors = 2;
#elif defined(__AVX2__)
constexpr int kGroup = 2, kVectors = 2;
#else
constexpr int kGroup = 1, kVectors = 4;
#endif
// Short rows come kBatch at a time, in groups, each step for all groups before the next: the sums, quotients and roots
// of one group are waited for while those of the others are computed. That took layer_norm of float32
// (4096, 64) on one thread from 130 to 99 us, of (2048, 128) from 77 to 65.
constexpr int kBatch = 4 * kGroup;
constexpr int64_t kShort = 256;
template <int kRows>
constexpr int kTogether = kRows < kGroup ? kRows : kGroup;

template <class T>
constexpr int kChains = kHalf<T> ? kVectors / 2 : kVectors;
static_assert(kGroup <= kRowGroup, "rows.cpp makes room for kRowGroup");

// -------------------------------------------------------------------------------- the blocks of one row

// block(start, n) for each block of a row of `size` elements, shared by `threads`.
template <class Block>
void for_blocks(int64_t size, int threads, const Block& block) {
    struct Job {
        const Block& block;
        int64_t size;
    } job{block, size};
    const auto range = [](void* context, int64_t first, int64_t last) {
        const Job& job = *static_cast<const Job*>(context);
        for (int64_t start = first * kRowBlock; start < last * kRowBlock && start < job.size; start += kRowBlock)
            job.block(start, job.size - start < kRowBlock ? job.size - start : kRowBlock);
    };
    const int64_t blocks = (size + kRowBlock - 1) / kRowBlock;
    if (threads == 1) {
        range(&job, 0, blocks);
    } else {
        parallel_ranges(blocks, threads, range, &job);
    }
}

// Adds block(start, n, sums) over the blocks in their order, in double: the same bits for any number of threads. A
// block sums up kRows rows at once and sets sums[0..kRows).
template <int kRows, class Block>
void sum_blocks(int64_t size, int threads, Sums* partials, Sums* sums, const Block& block) {
    const auto add = [&](const Sums* part) {
        for (int r = 0; r < kRows; ++r) {
            sums[r].first += part[r].first;
            sums[r].second += part[r].second;
        }
    };
    if (threads == 1) {
        for_blocks(size, 1, [&](int64_t start, int64_t n) {
            Sums part[kRows];
            block(start, n, part);
            add(part);
        });
    } else {
        for_blocks(size, threads,
                   [&](int64_t start, int64_t n) { block(start, n, partials + start / kRowBlock * kRows); });
        for (int64_t i = 0; i * kRowBlock < size; ++i) add(partials + i * kRows);
    }
}

// `weight` + its offset in the accumulation dtype; ones where there is none. T is the rows' dtype.
template <class T>
void widen(const void* source, double offset, void* target, int64_t n) {
    using A = Acc<T>;
    sweep<T>(n, [&](int64_t i, int, auto lanes) NORMKIT_STEP {
        const Wide<T> v = source ? load<T>(static_cast<const T*>(source) + i, lanes) + A(offset) : Wide<T>{} + A(1);
        store_wide<T>(static_cast<A*>(target) + i, v, lanes);
    });
}

// Numbers in storage dtype; doubles become float first, as in torch, where T is a half type.
template <class T, class From>
void narrow(const From* source, void* target, int64_t n) {
    using A = Acc<T>;
    constexpr int64_t kPiece = 64;
    for (int64_t start = 0; start < n; start += kPiece) {
        A values[kPiece];
        const int64_t m = n - start < kPiece ? n - start : kPiece;
        for (int64_t i = 0; i < m; ++i) values[i] = A(source[start + i]);
        sweep<T>(m, [&](int64_t i, int, auto lanes) NORMKIT_STEP {
            store<T>(static_cast<T*>(target) + start + i, load_wide<T>(values + i, lanes), lanes);
        });
    }
}

// piece(start, n) for all of a block where its weights lie in the accumulation dtype; else for as many elements at a
// time as can be widened into the first cache beside the rows.
constexpr int64_t kWeightPiece = 1024;
template <class Piece>
NORMKIT_INLINE void for_pieces(int64_t start, int64_t n, bool wide, const Piece& piece) {
    if (wide) return piece(start, n);
    for (int64_t i = start; i < start + n; i += kWeightPiece)
        piece(i, start + n - i < kWeightPiece ? start + n - i : kWeightPiece);
}

// Elements start..start+n of a weight: out of `wide`, or widened into `buffer`.
template <class T>
NORMKIT_INLINE const Acc<T>* weight_piece(const Weight& weight, const void* wide, int64_t start, int64_t n,
                                          Acc<T>* buffer) {
    using A = Acc<T>;
    if (wide != nullptr) return static_cast<const A*>(wide) + start;
    if (weight.data == nullptr) {
        widen<T>(nullptr, 0, buffer, n);
    } else if (weight.dtype == kFloat32 || weight.dtype == kFloat64) {
        widen<A>(static_cast<const A*>(weight.data) + start, weight.offset, buffer, n);
    } else {
        widen<T>(static_cast<const T*>(weight.data) + start, weight.offset, buffer, n);
    }
    return buffer;
}

// value(r) for the rows that a block takes together, in registers: through a pointer to the rows, the compiler would
// read them again after every store.
template <class Value, int kRows>
struct Each {
    Value of[kRows];
};
template <int kRows, class Call>
NORMKIT_INLINE auto each(const Call& value) {
    Each<decltype(value(0)), kRows> found;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) found.of[r] = value(r);
    return found;
}

}  // namespace normkit::NORMKIT_ISA
