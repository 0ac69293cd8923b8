"""experiments.evaluate and experiments.generate on a tiny run, as a user starts them."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import lora_jax as lj
from configs.e2e import get_config
from lora_jax import checkpoints, training
from lora_jax.data import batches, e2e, pairs, text
from lora_jax.data.tasks import named
from lora_jax.generation import complete
from lora_jax.interop import hf
from lora_jax.metrics import bleu, java
from lora_jax.models import gpt2
from lora_jax.runs import bases, evaluation
from lora_jax.runs.evaluation import answer, completed, json_lines
from lora_jax.runs.reload import load
from tests.helpers.cli import run_entry
from tests.helpers.locks import held_elsewhere

ROOT = Path(__file__).resolve().parents[2]
PAIRS = """name : X | area : riverside||X is by the river .
name : X | area : riverside||By the river there is X .
name : Y | food : French||Y serves French food .
name : Z||There is a place called Z .
"""

GREEDY = ("--num_beams=1", "--no_repeat_ngram_size=0")


class State(NamedTuple):
    step: Any
    delta: Any


class Made(NamedTuple):
    workdir: Path
    model: gpt2.GPT2
    adapted: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A base with a tokenizer of its own, data, and the workdir of a run with a scanned model."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "test.txt").write_text(PAIRS)
    tokenizer = text.train_tokenizer([folder / "test.txt"], 300)
    shape = gpt2.GPT2Config(300, n_positions=100, n_embd=16, n_layer=2, n_head=2, eos_token_id=0)
    params = jax.jit(gpt2.GPT2(shape).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, params)
    hf.save(folder / "base", gpt2.GPT2(shape), params, tokenizer)

    config = get_config("small")
    config.base, config.data.path, config.model.scan_layers = str(folder / "base"), str(folder), True
    model, params, _ = hf.load(config.base)
    identity = checkpoints.identity(params, config.base)
    params = gpt2.to_scanned(params)
    method = lj.lora(lj.select("h/attn/{query,value}/kernel", axes=dict(gpt2.AXES)), rank=2, alpha=8)
    delta = jax.tree.map(lambda x: x + 0.1, method.init(jax.random.key(1), params))
    training.claim(folder / "workdir", config)
    manager = checkpoints.manager(folder / "workdir")
    checkpoints.save(manager, 7, State(np.int32(7), delta), spec=method.spec, base=identity, position=(0, 7))
    manager.wait_until_finished()
    manager.close()
    model = gpt2.GPT2(gpt2.GPT2Config(**{**vars(model.config), "scan_layers": True}))
    return Made(folder / "workdir", model, method.apply(params, delta), tokenizer)


def start(app: str, *flags: str, typed: str = "") -> subprocess.CompletedProcess:
    return run_entry(app, *flags, stdin=typed)


def texts(run: Made, params: Any, contexts: list[str], **how: Any) -> list[str]:
    prompts = pairs.prompts(contexts, run.tokenizer, eos=0)
    options: dict[str, Any] = {"max_new_tokens": 20, "eos": 0, "progress": False} | how
    return complete(run.model, params, run.tokenizer, prompts, **options)


@pytest.mark.parametrize("by", ["a call", pytest.param("the command", marks=pytest.mark.slow)])  # METEOR takes long
def test_evaluate(run: Made, by: str, request: pytest.FixtureRequest) -> None:
    shown = ""
    if by == "a call":
        request.getfixturevalue("no_java")
        evaluation.evaluate(run.workdir, limit=2, decoding={"max_new_tokens": 20})
    else:
        done = start("evaluate", f"--workdir={run.workdir}", "--limit=2", "--max_new_tokens=20")
        assert done.returncode == 0, done.stderr
        shown = done.stdout
    folder = run.workdir / "evaluation/test-adapted-first2"
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    result = json.loads((folder / "evaluate.json").read_text())
    assert [row["context"] for row in rows] == ["name : X | area : riverside", "name : Y | food : French"]
    assert [len(row["references"]) for row in rows] == [2, 1]
    predictions = [row["prediction"] for row in rows]
    beams = {
        "num_beams": 10,
        "length_penalty": 0.9,
        "no_repeat_ngram_size": 4,
        "beam_rule": "lora_paper",
    }  # the config's
    assert predictions == texts(run, run.adapted, [row["context"] for row in rows], **beams)
    scores = result["scores"]["all"]
    assert scores["bleu"]["score"] == pytest.approx(bleu(predictions, [row["references"] for row in rows]))
    assert scores["bleu"]["low"] <= scores["bleu"]["score"] <= scores["bleu"]["high"]
    assert {"nist"} <= set(scores) <= {"bleu", "nist", "meteor", "rouge_l", "cider"}
    assert (result["step"], result["contexts"], result["references"]) == (7, 2, 3)

    data = e2e.load(run.workdir.parent, "test").select(range(3))
    encoded = pairs.encode(data, run.tokenizer, eos=0, length=100)
    schedule = batches.bucketed(encoded, 4, buckets=1)
    expected = training.validate(training.language_model(run.model), lj.merge(run.adapted), schedule)["validation_loss"]
    np.testing.assert_allclose(result["loss"], expected, rtol=1e-5)
    if shown:
        assert f"{scores['bleu']['score']:.4f}" in shown and f"{result['loss']:.4f}" in shown


def test_generate(run: Made, tmp_path: Path) -> None:
    (tmp_path / "contexts.txt").write_text("name : Y | food : French\n\nname : Q\n")
    out = tmp_path / "out" / "texts.jsonl"
    flags = [f"--workdir={run.workdir}", "--params=merged", "--max_new_tokens=20", *GREEDY]
    done = start("generate", *flags, "--context=name : Z", f"--file={tmp_path}/contexts.txt", f"--out={out}")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    contexts = ["name : Z", "name : Y | food : French", "name : Q"]
    assert [row["context"] for row in rows] == contexts
    assert [row["prediction"] for row in rows] == texts(run, lj.merge(run.adapted), contexts)


@pytest.mark.slow
def test_a_killed_run_goes_on_at_the_next_batch(run: Made, tmp_path: Path) -> None:
    """What it left is taken over as it is, but for a line that was cut off; other settings are refused."""
    contexts = ["name : Y", "name : Q", "name : Z"]
    (tmp_path / "contexts.txt").write_text("\n".join(contexts))
    out = tmp_path / "texts.jsonl"
    flags = [f"--workdir={run.workdir}", "--max_new_tokens=20", *GREEDY, "--batch_size=1"]
    flags += [f"--file={tmp_path}/contexts.txt", f"--out={out}"]
    (tmp_path / "texts.jsonl.part").write_text("another run\n")
    refused = start("generate", *flags)
    assert refused.returncode == 1 and "was begun with other contexts or settings" in refused.stderr
    (tmp_path / "texts.jsonl.part").unlink()
    assert start("generate", *flags).returncode == 0
    predictions = [json.loads(line)["prediction"] for line in out.read_text().splitlines()]
    assert predictions == texts(run, run.adapted, contexts)
    assert not (tmp_path / "texts.jsonl.part").exists()

    settings = {"max_new_tokens": 20, "num_beams": 1, "length_penalty": 0.9, "no_repeat_ngram_size": 0}
    settings |= {"beam_rule": "lora_paper", "seed": 0, "batch_size": 1, "params": "adapted", "step": 7}
    settings |= {"workdir": str(run.workdir.resolve()), "base": checkpoints.meta_of(run.workdir)["base"]}
    left = [settings | {"contexts": contexts}, [1, "left by the killed run \x85 \u2028 here"]]
    part = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in left) + '[2, "cut o'
    (tmp_path / "texts.jsonl.part").write_text(part)
    done = start("generate", *flags)
    assert done.returncode == 0, done.stderr
    again = [json.loads(line)["prediction"] for line in out.read_text().split("\n")[:-1]]
    assert again == [predictions[0], left[1][1], predictions[2]]


def test_a_file_cut_off_anywhere_is_gone_on_with(tmp_path: Path) -> None:
    """At every byte, within characters too."""
    file = tmp_path / "texts.part"
    assert completed(file, {"step": 1}) == {}
    head = file.read_bytes()
    lines = [json.dumps([row, text], ensure_ascii=False) + "\n" for row, text in enumerate(["café £5", "é\u2028"])]
    content = head + "".join(lines).encode()
    for end in range(len(head), len(content) + 1):
        file.write_bytes(content[:end])
        rows = completed(file, {"step": 1})
        count = content[len(head) : end].count(b"\n")
        assert rows == dict(list(enumerate(["café £5", "é\u2028"]))[:count])
        assert file.read_bytes() == head + "".join(lines[:count]).encode()
    with pytest.raises(ValueError, match="other contexts or settings"):
        completed(file, {"step": 2})


def test_scores_of_seen_and_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: str) -> str:
        raise ImportError

    monkeypatch.setattr(java, "jar", absent)  # METEOR, which takes long to start, is left out
    rows = [
        {"context": "a", "prediction": "A b-c .", "references": ["a b - c ."], "seen": True},
        {"context": "b", "prediction": "x y z w", "references": ["q", "x y z W"], "seen": False},
        {"context": "c", "prediction": "nothing of it here", "references": ["x y z w"], "seen": False},
    ]
    scores = evaluation.scores(rows, named("webnlg"))
    assert list(scores) == ["all", "seen", "unseen"]
    assert scores["seen"]["bleu"]["score"] == pytest.approx(100)
    half = scores["unseen"]["bleu"]["score"]
    assert 0 < half < scores["all"]["bleu"]["score"] < 100
    assert list(evaluation.scores([{**row, "seen": True} for row in rows], named("webnlg"))) == ["all", "seen"]


@pytest.mark.slow
def test_compare(run: Made, tmp_path: Path) -> None:
    references = [["the cat sat on the mat"], ["a dog barked at the moon"]]
    for name, predictions in (("good", ["the cat sat on the mat", "a dog barked"]), ("bad", ["cat", "dog"])):
        folder = tmp_path / name / "evaluation/test-adapted"
        folder.mkdir(parents=True)
        rows = [
            {"context": str(i), "prediction": p, "references": r}
            for i, (p, r) in enumerate(zip(predictions, references, strict=True))
        ]
        (folder / "predictions.jsonl").write_bytes(json_lines(rows))
        shutil.copy(run.workdir / "config.json", tmp_path / name)
    done = start("compare", f"--runs={tmp_path}/good,{tmp_path}/bad")
    assert done.returncode == 0, done.stderr
    expected = bleu(["the cat sat on the mat", "a dog barked"], references) - bleu(["cat", "dog"], references)
    assert f"bleu      {expected:+.4f}" in done.stdout
    missing = start("compare", f"--runs={tmp_path}/good,{tmp_path}/none")
    assert missing.returncode == 1 and "experiments.evaluate writes it" in missing.stderr


def test_dialogue(run: Made, tmp_path: Path) -> None:
    """Adapters and strengths change between the turns; bad lines get help, and the dialogue goes on."""
    identity = checkpoints.meta_of(run.workdir)["base"]
    loaded = checkpoints.load(run.workdir)
    other = jax.tree.map(lambda x: 20 * x, loaded.delta)
    checkpoints.save_adapter(tmp_path / "other.safetensors", loaded.method, other, identity)
    typed = [
        "name : Y | food : French",
        ":strength 0",
        "name : Y | food : French",
        ":adapter other",
        ":strength 1",
        "name : Y | food : French",
        ":adapter none",
        ":quit",
    ]
    flags = [f"--workdir={run.workdir}", "--interactive", f"--adapter=other:{tmp_path}/other.safetensors"]
    done = start("generate", *flags, "--max_new_tokens=20", *GREEDY, typed="\n".join(typed))
    assert done.returncode == 0, done.stderr
    base = gpt2.to_scanned(hf.load(run.workdir.parent / "base")[1])
    trees = [run.adapted, base, loaded.method.apply(base, other)]
    expected = [texts(run, params, ["name : Y | food : French"])[0] for params in trees]
    assert len(set(expected)) == 3
    places = [done.stdout.find(text) for text in expected]
    assert -1 not in places and places == sorted(places)
    assert "no adapter 'none': there are run, other\n" in done.stdout


def test_contexts_that_are_no_unicode_are_an_error_before_anything_is_written(run: Made, tmp_path: Path) -> None:
    loaded = load(run.workdir)
    kept = tmp_path / "texts.part"
    with pytest.raises(ValueError, match=r"context 1 .*'\\udc80', half of a surrogate pair, at character 2"):
        evaluation.complete(loaded, ["name : Z", "a \udc80"], kept=kept)
    assert not kept.exists() and evaluation.complete(loaded, []) == []
    base, trained = bases.load(loaded.config), checkpoints.load(run.workdir)
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        answer(base, trained.method, trained.delta, 1.0, "\ud83d", {"max_new_tokens": 1})
    with pytest.raises(ValueError, match="no contexts to complete: split='test', limit=0"):
        evaluation.evaluate(loaded._replace(workdir=tmp_path), limit=0)
    assert not list(tmp_path.iterdir())


def test_one_process_evaluates_at_a_time(run: Made, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation" / "test-adapted-first1"
    folder.mkdir(parents=True)
    with held_elsewhere(folder), pytest.raises(ValueError, match="is being written by another process: wait"):
        evaluation.evaluate(load(run.workdir)._replace(workdir=tmp_path), limit=1)
    assert [file.name for file in folder.iterdir()] == [".lock"]


def test_switching_compiles_nothing(run: Made) -> None:
    loaded = checkpoints.load(run.workdir)
    base = bases.load(ConfigDict(loaded.config))
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3, "beam_rule": "lora_paper"}
    deltas = [jax.tree.map(lambda x, by=by: by * x, loaded.delta) for by in (1, 20)]
    answer(base, loaded.method, deltas[0], 1.0, "name : Y | food : French", options)
    compiled: list[str] = []

    def listen(name: str, _: float, **__: Any) -> None:
        compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        answers = {
            answer(base, loaded.method, delta, strength, "name : Y | food : French", options)
            for delta in deltas
            for strength in (0.0, 0.3, 1.0)
        }
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert "/jax/core/compile/backend_compile_duration" not in compiled
    assert len(answers) > 2


def test_another_base_is_refused(run: Made, tmp_path: Path) -> None:
    model, params, tokenizer = hf.load(run.workdir.parent / "base")
    params["wte"]["embedding"] = params["wte"]["embedding"].at[3, 3].add(1)
    hf.save(tmp_path, model, params, tokenizer)
    done = start("generate", f"--workdir={run.workdir}", f"--base={tmp_path}", "--context=x")
    assert done.returncode == 1
    assert "belongs to the base" in done.stderr and "other weights" in done.stderr
