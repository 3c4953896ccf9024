"""Closed forms about normalization, each with its assumptions and its source; the tests check them by simulation.

Here: the functions of the modules of this package, under one name.
May import: its modules, which need the standard library only.
Read next: identity.py, then residual.py, saturation.py, running.py, batches.py; study/measure.py measures what these
predict.
"""

from normkit.theory.batches import (
    batch_mean_noise,
    batch_std_mean,
    batch_std_noise,
    largest_normalized_value,
)
from normkit.theory.identity import post_identity_weight, post_skip_weight, pre_identity_weight
from normkit.theory.residual import (
    last_layer_gradient_bound,
    post_gradient_growth,
    pre_gradient_growth,
    pre_norm_variance_bounds,
    stream_variances,
)
from normkit.theory.running import (
    running_noise,
    running_residual,
    updates_until,
)
from normkit.theory.saturation import preactivation_std, saturation_probability, saturation_threshold

__all__ = [
    "batch_mean_noise",
    "batch_std_mean",
    "batch_std_noise",
    "largest_normalized_value",
    "last_layer_gradient_bound",
    "post_gradient_growth",
    "post_identity_weight",
    "post_skip_weight",
    "pre_gradient_growth",
    "pre_identity_weight",
    "pre_norm_variance_bounds",
    "preactivation_std",
    "running_noise",
    "running_residual",
    "saturation_probability",
    "saturation_threshold",
    "stream_variances",
    "updates_until",
]
