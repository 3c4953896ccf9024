"""`normkit explain`: worked examples, step by step, with numbers that the library computes.

Here: `explain`, `TOPICS`, `LANGUAGES`.
May import: functional, theory, statistics.
Read next: steps.py, what is computed; texts.py, the sentences around it; show.py, how they are printed.
"""

from normkit.explain.steps import TOPICS, Step, explain
from normkit.explain.tables import Table, read_csv
from normkit.explain.texts import LANGUAGES, sentence

__all__ = ["LANGUAGES", "TOPICS", "Step", "Table", "explain", "read_csv", "sentence"]
