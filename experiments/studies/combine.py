"""Does LoRA gain from prefixes beside it? (Hu et al. 2021, Appendix E, Table 15.)

    python -m experiments.study --config=configs/studies.py:combine --workdir=runs/studies --data=E2E \\
      --config.run.base=GPT2 --out=docs/results/study_combine.json

The paper (GPT-3, l_p = 8, l_i = 4): LoRA with trained embeddings of special tokens (PE) beats both on WikiSQL (75.0 to
76.2, LoRA 73.8) and not on MNLI; with trained hidden states of every layer (PL) it is a little worse than LoRA. Here:
E2E on a small GPT-2, each with its own rate.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from experiments.studies.rates import members as members
from experiments.studies.rates import plot as plot
from experiments.studies.reading import Row, best_rows
from experiments.studies.running import Run


def rows(config: ConfigDict, runs: Sequence[Run]) -> list[Row]:
    """A row for LoRA, each prefix, and both together, at its best rate."""
    return best_rows(runs)
