"""A package of somebody else's adds a model family, a method, a task, a metric and a kind of PEFT adapter.

Each is registered by at most two files of it, and used through what the library offers everybody.
"""

import functools
import importlib
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import lora_jax as lj
from lora_jax import runs, training
from lora_jax.core.selection import flatten, look_up
from lora_jax.core.transforms import traits_of
from lora_jax.distributed import sharding
from lora_jax.interop import hf, peft
from lora_jax.models.family import family_of
from lora_jax.runs import bases, tasks
from lora_jax.runs import shapes as run_shapes
from tests.helpers.public import registries_restored
from tests.helpers.runs import model_and_params

# The files that add each; the test copies them to another folder and imports them from there.
FILES = {
    "family": ("model", "hf_format"),
    "method": ("diagonal",),
    "task": ("next_word",),
    "metric": ("top_three",),
    "peft kind": ("ln_tuning",),
}
FILES_OF_PEFT = ("adapter_config.json", "adapter_model.safetensors")
WORDS = "the a red blue old new house tree river bird sings stands flows waits".split()
QV, RANK, WIDTH, DEPTH = "**/{q,v}/kernel", 2, 8, 2


class Extended(NamedTuple):
    """The package's modules by name, a base of its family in a folder, and a run on it."""

    modules: dict[str, ModuleType]
    folder: Path
    config: ConfigDict
    result: runs.RunResult


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Extended]:
    folder = tmp_path_factory.mktemp("extension")
    shutil.copytree(Path(__file__).parent / "helpers" / "acme", folder / "acme")
    with pytest.MonkeyPatch.context() as patch, registries_restored():
        patch.syspath_prepend(folder)
        try:
            modules = {name: importlib.import_module(f"acme.{name}") for names in FILES.values() for name in names}
            assert all(Path(str(module.__file__)).is_relative_to(folder) for module in modules.values())
            write_inputs(folder, modules["model"])
            config = config_of(folder)
            yield Extended(modules, folder, config, runs.train(config, folder / "run"))
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == "acme"]:
                del sys.modules[name]


