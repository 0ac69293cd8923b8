"""Updates of PEFT's folders without their base, and two of them compared."""

import jax
import numpy as np
import pytest

pytest.importorskip("peft")

import peft as theirs
import torch

from lora_jax import analysis
from lora_jax.interop import peft
from tests.helpers.dense import product
from tests.helpers.peft_files import CLS, CONFIG, LM, spoiled
from tests.helpers.peft_models import adapter, base, quietly, written
from tests.helpers.reference import same

PLAIN = {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 2}, "alpha_pattern": {"h.1.mlp.c_fc": 11}}


def their_changes(made):
    """`{module: (inputs, outputs)}` of the changes that PEFT adds to the weights."""
    layers = {name: module for name, module in made.named_modules() if hasattr(module, "get_delta_weight")}
    changes = {}
    for name, layer in layers.items():
        change = layer.get_delta_weight("default").detach().numpy()
        stored_as_inputs_first = layer.fan_in_fan_out or "Embedding" in type(layer.get_base_layer()).__name__
        changes[name.removeprefix("base_model.model.")] = change if stored_as_inputs_first else change.T
    return changes


@pytest.mark.parametrize(
    "kind, fields",
    [
        ("gpt2", LM | PLAIN | {"bias": "all"}),
        ("gpt2", LM | PLAIN | {"use_rslora": True}),
        ("gpt2", LM | {"target_modules": ["wte", "c_proj"]}),
        ("roberta", CLS),  # with a head beside it
    ],
)
def test_the_updates_are_what_peft_adds(kind, fields, tmp_path):
    made = adapter(kind, **fields)
    updates = peft.updates(written(made, tmp_path / "theirs"))
    want = their_changes(made)
    assert set(updates) == set(want)
    for name, change in want.items():
        np.testing.assert_allclose(product(updates[name])[0], change, rtol=0, atol=1e-6 * np.abs(change).max())


def test_the_updates_of_a_model_that_is_unknown_here(tmp_path):
    """A convolution and a Linear of torch alone, in bfloat16: no architecture is asked for."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Flatten(), torch.nn.Linear(16, 5))
    made = quietly(theirs.get_peft_model, model, theirs.LoraConfig(target_modules=["0", "2"], r=3, lora_alpha=2))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    made = made.to(torch.bfloat16)
    updates = peft.updates(written(made, tmp_path / "conv"))
    layers = made.base_model.model
    for name in "02":
        a, b = (getattr(layers[int(name)], f"lora_{x}")["default"].weight.detach().float().numpy() for x in "AB")
        want = 2 / 3 * (b.reshape(len(b), -1) @ a.reshape(len(a), -1)).T
        np.testing.assert_allclose(product(updates[name])[0], want, rtol=0, atol=1e-6)


def test_two_folders_are_compared_in_one_call(tmp_path):
    folders = [written(adapter("gpt2", seed=n, **LM | PLAIN), tmp_path / str(n)) for n in (1, 2)]
    compared = analysis.compare(*map(peft.updates, folders))
    assert set(compared) == {f"transformer.h.{n}.{name}" for n in range(3) for name in ("attn.c_attn", "mlp.c_fc")}
    # beside those of `load`, for which the shapes of a base suffice
    shapes = jax.eval_shape(lambda: base("gpt2").params)
    loaded = [peft.load(folder, shapes) for folder in folders]
    same(loaded[0][1], peft.load(folders[0], base("gpt2").params)[1])
    for side in ("input", "output"):
        similarity = analysis.of_adapters(*loaded[0], *loaded[1], side)["h_1/mlp/up/kernel"]
        got = getattr(compared["transformer.h.1.mlp.c_fc"], side)
        np.testing.assert_allclose(got.phi, similarity.phi, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(got.random, similarity.random)
    assert compared["transformer.h.0.attn.c_attn"].input.phi.shape == (1, 3, 3)


def test_adapters_that_need_their_base_are_named(tmp_path):
    kinds = {
        "use_dora=True": (theirs.LoraConfig, LM | {"use_dora": True}),
        "init_lora_weights='pissa'": (theirs.LoraConfig, LM | {"init_lora_weights": "pissa"}),
        "IA3 is no LoRA": (theirs.IA3Config, {"target_modules": ["c_attn"], "feedforward_modules": []}),
    }
    for n, (named, (config, fields)) in enumerate(kinds.items()):
        folder = written(adapter("gpt2", config=config, **fields), tmp_path / str(n))
        with pytest.raises(ValueError, match=rf"{named}.*peft.load\(folder, params\)"):
            peft.updates(folder)


def test_a_folder_that_is_wrong_is_said(tmp_path):
    folder = written(adapter("gpt2", **LM), tmp_path / "theirs")
    first = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    with pytest.raises(
        ValueError, match=r"h.0.attn.c_attn has A \(3, 12\) and B \(36, 3\), but its config says rank 4"
    ):
        peft.updates(spoiled(folder, tmp_path / "rank", r=4))
    with pytest.raises(ValueError, match=r"h.0.attn.c_attn has lora_B but not the other factor"):
        peft.updates(spoiled(folder, tmp_path / "half", lambda x: {n: v for n, v in x.items() if n != first}))
    with pytest.raises(ValueError, match="has no factors of a LoRA: its names begin with"):
        peft.updates(spoiled(folder, tmp_path / "none", lambda x: {"classifier.weight": x[first]}))
    with pytest.raises(ValueError, match="lora_alpha='x' is not a finite number"):
        peft.updates(spoiled(folder, tmp_path / "alpha", lora_alpha="x"))
    with pytest.raises(ValueError, match="the field new=1 is not known here"):
        peft.updates(spoiled(folder, tmp_path / "field", new=1))
    (folder / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{CONFIG} is missing"):
        peft.updates(folder)
