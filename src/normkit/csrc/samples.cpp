// Norms with statistics of each sample's groups of channels, in one call: GroupNorm, and InstanceNorm as groups of one.
// A sample is reduced and written before the next, so that memory is read once where its data fits a core's cache.
// Read next: channels.h, affine.h, the arithmetic.
#include "cuts.h"

namespace normkit {
namespace {

// One sample of a ChannelsNorm as a batch of its own.
struct Sample {
    ChannelsReduction reduction{};
    ChannelsAffine apply{};
    Scratch<double> counts, first, second;
    int64_t bytes, units, pieces;
    const char *x, *dout;
    char* out;

    Sample(const ChannelsNorm& args, int dtype)
        : bytes(args.x.batch_stride * storage_bytes(dtype)),
          x(static_cast<const char*>(args.x.data)),
          dout(static_cast<const char*>(args.dout.data)),
          out(static_cast<char*>(args.out)) {
        set_layout(args, &apply);
        apply.shape.batch = 1;
        apply.first_channel = 0;
        apply.last_channel = args.shape.channels;
        reduction.shape = apply.shape;
        reduction.cut = cut(reduction.shape, false);
        counts = block_counts(reduction.shape, reduction.cut);
        reduction.counts = counts.get();
        const int64_t partials = reduction.cut.blocks * args.shape.channels;
        first = scratch<double>(partials);
        second = scratch<double>(partials);
        reduction.first = first.get();
        reduction.second = second.get();
        units = reduction.cut.blocks * reduction.cut.tiles;
        const ChannelsShape& shape = reduction.shape;
        pieces = (shape.channels_last ? shape.space : shape.channels) * pieces_per_line(shape);
    }

    void at(int64_t b) {
        reduction.x = apply.x = {x + b * bytes, 0, apply.x.line_stride};
        if (dout != nullptr) reduction.dout = apply.dout = {dout + b * bytes, 0, apply.dout.line_stride};
        if (out != nullptr) apply.out = out + b * bytes;
    }

    void reduce(UnitKernel unit, MergeKernel merge) {
        unit(reduction, 0, units);
        merge(reduction, 0, 0, reduction.shape.channels);
    }
};

// work(first, last) over the samples.
template <class Work>
void each_sample(const ChannelsNorm& args, int dtype, int threads, int tensors, bool* stream, const Work& work) {
    const ChannelsShape& shape = args.shape;
    const int64_t elements = shape.batch * shape.channels * shape.space, bytes = elements * storage_bytes(dtype);
    *stream = beyond_cache(tensors * bytes);
    prefer_huge_pages(args.out, bytes);
    share(shape.batch, useful_threads(threads, elements), work);
}

}  // namespace

void samples_normalize(const ChannelsNorm& args, int64_t groups, int dtype, int threads) {
    const int64_t channels = args.shape.channels, size = channels / groups;
    const double space = double(args.shape.space);
    const Vector weight = widened(args.weight, channels, dtype), bias = widened(args.bias, channels, dtype);
    bool stream = false;
    each_sample(args, dtype, threads, 2, &stream, [&](int64_t from, int64_t to) {
        Sample sample(args, dtype);
        Vector center(channels, dtype), scale(channels, dtype), shift(channels, dtype);
        const Scratch<double> means = scratch<double>(channels), m2s = scratch<double>(channels);
        sample.reduction.result_first = means.get();
        sample.reduction.result_second = m2s.get();
        sample.apply.center.data = center.data;
        sample.apply.scale.data = scale.data;
        sample.apply.shift.data = shift.data;
        sample.apply.stream = stream;
        for (int64_t b = from; b < to; ++b) {
            sample.at(b);
            sample.reduce(kernels().channels_moments[dtype], kernels().merge_moments);
            for (int64_t g = 0; g < groups; ++g) {
                const double *mean_of = means.get() + g * size, *m2_of = m2s.get() + g * size;
                double mean = 0, m2 = 0;
                for (int64_t i = 0; i < size; ++i) mean += mean_of[i];
                mean /= double(size);  // channels have equal counts
                for (int64_t i = 0; i < size; ++i) m2 += m2_of[i] + (mean_of[i] - mean) * (mean_of[i] - mean) * space;
                const double rstd = 1 / __builtin_sqrt(m2 / (double(size) * space) + args.eps);
                args.mean[b * groups + g] = mean;
                args.rstd[b * groups + g] = rstd;
                for (int64_t c = g * size; c < (g + 1) * size; ++c) {
                    const double gain = rstd * weight[c], rest = mean - center.set(c, mean);
                    scale.set(c, gain);
                    shift.set(c, (args.bias.data != nullptr ? bias[c] : 0) - rest * gain);
                }
            }
            kernels().channels_affine[dtype](sample.apply, 0, sample.pieces);
        }
    });
}

void samples_gradients(const ChannelsNorm& args, int64_t groups, int dtype, int threads) {
    const int64_t batch = args.shape.batch, channels = args.shape.channels, size = channels / groups;
    const double count = double(size * args.shape.space);
    const Vector weight = widened(args.weight, channels, dtype);
    const Scratch<double> dweights = scratch<double>(batch * channels), dbiases = scratch<double>(batch * channels);
    bool stream = false;
    each_sample(args, dtype, threads, 3, &stream, [&](int64_t from, int64_t to) {
        Sample sample(args, dtype);
        Vector center(channels, dtype), a(channels, dtype), b_of(channels, dtype), c_of(channels, dtype);
        sample.reduction.center.data = sample.apply.center.data = center.data;
        sample.apply.a.data = a.data;
        sample.apply.b.data = b_of.data;
        sample.apply.c.data = c_of.data;
        sample.apply.stream = stream;
        for (int64_t b = from; b < to; ++b) {
            const double *mean = args.mean + b * groups, *rstd = args.rstd + b * groups;
            double *dbias = dbiases.get() + b * channels, *dweight = dweights.get() + b * channels;
            for (int64_t c = 0; c < channels; ++c) center.set(c, mean[c / size]);
            sample.at(b);
            sample.reduction.result_first = dbias;
            sample.reduction.result_second = dweight;  // sum(dout * (x - center)) until it is dweight's part
            sample.reduce(kernels().channels_backward_moments[dtype], kernels().merge_sums);
            for (int64_t g = 0; g < groups; ++g) {
                const double rest = mean[g] - center[g * size];
                double slope = 0, level = 0;  // what multiplies (x - mean), and what does not, but for a * dout
                for (int64_t c = g * size; c < (g + 1) * size; ++c) {
                    dweight[c] = (dweight[c] - rest * dbias[c]) * rstd[g];
                    const double gain = rstd[g] * weight[c];
                    a.set(c, gain);
                    slope -= gain * rstd[g] * dweight[c];
                    level -= gain * dbias[c];
                }
                for (int64_t c = g * size; c < (g + 1) * size; ++c) {
                    b_of.set(c, slope / count);
                    c_of.set(c, level / count - slope / count * rest);
                }
            }
            if (args.out != nullptr) kernels().channels_backward_affine[dtype](sample.apply, 0, sample.pieces);
        }
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
