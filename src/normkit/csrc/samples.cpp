// Norms with statistics of each sample's groups of channels, in one call: GroupNorm, and InstanceNorm as groups of one.
// A part is reduced and written before the next, so that memory is read once where its data fits a core's cache: a
// group of a sample or, channels-last, where a group's data lie apart, all groups of a sample. Read next: channels.h,
// affine.h, the arithmetic.
#include "cuts.h"

namespace normkit {
namespace {

// One sample of a ChannelsNorm as a batch of its own, taken part by part. `joined`: so many channels, which follow each
// other in memory, are reduced as one.
struct Sample {
    ChannelsReduction reduction{};
    ChannelsAffine apply{};
    Scratch<double> counts, first, second;
    int64_t bytes, line_pieces;
    const char *x, *dout;
    char* out;

    Sample(const ChannelsNorm& args, int64_t joined, int dtype, bool stream)
        : bytes(args.x.batch_stride * storage_bytes(dtype)),
          x(static_cast<const char*>(args.x.data)),
          dout(static_cast<const char*>(args.dout.data)),
          out(static_cast<char*>(args.out)) {
        set_layout(args, &apply);
        apply.shape.batch = 1;
        apply.stream = stream;
        reduction.shape = apply.shape;
        reduction.shape.channels /= joined;
        reduction.shape.space *= joined;
        reduction.x.line_stride = apply.x.line_stride * joined;
        reduction.dout.line_stride = apply.dout.line_stride * joined;
        reduction.cut = cut(reduction.shape, false);
        counts = block_counts(reduction.shape, reduction.cut);
        reduction.counts = counts.get();
        const int64_t partials = reduction.cut.blocks * reduction.shape.channels;
        first = scratch<double>(partials);
        second = scratch<double>(partials);
        reduction.first = first.get();
        reduction.second = second.get();
        line_pieces = pieces_per_line(apply.shape);
    }

    void at(int64_t b, int64_t first_channel, int64_t last_channel) {
        reduction.x.data = apply.x.data = x + b * bytes;
        if (dout != nullptr) reduction.dout.data = apply.dout.data = dout + b * bytes;
        if (out != nullptr) apply.out = out + b * bytes;
        apply.first_channel = first_channel;
        apply.last_channel = last_channel;
    }

    // Of the reduction's channels.
    void reduce(int64_t from, int64_t to, UnitKernel unit, MergeKernel merge) {
        const ChannelsShape& shape = reduction.shape;
        const int64_t blocks = reduction.cut.blocks;
        if (shape.channels_last) {
            unit(reduction, 0, blocks * reduction.cut.tiles);
        } else {
            for (int64_t k = 0; k < blocks; ++k) unit(reduction, k * shape.channels + from, k * shape.channels + to);
        }
        merge(reduction, 0, from, to);
    }

    int64_t pieces() const {
        const ChannelsShape& shape = apply.shape;
        return (shape.channels_last ? shape.space : apply.last_channel - apply.first_channel) * line_pieces;
    }
};

// Groups of one sample that a thread reduces and then writes: what a core's own cache holds, as each turn takes 40 ns
// beside its planes, but parts enough for all threads. Bits do not depend on it.
int64_t groups_at_once(const ChannelsNorm& args, int64_t groups, int dtype, int threads, int tensors) {
    const ChannelsShape& shape = args.shape;
    const int64_t group_bytes = shape.channels / groups * shape.space * storage_bytes(dtype);
    int64_t step = 1;
    while (step < groups && within_core_cache(2 * step * group_bytes * (tensors - 1)) &&
           shape.batch * divide_up(groups, 2 * step) >= 4 * threads)
        step *= 2;
    return step;
}

// work(stream)(b, first group, last group) over all parts; threads share them.
template <class Work>
void each_part(const ChannelsNorm& args, int64_t groups, int dtype, int threads, int tensors, const Work& work) {
    const ChannelsShape& shape = args.shape;
    const int64_t elements = shape.batch * shape.channels * shape.space, bytes = elements * storage_bytes(dtype);
    const bool stream = streams(shape, dtype, tensors);
    prefer_huge_pages(args.out, bytes);
    threads = useful_threads(threads, elements);
    const int64_t step = shape.channels_last ? groups : groups_at_once(args, groups, dtype, threads, tensors);
    const int64_t parts = divide_up(groups, step);
    share(shape.batch * parts, threads, [&](int64_t from, int64_t to) {
        auto one = work(stream);
        for (int64_t i = from; i < to; ++i) {
            const int64_t first = i % parts * step;
            one(i / parts, first, first + step < groups ? first + step : groups);
        }
    });
}

// What a thread works with: a sample, its vectors of C numbers, and the results of a reduction.
struct Workspace {
    Sample sample;
    Vector center, one, two, three;
    Scratch<double> first, second;

