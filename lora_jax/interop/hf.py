"""Hugging Face folders, both ways: config.json, model.safetensors and tokenizer.json."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from flax import linen as nn
from jax import Array
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from lora_jax.interop import hf_encoder, hf_gpt2
from lora_jax.interop.folders import INDEX, WEIGHTS, inside, read_json, read_tensors

# By config.json's `model_type`. A family is a module with MODEL, IGNORED, `config_of`, `from_hf` and `to_hf`.
FAMILIES: dict[str, ModuleType] = {"gpt2": hf_gpt2, "roberta": hf_encoder, "bert": hf_encoder}


def load(
    folder_or_hub_id: str | os.PathLike,
    *,
    head: str | None = None,
    labels: int | None = None,
    tie: bool | None = None,
    key: Array | None = None,
) -> tuple[nn.Module, dict, Tokenizer | None]:
    """A model, its parameters and its tokenizer from a folder or from the Hugging Face Hub.

    Args:
      folder_or_hub_id: a folder, or else a name on the Hub ("openai-community/gpt2").
      head: the head that is wanted; made anew, with a warning, where the files have none. GPT-2
        has "lm" only, and has it anyway unless the files say that it is untied and lack it.
        Encoders have "classification", "regression", or by default what the files have.
      labels: how many classes a classification head has; a head of another number is not used.
      tie: whether GPT-2's head is the token embedding; None: as config.json says. False copies it.
      key: the key of a head that is made anew; an encoder's has one by default.

    Returns:
      `(model, params, tokenizer)`: float32 parameters as nested dicts in the loop layout
      (`h_0`, ...); the tokenizer is None where there is no tokenizer.json. `model.config` has no
      dropout, whatever config.json says: its rates concern training only.

    Raises:
      FileNotFoundError: neither such a folder nor such a model, or files are missing.
      ValueError: damaged files; a missing, extra, misshapen or non-finite tensor; a config field
        that changes the function and is not supported; a missing head that is not asked for.
    """
    folder = _folder(folder_or_hub_id)
    family, fields = _described(folder)
    tensors = read_tensors(folder, family.IGNORED)
    model, params = family.from_hf(fields, tensors, str(folder), head=head, labels=labels, tie=tie, key=key)
    return model, params, _tokenizer(folder, model.config.vocab_size)


def without_weights(folder: str | os.PathLike) -> nn.Module:
    """The model that a folder's config.json describes, an encoder without pooler and head; no weights are read.

    Raises:
      FileNotFoundError, ValueError: of config.json, as `load`.
    """
    family, fields = _described(Path(folder))
    return family.MODEL(family.config_of(fields, str(folder)))


def tensor_names(folder_or_hub_id: str | os.PathLike) -> set[str]:
    """The names of the tensors of what `load` has read before; no weights are read."""
    folder = _folder(folder_or_hub_id)
    if not inside(folder, WEIGHTS).is_file():
        return set(read_json(folder / INDEX)["weight_map"])
    with safe_open(folder / WEIGHTS, "numpy") as file:
        return set(file.keys())


def save(folder: str | os.PathLike, model: nn.Module, params: Any, tokenizer: Tokenizer | None = None) -> None:
    """Writes a folder that `load` and transformers' `from_pretrained` read.

    Parameters of either layout, of float32, float16 or bfloat16, are stored as they are. Files of
    the same names are replaced only when all new ones are complete; others stay.

    Raises:
      ValueError: the parameters are not the model's (the names and shapes are shown).
      TypeError: adapted parameters (merge them first), or a model of no known family.
    """
    family = next((f for f in FAMILIES.values() if isinstance(model, f.MODEL)), None)
    if family is None:
        raise TypeError(f"{type(model).__name__} has no Hugging Face form here")
    fields, tensors = family.to_hf(model, params)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        complete = Path(temporary)
        save_file(tensors, complete / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(str(complete / "tokenizer.json"))
        (complete / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        shutil.copymode(complete / "config.json", complete / WEIGHTS)  # safetensors lets the owner read only
        for file in complete.iterdir():
            os.replace(file, folder / file.name)


def _described(folder: Path) -> tuple[ModuleType, dict[str, Any]]:
    """The family that config.json names, and its fields."""
    fields = read_json(folder / "config.json")
    kind = fields.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{folder}: model_type {kind!r} is none of {', '.join(FAMILIES)}")
    return FAMILIES[kind], fields


def _folder(source: str | os.PathLike) -> Path:
    """The folder itself, or the local copy of a model on the Hub."""
    if Path(source).is_dir():
        return Path(source)
    import huggingface_hub  # slow to import, and seldom needed

    try:
        wanted = ["config.json", WEIGHTS, INDEX, "model-*.safetensors", "tokenizer.json"]
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=wanted))
    except Exception as error:  # of the Hub, the network or the disk: the way out is the same
        raise FileNotFoundError(
            f"there is no folder {source}, and https://huggingface.co/{source} could not be fetched "
            f"({type(error).__name__}); download its config.json, {WEIGHTS} and tokenizer.json "
            "and name their folder"
        ) from error


def _tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    path = inside(folder, "tokenizer.json")
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no tokenizer ({error})") from error
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.get_vocab_size()} tokens, but config.json says vocab_size {vocab_size}"
        )
    return tokenizer
