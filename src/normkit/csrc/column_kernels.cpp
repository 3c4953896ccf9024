// One instruction set's kernels of columns.h, apart from kernels.cpp so that both compile at the same time.
// Read next: kernels.cpp.
#include "columns.h"

namespace normkit::NORMKIT_ISA {

extern const ColumnKernels column_table;
const ColumnKernels column_table = {
    {columns_forward<float>, columns_forward<double>, columns_forward<bfloat16>, columns_forward<float16>},
    {columns_backward<float>, columns_backward<double>, columns_backward<bfloat16>, columns_backward<float16>},
};

}  // namespace normkit::NORMKIT_ISA
