"""Runs given away and taken in: the merged model, PEFT's adapter and ours compute what the run computes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import lora_jax as lj
from configs import e2e
from lora_jax import checkpoints, runs, training
from lora_jax.interop import hf
from lora_jax.models.gpt2 import to_loop
from lora_jax.runs import bases, methods
from tests.helpers.cli import make_inputs

FORMS = ("merged", "peft", "native")


def config_of(folder: Path, name: str = "small", **changes: Any) -> ConfigDict:
    config = e2e.get_config(name)
    config.base, config.data.path = str(folder / "base"), str(folder / "data")
    config.update_from_flattened_dict(changes)
    return config


def make_run(folder: Path, config: ConfigDict, workdir: Path) -> lj.Delta:
    """A workdir at step 3, whose delta is random and nowhere zero."""
    base = bases.load(config)
    method = lj.from_spec(methods.spec(config, base.model))
    random = np.random.default_rng(0)
    fresh = jax.device_get(jax.jit(method.init)(jax.random.key(0), base.params))
    delta = jax.tree.map(lambda x: jnp.asarray(x + random.normal(0, 0.1, x.shape).astype(np.float32)), fresh)
    training.claim(workdir, config)
    state = training.State(jnp.array(3), delta, (), jnp.zeros(2, jnp.uint32), jnp.zeros(7))
    with checkpoints.manager(workdir) as manager:
        checkpoints.save(manager, 3, state, spec=method.spec, base=base.identity)
    return delta


def logits(config: ConfigDict, method: lj.ParamTransform | None, delta: Any, params: Any = None) -> np.ndarray:
    """Of the base, adapted, on some tokens."""
    base = bases.load(config)
    params = base.params if params is None else params
    adapted = params if method is None else method.apply(params, delta)
    tokens = np.random.default_rng(1).integers(0, 272, (2, 9), dtype=np.int32)
    return np.asarray(jax.jit(lj.lift(base.model.apply))({"params": adapted}, tokens))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("export")
    make_inputs(made)
    return made


CASES: dict[str, Callable[[Path], ConfigDict]] = {
    "q and v": lambda folder: config_of(folder, **{"lora.rank": 2}),
    "scanned": lambda folder: config_of(folder, **{"lora.rank": 2, "model.scan_layers": True}),
    "on a mesh": lambda folder: config_of(folder, **{"lora.rank": 2, "mesh.fsdp": 2, "mesh.tensor": 2}),
}


@pytest.mark.parametrize(
    "case", [*(pytest.param(case, marks=pytest.mark.slow) for case in ("q and v", "scanned")), "on a mesh"]
)
def test_every_form_goes_out_and_comes_back(case: str, folder: Path, tmp_path: Path) -> None:
    """1e-5 of the largest logit: sums in another order; the native form has the same bits."""
    config = CASES[case](folder)
    delta = make_run(folder, config, tmp_path / "run")
    method = lj.from_spec(methods.spec(config, bases.load(config).model))
    expected = logits(config, method, delta)
    assert np.abs(expected - logits(config, None, None)).max() > 1e-3
    for form in FORMS:
        runs.export_run(tmp_path / "run", form, tmp_path / form)
        loop = config_of(folder)
        runs.import_run(tmp_path / form, loop if form != "native" else config, tmp_path / f"from_{form}")
        run = checkpoints.load(tmp_path / f"from_{form}")
        got = logits(loop if form != "native" else config, run.method, run.delta)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=form)
        assert run.step == 0
    _, params, tokenizer = hf.load(tmp_path / "merged")
    assert tokenizer is not None
    merged = lj.merge(method.apply(bases.load(config).params, delta))
    for ours, theirs in zip(jax.tree.leaves(to_loop(merged)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_torch_computes_the_same_from_both(folder: Path, tmp_path: Path) -> None:
    """The merged model in transformers, and the adapter on the base in PEFT; 1e-4, as everywhere between the two."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = config_of(folder, **{"lora.rank": 2})
    shutil.copytree(folder / "base", tmp_path / "base")
    config.base = str(tmp_path / "base")
    fields = json.loads((folder / "base" / "config.json").read_text())
    fields |= {"attn_pdrop": 0.3, "pad_token_id": 7, "bos_token_id": 5, "id2label": {"0": "x"}, "summary_type": "mean"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(fields))
    delta = make_run(folder, config, tmp_path / "run")
    expected = logits(config, lj.from_spec(methods.spec(config, bases.load(config).model)), delta)
    tokens = torch.tensor(np.random.default_rng(1).integers(0, 272, (2, 9)))
    for form in ("merged", "peft"):
        runs.export_run(tmp_path / "run", form, tmp_path / form)
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == fields
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    for model in (merged, peft.PeftModel.from_pretrained(base, str(tmp_path / "peft"))):
        with torch.no_grad():
            got = model.eval()(tokens).logits.numpy()
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_training_goes_on_from_what_was_taken_in(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, **{"lora.rank": 2, "steps": 2, "data.batch_size": 4, "data.buckets": 1})
    config.optimizer.warmup_steps = 0
    delta = make_run(folder, config, tmp_path / "run")
    runs.export_run(tmp_path / "run", "native", tmp_path / "native")
    runs.import_run(tmp_path / "native", config, tmp_path / "new")
    runs.train(config, tmp_path / "new")
    after = checkpoints.load(tmp_path / "new")
    assert after.step == 2
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), after.delta, delta)
    assert 0 < max(jax.tree.leaves(moved)) < 1e-3  # two steps of a rate of 2e-4


