"""Tiny models of transformers with random weights, their parameters here, and PEFT's adapters on them."""

import atexit
import copy
import dataclasses
import functools
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers

import lora_jax as lj
from lora_jax.interop import hf
from lora_jax.models.gpt2 import GPT2 as GPT2Model
from lora_jax.models.llama import Llama
from tests.helpers import llamas

GPT2 = {"vocab_size": 23, "n_positions": 12, "n_embd": 12, "n_layer": 3, "n_head": 3}
ENCODER = {
    "vocab_size": 23,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 14,
    "num_labels": 3,
}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
DECODERS = (GPT2Model, Llama)  # which have a head in any case
TOKENS = np.random.default_rng(0).integers(2, 23, (3, 9), dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class Base:
    """A model of transformers, the folder that holds it, and the same here."""

    torch: Any
    folder: Path
    model: Any
    params: Any


@functools.cache
def base(kind: str) -> Base:
    """`gpt2`, `gpt2 untied`, `gpt2 bare`, `gpt2 score`, `roberta`, `roberta bare`, `bert`, `bert bare`, or a variant of
    `llamas`, which is tied too without another word after a colon: `llama`, `qwen3: untied`, `llama: score`."""
    if kind.partition(":")[0] in llamas.VARIANTS:
        return _llama(*kind.partition(": ")[::2])
    family, _, what = kind.partition(" ")
    fields = (GPT2 if family == "gpt2" else ENCODER) | IDS | {"tie_word_embeddings": what != "untied"}
    config = {"gpt2": "GPT2Config", "roberta": "RobertaConfig", "bert": "BertConfig"}[family]
    name = {"gpt2": "GPT2", "roberta": "Roberta", "bert": "Bert"}[family]
    suffixes = {"bare": "Model", "score": "ForSequenceClassification"}
    suffixes[""] = suffixes["untied"] = "LMHeadModel" if family == "gpt2" else "ForSequenceClassification"
    if what == "score":
        fields |= {"num_labels": 4}
    torch.manual_seed(0)
    made = getattr(transformers, name + suffixes[what])(getattr(transformers, config)(**fields)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.05, 0.3)
    folder = _saved(made)
    if what == "score":
        made.transformer.save_pretrained(folder / "backbone")
        model, params, _ = hf.load(folder / "backbone")
        params = params | {"score": {"kernel": jnp.asarray(made.score.weight.detach().numpy().T)}}
    else:
        model, params, _ = hf.load(folder)
    return Base(made, folder, model, params)


def _llama(variant: str, what: str) -> Base:
    head = {"bare": "", "score": "SequenceClassification"}.get(what, "CausalLM")
    labels = {"num_labels": 4} if what == "score" else {}
    made = llamas.torch_model(variant, head, tie_word_embeddings=what != "untied", **labels)
    folder = _saved(made)
    return Base(made, folder, *hf.load(folder)[:2])


def _saved(made: Any) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="peft-base-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made.save_pretrained(folder)
    return folder


def quietly(function, *args, **kwargs):
    """A call of PEFT's, whose warnings (on layouts, ties, deprecations within) say nothing here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def adapter(kind: str, *, config: Any = peft.LoraConfig, size: float = 0.3, seed: int = 1, **fields) -> Any:
    """A PEFT model with random numbers in all that trains, ready to predict."""
    made = quietly(lambda: peft.get_peft_model(copy.deepcopy(base(kind).torch), config(**fields)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, size)
    return made.eval()


def written(made: Any, folder: Path) -> Path:
    """The folder, with a PEFT model's adapter in it."""
    quietly(made.save_pretrained, folder)
    return folder


def read_by_peft(kind: str, folder: Path) -> Any:
    """The base with an adapter that PEFT read; a warning of PEFT's is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # transformers on PEFT's own use of its name, for every adapter (seen 2026-11, transformers 5.24, peft 0.21)
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base(kind).torch), folder).eval()


def theirs(made: Any, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """Logits, or the last hidden state of a model without a head."""
    with torch.no_grad():
        out = made(torch.tensor(tokens).long())
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


def ours(kind: str, adapted: Any, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """The same of adapted or plain parameters here."""
    model = base(kind).model

    def run(params):
        if kind == "gpt2 score" or (kind.endswith("bare") and type(model) in DECODERS):
            named = lambda module, _: module.name == "ln_f"  # noqa: E731
            _, state = model.apply({"params": params}, tokens, capture_intermediates=named, mutable="intermediates")
            hidden = state["intermediates"]["ln_f"]["__call__"][0]
            return hidden if kind.endswith("bare") else hidden[:, -1] @ params["score"]["kernel"]
        return model.apply({"params": params}, tokens)

    return np.asarray(lj.lift(run, on_dense="error")(adapted))


def tolerance(kind: str) -> float:
    """Of the largest entry, where both sum in float32, in other orders: a Llama's norms divide by small numbers."""
    return 1e-4 if kind.partition(":")[0] in llamas.VARIANTS else 1e-5


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest entry: both sum in float32, in other orders."""
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, float(np.abs(want).max())))
