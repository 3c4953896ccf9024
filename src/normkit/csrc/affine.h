// The arithmetic of channel norms, element by element: affine forward and backward over (B, C, S), one axis contiguous.
// May include: core.h, steps.h, channels.h. Compiled once per instruction set; no threads.
// Read next: channels.cpp, which cuts and shares the work.
#pragma once

#include "channels.h"

namespace normkit::NORMKIT_ISA {

// A step knows where its lines and its channels' numbers lie. step.numbers(read) is those numbers, by read(address);
// step.at(numbers, line, i, lanes) the result at element i of a line; step.ask(line, i) prefetches what it takes.

// (x - center) * scale + shift.
template <class T>
struct Affine {
    using A = Acc<T>;
    struct Numbers {
        Wide<T> center, scale, shift;
    };
    const A *center, *scale, *shift;
    const T* x;
    int64_t x_stride;

    NORMKIT_INLINE Affine(const ChannelsAffine& a, int64_t b, int64_t line, int64_t start, int64_t channel)
        : center(values_at<A>(a.center, b) + channel),
          scale(values_at<A>(a.scale, b) + channel),
          shift(values_at<A>(a.shift, b) + channel),
          x(line_at<T>(a.x, b, line) + start),
          x_stride(a.x.line_stride) {}
    template <class Read>
    NORMKIT_INLINE Numbers numbers(const Read& read) const {
        return {read(center), read(scale), read(shift)};
    }
    template <class Lanes>
    NORMKIT_INLINE Wide<T> at(const Numbers& of, int64_t line, int64_t i, Lanes lanes) const {
        return fused(load<T>(x + line * x_stride + i, lanes) - of.center, of.scale, of.shift);
    }
    NORMKIT_INLINE void ask(int64_t line, int64_t i) const { prefetch<T>(x + line * x_stride, i); }
};

// a * dout + b * (x - center) + c; kFixed: a * dout, x is not read.
template <class T, bool kFixed>
struct BackwardAffine {
    using A = Acc<T>;
    struct Numbers {
        Wide<T> a, center, b, c;
    };
    const A *a, *center, *b, *c;
    const T *dout, *x;
    int64_t dout_stride, x_stride;