def test_what_cannot_be_is_said(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, **{"lora.rank": 2})
    make_run(folder, config, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no adapter\.safetensors"):
        runs.import_run(tmp_path / "empty", config, tmp_path / "new")
    runs.export_run(tmp_path / "run", "native", tmp_path / "native")
    with pytest.raises(ValueError, match="holds a run already"):
        runs.import_run(tmp_path / "native", config, tmp_path / "run")
    make_inputs(tmp_path / "other", seed=1)
    other = config_of(tmp_path / "other")
    with pytest.raises(ValueError, match="has other weights of the same shapes"):
        runs.import_run(tmp_path / "native", other, tmp_path / "new")
    with pytest.raises(ValueError, match="has other weights of the same shapes"):
        runs.export_run(tmp_path / "run", "merged", tmp_path / "x", base=str(tmp_path / "other" / "base"))
    fields = json.loads((folder / "base" / "config.json").read_text())
    small = tmp_path / "small"
    model, params, tokenizer = hf.load(folder / "base")
    hf.save(small, model, params, tokenizer)
    (small / "config.json").write_text(json.dumps(fields | {"n_layer": 1}))
    with pytest.raises(ValueError, match="n_layer 1, but the tensors are of 2 layers"):
        runs.import_run(small, config, tmp_path / "new")


def test_training_goes_on_only_under_the_same_function(folder: Path, tmp_path: Path) -> None:
    """Shapes agree, but alpha, or the rule for it, would rescale the delta. Other globs for the same leaves may be."""
    config = config_of(folder, **{"lora.rank": 2, "steps": 1, "data.batch_size": 4, "data.buckets": 1})
    make_run(folder, config, tmp_path / "run")
    runs.export_run(tmp_path / "run", "peft", tmp_path / "peft")
    fused = {"lora.select": ("**/attn/{query,key,value}/kernel",), "lora.rank": 4, "lora.alpha": 64.0}
    for case, changes, message in [
        ("same", {}, None),
        ("alpha", {"lora.alpha": 63.0}, r"h_0/attn/key/kernel has scale 16.0 in one, 15.75 in the other"),
        ("rule", {"lora.scale_rule": "alpha/sqrt(r)"}, r"has scale 16.0 in one, 32.0 in the other"),
    ]:
        other = config_of(folder, **{"steps": 1, "data.batch_size": 4, "data.buckets": 1, **fused, **changes})
        with other.unlocked():
            other.lora.shared = fused["lora.select"]
        runs.import_run(tmp_path / "peft", other, tmp_path / case)
        if message is None:
            assert runs.train(other, tmp_path / case).finished
            continue
        with pytest.raises(ValueError, match=message):
            runs.train(other, tmp_path / case)


def test_a_model_card_stands_beside_every_form(folder: Path, tmp_path: Path) -> None:
    """Read by the Hub's own reader. What nobody knows is left out: this base has no name there, and no license."""
    repocard = pytest.importorskip("huggingface_hub")
    make_run(folder, config_of(folder, **{"lora.rank": 2}), tmp_path / "run")
    summary = {"steps": 3, "validation": ["validation_loss"], "validation_loss": 1.25}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    for name, params, step in (("test-adapted", "adapted", 3), ("test-base", "base", 3), ("old-adapted", "adapted", 2)):
        part = tmp_path / "run" / "evaluation" / name
        part.mkdir(parents=True)
        scores = {"bleu": {"score": 59.3 + step, "low": 50.0, "high": 70.0}}
        result = {"split": name, "params": params, "step": step, "contexts": 8, "scores": {"all": scores}}
        (part / "evaluate.json").write_text(json.dumps(result))
    libraries = {"merged": "transformers", "peft": "peft", "native": "lora_jax"}
    for form, library in libraries.items():
        runs.export_run(tmp_path / "run", form, tmp_path / form)
        card = repocard.ModelCard.load(tmp_path / form / "README.md")
        fields = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["lora", "lora_jax"]}
        assert card.data.to_dict() == fields
        expected = ["rank `2`", "Trained parameters: 256.", "- steps: 3", "- learning rate: 0.0002", "1.2500"]
        expected += [
            str(folder / "base"),
            str(folder / "data"),
            "| test-adapted (8 contexts) | BLEU | 62.30 | 50.00 to",
        ]
        expected += [f"lora_jax {lj.__version__}"]
        assert [text for text in expected if text not in card.text] == []
        assert "test-base" not in card.text and "old-adapted" not in card.text
        code = "".join(re.findall(r"```python\n(.*?)```", card.text, re.DOTALL))
        compile(code, form, "exec")
        assert f'"{form}"' in code and (library == "lora_jax") == ("transformers" not in code)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "base")
    assert 'target_modules `["c_attn"]`' in (tmp_path / "peft" / "README.md").read_text()


