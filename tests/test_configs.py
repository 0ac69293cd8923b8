"""The configs: every row of the paper's tables by name, its hyperparameters and what it trains."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from configs import dart, e2e, nlg, webnlg
from lora_jax.data import text
from lora_jax.interop import hf
from lora_jax.models import gpt2
from lora_jax.runs import methods, run
from tests.helpers import shapes

CONFIGS = {"e2e": e2e, "webnlg": webnlg, "dart": dart}


MODELS = {size: gpt2.GPT2(gpt2.SIZES[size]) for size in nlg.SIZES}


def trained(config: Any, size: str) -> int:
    return report_of(json.dumps(methods.spec(config, MODELS[size])), size).trained


@functools.cache
def report_of(spec: str, size: str) -> lj.Report:
    return lj.check(lj.from_spec(json.loads(spec)), shapes.params_of(MODELS[size]))


@pytest.mark.parametrize("task", CONFIGS)
@pytest.mark.parametrize(
    ("name", "size", "numbers"),
    [
        ("medium", "medium", 2 * 48 * 1024 * 4),  # "0.35M"
        ("medium,lora", "medium", 393_216),
        ("medium,full", "medium", 354_823_168),  # "354.92M"
        ("medium,top2", "medium", 2 * (12 * 1024**2 + 13 * 1024)),  # 25.19M; "24M" in Tables 13 and 14
        ("large", "large", 2 * 72 * 1280 * 4),  # "0.77M"
        ("large,full", "large", 774_030_080),
        ("medium,lora_all", "medium", 24 * 4 * (4 * 2 * 1024 + 2 * 5 * 1024)),
    ],
)
def test_the_rows_of_tables_3_13_and_14(task: str, name: str, size: str, numbers: int) -> None:
    config = CONFIGS[task].get_config(name)
    assert trained(config, size) == numbers
    assert (config.data.name, config.base) == (task, {"medium": "gpt2-medium", "large": "gpt2-large"}[size])


def test_the_top_two_layers_are_the_last() -> None:
    report = report_of(json.dumps(methods.spec(e2e.get_config("medium,top2"), MODELS["medium"])), "medium")
    assert {row.path.split("/")[0] for row in report.rows} == {"h_22", "h_23"}
    assert trained(e2e.get_config("small,top2"), "small") == 2 * (12 * 768**2 + 13 * 768)


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
def test_the_ranks_of_table_18(rank: int) -> None:
    config = e2e.get_config(f"medium,lora_r{rank}")
    assert trained(config, "medium") == 2 * 48 * 1024 * rank
    assert (config.steps, config.lora.alpha, config.optimizer.learning_rate) == (26_000, 32, 2e-4)


@pytest.mark.parametrize(
    ("task", "weight_decay", "dropout", "smoothing", "penalty"),
    [("e2e", 0.01, 0.1, 0.1, 0.9), ("webnlg", 0.01, 0.1, 0.1, 0.8), ("dart", 0.0, 0.0, 0.0, 0.8)],
)
@pytest.mark.parametrize("name", ["medium", "large", "medium,full", "medium,top2", "medium,frozen"])
def test_the_hyperparameters_of_table_11(
    task: str, weight_decay: float, dropout: float, smoothing: float, penalty: float, name: str
) -> None:
    config = CONFIGS[task].get_config(name)
    assert config.optimizer.weight_decay == weight_decay
    assert config.lora.dropout == dropout
    assert config.label_smoothing == smoothing
    assert config.decode.length_penalty == penalty
    # all three
    assert (config.data.batch_size, config.epochs, config.optimizer.warmup_steps) == (8, 5, 500)
    assert (config.lora.rank, config.lora.alpha, config.optimizer.schedule) == (4, 32, "linear")
    assert config.optimizer.learning_rate == (2e-4 if name in ("medium", "large", "medium,frozen") else 5e-5)
    assert (config.decode.num_beams, config.decode.no_repeat_ngram_size) == (10, 4)
    # of the authors' README
    assert (config.seed, config.data.length, config.decode.max_new_tokens) == (110, 512, 64)
    assert (config.optimizer.b1, config.optimizer.b2, config.optimizer.eps) == (0.9, 0.999, 1e-6)
    assert config.optimizer.clip_norm is None and tuple(config.optimizer.decay) == ("**",)


def test_no_such_name() -> None:
    for name in ("huge", "medium,lora_r3", "", "medium,full,lora"):
        with pytest.raises(ValueError, match=r"no config '.*': give one of small, medium, large, .* lora, lora_all"):
            e2e.get_config(name)
    with pytest.raises(ValueError, match="'medium,lora_r8'"):
        webnlg.get_config("medium,lora_r8")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "a.txt").write_text("A : is : B\nA is B .\n")
    tokenizer = text.train_tokenizer([folder / "a.txt"], 262)
    model = gpt2.GPT2(gpt2.GPT2Config(vocab_size=262, n_positions=64, n_embd=8, n_layer=1, n_head=1, eos_token_id=0))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    hf.save(folder / "base", model, params, tokenizer)
    return folder / "base"


def test_training_takes_the_task_of_the_config(base: Path, tmp_path: Path) -> None:
    triples = [{"subject": "A", "property": "Is", "object": "B"}]
    texts = [{"comment": "good", "lex": "A is B."}] * 3
    entry = {"category": "City", "modifiedtripleset": triples, "lexicalisations": texts}
    for name, number in (("train", 3), ("dev", 1)):
        entries = [{str(i + 1): entry} for i in range(number)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"entries": entries}))
    facts = [{"tripleset": [["A", "Is", str(i)]], "annotations": [{"text": "A."}] * 2} for i in range(20)]
    (tmp_path / "dart-v1.1.1-full-dev.json").write_text(json.dumps(facts))
    line = json.dumps({"dialogue": "A: Hi", "summary": "Hi."})
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(f"{line}\n" * 2)

    def rows(module: Any, name: str) -> tuple[int, int]:
        config = module.get_config("small")
        config.base, config.data.path, config.data.name = str(base), str(tmp_path), name
        schedules = run.load_setup(config).batches
        return tuple(sum(map(len, schedules[split].buckets)) for split in ("train", "valid"))

    assert rows(webnlg, "webnlg") == (9, 3)
    assert rows(dart, "dart_dev") == (36, 4)
    assert rows(e2e, "samsum") == (2, 2)
    with pytest.raises(FileNotFoundError, match=r"full-train\.json.*Yale-LILY/dart"):
        rows(dart, "dart")
    with pytest.raises(ValueError, match=r"no task 'x' \(data\.name\): one of e2e"):
        rows(e2e, "x")
