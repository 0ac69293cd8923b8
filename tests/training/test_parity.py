"""experiments.parity on tiny models: training here and with PEFT gives the same losses and factors."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from configs import e2e, glue
from experiments import parity, train
from tests.helpers import cli, glue_inputs

pytest.importorskip("torch")
pytest.importorskip("peft")


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("kind", ["gpt2", pytest.param("bert", marks=pytest.mark.slow)])
def test_losses_and_factors_agree_with_peft(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1e-4 of the losses and 1e-3 of the factors, as for the real models; float32 sums in another order."""
    if kind == "gpt2":
        cli.make_inputs(tmp_path)
        config = e2e.get_config("small")
        changes: dict[str, Any] = {"data.path": f"{tmp_path}/data", "optimizer.warmup_steps": 2}
    else:
        glue_inputs.make_inputs(tmp_path)
        config = glue.get_config("base,cola")
        changes = {"data.path": f"{tmp_path}/glue"}
    changes |= {"data.batch_size": 4, "data.buckets": 1, "base": f"{tmp_path}/base"}
    config.update_from_flattened_dict(changes)
    monkeypatch.setattr(train, "CONFIG", SimpleNamespace(value=config))
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(steps=8, out=f"{tmp_path}/parity.json"):
        parity.main()
    (row,) = json.loads((tmp_path / "parity.json").read_text())["rows"]
    assert row["loss_difference"] < 1e-4 and row["factor_difference"] < 1e-3
    losses = row["losses"]["ours"]
    assert len(losses) == row["steps_compared"] == 8 and len(set(losses)) == 8
    assert row["timed_steps"] == 7 and row["ratio_median"] > 0
