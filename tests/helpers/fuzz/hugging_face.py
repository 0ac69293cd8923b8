"""Hugging Face folders: a GPT-2 in shards with its index and tokenizer, one in a file, a RoBERTa with a head."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from tokenizers import Tokenizer

from lora_jax.interop import hf
from lora_jax.models import encoder, gpt2
from tests.helpers.fuzz.mutations import Files
from tests.helpers.fuzz.runner import Part
from tests.helpers.fuzz.tensors import read_tensors
from tests.helpers.tokenizers import byte_level

GPT2 = gpt2.GPT2Config(vocab_size=300, n_positions=6, n_embd=4, n_layer=2, n_head=2, eos_token_id=0)
UNTIED = gpt2.GPT2Config(vocab_size=11, n_positions=6, n_embd=4, n_layer=1, n_head=2, eos_token_id=0, tie=False)
ROBERTA = encoder.EncoderConfig("roberta", 11, 8, 4, 1, 2, 6, 1, head="classification", labels=3)

GPT2_FIELDS = {name: name for name in "vocab_size n_positions n_embd n_layer n_head layer_norm_epsilon".split()}
GPT2_FIELDS |= {"eos_token_id": "eos_token_id", "activation_function": "activation", "tie_word_embeddings": "tie"}
ENCODER_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "inner",
    "type_vocab_size": "token_types",
    "layer_norm_eps": "eps",
    "hidden_act": "activation",
    "pad_token_id": "pad_id",
    "model_type": "family",
}
# torch's module -> ours; its weight is as ours, or transposed ("T"), or three of ours side by side ("qkv").
GPT2_LAYER = {"ln_1": ("ln_1", ""), "ln_2": ("ln_2", ""), "attn.c_attn": ("attn", "qkv")}
GPT2_LAYER |= {"attn.c_proj": ("attn/out", ""), "mlp.c_fc": ("mlp/up", ""), "mlp.c_proj": ("mlp/down", "")}
GPT2_REST = {"wte": ("wte", ""), "wpe": ("wpe", ""), "ln_f": ("ln_f", ""), "lm_head": ("lm_head", "T")}
ENCODER_LAYER = {f"attention.self.{name}": (f"attn/{name}", "T") for name in ("query", "key", "value")}
ENCODER_LAYER |= {"attention.output.dense": ("attn/out", "T"), "attention.output.LayerNorm": ("ln_1", "")}
ENCODER_LAYER |= {"intermediate.dense": ("mlp/up", "T"), "output.dense": ("mlp/down", "T")}
ENCODER_LAYER |= {"output.LayerNorm": ("ln_2", "")}
EMBEDDINGS = {"word_embeddings": "word", "position_embeddings": "position", "token_type_embeddings": "token_type"}
ENCODER_REST = {f"embeddings.{name}": (f"embeddings/{ours}", "") for name, ours in EMBEDDINGS.items()}
ENCODER_REST |= {"embeddings.LayerNorm": ("embeddings/norm", ""), "classifier.dense": ("classifier/dense", "T")}
ENCODER_REST |= {"classifier.out_proj": ("classifier/out", "T")}
ENDS = {"ln_1": "scale", "ln_2": "scale", "ln_f": "scale", "norm": "scale"}
ENDS |= dict.fromkeys(("wte", "wpe", "word", "position", "token_type"), "embedding")


def params_of(model: Any) -> Any:
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def folder_of(model: Any, **options: Any) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        hf.save(folder, model, params_of(model), **options)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def sharded() -> Part:
    files = folder_of(gpt2.GPT2(GPT2), tokenizer=byte_level(), shard_size=1500)
    assert len(files) > 4
    return Part(files, hf.load, check)


def untied() -> Part:
    return Part(folder_of(gpt2.GPT2(UNTIED)), hf.load, check)


def roberta() -> Part:
    return Part(folder_of(encoder.Encoder(ROBERTA)), hf.load, check)


def check(folder: Path, loaded: Any) -> None:
    """Every parameter is the tensor of its name, bit for bit, and the config and the tokenizer are the files'."""
    model, params, tokenizer = loaded
    fields = json.loads((folder / "config.json").read_bytes())
    is_gpt2 = fields["model_type"] == "gpt2"
    for name, ours in (GPT2_FIELDS if is_gpt2 else ENCODER_FIELDS).items():
        if name in fields:
            value = getattr(model.config, ours)
            assert value == type(value)(fields[name]) and isinstance(value, bool) == isinstance(fields[name], bool), (
                name
            )
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if not (folder / "model.safetensors").exists():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    tensors = {name: tensor for file in names for name, tensor in read_tensors(folder / file).items()}
    want = (from_gpt2 if is_gpt2 else from_roberta)(tensors)
    if is_gpt2 and model.config.tie:
        want.pop("lm_head/kernel", None)
    elif is_gpt2:
        want.setdefault("lm_head/kernel", want["wte/embedding"].T)
    got = flatten_dict(params, sep="/")
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    for path, array in got.items():
        np.testing.assert_array_equal(np.asarray(array), want[path].astype(np.float32), err_msg=path)
    if (folder / "tokenizer.json").is_file():
        check_tokenizer(folder / "tokenizer.json", tokenizer, model.config.vocab_size)


def from_gpt2(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    named = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    named = {name: tensor for name, tensor in named.items() if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name)}
    return ours_of(named, r"h\.(\d+)\.(.+)", GPT2_LAYER, GPT2_REST)


def from_roberta(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    named = {name.removeprefix("roberta."): tensor for name, tensor in tensors.items()}
    unused = r"(lm_head|cls|pooler)\..*|(\w+\.)?embeddings\.(position_ids|token_type_ids)"
    named = {name: tensor for name, tensor in named.items() if not re.fullmatch(unused, name)}
    newer = {"gamma": "weight", "beta": "bias"}
    named = {re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda m: newer[m[0]], name): x for name, x in named.items()}
    return ours_of(named, r"encoder\.layer\.(\d+)\.(.+)", ENCODER_LAYER, ENCODER_REST)


def ours_of(tensors: dict, layer: str, in_layer: dict, rest: dict) -> dict[str, np.ndarray]:
    ours = {}
    for name, tensor in tensors.items():
        module, _, which = name.rpartition(".")
        match = re.fullmatch(layer, module)
        path, how = in_layer[match[2]] if match else rest[module]
        path = f"h_{match[1]}/{path}" if match else path
        end = "bias" if which == "bias" else ENDS.get(path.rpartition("/")[2], "kernel")
        if how == "qkv":
            parts = np.split(tensor, 3, axis=-1)
            ours |= {f"{path}/{part}/{end}": x for part, x in zip(("query", "key", "value"), parts, strict=True)}
        else:
            ours[f"{path}/{end}"] = tensor.T if how == "T" and which == "weight" else tensor
    return ours


TEXTS = ["the cat sat", "", " on  the mat </s>", "\u00e9\u732b", "<s><mask>", "the hat " * 40]


def check_tokenizer(file: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """It is the library's of that file, but neither cuts nor pads, and its ids are below the embedding's rows."""
    other = Tokenizer.from_file(str(file))
    other.no_truncation()
    other.no_padding()
    assert max(other.get_vocab().values()) < vocab_size
    for text in TEXTS:
        assert tokenizer.encode(text).ids == other.encode(text).ids
