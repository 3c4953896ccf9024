// Whole calls on torch's tensors: views, new memory and kernels in one step, without Python in between. Each answers
// None where the tensors are not plain; kernels/cpu.py then goes the general way, to the same bits.
// Read next: calls.cpp.
#pragma once

#include "tensors.h"

namespace normkit {

nb::object norm_now(nb::handle x, nb::handle residual, nb::handle normalized_shape, nb::handle weight, nb::handle bias,
                    nb::handle eps, bool centered, double weight_offset);
nb::object norm_recorded(nb::handle x, nb::handle residual, nb::handle weight, nb::handle bias, double eps,
                         bool centered, double weight_offset);
nb::object norm_backward(nb::handle dout, nb::handle dtotal, nb::handle total, nb::handle mean, nb::handle rstd,
                         nb::handle weight, double weight_offset, bool dx, bool dweight, bool dbias, bool narrow);
nb::object norm_backward_now(nb::handle dout, nb::handle dtotal, nb::handle total, nb::handle mean, nb::handle rstd,
                             nb::handle weight, double weight_offset, bool dx, bool dweight, bool dbias, bool narrow);
nb::object batch_norm_now(nb::handle x, nb::handle running_mean, nb::handle running_var, nb::handle weight,
                          nb::handle bias, nb::handle in_training, nb::handle momentum, nb::handle eps, bool guarded);
nb::object sample_norm_now(nb::handle x, nb::handle groups, nb::handle weight, nb::handle bias, nb::handle eps);
nb::object batch_norm_backward_now(nb::handle dout, nb::handle x, nb::handle mean, nb::handle rstd, nb::handle weight,
                                   bool dx, bool parameters, bool narrow);

}  // namespace normkit
