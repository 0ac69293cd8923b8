"""A dialogue with a base whose adapter, and its strength, change between the turns.

The strength is an array in the program, and so are the adapters: only one of another shape (another
rank, other targets), or a context of another multiple of 16 tokens, is compiled anew.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments import reload
from lora_jax import Delta, ParamTransform, checkpoints
from lora_jax.data.pairs import prompts
from lora_jax.generation import complete, end_tokens
from lora_jax.runs import bases
from lora_jax.runs.methods import placeholders

HELP = """A line is a context, which the model completes. Besides:
  :adapter NAME     another adapter: {names}
  :strength NUMBER  how much of it: 0 the base, 1 as it was trained
  :help             this
  :quit             or the end of input"""


class Adapter(NamedTuple):
    method: ParamTransform
    delta: Delta


def hold(further: dict[str, Path]) -> None:
    """Asks for lines on the terminal and answers, until :quit. Starts with the adapter of the flags' workdir, "run".

    Args:
      further: other adapters by name: workdirs or adapter files.

    Raises:
      ValueError: an adapter belongs to another base.
    """
    workdir = Path(flags.FLAGS.workdir)
    config = reload.config_of(workdir, classifies=False)
    base = bases.load(config, flags.FLAGS.base)
    places = {"run": workdir, **further}
    adapters = {name: load(path, base) for name, path in places.items() if config.method != "none" or path != workdir}
    if not adapters:
        raise ValueError(f"{workdir} trained nothing (method none): name an adapter, --adapter=NAME:PATH")
    options = reload.decoding(config)
    options |= reload.sampling_key(options)
    name, strength = next(iter(adapters)), 1.0
    help_text = HELP.format(names=", ".join(adapters))
    print(help_text)
    turn = 0
    while (line := ask(f"[{name} x {strength:g}] ")) is not None:
        command, _, value = line.partition(" ")
        if command == ":quit":
            return
        if command == ":adapter" and value in adapters:
            name = value
        elif command == ":strength" and (number := _number(value)) is not None:
            strength = number
        elif line.startswith(":"):
            print(help_text)
        elif line:
            turn += 1
            own = {"key": jax.random.fold_in(options["key"], turn)} if "key" in options else {}
            answer(base, adapters[name], strength, line, options | own)


def answer(base: bases.Base, adapter: Adapter, strength: float, context: str, options: dict[str, Any]) -> None:
    """Prints what the model says of a context."""
    eos = base.model.config.eos_token_id
    ends = end_tokens(base.tokenizer, eos)
    params = adapter.method.apply(base.params, adapter.delta, strength=np.float32(strength))
    try:
        asked = prompts([context], base.tokenizer, eos=eos, **placeholders(adapter.method.spec, base.model))
        (text,) = complete(base.model, params, base.tokenizer, asked, eos=ends, progress=False, **options)
    except ValueError as error:  # too long, for example: the dialogue goes on
        text = f"({error})"
    print(text, flush=True)


def load(path: Path, base: bases.Base) -> Adapter:
    """The adapter of a workdir or a file, for that base."""
    if (path / "config.json").is_file():
        reload.config_of(path)  # which knows a method of one's own
        run = checkpoints.load(path)
        checkpoints.check_base(checkpoints.meta_of(path)["base"], base.identity, path)
        return Adapter(run.method, run.delta)
    return Adapter(*bases.adapter(path, base))


def ask(question: str) -> str | None:
    """A line of input, or None at its end."""
    try:
        return input(question if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
