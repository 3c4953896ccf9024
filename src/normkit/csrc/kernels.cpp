// One instruction set's table of kernels; CMake compiles this file once per instruction set.
// Read next: dispatch.cpp, which picks a table.
#include "affine.h"
#include "channels.h"
#include "rows.h"

#define NORMKIT_TEXT_OF(name) #name
#define NORMKIT_TEXT(name) NORMKIT_TEXT_OF(name)

namespace normkit::NORMKIT_ISA {

extern const ColumnKernels column_table;  // column_kernels.cpp
extern const Kernels table;
const Kernels table = {
    NORMKIT_TEXT(NORMKIT_ISA),
    {widen<float>, widen<double>, widen<bfloat16>, widen<float16>},
    {narrow<float, double>, narrow<double, double>, narrow<bfloat16, double>, narrow<float16, double>},
    {rows_forward<float>, rows_forward<double>, rows_forward<bfloat16>, rows_forward<float16>},
    {rows_backward<float>, rows_backward<double>, rows_backward<bfloat16>, rows_backward<float16>},
    {sum_lines<float>, sum_lines<double>, sum_lines<bfloat16>, sum_lines<float16>},
    {channels_moments<float>, channels_moments<double>, channels_moments<bfloat16>, channels_moments<float16>},
    {channels_backward_moments<float>, channels_backward_moments<double>, channels_backward_moments<bfloat16>,
     channels_backward_moments<float16>},
    merge_moments,
    merge_sums,
    {channels_affine<float>, channels_affine<double>, channels_affine<bfloat16>, channels_affine<float16>},
    {channels_backward_affine<float>, channels_backward_affine<double>, channels_backward_affine<bfloat16>,
     channels_backward_affine<float16>},
    &column_table,
};

}  // namespace normkit::NORMKIT_ISA