def write_inputs(folder: Path, model: ModuleType) -> None:
    """A tokenizer, a base in Hugging Face's form by our `hf.save`, and lines of words."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["<end>", *WORDS])}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    acme = model.Acme(model.AcmeConfig(vocab_size=16, width=WIDTH, depth=DEPTH))
    params = jax.jit(acme.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    hf.save(folder / "base", acme, params, tokenizer)
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("valid", 8)):
        lines = [" ".join(random.choice(WORDS, random.integers(3, 8))) for _ in range(count)]
        (folder / f"{split}.words").write_text("\n".join(lines) + "\n")


def config_of(folder: Path) -> ConfigDict:
    config = runs.default_config("generation")
    config.base, config.method, config.metrics = str(folder / "base"), "diagonal", ("top_three",)
    config.diagonal = ConfigDict({"select": (QV,), "rank": RANK})
    config.data.name, config.data.path, config.data.batch_size, config.data.buckets = "next_word", str(folder), 4, 1
    config.optimizer.warmup_steps, config.optimizer.learning_rate, config.steps = 1, 0.1, 4
    del config.model.query_block  # this model has no such option
    return config


@functools.cache
def forward(model: Any) -> Any:
    return jax.jit(lj.lift(model.apply))


def logits(model: Any, params: Any) -> np.ndarray:
    tokens = jnp.asarray(np.random.default_rng(1).integers(1, 16, (2, 6)), jnp.int32)
    return np.asarray(forward(model)({"params": params}, tokens))


def test_each_part_is_at_most_two_files() -> None:
    package = Path(__file__).parent / "helpers" / "acme"
    assert sorted(name for names in FILES.values() for name in names) == sorted(
        file.stem for file in package.glob("*.py") if file.stem != "__init__"
    )
    assert all(1 <= len(names) <= 2 for names in FILES.values())


def test_a_run_of_the_packages_parts(extended: Extended) -> None:
    """It trains, its metric is among the figures, and the workdir gives the same function again."""
    config, result = extended.config, extended.result
    assert result.finished and result.step == 4
    entries = [entry for entry in training.read_metrics(result.workdir) if "validation_loss" in entry]
    assert all(0 <= entry["top_three"] <= 1 for entry in entries)
    loaded = runs.load(result.workdir)
    jax.tree.map(np.testing.assert_array_equal, loaded.delta, result.delta)
    assert type(loaded.model) is extended.modules["model"].Acme and loaded.spec["method"] == "diagonal"
    task = extended.modules["next_word"]
    schedule = task.batches(task.load(extended.folder, "valid"), config, loaded, loaded.spec)
    objective = training.with_metrics(task.objective(config, loaded.model), ("top_three",))
    figures = training.validate(objective, loaded.params, schedule)
    assert entries[-1]["validation_loss"] == pytest.approx(figures["validation_loss"], rel=1e-6)
    assert entries[-1]["top_three"] == figures["top_three"]
    before = training.validate(objective, runs.load(result.workdir, params="base").params, schedule)
    assert figures["validation_loss"] < before["validation_loss"] - 1e-3
    adapted = logits(loaded.model, loaded.params)
    model, params, _ = hf.load(extended.folder / "base")
    np.testing.assert_array_equal(adapted, logits(model, loaded.method.apply(params, result.delta)))
    merged = logits(model, runs.load(result.workdir, params="merged").params)
    np.testing.assert_allclose(merged, adapted, rtol=0, atol=1e-5 * np.abs(adapted).max())
    assert np.abs(adapted - logits(model, params)).max() > 1e-3


@pytest.mark.usefixtures("logits_in_pieces")
def test_the_librarys_loss_trains_the_family(extended: Extended, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the output head that the family names: a run with `language_model` is that with the package's objective."""
    task, config = extended.modules["next_word"], extended.config.copy_and_resolve_references()
    librarys = runs.Task(task.load, task.batches, lambda config, model: training.language_model(model))
    monkeypatch.setitem(tasks._TASKS, "next_word", librarys)
    config.metrics = ()
    result = runs.train(config, extended.folder / "librarys_loss")
    losses = [
        [entry["validation_loss"] for entry in training.read_metrics(workdir) if "validation_loss" in entry]
        for workdir in (result.workdir, extended.result.workdir)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(result.delta), jax.tree.leaves(extended.result.delta), strict=True):
        # 2e-5 of the largest entry: the same sums in another order
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_the_familys_folder_in_both_layouts(extended: Extended) -> None:
    model, params, tokenizer = hf.load(extended.folder / "base")
    assert tokenizer is not None and tokenizer.get_vocab_size() == 15
    scanned, stacked, _ = hf.load(extended.folder / "base", scan_layers=True)
    # 1e-6: the same sums, of logits near 1
    np.testing.assert_allclose(logits(scanned, stacked), logits(model, params), rtol=0, atol=1e-6)
    hf.save(extended.folder / "again", scanned, stacked, tokenizer)
    traced = lj.sites(model.apply, {"params": params}, jnp.zeros((1, 3), jnp.int32))
    published = family_of(model).sites(model.config)
    assert {name: (count, shape[2:], str(dtype)) for name, (count, shape, dtype) in traced.items()} == published
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (extended.folder / "again" / name).read_bytes() == (extended.folder / "base" / name).read_bytes()


def test_what_trains_is_counted(extended: Extended) -> None:
    count = run_shapes.count(extended.config)
    trained = DEPTH * 2 * RANK * (WIDTH + WIDTH + 1)
    assert (count.report.trained, count.head) == (trained, 0)
    assert sum(leaf.size for leaf in jax.tree.leaves(extended.result.delta)) == trained


def test_the_rank_is_swept(extended: Extended) -> None:
    """A member is the run of its config alone."""
    config = extended.config.copy_and_resolve_references()
    config.sweep.rank = (1, RANK)
    members = runs.sweep(config, extended.folder / "sweep").members
    assert list(members) == ["rank=1", f"rank={RANK}"]
    small, same = (member.delta for member in members.values() if member is not None)
    assert {factors["d"].shape for factors in small.values()} == {(1,)}
    for ours, alone in zip(jax.tree.leaves(same), jax.tree.leaves(extended.result.delta), strict=True):
        # 2e-5 of the largest entry: the same sums in another order
        np.testing.assert_allclose(ours, alone, rtol=0, atol=2e-5 * np.abs(alone).max())


def test_its_changes_add(extended: Extended) -> None:
    loaded = runs.load(extended.result.workdir, params="merged")
    method, delta = loaded.method, loaded.delta
    assert method is not None and delta is not None
    _, params, _ = hf.load(extended.folder / "base")
    other = jax.tree.map(lambda x: x + np.float32(0.1), jax.device_get(delta))
    merge = jax.jit(lambda deltas: [lj.merge(method.apply(params, d)) for d in deltas])
    params, *merged = jax.device_get([params, *merge([delta, other])])
    added, sums = lj.arithmetic.add([(method, delta), (method, other)], [1, -2])
    expected = jax.tree.map(lambda base, a, b: base + (a - base) - 2 * (b - base), params, *merged)
    # 1e-6: rounding of kernels below 1
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)  # noqa: E731
    jax.tree.map(close, lj.merge(added.apply(params, sums)), expected)
    ((_, traits),) = traits_of(method.spec)
    assert traits.fast == ("d",) and not traits.not_additive


