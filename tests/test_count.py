"""What trains in every row of the paper's Tables 2, 3, 4 and 15, from shapes alone: against formulas written out here,
and against the paper's figures."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from configs import e2e, glue, gpt3
from configs.paper_rows import ROWS, agrees
from experiments import count
from lora_jax.runs import shapes
from tests.helpers.cli import run_entry

ROOT = Path(__file__).resolve().parents[1]


def layer(d: int) -> int:
    """The parameters of a Transformer's layer: four d x d matrices, two of d x 4d, their biases, two LayerNorms."""
    return 12 * d * d + 13 * d


def gpt(d: int, layers: int, positions: int = 1024) -> int:
    return 50257 * d + positions * d + layers * layer(d) + 2 * d


def roberta(d: int, layers: int) -> int:
    """Without pooler and head; one token type, a LayerNorm of the embeddings."""
    return (50265 + 514 + 1) * d + 2 * d + layers * layer(d)


def biases(d: int, layers: int) -> int:
    """3d of q, k, v, d of the output, 4d + d of the MLP, 2d of LayerNorms, and one LayerNorm's outside the layers."""
    return layers * 11 * d + d


def adapters(n: int, d: int, r: int, norms: int = 0) -> int:
    return n * (2 * d * r + r + d) + 2 * norms * d


def lora(layers: int, d: int, ranks: int) -> int:
    """Of square matrices whose ranks in a layer sum up to `ranks`."""
    return 2 * layers * d * ranks


G, L = 12288, 96  # GPT-3's width and layers

