"""The tables of the documentation come from what runs leave."""

import json
from pathlib import Path

import pytest

from experiments.results import collect
from lora_jax.runs.tables import fill


def leave(workdir: Path, **summary: object) -> str:
    (workdir / "evaluation/test-merged").mkdir(parents=True)
    (workdir / "summary.json").write_text(json.dumps(summary))
    bleu = {"bleu": {"score": 41.237, "low": 40.1, "high": 42.3}}
    result = {"scores": {"all": bleu, "seen": bleu}, "contexts": 630, "skipped": 0, "decoding": {}, "missing": None}
    (workdir / "evaluation/test-merged/evaluate.json").write_text(json.dumps(result))
    return f"LoRA:{workdir}"


def test_tables_are_filled(tmp_path: Path) -> None:
    common = {"method": "lora", "seed": 1, "device": "1 x cpu", "validation_loss": 1.23456}
    lora = {"trained": 1024, "tokens_per_second": 9000, "command": "python train"}
    rows = [*collect(leave(tmp_path / "a", **common, **lora)), {"label": "frozen", "trained": 0, "bleu": 0.1}]
    (tmp_path / "e2e.json").write_text(json.dumps({"rows": rows}))
    text = "before\n<!-- results: e2e -->\nold\n<!-- end -->\nafter\n"
    filled = fill(text, tmp_path)
    assert "| LoRA | 1,024 | 1.2346 | 630 | 41.24 [40.10, 42.30] |" in filled
    assert "| LoRA, seen | - | - | - | 41.24 [40.10, 42.30] |" in filled
    assert "| frozen | 0 | - | - | 0.10 |" in filled and "old" not in filled
    assert "Seed 1; 1 x cpu:" in filled and "python train" in filled
    some = fill("<!-- results: e2e frozen -->\n<!-- end -->", tmp_path)
    assert some.startswith("<!-- results: e2e frozen -->\n") and "| frozen | 0 | 0.10 |" in some and "LoRA" not in some
    assert filled.startswith("before\n") and filled.endswith("<!-- end -->\nafter\n")
    assert fill(filled, tmp_path) == filled


def test_words_stand_on_the_left(tmp_path: Path) -> None:
    same = {"label": "M, LoRA", "table": 3, "config": "configs/e2e.py:medium", "trained": 393_216}
    rows = [same | {"printed": "0.35M", "verdict": "nominal"}, {"label": "XXL, FT", "table": 2, "printed": "1500.0M"}]
    (tmp_path / "count.json").write_text(json.dumps({"rows": rows}))
    header, sides, *filled = fill("<!-- results: count -->\n<!-- end -->", tmp_path).splitlines()[1:-1]
    assert header == "|  | table | config | trained parameters | the paper's figure |  |"
    assert sides == "| --- | ---: | --- | ---: | ---: | --- |"
    assert filled[0] == "| M, LoRA | 3 | `configs/e2e.py:medium` | 393,216 | 0.35M | nominal |"
    assert filled[1] == "| XXL, FT | 2 | - | - | 1500.0M | - |"


def test_missing_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.json does not exist, but a table"):
        fill("<!-- results: no -->\n<!-- end -->", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"summary\.json does not exist"):
        collect(f"x:{tmp_path}")
    with pytest.raises(ValueError, match="write LABEL:WORKDIR"):
        collect("runs")
