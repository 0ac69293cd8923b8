"""A dialogue with a base whose adapter, and its strength, change between the turns.

The strength is an array in the program, and so are the adapters: only one of another shape (another
rank, other targets), or a context of another multiple of 16 tokens, is compiled anew.
"""

import sys
from pathlib import Path

import jax
from absl import flags

from experiments import reload
from lora_jax.data import chat
from lora_jax.runs import bases
from lora_jax.runs.evaluation import answer, decoding_options, sampling_key
from lora_jax.runs.reload import adapter, read_config, text_task
from lora_jax.runs.tasks import task_in

HELP = """  :adapter NAME     another adapter: {names}
  :strength NUMBER  how much of it: 0 the base, 1 as it was trained
  :help             this
  :quit             or the end of input"""
CONTEXTS = """A line is a context, which the model completes. Besides:
"""
TURNS = """A line is what you say; the model answers, and knows what was said before. Besides:
  :reset            begins a new conversation
"""


def hold(further: dict[str, Path]) -> None:
    """Asks for lines on the terminal and answers, until :quit. Starts with the adapter of the flags' workdir, "run".

    Args:
      further: other adapters by name: workdirs or adapter files.

    Raises:
      ValueError: an adapter belongs to another base.
    """
    workdir = Path(flags.FLAGS.workdir)
    config = read_config(workdir)
    task = task_in(config)
    has_turns = text_task(task, config, workdir).conversations
    base = bases.load(config, flags.FLAGS.base)
    paths = ({} if config.method == "none" else {"run": workdir}) | further
    if not paths:
        raise ValueError(f"{workdir} trained nothing (method none): name an adapter, --adapter=NAME:PATH")
    adapters = {name: adapter(path, base) for name, path in paths.items()}
    options = decoding_options(config, reload.decoding())
    options |= sampling_key(options, flags.FLAGS.seed)
    name, strength = next(iter(adapters)), 1.0
    help_text = (TURNS if has_turns else CONTEXTS) + HELP.format(names=", ".join(adapters))
    print(help_text)
    turn = 0
    messages: list[dict[str, str]] = []  # of the conversation so far
    while (line := ask(f"[{name} x {strength:g}] ")) is not None:
        command, _, value = line.partition(" ")
        if command == ":quit":
            return
        if command == ":adapter" and value in adapters:
            name = value
        elif command == ":adapter":
            print(f"no adapter {value!r}: there are {', '.join(adapters)}", flush=True)
        elif command == ":strength" and (number := _number(value)) is not None:
            strength = number
        elif command == ":reset" and has_turns:
            messages = []
        elif line.startswith(":"):
            print(help_text)
        elif line:
            turn += 1
            key = {"key": jax.random.fold_in(options["key"], turn)} if "key" in options else {}
            asked = [*messages, {"role": "user", "content": line}]
            context = chat.dumped(asked) if has_turns else line
            try:
                text = answer(base, *adapters[name], strength, context, options | key, task=task, config=config)
            except ValueError as error:  # too long, for example: the dialogue continues
                print(f"({error})", flush=True)
                continue
            print(text, flush=True)
            if text:  # an empty answer is none
                messages = [*asked, {"role": "assistant", "content": text}]


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
