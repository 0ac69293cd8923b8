"""A run resumes, and an adapter is used, with the base and the data that it began with, wherever they are."""

import dataclasses
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tokenizers import AddedToken, Tokenizer

import lora_jax as lj
from lora_jax import checkpoints, runs, training
from lora_jax.data import batches, digest, text
from lora_jax.data.encoded import Encoded, Texts
from lora_jax.interop import hf
from lora_jax.models import encoder, gpt2
from lora_jax.models.family import function_fields
from lora_jax.runs import bases
from tests.helpers.runs import config_of, pairs, prepare, run_config, schedule
from tests.helpers.sweeps import members, ready

GPT2 = gpt2.GPT2Config(vocab_size=61, n_positions=32, n_embd=8, n_layer=1, n_head=2, eos_token_id=0)
BERT = encoder.EncoderConfig("bert", 61, 32, hidden=8, layers=1, heads=2, inner=16, pad_id=0)
# What else computes: a value that the config does not have.
CHANGES: list[tuple[Any, dict[str, Any]]] = [
    *((GPT2, change) for change in ({"n_head": 4}, {"layer_norm_epsilon": 1e-6}, {"activation": "relu"})),
    *((GPT2, change) for change in ({"eos_token_id": 7}, {"n_positions": 31}, {"tie": False})),
    *((BERT, change) for change in ({"heads": 4}, {"eps": 1e-12}, {"activation": "silu"}, {"pad_id": 2})),
    (BERT, {"family": "roberta"}),
]
SAME: list[tuple[Any, dict[str, Any]]] = [
    *((shape, {"dtype": "bfloat16", "param_dtype": "float16", "scan_layers": True}) for shape in (GPT2, BERT)),
    (GPT2, {"remat": True, "query_block": 16, "n_inner": 32}),
    (BERT, {"head": "classification", "labels": 5, "pooler": True, "dropout": 0.1, "attention_dropout": 0.1}),
]


