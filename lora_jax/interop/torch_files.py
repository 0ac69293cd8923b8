"""The tensors of torch checkpoints, as safetensors. Only this module reads pickles, and runs no code in them."""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

from lora_jax.checkpoints import write_atomically
from lora_jax.interop.loralib import IGNORED


def convert(checkpoint: str | Path, out: str | Path) -> tuple[list[str], list[str]]:
    """Writes the tensors of a torch checkpoint as one safetensors file, which appears when it is complete.

    The checkpoint is of `torch.save(state_dict)` or `torch.save({"model_state_dict": state_dict})`, from any device.
    `module.` before all names (DistributedDataParallel) is taken off; tensors that share memory are written once each.

    Returns:
      The names that were written, and what was left out: GPT-2's causal masks, position counters, what is no tensor.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such checkpoint, it would run code on being read, or torch is missing or too old.
    """
    torch = _torch()
    from safetensors.torch import save  # it imports torch

    state, left_out = _state(torch, Path(checkpoint))
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value) and not IGNORED.fullmatch(name)}
    left_out += [str(name) for name in state if name not in tensors]
    if not tensors:
        raise ValueError(f"{checkpoint} holds no weights; it holds {', '.join(left_out) or 'nothing'}")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    try:
        # safetensors takes contiguous tensors that share no memory.
        alone = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        wide = ((name, x.float() if x.itemsize == 1 else x) for name, x in alone.items() if x.is_floating_point())
        infinite = [name for name, x in wide if not x.isfinite().all()]
        content = save(alone, metadata={"format": "pt"})
    except (RuntimeError, ValueError, KeyError) as error:  # sparse or quantized tensors, types unknown to the format
        raise ValueError(f"{checkpoint} has a tensor that safetensors cannot hold: {error}") from error
    if infinite:
        raise ValueError(f"{checkpoint}: {infinite[0]} has entries that are not finite: it is not written")
    write_atomically(out, content)
    return list(alone), left_out


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ValueError("torch is needed to read torch's checkpoints: pip install torch") from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise ValueError(
            f"torch {torch.__version__} can be made to run code by a checkpoint even with weights_only=True "
            "(CVE-2025-32434): pip install --upgrade torch"
        )
    return torch


def _state(torch: Any, path: Path) -> tuple[dict[str, Any], list[str]]:
    """The state dict of a checkpoint, and the names of what stands beside it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch did not write, which fail right after
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {unsafe[1]}" if unsafe else "it is no pickle of torch"
        raise ValueError(
            f"{path} holds more than tensors ({what}) and could run any code, so it was not read; where you trust it, "
            "save the tensors alone: torch.save(loralib.lora_state_dict(model), path)"
        ) from error
    except Exception as error:  # whatever torch raises on damaged files
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is cut off or damaged ({first})") from error
    beside: list[str] = []
    if isinstance(content, dict) and isinstance(content.get("model_state_dict"), dict):
        beside = [str(name) for name in content if name != "model_state_dict"]
        content = content["model_state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors by name")
    if not_names := [name for name in content if not isinstance(name, str)]:
        raise ValueError(f"{path} holds a dict whose keys are no names: {not_names[0]!r}")
    return content, beside
