"""The comparison of methods: sized to LoRA, its rate chosen, resumable, a row for each."""

import json
import subprocess
from pathlib import Path

import pytest

from lora_jax import training
from tests.helpers.cli import make_inputs, run_entry


def study(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    paths = [f"--workdir={folder}/study", f"--base={folder}/base", f"--data={folder}/data", f"--out={folder}/rows.json"]
    return run_entry("study", "--task=e2e", "--steps=3", "--search_steps=2", *paths, *flags, timeout=600)


@pytest.mark.slow
def test_a_method_is_sized_its_rate_chosen_and_its_run_gone_on_with(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    done = study(tmp_path, "--methods=adapter_p,bitfit")
    assert done.returncode == 0, done.stderr
    rows = {row["label"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    # LoRA's rank 4 has 2 layers x 2 matrices x 4 x (16 + 16) = 512; an adapter 2 (33 r + 16), 2 x 2 (16 + 16) at r = 1
    sizes = {rank: 2 * (33 * rank + 16) for rank in range(1, 16)}
    size = rows["adapter_p"]["size"]
    assert rows["adapter_p"]["trained"] == sizes[size] and abs(sizes[size] - 512) == min(
        abs(count - 512) for count in sizes.values()
    )
    for name, seeds in (("adapter_p", 1), ("bitfit", 3)):
        folder, row = tmp_path / "study" / "e2e" / name, rows[name]
        metrics = {run.name: training.read_metrics(run) for run in folder.iterdir()}
        at = {
            run: {entry["step"]: entry["validation_loss"] for entry in entries if "validation_loss" in entry}
            for run, entries in metrics.items()
        }
        rates = {run: losses for run, losses in at.items() if run.startswith("rate_")}
        best = min(rates, key=lambda run: rates[run][2])
        assert len(rates) == 3 and best == f"rate_{row['rate']:g}"
        assert [run for run, losses in rates.items() if 3 in losses] == [best]  # it alone went on
        last = sorted(losses[3] for losses in at.values() if 3 in losses)
        assert len(last) == len(row["seed"]) == seeds
        assert row["validation_loss"] == {"score": last[seeds // 2], "low": last[0], "high": last[-1]}
        assert 0 <= row["bleu"]["score"] <= 100
    assert (tmp_path / "rows.png").stat().st_size > 1000
    # again: nothing trains, the other method's row stays
    again = study(tmp_path, "--methods=adapter_p")
    assert again.returncode == 0 and "step/s" not in again.stderr, again.stderr
    assert {row["label"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]} == rows


def test_an_unknown_method_is_said(tmp_path: Path) -> None:
    failed = study(tmp_path, "--methods=lora,top3")
    assert failed.returncode == 1 and "--methods=top3: it is one of lora, lora_all" in failed.stderr
