"""config.json of Hugging Face folders: each field has the type and the range that the model's config says."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.interop import hf
from lora_jax.models import gpt2

SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpt2")
    config = gpt2.GPT2Config(vocab_size=7, n_positions=4, n_embd=4, n_layer=1, n_head=2, n_inner=3, eos_token_id=0)
    model = gpt2.GPT2(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    hf.save(made, model, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    return made


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"eos_token_id": None}, r"eos_token_id=None; give it one id"),
        ({"eos_token_id": True}, r"eos_token_id=True, not a int"),
        ({"eos_token_id": -1}, r"eos_token_id=-1: at least 0"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings='false', not a bool"),
        ({"tie_word_embeddings": 0}, r"tie_word_embeddings=0, not a bool"),
        ({"tie_word_embeddings": None}, r"tie_word_embeddings=None, not a bool"),
        *(({name: 0}, f"{name}=0: at least 1") for name in SIZES),
        *(({name: -2}, f"{name}=-2: at least 1") for name in SIZES),
        *(({name: "2"}, f"{name}='2', not a int") for name in SIZES),
        *(({name: 2.0}, f"{name}=2.0, not a int") for name in SIZES),
        *(({name: True}, f"{name}=True, not a int") for name in SIZES),
        *(({name: [2]}, rf"{name}=\[2\], not a int") for name in SIZES),
        *(({name: 10**30}, f"{name}=10+, too large for any model") for name in SIZES),
        ({"activation_function": None}, "activation_function=None, not a str"),
        ({"activation_function": ["gelu"]}, r"activation_function=\['gelu'\], not a str"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon='1e-5', not a float"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon=-1e-05: at least 0"),
        ({"layer_norm_epsilon": float("nan")}, "config.json is no JSON .NaN is no number"),
        ({"layer_norm_epsilon": True}, "layer_norm_epsilon=True, not a float"),
    ],
    ids=str,
)
def test_wrong_fields(folder: Path, fields: dict, says: str) -> None:
    file = folder / "config.json"
    content = file.read_text()
    file.write_text(json.dumps(json.loads(content) | fields))
    try:
        with pytest.raises(ValueError, match=says) as caught:
            hf.load(folder)
    finally:
        file.write_text(content)
    assert str(folder) in str(caught.value)
    hf.load(folder)


def test_numbers_that_are_right(folder: Path) -> None:
    """A whole number is a float too, and null is one of the sizes inside the MLP."""
    for fields in ({"layer_norm_epsilon": 1}, {"n_inner": None}):
        config = json.loads((folder / "config.json").read_text()) | fields
        names = {name: name for name in (*SIZES, "layer_norm_epsilon")}
        read = hf.read_config(gpt2.GPT2Config, config, names, {}, "x")
        assert read.n_inner == config["n_inner"] and type(read.layer_norm_epsilon) is float
