"""The studies beside `placement`: small experiments that each put one question about normalization to real data.

Here: STUDIES, by name.
May import: its modules.
Read next: protocol.py, what a study is; run.py, how its cells are run and kept; batch_size.py, one of them.
"""

from normkit.studies.batch_size import BATCH_SIZE
from normkit.studies.claims import CLAIMS
from normkit.studies.cost import COST
from normkit.studies.padding import PADDING
from normkit.studies.protocol import Study
from normkit.studies.running import RUNNING
from normkit.studies.saturation import SATURATION
from normkit.studies.warmup import WARMUP

STUDIES: dict[str, Study] = {
    study.name: study for study in (WARMUP, BATCH_SIZE, RUNNING, SATURATION, PADDING, COST, CLAIMS)
}

__all__ = ["STUDIES", "Study"]