def test_the_familys_rules_place_every_leaf(extended: Extended, caplog: pytest.LogCaptureFixture) -> None:
    """Of the base as it is read, and of the delta, on 2 x 2 x 2 devices."""
    caplog.set_level(logging.WARNING)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    base = bases.load(extended.config, mesh=mesh)
    _, params, _ = hf.load(extended.folder / "base")
    rules = family_of(base.model).sharding_rules(base.model.config, mesh)
    for (path, leaf), (_, unsharded) in zip(flatten(base.params)[0], flatten(params)[0], strict=True):
        assert leaf.sharding == jax.sharding.NamedSharding(mesh, look_up(rules, path, "rules")), path
        np.testing.assert_array_equal(leaf, unsharded)
    method, delta = lj.from_spec(runs.load(extended.result.workdir).spec), extended.result.delta
    adapted = jax.eval_shape(method.apply, base.params, delta)
    places = sharding.shardings(delta, mesh, base.placement.rules, adapted)["h_0/q/kernel"]
    assert {name: tuple(place.spec) for name, place in places.items()} == {
        "a": ("fsdp", None),
        "b": (None, "tensor"),
        "d": (),
    }
    assert not caplog.text


def test_lora_of_the_family_in_pefts_form(extended: Extended) -> None:
    """The family's format names its modules for PEFT too."""
    model, params, _ = hf.load(extended.folder / "base")
    method = lj.lora(lj.select(QV, axes=family_of(model).axes), rank=2)
    delta = jax.tree.map(lambda x: x + 0.1, method.init(jax.random.key(0), params))
    peft.save(extended.folder / "lora", method, delta, params=params)
    loaded, again = peft.load(extended.folder / "lora", params)
    merged = [lj.merge(m.apply(params, d)) for m, d in ((loaded, again), (method, delta))]
    jax.tree.map(np.testing.assert_array_equal, *merged)


def test_the_kind_of_adapter_comes_back_byte_for_byte(extended: Extended) -> None:
    """Tuned layer norms in a file of PEFT's names."""
    _, params = model_and_params()
    random, tensors = np.random.default_rng(2), {}
    for norm in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        for which in ("weight", "bias"):
            name = f"base_model.model.transformer.{norm}.ln_tuning_layers.{which}"
            tensors[name] = random.normal(size=8).astype(np.float32)
    folder, again = extended.folder / "norms", extended.folder / "norms_again"
    folder.mkdir()
    config = {"peft_type": "LN_TUNING", "task_type": "CAUSAL_LM", "target_modules": None}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    method, delta = peft.load(folder, params)
    assert set(delta) == {f"{norm}/{leaf}" for norm in ("h_0/ln_1", "h_0/ln_2", "ln_f") for leaf in ("scale", "bias")}
    merged = lj.merge(method.apply(params, delta))
    expected = tensors["base_model.model.transformer.h.0.ln_2.ln_tuning_layers.weight"]
    np.testing.assert_array_equal(merged["h_0"]["ln_2"]["scale"], expected)
    peft.save(again, method, delta, params=params)
    for name in FILES_OF_PEFT:
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_the_kind_of_adapter_is_pefts(extended: Extended) -> None:
    """Its own folder gives its own logits, and comes back byte for byte."""
    theirs = pytest.importorskip("peft")
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.helpers import peft_models

    for targets in (None, ["ln_2"]):
        options = {"task_type": "CAUSAL_LM", "target_modules": targets}
        adapter = peft_models.adapter("gpt2", config=theirs.LNTuningConfig, **options)
        folder = peft_models.written(adapter, extended.folder / f"theirs_{targets}")
        base = peft_models.base("gpt2")
        method, delta = peft.load(folder, base.params)
        # 1e-5 of the largest logit: both sum in float32, in other orders
        peft_models.assert_close(
            peft_models.ours("gpt2", method.apply(base.params, delta)), peft_models.theirs(adapter)
        )
        peft.save(extended.folder / "ours", method, delta, params=base.params)
        for name in FILES_OF_PEFT:
            assert (extended.folder / "ours" / name).read_bytes() == (folder / name).read_bytes()
