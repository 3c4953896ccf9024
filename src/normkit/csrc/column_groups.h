// What the kernels of columns.h stand on: groups of positions, how wide they are, and the numbers beside them. No
// arithmetic of a norm. May include: core.h, steps.h. Compiled once per instruction set.
// Read next: columns.h.
//
// A group is some steps of positions side by side, with all their channels. It goes down the channels' lines two or
// three times: once out of memory, then out of the core's own caches. A lane belongs to one position, and what it
// computes does not depend on what stands beside it.
#pragma once

#include "core.h"
#include "steps.h"

namespace normkit::NORMKIT_ISA {

// Steps of a group: 512 bytes of a line of float32 with AVX-512, since memory likes wide pieces; that not all of
// backward's numbers then stay in registers costs less.
constexpr int kWideVectors = 8;
template <class T>
constexpr int kWideSteps = kHalf<T> ? kWideVectors / 2 : kWideVectors;

// Where all lines' pieces stay in the nearest cache, later passes do not wait behind what is asked for from memory:
// groups of a whole type are as wide as they may be for that, if the narrowest may. On one thread, wide or so: forward
// of float32 (32, 64, 56, 56) 2250 or 1300 us, (32, 128, 28, 28) 1280 or 620; backward 4160 or 2880, 1750 or 1190.
// bfloat16 gained nothing.
struct Width {
    int64_t near_bytes, most_bytes;  // of one tensor: for any width, for the narrowest
    int narrowest_bytes;             // of a line
};
constexpr Width kForwardWidth = {16 << 10, 24 << 10, 128}, kBackwardWidth = {4 << 10, 12 << 10, 64};

template <class T>
NORMKIT_INLINE int group_steps(int64_t channels, Width width) {
    if (kHalf<T>) return kWideSteps<T>;
    int steps = kWideSteps<T>;
    for (; steps * kVectorBytes > width.narrowest_bytes; steps /= 2)
        if (channels * steps * kVectorBytes <= width.near_bytes) return steps;
    return channels * steps * kVectorBytes <= width.most_bytes ? steps : kWideSteps<T>;
}

// Lines that are summed in the accumulation dtype before a double takes over.
constexpr int64_t kRun = 64;

// step(k, lanes) for the steps of a group. `last` is Partial at the end of a line.
template <int kCount, class Last, class Step>
NORMKIT_INLINE void across(Last last, const Step& step) {
#pragma GCC unroll 8
    for (int k = 0; k + 1 < kCount; ++k) step(k, Full{});
    step(kCount - 1, last);
}

// A step's lanes added up to one vector.
NORMKIT_INLINE Vec<float> one_vector(Two v) { return v.low + v.high; }
template <class V>
NORMKIT_INLINE V one_vector(V v) {
    return v;
}

// What is computed beside the positions of a group.
template <class T, int kCount>
struct Beside {
    static constexpr int kWidth = kCount * kStep<T>;
    Acc<T> of[kWidth];

    NORMKIT_INLINE Wide<T> step(int k) const { return load_wide<T>(of + k * kStep<T>, Full{}); }
};
template <class T, int kCount>
struct WideSums {
    double of[kCount * kStep<T>] = {};

    NORMKIT_INLINE void add(const Wide<T> (&run)[kCount]) {
        Beside<T, kCount> values;
#pragma GCC unroll 8
        for (int k = 0; k < kCount; ++k) store_wide<T>(values.of + k * kStep<T>, run[k], Full{});
        for (int i = 0; i < values.kWidth; ++i) of[i] += double(values.of[i]);
    }
};

// run(first, last) over runs of lines.
template <class Run>
NORMKIT_INLINE void for_runs(int64_t channels, const Run& run) {
    for (int64_t c = 0; c < channels; c += kRun) run(c, c + kRun < channels ? c + kRun : channels);
}

// A group's elements in one tensor: those of channel c lie at + c * stride. Where they are used for the last time,
// those at next + c * next_stride are asked for.
template <class T>
struct Columns {
    const T* at;
    int64_t stride;
    const T* next;
    int64_t next_stride;
};

// The group of n positions from s on, in sample b. Of a sample that stays in the core's own cache, the next is asked
// for in the order of memory, as much of it as the group is of its own; else the group that follows.
template <class T>
NORMKIT_INLINE Columns<T> columns_at(const Lines& lines, int64_t b, int64_t s, int64_t n, int64_t batch,
                                     int64_t channels, int64_t space) {
    constexpr int64_t kSmallSample = 256 << 10;
    const T* sample = static_cast<const T*>(lines.data) + b * lines.batch_stride;
    const int64_t stride = lines.line_stride;
    if (stride == space && channels * space * int64_t(sizeof(T)) <= kSmallSample)
        return {sample + s, stride, sample + (b + 1 < batch ? lines.batch_stride : 0) + s * channels, n};
    const T* next = s + n < space ? sample + s + n : b + 1 < batch ? sample + lines.batch_stride : sample + s;
    return {sample + s, stride, next, stride};
}

// Where the group's results go. Unless they are written past the caches, its lines are asked for while others are read:
// that took forward of float32 (64, 256, 14, 14) from 1127 to 910 us on one thread, its backward from 2324 to 1857.
template <class T, bool kStream>
struct Target {
    T* at;
    int64_t stride;

    NORMKIT_INLINE void ask(int64_t c, int64_t i) const {
        if (!kStream) __builtin_prefetch(at + c * stride + i, 1, 2);
    }
};

// group(s, n, Number<steps>, lanes of the last step) for the positions first..last of a line, `steps` at a time: a
// power of two up to kMost.
template <class T, int kMost, class Group>
NORMKIT_INLINE void for_groups(int steps, int64_t first, int64_t last, const Group& group) {
    constexpr int kWidth = kStep<T>;
    if constexpr (kMost > 1)
        if (steps < kMost) return for_groups<T, kMost / 2>(steps, first, last, group);
    for (; first + kMost * kWidth <= last; first += kMost * kWidth)
        group(first, int64_t(kMost * kWidth), Number<kMost>{}, Full{});
    const auto rest = [&](auto count) NORMKIT_STEP {
        if ((last - first + kWidth - 1) / kWidth == count.value)
            group(first, last - first, count, Partial{int(last - first) - (count.value - 1) * kWidth});
    };
    rest(Number<1>{});
    if constexpr (kMost > 1) rest(Number<2>{});
    if constexpr (kMost > 2) rest(Number<3>{}), rest(Number<4>{});
    if constexpr (kMost > 4) rest(Number<5>{}), rest(Number<6>{}), rest(Number<7>{}), rest(Number<8>{});
}

}  // namespace normkit::NORMKIT_ISA
