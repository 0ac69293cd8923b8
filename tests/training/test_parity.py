"""experiments.parity on tiny models: training here and with PEFT gives the same losses and factors."""

import json
from pathlib import Path

import pytest

from tests.helpers import cli, glue_inputs

pytest.importorskip("torch")
pytest.importorskip("peft")


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("bert", marks=pytest.mark.slow)])
def test_losses_and_factors_agree_with_peft(kind: str, tmp_path: Path) -> None:
    """1e-4 of the losses and 1e-3 of the factors, as for the real models; float32 sums in another order."""
    if kind == "gpt2":
        cli.make_inputs(tmp_path)
        flags = ["--config=configs/e2e.py:small", f"--config.data.path={tmp_path}/data"]
        flags += ["--config.optimizer.warmup_steps=2"]
    else:
        glue_inputs.make_inputs(tmp_path)
        flags = ["--config=configs/glue.py:base,cola", f"--config.data.path={tmp_path}/glue"]
    flags += ["--steps=8", "--config.data.batch_size=4", "--config.data.buckets=1", f"--config.base={tmp_path}/base"]
    done = cli.run_entry("parity", f"--out={tmp_path}/parity.json", *flags)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "parity.json").read_text())["rows"]
    assert row["loss_difference"] < 1e-4 and row["factor_difference"] < 1e-3
    losses = row["losses"]["ours"]
    assert len(losses) == row["steps_compared"] == 8 and len(set(losses)) == 8
    assert row["timed_steps"] == 7 and row["ratio_median"] > 0
