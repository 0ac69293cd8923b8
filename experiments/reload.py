"""A run from its workdir, ready to use: what evaluate and generate share."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict
from tokenizers import Tokenizer

import lora_jax as lj
from experiments import bases
from lora_jax import checkpoints
from lora_jax.data.pairs import prompts
from lora_jax.generation import complete, end_tokens
from lora_jax.models import gpt2

flags.DEFINE_enum(
    "params",
    "adapted",
    ["base", "adapted", "merged"],
    "The base alone, the base adapted by the run, or the same merged into plain weights.",
)
flags.DEFINE_string("base", None, "The base, where it is no longer where the run's config says.")
flags.DEFINE_integer("max_new_tokens", 64, "The most tokens of a text (the authors' 64).")
flags.DEFINE_integer("batch_size", 32, "Contexts that are completed together.")
flags.mark_flags_as_required(["workdir"])


class Loaded(NamedTuple):
    """A run's model, with the parameters that the flags ask for."""

    config: ConfigDict
    model: gpt2.GPT2
    params: Any
    tokenizer: Tokenizer
    step: int  # of the checkpoint; 0 for the base


def load() -> Loaded:
    """The run of the flags' workdir.

    Raises:
      FileNotFoundError: no run there, or no base where its config or --base says.
      ValueError: the base is another than the run's.
    """
    workdir, which = Path(flags.FLAGS.workdir), flags.FLAGS.params
    file = workdir / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: is {workdir} the workdir of a run?")
    config = ConfigDict(json.loads(file.read_text()))
    if which != "base" and config.method == "none":
        raise ValueError(f"{workdir} trained nothing (method none): there is --params=base only")
    model, params, tokenizer, identity = bases.load(config, flags.FLAGS.base)
    if which == "base":
        return Loaded(config, model, params, tokenizer, 0)
    checkpoints.check_base(checkpoints.base_of(workdir), identity, workdir)
    run = checkpoints.load(workdir)
    adapted = run.method.apply(lj.without_tuned(params, run.delta), run.delta)
    return Loaded(config, model, lj.merge(adapted) if which == "merged" else adapted, tokenizer, run.step)


def complete_contexts(loaded: Loaded, contexts: list[str]) -> list[str]:
    """What the model says of each context."""
    eos = loaded.model.config.eos_token_id
    return complete(
        loaded.model,
        loaded.params,
        loaded.tokenizer,
        prompts(contexts, loaded.tokenizer, eos=eos),
        max_new_tokens=flags.FLAGS.max_new_tokens,
        eos=end_tokens(loaded.tokenizer, eos),
        batch_size=flags.FLAGS.batch_size,
    )


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