# By table, in its order: (printed figure, number by hand, whether they agree to the printed digits).
EXPECTED = {
    2: [
        ("125.0M", roberta(768, 12), False),
        ("0.1M", biases(768, 12), True),
        ("0.3M", adapters(12, 768, 16), True),
        ("0.9M", adapters(12, 768, 48), True),
        ("0.3M", lora(12, 768, 8 + 8), True),
        ("355.0M", roberta(1024, 24), False),
        ("0.8M", lora(24, 1024, 8 + 8), True),
        ("3.0M", adapters(24, 1024, 64), False),
        ("0.8M", adapters(24, 1024, 16), True),
        ("6.0M", adapters(48, 1024, 64), False),
        ("0.8M", adapters(48, 1024, 8), True),
        ("0.8M", lora(24, 1024, 8 + 8), True),
        ("1500.0M", None, False),
        ("4.7M", lora(48, 1536, 16 + 16), True),
    ],
    3: [
        ("354.92M", gpt(1024, 24), False),
        ("0.37M", adapters(24, 1024, 6, norms=24), True),
        ("11.09M", adapters(24, 1024, 224, norms=24), True),
        ("11.09M", adapters(48, 1024, 112), False),
        ("25.19M", 2 * layer(1024), True),
        ("0.35M", 24 * 1024 * 14, False),
        ("0.35M", lora(24, 1024, 4 + 4), False),
        ("774.03M", gpt(1280, 36), True),
        ("0.88M", adapters(36, 1280, 8, norms=36), True),
        ("23.00M", adapters(36, 1280, 248, norms=36), True),
        ("0.77M", 36 * 1280 * 16, False),
        ("0.77M", lora(36, 1280, 4 + 4), False),
    ],
    4: [
        ("175,255.8M", gpt(G, L, 2048), False),
        ("14.2M", biases(G, L), False),
        ("3.2M", G * (256 + 8), True),
        ("20.2M", L * G * (8 + 8), False),
        ("7.1M", adapters(2 * L, G, 1), True),
        ("40.1M", adapters(2 * L, G, 8), True),
        ("4.7M", lora(L, G, 2), True),
        ("37.7M", lora(L, G, 4 * 4), True),
    ],
    15: [
        ("175B", gpt(G, L, 2048), True),
        ("0.4M", G * (32 + 8), False),
        ("0.9M", G * (64 + 8), True),
        ("1.7M", G * (128 + 8), True),
        ("3.2M", G * (256 + 8), True),
        ("6.4M", G * (512 + 8), True),
        ("5.1M", L * G * (2 + 2), False),
        ("10.1M", L * G * (8 + 0), False),
        ("20.2M", L * G * (8 + 8), False),
        ("44.1M", L * G * (32 + 4), False),
        ("76.1M", L * G * (64 + 0), False),
        ("7.1M", adapters(2 * L, G, 1), True),
        ("21.2M", adapters(2 * L, G, 4), True),
        ("40.1M", adapters(2 * L, G, 8), True),
        ("77.9M", adapters(2 * L, G, 16), True),
        ("304.4M", adapters(2 * L, G, 64), True),
        ("4.7M", lora(L, G, 2), True),
        ("4.7M", lora(L, G, 1 + 1), True),
        ("9.4M", lora(L, G, 2 + 2), True),
        ("18.8M", lora(L, G, 4 + 4), False),
        ("37.7M", lora(L, G, 8 + 8), True),
        ("301.9M", lora(L, G, 64 + 64), False),
        ("9.4M", lora(L, G, 4 * 1), True),
        ("18.8M", lora(L, G, 4 * 2), False),
        ("37.7M", lora(L, G, 4 * 4), True),
        ("603.8M", lora(L, G, 4 * 64), False),
        ("37.8M", lora(L, G, 8 + 8) + G * (8 + 4), False),
        ("151.1M", lora(L, G, 32 + 32) + G * (8 + 4), True),
        ("302.1M", lora(L, G, 64 + 64) + G * (8 + 4), True),
        ("52.8M", lora(L, G, 8 + 8) + L * G * (8 + 4), False),
    ],
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [count.paper_row(row) for row in ROWS]


@pytest.mark.parametrize("table", EXPECTED)
def test_every_row_of_the_paper(rows: list[dict[str, Any]], table: int) -> None:
    figures = [
        (row["printed"], row["trained"], row["verdict"].startswith("equal")) for row in rows if row["table"] == table
    ]
    assert figures == EXPECTED[table]


def test_what_is_not_the_papers_figure_is_said(rows: list[dict[str, Any]]) -> None:
    kinds = {"nominal": set(), "truncated": set(), "differs": set(), "equal": set()}
    for row in rows:
        kinds[re.match(r"\w+", row["verdict"])[0]].add((row["table"], row["printed"]))
    assert kinds["nominal"] == {(2, "125.0M"), (2, "355.0M"), (2, "1500.0M"), (3, "0.35M"), (3, "0.77M")}
    assert kinds["truncated"] == {(15, "0.4M"), (15, "18.8M"), (15, "301.9M"), (15, "37.8M")}
    layered = {(15, f"{figure}M") for figure in (5.1, 10.1, 20.2, 44.1, 76.1, 52.8)}
    others = {(2, "3.0M"), (2, "6.0M"), (3, "354.92M"), (3, "11.09M"), (4, "175,255.8M"), (4, "14.2M"), (4, "20.2M")}
    assert kinds["differs"] == layered | others | {(15, "603.8M")}


def test_the_truncated_figures_are_truncated(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["verdict"].startswith("truncated"):
            assert f"{row['trained'] // 100_000 / 10}M" == row["printed"], row


def test_the_numbers_in_the_notes(rows: list[dict[str, Any]]) -> None:
    numbers = {int(n.replace(",", "")) for row in rows for n in re.findall(r"\d+(?:,\d{3}){2,}", row["verdict"])}
    pooler = lambda d: d * d + d  # noqa: E731
    untied = gpt(G, L, 2048) + 50257 * G
    models = {roberta(768, 12) + pooler(768), roberta(1024, 24) + pooler(1024), untied}
    assert numbers == models | {lora(48, 1536, 8 + 8), lora(L, G, 8 + 8)}
    assert round(175_255.8 - untied / 1e6, 1) == 34.0 and round(L * 12 * G / 1e6, 1) == 14.2
    assert [round(24 * 1024 * n / 1e6, 2) for n in (14, 15)] == [0.34, 0.37]
    assert [round(36 * 1280 * n / 1e6, 2) for n in (16, 17)] == [0.74, 0.78]
    assert not any(agrees(adapters(48, 1024, r), "11.09M") for r in range(1, 1024))
    assert 2 * 301.9 == 603.8


def test_a_row_that_differs_needs_a_note() -> None:
    row = next(row for row in ROWS if row.config == "configs/e2e.py:medium")
    with pytest.raises(ValueError, match=r"Table 3, GPT-2 M, LoRA: 393,216 is not 0\.35M"):
        count.paper_row(row._replace(note=""))
    assert count.paper_row(row._replace(printed="0.39M", note=""))["verdict"] == "equal"


def test_the_kept_rows_are_these(rows: list[dict[str, Any]]) -> None:
    assert json.loads((ROOT / "docs/results/count.json").read_text())["rows"] == rows


def test_the_hyperparameters_of_table_12() -> None:
    named = {row.config.partition(":")[2] for row in ROWS if row.config and "gpt3" in row.config}
    assert named == set(gpt3.variants())
    rates = {"full": 5e-6, "bitfit": 1.6e-3, "prefix_embedding_64_8": 5e-4, "prefix_layer_8_0": 1e-4}
    rates |= {"adapter_h_r4": 1e-4, "lora_v_r2": 2e-4, "lora_qkvo_r64": 2e-4, "lora_pe_r8": 2e-4, "lora_pl_r8": 2e-4}
    for name, rate in rates.items():
        config = gpt3.get_config(name)
        assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (rate, 0.1), name
        assert (config.data.batch_size, config.data.length, config.epochs) == (128, 384, 2)
        assert config.optimizer.schedule == "linear"
    assert (config.optimizer.warmup_steps - 1) * 128 * 384 < 250_000 <= config.optimizer.warmup_steps * 128 * 384
    with pytest.raises(ValueError, match=r"no config 'lora_q_r8': give one of full, bitfit, prefix_embedding_32_8"):
        gpt3.get_config("lora_q_r8")


def test_a_base_by_its_config_json_alone(tmp_path: Path) -> None:
    config = e2e.get_config("small,full")
    config.base = str(tmp_path)
    fields = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 64, "n_layer": 3, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert shapes.count(config).report.trained == gpt(64, 3)
    config.method = "none"
    assert shapes.count(config).report == ([], 0, gpt(64, 3))
    with pytest.raises(ValueError, match="is a gpt2, but mrpc needs a model that classifies"):
        glued = glue.get_config("base,mrpc")
        glued.base = config.base
        shapes.count(glued)


def test_a_bert_has_its_head_apart(tmp_path: Path) -> None:
    fields = {"model_type": "bert", "vocab_size": 90, "hidden_size": 64, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 2, "intermediate_size": 256, "max_position_embeddings": 50}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for name, outputs in (("base,mnli,full", 3), ("base,stsb,full", 1)):
        config = glue.get_config(name)
        config.base = str(tmp_path)
        report, head = shapes.count(config)
        pooler = 64 * 64 + 64
        assert head == outputs * (64 + 1)
        assert report.trained == report.total == (90 + 50 + 2) * 64 + 2 * 64 + 2 * layer(64) + pooler


def test_what_has_no_known_shape() -> None:
    config = e2e.get_config("small")
    config.base = "no-such-base"
    with pytest.raises(ValueError, match=r"'no-such-base' is not known: give a folder .* or one of gpt2, gpt2-medium"):
        shapes.count(config)


def test_the_command_line() -> None:
    shown = run_entry("count", "--config=configs/glue.py:base,mrpc", "--config.lora.rank=4")
    assert shown.returncode == 0, shown.stderr
    *table, total, head = shown.stdout.splitlines()
    assert total == "trained: 147,456 of 124,055,040 parameters (0.1189%)"
    assert head == "head (classifier/**), which the paper does not count: 592,130 more"
    assert len(table) == 1 + 24 and not any("classifier" in line for line in table)
    wrong = run_entry("count", "--config=configs/e2e.py:small", "--all")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: give --config=FILE.py:NAME to count one config, or --all")


def test_the_table_of_all_rows(rows: list[dict[str, Any]]) -> None:
    header, *lines = count.table(rows).splitlines()
    assert len(lines) == len(rows) == 64
    assert header.split() == ["table", "row", "config", "trained", "paper", "verdict"]
    verdict = header.index("verdict")
    for line, row in zip(lines, rows, strict=True):
        number = "-" if row["trained"] is None else f"{row['trained']:,}"
        assert line[:verdict].split()[-2:] == [number, row["printed"]]
        assert line[verdict:] == row["verdict"]
        assert line[:verdict].endswith(f"{row['printed']}  ")