def test_a_model_card_names_what_is_on_the_hub(folder: Path, tmp_path: Path) -> None:
    repocard = pytest.importorskip("huggingface_hub")
    config = config_of(folder, **{"lora.rank": 2})
    make_run(folder, config, tmp_path / "run")
    cached = tmp_path / "models--owner--base" / "snapshots" / "0a1b"
    shutil.copytree(folder / "base", cached)
    (cached / "README.md").write_text("---\nlicense: mit\n---\n")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    saved["data"]["path"] = "owner/data"
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    runs.export_run(tmp_path / "run", "peft", tmp_path / "peft", base=str(cached))
    data = repocard.ModelCard.load(tmp_path / "peft" / "README.md").data.to_dict()
    assert (data["base_model"], data["license"], data["datasets"]) == ("owner/base", "mit", ["owner/data"])
    assert data["tags"] == ["base_model:adapter:owner/base", "lora", "lora_jax"]
    adapter = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "owner/base"


def test_a_user_s_readme_stays_and_an_earlier_card_is_replaced(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(folder, config_of(folder, **{"lora.rank": 2}), tmp_path / "run")
    readme = tmp_path / "out" / "README.md"
    readme.parent.mkdir()
    readme.write_text("mine")
    runs.export_run(tmp_path / "run", "native", tmp_path / "out")
    assert readme.read_text() == "mine" and "README.md was there and stays" in caplog.text
    readme.unlink()
    runs.export_run(tmp_path / "run", "native", tmp_path / "out")
    card = readme.read_text()
    summary = {"steps": 3, "validation": ["validation_loss"], "validation_loss": 1.25}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    runs.export_run(tmp_path / "run", "native", tmp_path / "out")
    assert "1.2500" in readme.read_text() and "1.2500" not in card
    readme.write_text(readme.read_text().replace("1.2500", "0.9"))
    changed = readme.read_text()
    runs.export_run(tmp_path / "run", "native", tmp_path / "out")
    assert readme.read_text() == changed