def identity(shape: Any, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    config = function_fields(shape)
    return checkpoints.identity({"w": np.ones(3, np.float32)}, "base", config=config, tokenizer=tokenizer)


@pytest.mark.parametrize(("shape", "change"), CHANGES, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_another_field_that_computes_is_another_base(shape: Any, change: dict[str, Any]) -> None:
    one, other = identity(shape), identity(dataclasses.replace(shape, **change))
    ((name, value),) = change.items()
    message = rf"run belongs to the base 'base', whose config has {name} {getattr(shape, name)!r}, not {value!r}"
    with pytest.raises(ValueError, match=message):
        checkpoints.check_base(one, other, "run")


@pytest.mark.parametrize(("shape", "change"), SAME)
def test_how_it_is_computed_its_head_and_dropout_do_not_count(shape: Any, change: dict[str, Any]) -> None:
    assert identity(shape) == identity(dataclasses.replace(shape, **change))


def test_identities_of_other_versions_are_compared_in_what_both_have() -> None:
    now = identity(GPT2)
    old = {name: now[name] for name in ("source", "shapes", "content")}
    later = now | {"config": now["config"] | {"rotary": True}, "tokenizer": "ab12"}
    for one, other in ((old, now), (now, old), (now, later), (later, now)):
        checkpoints.check_base(one, other, "run")
    assert json.loads(json.dumps(now)) == now


def tokenizer_of(folder: Path) -> dict[str, Any]:
    (folder / "text.txt").write_text("the pub and the bar\n\nthe bar and the pub by the river " * 9)
    return json.loads(text.train_tokenizer([folder / "text.txt"], 270).to_str())


def swap_ids(fields: dict[str, Any]) -> None:
    vocab = fields["model"]["vocab"]
    one, other = list(vocab)[70:72]
    vocab[one], vocab[other] = vocab[other], vocab[one]


def swap_merges(fields: dict[str, Any]) -> None:
    fields["model"]["merges"][:2] = fields["model"]["merges"][1::-1]


def lower(fields: dict[str, Any]) -> None:
    fields["normalizer"] = {"type": "Lowercase"}


def space(fields: dict[str, Any]) -> None:
    fields["pre_tokenizer"]["add_prefix_space"] = True


def no_token(fields: dict[str, Any]) -> None:
    fields["added_tokens"][0]["special"] = False


@pytest.mark.parametrize("change", [swap_ids, swap_merges, lower, space, no_token])
def test_another_tokenizer_is_another_base(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    fields = tokenizer_of(tmp_path)
    first = identity(GPT2, Tokenizer.from_str(json.dumps(fields)))
    change(fields)
    with pytest.raises(ValueError, match=r"run belongs to the base 'base' \(tokenizer \w+\), but 'base' has another"):
        checkpoints.check_base(first, identity(GPT2, Tokenizer.from_str(json.dumps(fields))), "run")


def test_truncation_and_padding_are_no_part_of_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_of(tmp_path)))
    before = identity(GPT2, tokenizer)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(pad_id=3)
    assert identity(GPT2, tokenizer) == before
    tokenizer.save(str(tmp_path / "tokenizer.json"), pretty=True)
    assert identity(GPT2, Tokenizer.from_file(str(tmp_path / "tokenizer.json"))) == before
    tokenizer.add_special_tokens([AddedToken("<new>", special=True)])
    assert identity(GPT2, tokenizer) != before


def texts() -> Texts:
    offsets = np.array([0, 4, 9, 15], np.int64)
    return Texts(np.arange(15, dtype=np.int32), np.zeros(15, np.int32), offsets, np.array([1, 0, 1], np.int32))


def schedules(examples: Any, batch_size: int = 4, seed: int = 0) -> batches.Schedule:
    if isinstance(examples, np.ndarray):
        return batches.packed(examples, batch_size, 8, seed, eos=0)
    kind = batches.bucketed if isinstance(examples, Encoded) else batches.classified
    return kind(examples, batch_size, seed, buckets=2)


@pytest.mark.parametrize(
    "examples", [pairs(6), texts(), np.arange(40, dtype=np.int32)], ids=["pairs", "texts", "stream"]
)
def test_a_change_of_any_example_changes_the_digest(examples: Any) -> None:
    first, random = digest.digest(schedules(examples)), np.random.default_rng(0)
    assert first == digest.digest(schedules(examples, batch_size=2, seed=5))
    arrays = {"": examples} if isinstance(examples, np.ndarray) else vars(examples)
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or name == "offsets":  # other offsets are of other sizes
            continue
        for _ in range(5):
            changed = array.copy()
            changed[random.integers(len(array))] ^= 1
            other = dataclasses.replace(examples, **{name: changed}) if name else changed
            assert digest.digest(schedules(other))["content"] != first["content"], name


def test_a_mapped_stream_is_not_copied(tmp_path: Path) -> None:
    np.arange(4_000_000, dtype=np.int32).tofile(tmp_path / "tokens")
    stream = np.memmap(tmp_path / "tokens", np.int32, mode="r")
    tracemalloc.start()
    digest.digest_of(stream)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < stream.nbytes / 100


def saved(workdir: Path, config: ConfigDict, step: int = 5, **changes: Any) -> training.Job:
    """A workdir with a checkpoint, as of a stopped run."""
    job = prepare(workdir, config)
    with checkpoints.manager(workdir) as manager:
        options = {"spec": job.method.spec, "base": job.base, "data": job.data} | changes
        checkpoints.save(manager, step, job.state._replace(step=np.int32(step)), **options)
    return job


def changed(count: int, seed: int) -> batches.Schedule:
    """The schedule of the helpers, of which one token differs."""
    examples = pairs(count, seed)
    examples.tokens[7] ^= 1
    return batches.bucketed(examples, 4, seed, buckets=2)


def test_a_run_resumes_with_the_data_that_it_began_with(tmp_path: Path) -> None:
    config = run_config(**{"data": ConfigDict({"path": "here"})})
    job = saved(tmp_path, config)
    assert job.data["train"]["examples"] == 20 and job.data["validation"]["examples"] == 8
    config.data.path = "there"
    assert prepare(tmp_path, config).start == 5
    assert json.loads((tmp_path / "config.json").read_text())["data"]["path"] == "there"
    for part, other, message in (
        ("batches", changed(20, 0), r"other training data: it began with 20 examples \(\w+\), here are 20"),
        ("batches", schedule(19), r"other training data: it began with 20 examples \(\w+\), here are 19"),
        ("validation", changed(8, 1), r"other validation data: it began with 8"),
        ("initial", {"a": {"b": np.ones(2)}}, r"began from another adapter \(warm_start\)"),
    ):
        with pytest.raises(ValueError, match=message):
            then = job.data | {"initial": {"content": "0"}}
            training.check_resumed(tmp_path, then, training_data(**{part: other}), 5, 10)
    plain = schedule()
    watched = dataclasses.replace(plain, collate=lambda *args: plain.collate(*args))  # of which less is known
    assert prepare(tmp_path, config, batches=watched).start == 5
    before = (tmp_path / "config.json").read_bytes()
    config.data.path, config.base = "elsewhere", "other"
    with pytest.raises(ValueError, match="other training data"):
        prepare(tmp_path, config, batches=changed(20, 0))
    with pytest.raises(ValueError, match="has other shapes"):
        prepare(tmp_path, config, base=checkpoints.identity({"w": np.ones(2)}, "other"))
    assert (tmp_path / "config.json").read_bytes() == before


def training_data(**changes: Any) -> dict[str, Any]:
    from lora_jax.training.workdir import data_of

    return data_of(**({"batches": schedule(), "validation": schedule(8, seed=1)} | changes))


def test_a_checkpoint_without_digests_resumes_within_its_total(tmp_path: Path) -> None:
    config = run_config(**{"data": ConfigDict({"path": "here"})})
    saved(tmp_path, config, data={})
    assert prepare(tmp_path, config, batches=changed(20, 0)).start == 5
    with pytest.raises(ValueError, match=r"the run has done 5 steps, but its data now give 4"):
        prepare(tmp_path, config, batches=schedule(6))
    config.data.path = "there"
    with pytest.raises(ValueError, match=r"another config: data.path is 'here' there and 'there' here"):
        prepare(tmp_path, config)


def test_a_warm_start_may_move_but_not_go(tmp_path: Path) -> None:
    config = run_config(warm_start="here")
    saved(tmp_path, config)
    config.warm_start = "there"
    assert prepare(tmp_path, config).start == 5
    config.warm_start = None
    with pytest.raises(ValueError, match=r"another config: warm_start is 'there' there and None here"):
        prepare(tmp_path, config)


def test_a_sweep_resumes_with_the_data_that_it_began_with(tmp_path: Path) -> None:
    path = {"data": ConfigDict({"path": "here"})}
    values = [{"learning_rate": 1e-3}, {"learning_rate": 1e-2}]
    job = ready(tmp_path, members(values, **path))
    with checkpoints.manager(tmp_path) as manager:
        state = job.state._replace(step=np.full(2, 5, np.int32))
        spec = {"method": "sweep", "of": [member.method.spec for member in job.members]}
        checkpoints.save(manager, 5, state, spec=spec, base=job.base, data=job.data)
    for member in job.members:
        (tmp_path / member.name / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    path["data"].path = "there"
    assert ready(tmp_path, members(values, **path)).start == 5
    with pytest.raises(ValueError, match="other training data"):
        ready(tmp_path, [member._replace(batches=changed(20, 0)) for member in members(values, **path)])


def edited(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda fields: fields.update(n_head=4), "config has n_head 2, not 4"),
        ("config.json", lambda fields: fields.update(layer_norm_epsilon=1e-3), "layer_norm_epsilon 1e-05, not 0.001"),
        ("tokenizer.json", swap_ids, r"has another tokenizer"),
    ],
)
def test_an_adapter_is_for_its_base(
    inputs: Path, tmp_path: Path, file: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    base = bases.load(config_of(inputs))
    method = lj.lora(lj.select("**/query/kernel", axes=dict(gpt2.AXES)), rank=1)
    shapes = jax.eval_shape(method.init, jax.random.key(0), base.params)
    delta = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    checkpoints.save_adapter(tmp_path / "adapter", method, delta, base.identity)
    shutil.copytree(inputs / "base", tmp_path / "base")
    again = bases.load(config_of(tmp_path, **{"model.scan_layers": True, "model.remat": True}))
    assert again.identity == base.identity | {"source": str(tmp_path / "base")}
    bases.adapter(tmp_path / "adapter", again)
    hf.save(tmp_path / "saved", base.model, base.params, base.tokenizer)
    assert bases.load(config_of(tmp_path), str(tmp_path / "saved")).identity["config"] == base.identity["config"]
    bases.adapter(tmp_path / "adapter", bases.load(config_of(tmp_path), str(tmp_path / "saved")))
    edited(tmp_path / "base" / file, change)
    with pytest.raises(ValueError, match=message):
        bases.adapter(tmp_path / "adapter", bases.load(config_of(tmp_path)))


@pytest.mark.slow
def test_a_workdir_resumes_on_another_machine(inputs: Path, tmp_path: Path) -> None:
    """Base and data have other paths there and are the same; changed data are refused, of seeds too."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(inputs, here)
    straight = runs.train(config_of(here), tmp_path / "straight")
    seeds = runs.train(config_of(here, seeds=(3, 4)), tmp_path / "seeds")
    shutil.move(here, there)
    for workdir in (tmp_path / "straight", tmp_path / "seeds" / "seed_4"):
        shutil.rmtree(workdir / "checkpoints" / "4")
        shutil.rmtree(workdir / "adapter")
    (tmp_path / "seeds" / "seed_4" / "summary.json").unlink()
    resumed = runs.train(config_of(there), tmp_path / "straight")
    jax.tree.map(np.testing.assert_array_equal, resumed.delta, straight.delta)
    again = runs.train(config_of(there, seeds=(3, 4)), tmp_path / "seeds")
    jax.tree.map(np.testing.assert_array_equal, again.members[0].delta, seeds.members[1].delta)

    lines = (there / "data" / "train.txt").read_text()
    (there / "data" / "train.txt").write_text(lines.replace("is in the riverside", "is near the riverside", 1))
    shutil.rmtree(tmp_path / "straight" / "checkpoints" / "4")
    with pytest.raises(ValueError, match="straight holds a run on other training data: it began with 48"):
        runs.train(config_of(there), tmp_path / "straight")
    shutil.rmtree(tmp_path / "seeds" / "seed_4")
    with pytest.raises(ValueError, match="seed_3 holds a run on other training data"):
        runs.train(config_of(there, seeds=(3, 4)), tmp_path / "seeds")
