"""The base of a config: what train, evaluate and generate begin with."""

import dataclasses
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from tokenizers import Tokenizer

from lora_jax import checkpoints
from lora_jax.interop import hf
from lora_jax.models import gpt2

PUBLIC = "huggingface.co/gpt2, gpt2-medium and gpt2-large"


class Base(NamedTuple):
    """A pretrained model, computed as the config says (dtype, scan_layers, remat)."""

    model: gpt2.GPT2
    params: Any
    tokenizer: Tokenizer
    identity: dict[str, str]


def load(config: ConfigDict, source: str | None = None) -> Base:
    """The base at `source`, or where the config says.

    Raises:
      FileNotFoundError: it or its tokenizer is not there.
    """
    source = source or config.base
    try:
        model, params, tokenizer = hf.load(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. The paper's bases are public: {PUBLIC}") from error
    if tokenizer is None:
        raise FileNotFoundError(f"{source} has no tokenizer.json: put the base's own there")
    identity = checkpoints.identity(params, source)
    model = gpt2.GPT2(dataclasses.replace(model.config, **config.model.to_dict()))
    if model.config.scan_layers:
        params = gpt2.to_scanned(params)
    return Base(model, params, tokenizer, identity)