    NORMKIT_INLINE BackwardAffine(const ChannelsAffine& of, int64_t sample, int64_t line, int64_t start,
                                  int64_t channel)
        : a(values_at<A>(of.a, sample) + channel),
          center(kFixed ? a : values_at<A>(of.center, sample) + channel),
          b(kFixed ? a : values_at<A>(of.b, sample) + channel),
          c(kFixed ? a : values_at<A>(of.c, sample) + channel),
          dout(line_at<T>(of.dout, sample, line) + start),
          x(kFixed ? dout : line_at<T>(of.x, sample, line) + start),
          dout_stride(of.dout.line_stride),
          x_stride(of.x.line_stride) {}
    template <class Read>
    NORMKIT_INLINE Numbers numbers(const Read& read) const {
        return {read(a), read(center), read(b), read(c)};
    }
    template <class Lanes>
    NORMKIT_INLINE Wide<T> at(const Numbers& of, int64_t line, int64_t i, Lanes lanes) const {
        const Wide<T> d = load<T>(dout + line * dout_stride + i, lanes);
        if constexpr (kFixed) return of.a * d;
        return fused(of.a, d, fused(of.b, load<T>(x + line * x_stride + i, lanes) - of.center, of.c));
    }
    NORMKIT_INLINE void ask(int64_t line, int64_t i) const {
        prefetch<T>(dout + line * dout_stride, i);
        if constexpr (!kFixed) prefetch<T>(x + line * x_stride, i);
    }
};

// A plane, or a piece of one: its channel's numbers are scalars.
template <class T, bool kMask, bool kStream, class Step>
NORMKIT_INLINE void write_plane(const Step& step, int64_t n, const uint8_t* mask, T* out) {
    using A = Acc<T>;
    const auto numbers = step.numbers([](const A* p) NORMKIT_STEP { return splat_wide<T>(*p); });
    sweep<T>(n, [&](int64_t i, int, auto lanes) NORMKIT_STEP {
        Wide<T> v = step.at(numbers, 0, i, lanes);
        if constexpr (kMask) v = where_valid<T>(mask + i, v, lanes);
        store_out<kStream>(out + i, v, lanes);
    });
}

// Some lines of n channels. Columns of kColumns vectors keep their channels' numbers in registers for all lines; up to
// kNear channels of a whole type the numbers stay in the nearest cache, and the lines are taken one by one, in the
// order of memory: that took eval of float32 (64, 256, 14, 14) from 700 to 520 us, but backward of (8, 2048, 7, 7) from
// 177 to 213, and of bfloat16 from 500 to 600. The lines that follow are asked for.
template <class T, bool kStream, class Step>
NORMKIT_INLINE void write_lines(const Step& step, int64_t lines, int64_t n, T* out, int64_t out_stride) {
    using A = Acc<T>;
    constexpr int kWidth = kStep<T>, kVectors = kVectorBytes / 16;  // that registers hold, times four numbers
    constexpr int kColumns = kHalf<T> && kVectors > 1 ? kVectors / 2 : kVectors;
    constexpr int64_t kNear = 512;
    const int64_t together = !kHalf<T> && n <= kNear ? 1 : lines;
    int64_t first = 0;
    const auto columns = [&](int64_t i, auto count, auto lanes) NORMKIT_STEP {
        typename Step::Numbers numbers[count.value];
#pragma GCC unroll 4
        for (int k = 0; k < count.value; ++k)
            numbers[k] = step.numbers([&](const A* p) NORMKIT_STEP { return load_wide<T>(p + i + k * kWidth, lanes); });
        for (int64_t line = first; line < first + together; ++line) {
#pragma GCC unroll 4
            for (int k = 0; k < count.value; ++k) {
                step.ask(line + lines, i + k * kWidth);
                store_out<kStream>(out + line * out_stride + i + k * kWidth,
                                   step.at(numbers[k], line, i + k * kWidth, lanes), lanes);
            }
        }
    };
    for (; first < lines; first += together) {
        int64_t i = 0;
        for (; i + kColumns * kWidth <= n; i += kColumns * kWidth) columns(i, Number<kColumns>{}, Full{});
        for (; i + kWidth <= n; i += kWidth) columns(i, Number<1>{}, Full{});
        if (i < n) columns(i, Number<1>{}, Partial{int(n - i)});
    }
}

// The pieces first..last of all planes, kSpaceBlock elements each.
template <class T, class Step, bool kMask, bool kStream>
NORMKIT_INLINE void write_planes(const ChannelsAffine& a, int64_t first, int64_t last) {
    const int64_t from = a.first_channel, to = a.last_channel, size = a.shape.space;
    const int64_t pieces = (size + kSpaceBlock - 1) / kSpaceBlock;
    if (first == last) return;
    int64_t start = first % pieces * kSpaceBlock, b = first / pieces / (to - from);
    int64_t channel = from + first / pieces % (to - from);
    for (int64_t piece = first; piece < last; ++piece) {
        const int64_t n = least(kSpaceBlock, size - start);
        T* out = static_cast<T*>(a.out) + b * a.out_batch_stride + channel * a.out_line_stride + start;
        const uint8_t* mask = kMask ? a.shape.mask + b * size + start : nullptr;
        const Step step(a, b, channel, start, channel);
        if (kStream && aligned(out)) {
            write_plane<T, kMask, kStream>(step, n, mask, out);
        } else {
            write_plane<T, kMask, false>(step, n, mask, out);
        }
        start += kSpaceBlock;
        if (start < size) continue;
        start = 0;
        if (++channel < to) continue;
        channel = from;
        ++b;
    }
}

// The pieces first..last of all channels-last lines: kSpaceBlock channels each, taken kRun lines at a time. An invalid
// line becomes 0.
template <class T, class Step, bool kStream>
NORMKIT_INLINE void write_columns(const ChannelsAffine& a, int64_t first, int64_t last) {
    constexpr int64_t kRun = 16;
    const ChannelsShape& shape = a.shape;
    const int64_t pieces = (shape.channels + kSpaceBlock - 1) / kSpaceBlock;
    const auto valid = [&](int64_t b, int64_t s) { return shape.mask == nullptr || shape.mask[b * shape.space + s]; };
    for (int64_t piece = first; piece < last;) {
        const int64_t start = piece % pieces * kSpaceBlock, line = piece / pieces;
        const int64_t b = line / shape.space, s = line % shape.space, n = least(kSpaceBlock, shape.channels - start);
        T* out = static_cast<T*>(a.out) + b * a.out_batch_stride + s * a.out_line_stride + start;
        int64_t run = 1;
        if (!valid(b, s)) {
            memset(out, 0, size_t(n) * sizeof(T));
        } else {
            const int64_t most = pieces > 1 ? 1 : least(kRun, least(last - piece, shape.space - s));
            while (run < most && valid(b, s + run)) ++run;
            const Step step(a, b, s, start, start);
            if (kStream && aligned(out) && (run == 1 || a.out_line_stride * int64_t(sizeof(T)) % kVectorBytes == 0)) {
                write_lines<T, kStream>(step, run, n, out, a.out_line_stride);
            } else {
                write_lines<T, false>(step, run, n, out, a.out_line_stride);
            }
        }
        piece += run;
    }
}

template <class T, class Step>
void write_channels(const ChannelsAffine& a, int64_t first, int64_t last) {
    choose(
        [&](auto last_axis, auto mask, auto stream) {
            if constexpr (last_axis.value) {
                write_columns<T, Step, stream.value>(a, first, last);
            } else {
                write_planes<T, Step, mask.value, stream.value>(a, first, last);
            }
        },
        a.shape.channels_last, a.shape.mask != nullptr, a.stream);
    if (a.stream) end_stream();
}

template <class T>
void channels_affine(const ChannelsAffine& a, int64_t first, int64_t last) {
    write_channels<T, Affine<T>>(a, first, last);
}

template <class T>
void channels_backward_affine(const ChannelsAffine& a, int64_t first, int64_t last) {
    if (a.b.data == nullptr) {
        write_channels<T, BackwardAffine<T, true>>(a, first, last);
    } else {
        write_channels<T, BackwardAffine<T, false>>(a, first, last);
    }
}

}  // namespace normkit::NORMKIT_ISA
