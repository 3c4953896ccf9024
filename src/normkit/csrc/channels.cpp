// Channel norms: who computes which piece. The arithmetic is in channels.h and affine.h.
// Nothing here may change a result's bits with the number of threads.
// Read next: cuts.h, samples.cpp; channels.h, affine.h.
#include <initializer_list>

#include "cuts.h"

namespace normkit {
namespace {

// Partial results of every block into scratch memory, then each group's blocks merged in their order.
void reduce(ChannelsReduction& args, int threads, UnitKernel unit, MergeKernel merge) {
    const ChannelBlocks& cut = args.cut;
    const int64_t channels = args.shape.channels, partials = cut.groups * cut.blocks * channels;
    const Scratch<double> first = scratch<double>(partials), second = scratch<double>(partials);
    args.first = first.get();
    args.second = second.get();
    const int64_t elements = args.shape.batch * channels * args.shape.space;
    share(cut.groups * cut.blocks * cut.tiles, useful_threads(threads, elements),
          [&](int64_t from, int64_t to) { unit(args, from, to); });
    // A unit of merging is 256 channels of a group, so that one group with many blocks is shared as well.
    const int64_t pieces = divide_up(channels, kTile);
    share(cut.groups * pieces, useful_threads(threads, partials), [&](int64_t from, int64_t to) {
        for (int64_t piece = from; piece < to; ++piece) {
            const int64_t start = piece % pieces * kTile;
            merge(args, piece / pieces, start, start + kTile < channels ? start + kTile : channels);
        }
    });
}

// The samples of dense channels-last tensors as one: their lines follow each other.
void join_samples(ChannelsShape& shape) {
    shape.space *= shape.batch;
    shape.batch = 1;
}

// Pieces of lines, see write_planes and write_columns in affine.h.
template <class Kernel>
void affine(ChannelsAffine args, int dtype, int threads, int tensors, Kernel kernel) {
    ChannelsShape& shape = args.shape;
    const int64_t step = shape.space * args.out_line_stride;
    bool joined = shape.channels_last && args.out_batch_stride == step;
    for (const Lines& lines : {args.x, args.dout})
        joined = joined &&
                 (lines.data == nullptr || (lines.batch_stride == step && lines.line_stride == args.out_line_stride));
    for (const ChannelValues& values : {args.center, args.scale, args.shift, args.a, args.b, args.c})
        joined = joined && values.batch_stride == 0;
    if (joined) join_samples(shape);
    args.first_channel = 0;
    args.last_channel = shape.channels;
    const int64_t elements = shape.batch * shape.channels * shape.space, bytes = elements * storage_bytes(dtype);
    args.stream = streams(shape, dtype, tensors);
    prefer_huge_pages(args.out, bytes);
    const int64_t lines = shape.batch * (shape.channels_last ? shape.space : shape.channels);
    share(lines * pieces_per_line(shape), useful_threads(threads, elements),
          [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

}  // namespace

void channels_moments(ChannelsReduction args, int dtype, bool per_sample, int threads) {
    args.cut = cut(args.shape, per_sample);
    const Scratch<double> counts = block_counts(args.shape, args.cut);
    args.counts = counts.get();
    reduce(args, threads, kernels().channels_moments[dtype], kernels().merge_moments);
}

void channels_backward_moments(ChannelsReduction args, int dtype, bool per_sample, int threads) {
    args.cut = cut(args.shape, per_sample);
    reduce(args, threads, kernels().channels_backward_moments[dtype], kernels().merge_sums);
}

void channels_affine(const ChannelsAffine& args, int dtype, int threads) {
    affine(args, dtype, threads, 2, kernels().channels_affine[dtype]);
}

void channels_backward_affine(const ChannelsAffine& args, int dtype, int threads) {
    affine(args, dtype, threads, args.b.data != nullptr ? 3 : 2, kernels().channels_backward_affine[dtype]);
}

// ------------------------------------------------------------------------------- reduction and affine in one call

namespace {

// Channels whose data should be reduced and written before the next: all of them where everything stays in the last
// cache; else what a core's own cache holds, so that memory is read once, but 16 KiB of every sample at least, since
// writing shorter pieces, each far from the last, took up to 1.6 times as long (bfloat16, (128, 256, 784)).
int64_t band_of(const ChannelsShape& shape, int64_t bytes, int tensors) {
    if (!beyond_cache(tensors * bytes)) return shape.channels;
    const int64_t channel_bytes = bytes / shape.channels, plane_bytes = channel_bytes / shape.batch;
    int64_t band = divide_up(int64_t(16) << 10, plane_bytes);
    while (within_core_cache((band + 1) * channel_bytes * (tensors - 1))) ++band;
    return band;
}

// Reduction, vectors of each channel, affine, for one band of channels after the other. The bits are the same.
template <class Vectors, class AffineKernel>
void reduce_and_apply(ChannelsReduction reduction, ChannelsAffine apply, int dtype, int threads, int tensors,
                      UnitKernel unit, MergeKernel merge, const Vectors& vectors, AffineKernel kernel) {
    const ChannelsShape& shape = apply.shape;
    const int64_t channels = shape.channels, plane = shape.batch * shape.space, elements = plane * channels;
    const int64_t bytes = elements * storage_bytes(dtype);
    const auto whole = [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c) vectors(c);
    };
    reduction.cut = cut(shape, false);
    const Scratch<double> counts = block_counts(shape, reduction.cut);
    reduction.counts = counts.get();
    threads = useful_threads(threads, elements);
    if (shape.channels_last || channels < 2 * threads ||
        (beyond_cache(tensors * bytes) && !within_core_cache(bytes / channels * (tensors - 1)))) {
        reduce(reduction, threads, unit, merge);
        whole(0, channels);
        if (apply.out != nullptr) affine(apply, dtype, threads, tensors, kernel);
        return;
    }
    const int64_t blocks = reduction.cut.blocks, pieces = pieces_per_line(shape);
    const Scratch<double> first_memory = scratch<double>(blocks * channels);
    const Scratch<double> second_memory = scratch<double>(blocks * channels);
    reduction.first = first_memory.get();
    reduction.second = second_memory.get();
    apply.stream = streams(shape, dtype, tensors);
    prefer_huge_pages(apply.out, bytes);
    const int64_t band = band_of(shape, bytes, tensors);
    share(channels, threads, [&](int64_t from, int64_t to) {
        for (int64_t c = from; c < to; c += band) {
            const int64_t end = c + band < to ? c + band : to;
            for (int64_t k = 0; k < blocks; ++k) unit(reduction, k * channels + c, k * channels + end);
            merge(reduction, 0, c, end);
            whole(c, end);
            if (apply.out == nullptr) continue;
            ChannelsAffine some = apply;
            some.first_channel = c;
            some.last_channel = end;
            kernel(some, 0, shape.batch * (end - c) * pieces);
        }
    });
}

}  // namespace

void channels_normalize(const ChannelsNorm& args, int dtype, int threads) {
    const int64_t channels = args.shape.channels;
    Vector center(channels, dtype), scale(channels, dtype), shift(channels, dtype);
    const Vector weight = widened(args.weight, channels, dtype);
    const Vector bias = widened(args.bias, channels, dtype);
    ChannelsAffine apply{};
    set_layout(args, &apply);
    apply.center.data = center.data;
    apply.scale.data = scale.data;
    apply.shift.data = shift.data;
    // What rounding takes from the mean goes into the shift, see channel_vectors in autograd.py.
    const auto set = [&](int64_t c, double mean, double rstd) {
        const double gain = rstd * weight[c], rest = mean - center.set(c, mean);
        scale.set(c, gain);
        shift.set(c, (args.bias.data != nullptr ? bias[c] : 0) - rest * gain);
    };
    const auto kernel = kernels().channels_affine[dtype];
    if (args.fixed_mean.data != nullptr) {
        const Vector mean = widened(args.fixed_mean, channels, dtype), var = widened(args.fixed_var, channels, dtype);
        for (int64_t c = 0; c < channels; ++c) set(c, mean[c], 1 / __builtin_sqrt(var[c] + args.eps));
        affine(apply, dtype, threads, 2, kernel);
        return;
    }
    ChannelsReduction reduction{};
    reduction.shape = args.shape;
    reduction.x = args.x;
    reduction.result_first = args.mean;
    reduction.result_second = args.m2;
    const double count = double(args.shape.batch * args.shape.space);
    const auto vectors = [&](int64_t c) {
        args.rstd[c] = 1 / __builtin_sqrt(args.m2[c] / count + args.eps);
        set(c, args.mean[c], args.rstd[c]);
    };
    reduce_and_apply(reduction, apply, dtype, threads, 2, kernels().channels_moments[dtype], kernels().merge_moments,
                     vectors, kernel);
}

void channels_gradients(const ChannelsNorm& args, int dtype, int threads) {
    const int64_t channels = args.shape.channels;
    Vector center(channels, dtype), a(channels, dtype), b(channels, dtype), c(channels, dtype);
    for (int64_t i = 0; i < channels; ++i) center.set(i, args.mean[i]);
    const Vector weight = widened(args.weight, channels, dtype);
    ChannelsAffine apply{};
    set_layout(args, &apply);
    apply.center.data = center.data;
    apply.a.data = a.data;
    apply.b.data = b.data;
    apply.c.data = c.data;
    ChannelsReduction reduction{};
    reduction.shape = args.shape;
    reduction.x = args.x;
    reduction.dout = args.dout;
    reduction.center.data = center.data;
    reduction.result_first = args.dbias;
    reduction.result_second = args.dweight;  // sum(dout * (x - center)) until vectors() makes it dweight
    const double count = double(args.count > 0 ? args.count : 1);
    // dx = gain * (dout - mean(dout) - xhat * mean(dout * xhat)), sorted by what multiplies (x - center)
    const auto vectors = [&](int64_t i) {
        const double rest = args.mean[i] - center[i], rstd = args.rstd[i], gain = rstd * weight[i];
        args.dweight[i] = (args.dweight[i] - rest * args.dbias[i]) * rstd;
        const double slope = -gain * rstd * args.dweight[i] / count;
        a.set(i, gain);
        b.set(i, slope);
        c.set(i, -gain * args.dbias[i] / count - slope * rest);
    };
    reduce_and_apply(reduction, apply, dtype, threads, 3, kernels().channels_backward_moments[dtype],
                     kernels().merge_sums, vectors, kernels().channels_backward_affine[dtype]);
}

void update_running(void* running, int dtype, const double* batch, double divisor, double momentum, int64_t channels) {
    const Vector old = widened({running, dtype, 0}, channels, dtype);
    const Scratch<double> next = scratch<double>(channels);
    // As torch.lerp: from the nearer end, so that nothing of the batch is lost in a large old value.
    for (int64_t c = 0; c < channels; ++c) {
        const double value = batch[c] / divisor, difference = value - old[c];
        next[size_t(c)] = momentum < 0.5 ? old[c] + momentum * difference : value - difference * (1 - momentum);
    }
    kernels().narrow[dtype](next.get(), running, channels);
}

}  // namespace normkit
