"""The parts of normkit.study.observe.

Here: restore.py (leave a model as it was), blocks.py (which modules are residual blocks), numbers.py (the formulas),
    calls.py (the hooks), records.py (what is kept of a call), reading.py (hooks' sums -> records).
May import: torch, layers, placement, functional, study.measure, study.models.
Read next: ../observe.py, which puts them together.
"""
