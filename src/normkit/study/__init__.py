"""The study: small language models trained with every norm in every placement, measured and recorded.

Here: data.py (bytes and batches), models.py (the transformer), grid.py (what to run), train.py (one cell),
measure.py (what is measured), records.py (what is kept), run.py (all cells), processes.py and cluster.py (where they
run), clock.py (time left), plan.py (one study), progress.py (what a terminal shows of it). And observe.py with
observation/: the same measurements on any model of one's own.
May import: layers, placement, theory.
Read next: train.py, one cell from start to record.
"""

from __future__ import annotations

from normkit.study.observe import Observation, observe

__all__ = ["Observation", "observe"]
