"""What a newcomer writes into a config or on a command line: refused before the base is read, in their terms."""

import itertools
import json
import traceback
from pathlib import Path
from typing import Any

import jax
import pytest
from matplotlib.figure import Figure

import lora_jax as lj
from lora_jax import runs, training
from lora_jax.interop import hf
from lora_jax.runs import bases, budget, reload
from lora_jax.runs.config import check
from lora_jax.runs.shapes import count
from tests.helpers import glue_inputs
from tests.helpers.cli import ROOT, run_entry
from tests.helpers.runs import config_of, schedule


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.select": ("**/querry/kernel",)}, "querry.* matches no parameter; the nearest paths are .*query/kernel"),
        ({"lora.rank": 17}, r"h_0/attn/query/kernel: rank=17 must be a whole number from 1 to min\(in, out\) = 16"),
        ({"optimizer.schedule": "linaer"}, "optimizer.schedule is 'linaer', not one of .*linear"),
        ({"metrics": ("acuracy",)}, "no metric 'acuracy' is registered"),
        ({"best": "bleu"}, "best='bleu' is no metric of validation: it has validation_loss"),
        ({"base": ""}, "the config names no base: a folder with config.json"),
        ({"sweep.rank": (2, 17)}, "rank=17 must be a whole number"),
    ],
)
def test_a_config_is_checked_before_the_base_is_read(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("the base is read")

    monkeypatch.setattr(hf, "read", read)
    config = config_of(inputs, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        (runs.sweep if "sweep.rank" in changes else runs.train)(config, tmp_path / "run")
    assert len("".join(traceback.format_exception(caught.value)).splitlines()) <= 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.dtype": "fp16"}, "^model.dtype='fp16': choose float32, bfloat16, float16$"),
        ({"decode.beam_rule": "paper"}, "^decode.beam_rule='paper': choose hf, lora_paper$"),
        ({"model.param_dtype": "half"}, "^model.param_dtype='half': choose"),
        (
            {"method": "lroa"},
            "no method 'lroa'. Did you mean 'lora'. It has .*dora.*vera; several .* Or 'none', or FILE",
        ),
        ({"method": "LoRA"}, "no method 'LoRA'. Did you mean 'lora'"),
        ({"lora.r": 8}, "lora has no option 'r': it is rank here"),
        ({"method": "lora+tuna"}, "no method 'tuna'. Did you mean 'tune'"),
    ],
)
def test_names_of_a_config_with_the_choices(changes: dict[str, Any], message: str) -> None:
    config = runs.default_config("generation")
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        check(config)


E2E = "--config=configs/e2e.py:small"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config is missing, for example --config=configs/e2e.py:medium --workdir=runs/e2e"),
        (
            ["--config=configs/e3e.py:small"],
            "--config: there is no file 'configs/e3e.py'; did you mean configs/e2e",
        ),
        (["--config", "nosuch/e2e.py"], "--config: there is no file 'nosuch/e2e.py'; for example --config=configs/e2e"),
        ([E2E, "--config.lora.r=8"], "the config has no key 'r'. It is lora.rank here.\n"),
        ([E2E, "--config.dora.r=8"], "the config has no key 'r'. It is dora.rank here.\n"),
        ([E2E, "--config.lora_alpha=8"], "the config has no key 'lora_alpha'. It is lora.alpha here.\n"),
        ([E2E, "--config.lr=1"], "the config has no key 'lr'. It is optimizer.learning_rate here.\n"),
        ([E2E, "--config.batch_size=8"], "the config has no key 'batch_size'. It is data.batch_size here.\n"),
        ([E2E, "--config.lora.target_modules=q"], "the config has no key 'target_modules'. It is lora.select, globs"),
        ([E2E, "--config.xyz=8"], "the config has no key 'xyz'. lora_jax/runs/config.py lists the keys.\n"),
    ],
)
def test_what_a_command_line_lacks_or_calls_otherwise(flags: list[str], message: str) -> None:
    done = run_entry("train", *flags, "--workdir=never")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1 and done.returncode == 1
    assert not (ROOT / "never").exists()


def test_the_matrices_among_what_a_config_selects(inputs: Path) -> None:
    config = config_of(inputs, **{"lora.select": ("**",), "lora.ndim": 2})
    assert config.dora.ndim is None
    trained = count(config).report.rows
    assert {len(row.shape) for row in trained} == {2} and "wte/embedding" in {row.path for row in trained}


def test_a_trained_head_is_not_told_as_a_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    glue_inputs.make_inputs(tmp_path, layers=1)
    config = runs.default_config("classification")
    config.base, config.data.path, config.data.name = str(tmp_path / "base"), str(tmp_path / "glue"), "cola"
    (tmp_path / "config.json").write_text(config.to_json())
    base, method = bases.load(config), lj.tune(lj.select("classifier/**"))
    assert "made new" in caplog.text
    delta = method.init(jax.random.key(0), base.params)
    monkeypatch.setattr(reload, "trained", lambda *_: (method, delta, 1, base.identity))
    for params, tells in (("adapted", False), ("base", True)):
        caplog.clear()
        assert repr(runs.load(tmp_path, params=params)).startswith(f"Loaded({tmp_path}, {params}, step ")
        assert ("made new" in caplog.text) == tells


def test_a_schedule_prints_briefly() -> None:
    assert repr(schedule()) == "Schedule(5 batches of 4, seed 0)"


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def test_the_losses_of_training_and_of_validation_have_an_axis_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "validation_loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    figures = drawn(monkeypatch)
    training.plot_loss(tmp_path)
    trained, validated = figures[0].axes
    assert trained.lines[0].get_ydata().tolist() == [3.0, 2.0] and "label smoothing" in trained.get_title()
    assert validated.lines[0].get_ydata().tolist() == [1.0] and "validation" in validated.get_title()


def test_no_name_of_a_method_lies_on_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method has a line of its own, however equal the figures."""
    rows = [
        {"label": f"lora_{n}", "trained": 24_576, "bleu": {"score": 1.0 + n % 2, "low": 0.5, "high": 3.0}}
        for n in range(20)
    ]
    figures = drawn(monkeypatch)
    budget.plot(rows, {"bleu": "BLEU"}, tmp_path / "study.png")
    (axes,) = figures[0].axes
    figures[0].draw_without_rendering()
    boxes = sorted((label.get_window_extent() for label in axes.get_yticklabels()), key=lambda box: box.y0)
    assert len(boxes) == 20 and all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))
    assert axes.get_yticklabels()[0].get_text() == "lora_0  (24,576)"
