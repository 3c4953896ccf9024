// What the core's parts agree on: dtypes, arguments of the primitives, the table of kernels of one instruction set.
// May include: the C headers of libc. No templates, no inline functions: baseline and AVX-512 code both read this.
// Read next: rows.h, channels.h, affine.h, columns.h (arithmetic), rows.cpp, channels.cpp, columns.cpp (threads and
// splitting).
#pragma once

#include <stdint.h>

namespace normkit {

enum Dtype { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kDtypes = 4 };

// Elements that are summed in the accumulation dtype before a double takes over. The boundaries depend on the shape
// alone, so they are part of a result's bits, and threads may share the blocks of one row without changing them.
constexpr int64_t kRowBlock = 4096;

struct Sums {
    double first, second;
};

// Row r lies at data + (r / inner) * outer_stride + (r % inner) * inner_stride, strides in elements.
struct StridedRows {
    const void* data;  // null: absent
    int64_t inner, outer_stride, inner_stride;
};

// (D,) numbers as they lie in memory: a gain is data + offset, or 1 where data is null.
struct Weight {
    const void* data;
    int dtype;  // x's dtype or its accumulation dtype
    double offset;
};

struct RowsForward {
    int64_t rows, size;  // R, D
    StridedRows x, residual;
    Weight weight, bias;       // bias without an offset; absent where its data is null
    const void *gain, *shift;  // weight and bias in the accumulation dtype; null: widened block by block
    double eps;
    bool centered;
    bool stream;        // out is written past the caches
    void *out, *total;  // (R, D) contiguous; total is null without a residual
    void *mean, *rstd;  // (R,) in the accumulation dtype, or null where nobody wants them
    Sums* partials;     // kRowGroup per block of a row; used when threads share rows
};

struct RowsBackward {
    int64_t rows, size;
    StridedRows dout, dtotal, total;
    const void *mean, *rstd;  // mean is null when not centered
    Weight weight;
    const void* gain;        // as in RowsForward
    void* dx;                // (R, D) contiguous, or null
    bool stream;             // dx is written past the caches
    void *dweight, *dbias;   // (row blocks, D) in the accumulation dtype; dbias only beside dweight; or null
    bool narrow;             // only with one row: dweight and dbias are in x's dtype
    int64_t rows_per_block;  // rows that one line of dweight and dbias sums up
    Sums* partials;          // kRowGroup per block of a row; used when threads share rows
};
constexpr int kRowGroup = 4;  // rows taken together: the gain is read, and dweight read and written, once for them

// out[j] = sum over `count` lines of lines[k][j], in the accumulation dtype or, if narrow, rounded from it to x's.
struct LineSum {
    const void* lines;
    void* out;
    int64_t count, size;
    bool narrow;
};

// (B, C, S) with one contiguous axis. channels_last: the line along C at (b, s); else the line along S at (b, c).
struct ChannelsShape {
    int64_t batch, channels, space;
    bool channels_last;
    const uint8_t* mask;  // (B, S), 0 = invalid; or null
};

struct Lines {
    const void* data;
    int64_t batch_stride, line_stride;  // elements
};

// (C,) or (B, C): sample b's C values lie at data + b * batch_stride, batch_stride 0 or C.
struct ChannelValues {
    const void* data;
    int64_t batch_stride;
};

// How a reduction over channels is cut: `groups` independent results (1, or B per sample), `blocks` partial results
// in each, combined in their order. Fixed by the shape.
struct ChannelBlocks {
    int64_t groups, blocks;
    int64_t samples_per_block, space_blocks;  // channels-first: a block is some samples' planes, or a piece of a plane
    int64_t rows_per_block, tiles;            // channels-last: a block is some rows; a unit is a tile of its columns
};

constexpr int64_t kSpaceBlock = 8192;  // channels-first: elements per block, 32 KiB of float32
constexpr int64_t kTile = 256;         // channels-last: columns per unit
constexpr int64_t kMaxTileRows = 256;

struct ChannelsReduction {
    ChannelsShape shape;
    ChannelBlocks cut;
    Lines x, dout;                         // dout only in backward
    ChannelValues center;                  // only in backward
    const double* counts;                  // (groups, blocks): elements of one channel in a block; only in moments
    double *first, *second;                // partial results (groups, blocks, C): mean and m2, or the two sums
    double *result_first, *result_second;  // (groups, C)
};

struct ChannelsAffine {
    ChannelsShape shape;
    Lines x, dout;                       // forward: x; backward: dout and, with b, x
    ChannelValues center, scale, shift;  // forward: (x - center) * scale + shift
    ChannelValues a, b, c;               // backward: a * dout + b * (x - center) + c; without b, a * dout
    void* out;
    int64_t out_batch_stride, out_line_stride;
    bool stream;                          // out is written past the caches, where its lines are aligned
    int64_t first_channel, last_channel;  // channels-first: those that are meant
};

// A whole normalization by channels, and its gradients: moments, vectors and affine in one call. x, dout and out are
// dense and of the same layout.
struct ChannelsNorm {
    ChannelsShape shape;
    Lines x, dout;
    Weight weight, bias;  // (C,)
    double eps;
    Weight fixed_mean, fixed_var;  // (C,); without data: the batch's own statistics
    double *mean, *m2, *rstd;      // (C,): written by forward, read by backward (not m2); unused when fixed
    int64_t count;                 // backward: values behind the statistics
    double *dweight, *dbias;       // (C,): written by backward
    void* out;                     // out or dx; dx may be null
};

constexpr int64_t kStrip = 128;  // positions of a line that are computed together, for all channels

// LayerNorm over C of (B, C, S), S contiguous: each position of each sample has its own statistics.
struct ColumnsForward {
    int64_t batch, channels, space;
    Lines x;                   // along S
    Weight weight, bias;       // (C,), without an offset; absent where their data is null
    const void *gain, *shift;  // (C,): weight and bias in the accumulation dtype; ones and zeros where absent
    double eps;
    void* out;          // (B, C, S) contiguous
    bool stream;        // out is written past the caches
    void *mean, *rstd;  // (B, S) in the accumulation dtype, or null where nobody wants them
};

struct ColumnsBackward {
    int64_t batch, channels, space;
    Lines x, dout;
    const void *mean, *rstd;  // (B, S)
    Weight weight;
    const void* gain;          // as in ColumnsForward
    void* dx;                  // (B, C, S) contiguous, or null
    bool stream;               // dx is written past the caches, or not at all
    void *dweight, *dbias;     // (blocks, C) in the accumulation dtype, both or null
    int64_t strips_per_block;  // strips that one line of dweight and dbias sums up
};

struct ColumnKernels {
    void (*forward[kDtypes])(const ColumnsForward&, int64_t first, int64_t last);
    // lanes: memory for two vectors of each channel, where dweight is wanted
    void (*backward[kDtypes])(const ColumnsBackward&, int64_t first, int64_t last, void* lanes);
};

// One instruction set's kernels, indexed by Dtype. first/last bound rows, row blocks or units (see the callers).
struct Kernels {
    const char* name;
    void (*widen[kDtypes])(const void* source, double offset, void* target, int64_t n);  // null source: ones
    void (*narrow[kDtypes])(const double* source, void* target, int64_t n);
    void (*rows_forward[kDtypes])(const RowsForward&, int64_t first, int64_t last, int threads);
    void (*rows_backward[kDtypes])(const RowsBackward&, int64_t first, int64_t last, int threads);
    void (*sum_lines[kDtypes])(const LineSum&, int64_t first, int64_t last);
    void (*channels_moments[kDtypes])(const ChannelsReduction&, int64_t first, int64_t last);
    void (*channels_backward_moments[kDtypes])(const ChannelsReduction&, int64_t first, int64_t last);
    void (*merge_moments)(const ChannelsReduction&, int64_t group, int64_t first, int64_t last);
    void (*merge_sums)(const ChannelsReduction&, int64_t group, int64_t first, int64_t last);
    void (*channels_affine[kDtypes])(const ChannelsAffine&, int64_t first, int64_t last);
    void (*channels_backward_affine[kDtypes])(const ChannelsAffine&, int64_t first, int64_t last);
    const ColumnKernels* columns;
};

// dispatch.cpp
const Kernels& kernels();  // those in use
int isa_count();
const char* isa_name(int index);  // compiled in and supported by this machine, best first
bool set_isa(const char* name);   // false: unknown or unsupported

// system.cpp
using Task = void (*)(void* context, int64_t first, int64_t last);
void parallel_ranges(int64_t n, int threads, Task task, void* context);
int useful_threads(int threads, int64_t elements);
bool beyond_cache(int64_t bytes);
bool within_core_cache(int64_t bytes);
bool has_openmp();
void prefer_huge_pages(void* data, int64_t bytes);

// rows.cpp, channels.cpp, columns.cpp: the primitives. They fill in what their arguments leave open: gain, bias,
// partials, cuts.
struct RowsBackwardResult {
    void *dweight, *dbias;  // (D,) in the accumulation dtype or, if narrow, in x's; or null
    bool narrow;
};
void rows_forward(RowsForward args, int dtype, int threads);
void rows_backward(RowsBackward args, int dtype, RowsBackwardResult result, int threads);
void channels_moments(ChannelsReduction args, int dtype, bool per_sample, int threads);
void channels_backward_moments(ChannelsReduction args, int dtype, bool per_sample, int threads);
void channels_affine(const ChannelsAffine& args, int dtype, int threads);
void channels_backward_affine(const ChannelsAffine& args, int dtype, int threads);
void channels_normalize(const ChannelsNorm& args, int dtype, int threads);
void channels_gradients(const ChannelsNorm& args, int dtype, int threads);
// samples.cpp: the same with statistics of each sample's groups of channels; args.mean and args.rstd are (B, groups).
void samples_normalize(const ChannelsNorm& args, int64_t groups, int dtype, int threads);
void samples_gradients(const ChannelsNorm& args, int64_t groups, int dtype, int threads);
void columns_forward(ColumnsForward args, int dtype, int threads);
// dweight and dbias: (C,) in the accumulation dtype, or null
void columns_backward(ColumnsBackward args, int dtype, void* dweight, void* dbias, int threads);
// statistics.update_running for one of the (C,) averages, in place: of mean (divisor 1) or m2 (divisor count - 1).
void update_running(void* running, int dtype, const double* batch, double divisor, double momentum, int64_t channels);

}  // namespace normkit