    Workspace(const ChannelsNorm& args, int64_t joined, int dtype, bool stream)
        : sample(args, joined, dtype, stream),
          center(args.shape.channels, dtype),
          one(args.shape.channels, dtype),
          two(args.shape.channels, dtype),
          three(args.shape.channels, dtype),
          first(scratch<double>(args.shape.channels)),
          second(scratch<double>(args.shape.channels)) {
        sample.reduction.result_first = first.get();
        sample.reduction.result_second = second.get();
        sample.apply.center.data = center.data;
    }
};

}  // namespace

void samples_normalize(const ChannelsNorm& args, int64_t groups, int dtype, int threads) {
    const int64_t channels = args.shape.channels, size = channels / groups;
    const double space = double(args.shape.space);
    // A group's planes follow each other: one reduction for all of them where they are short took float32
    // (2, 1280, 8, 8) in 32 groups from 88 to 22 us.
    const int64_t joined = args.shape.channels_last ? 1 : size;
    const Vector weight = widened(args.weight, channels, dtype), bias = widened(args.bias, channels, dtype);
    each_part(args, groups, dtype, threads, 2, [&](bool stream) {
        auto with = std::make_shared<Workspace>(args, joined, dtype, stream);
        with->sample.apply.scale.data = with->one.data;
        with->sample.apply.shift.data = with->two.data;
        return [&, with](int64_t b, int64_t first_group, int64_t last_group) {
            Sample& sample = with->sample;
            sample.at(b, first_group * size, last_group * size);
            const int64_t parts = size / joined;  // of a group, each reduced; they have equal counts
            sample.reduce(first_group * parts, last_group * parts, kernels().channels_moments[dtype],
                          kernels().merge_moments);
            for (int64_t g = first_group; g < last_group; ++g) {
                const double *mean_of = with->first.get() + g * parts, *m2_of = with->second.get() + g * parts;
                double mean = 0, m2 = 0;
                for (int64_t i = 0; i < parts; ++i) mean += mean_of[i];
                mean /= double(parts);
                for (int64_t i = 0; i < parts; ++i)
                    m2 += m2_of[i] + (mean_of[i] - mean) * (mean_of[i] - mean) * space * double(joined);
                const double rstd = 1 / __builtin_sqrt(m2 / (double(size) * space) + args.eps);
                args.mean[b * groups + g] = mean;
                args.rstd[b * groups + g] = rstd;
                for (int64_t c = g * size; c < (g + 1) * size; ++c) {
                    const double gain = rstd * weight[c], rest = mean - with->center.set(c, mean);
                    with->one.set(c, gain);
                    with->two.set(c, (args.bias.data != nullptr ? bias[c] : 0) - rest * gain);
                }
            }
            kernels().channels_affine[dtype](sample.apply, 0, sample.pieces());
        };
    });
}

void samples_gradients(const ChannelsNorm& args, int64_t groups, int dtype, int threads) {
    const int64_t batch = args.shape.batch, channels = args.shape.channels, size = channels / groups;
    const double count = double(size * args.shape.space);
    const Vector weight = widened(args.weight, channels, dtype);
    const Scratch<double> dweights = scratch<double>(batch * channels), dbiases = scratch<double>(batch * channels);
    each_part(args, groups, dtype, threads, 3, [&](bool stream) {
        auto with = std::make_shared<Workspace>(args, 1, dtype, stream);
        ChannelsAffine& apply = with->sample.apply;
        with->sample.reduction.center.data = with->center.data;
        apply.a.data = with->one.data;
        apply.b.data = with->two.data;
        apply.c.data = with->three.data;
        return [&, with](int64_t b, int64_t first_group, int64_t last_group) {
            Sample& sample = with->sample;
            const double *mean = args.mean + b * groups, *rstd = args.rstd + b * groups;
            double *dbias = dbiases.get() + b * channels, *dweight = dweights.get() + b * channels;
            for (int64_t c = first_group * size; c < last_group * size; ++c) with->center.set(c, mean[c / size]);
            sample.at(b, first_group * size, last_group * size);
            sample.reduction.result_first = dbias;
            sample.reduction.result_second = dweight;  // sum(dout * (x - center)) until it is dweight's part
            sample.reduce(first_group * size, last_group * size, kernels().channels_backward_moments[dtype],
                          kernels().merge_sums);
            for (int64_t g = first_group; g < last_group; ++g) {
                const double rest = mean[g] - with->center[g * size];
                double slope = 0, level = 0;  // what multiplies (x - mean), and what does not, but for a * dout
                for (int64_t c = g * size; c < (g + 1) * size; ++c) {
                    dweight[c] = (dweight[c] - rest * dbias[c]) * rstd[g];
                    const double gain = rstd[g] * weight[c];
                    with->one.set(c, gain);
                    slope -= gain * rstd[g] * dweight[c];
                    level -= gain * dbias[c];
                }
                for (int64_t c = g * size; c < (g + 1) * size; ++c) {
                    with->two.set(c, slope / count);
                    with->three.set(c, level / count - slope / count * rest);
                }
            }
            if (args.out != nullptr) kernels().channels_backward_affine[dtype](sample.apply, 0, sample.pieces());
        };
    });
    for (int64_t c = 0; c < channels; ++c) args.dweight[c] = args.dbias[c] = 0;
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t c = 0; c < channels; ++c) {
            args.dweight[c] += dweights[size_t(b * channels + c)];
            args.dbias[c] += dbiases[size_t(b * channels + c)];
        }
    }
}

}  // namespace normkit
