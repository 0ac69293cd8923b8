"""How an entry point that cannot continue ends: with one message that a user can act on."""

import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
from absl import flags


def with_new_names(arguments: Sequence[str]) -> list[str]:
    """The arguments, in which keys of the config have their new names."""
    if not any(argument.lstrip("-").startswith("config.") for argument in arguments):
        return list(arguments)
    from lora_jax.training.config import RENAMED  # slow to import

    for old, new in RENAMED.items():
        pattern = rf"^(--?config\.){re.escape(old)}(?==|$)"
        arguments = [re.sub(pattern, rf"\g<1>{new}", argument) for argument in arguments]
    return list(arguments)


def with_homes(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the home folder in the place of a `~` that begins a path: a shell leaves --workdir=~/runs to
    the program. Contexts are texts."""

    def expanded(argument: str) -> str:
        name, equals, value = argument.partition("=")
        if name.lstrip("-") == "context" or not name.startswith("-"):
            return argument
        return name + equals + re.sub(r"(?<![^,:])~[\w.-]*(?=/|$)", lambda home: os.path.expanduser(home[0]), value)

    return [expanded(argument) for argument in arguments]


def parse(argv: Sequence[str]) -> list[str]:
    """absl's parsing of the flags; a flag or a key of the config that there is not ends the program."""
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # of ml_collections: a key that is not there
        message = str(error.args[0])
        hint, key = re.search(r"Did you mean .*\?", message), re.findall(r"[a-zA-Z_]+", message)[0]
        advice = hint[0] if hint else "lora_jax/runs/config.py lists the keys."
        end(f"the config has no key {key!r}. {_of_peft(key) or advice}")
    except flags.Error as error:
        message = str(error).strip().splitlines()[-1]
        if missing := re.search(r"Flag --(\w+) must have a value", message):
            example = _EXAMPLES.get(missing[1])
            message = f"--{missing[1]} is missing" + (f", for example {example}" if example else "")
        end(message)


_EXAMPLES = {"config": "--config=configs/e2e.py:medium --workdir=runs/e2e", "workdir": "--workdir=runs/e2e"}


def _of_peft(key: str) -> str:
    """What a key that PEFT or transformers have is called here, as a sentence; "" where there is none."""
    from lora_jax.methods.arguments import FOREIGN  # slow to import

    return f"It is {FOREIGN[key]} here." if key in FOREIGN else ""


def end(message: str, *, at_once: bool = False) -> NoReturn:
    """Ends the program with a message. At once: without what usual exits do, which waits for the other processes, and
    tells of what orbax could not finish."""
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized() and jax.process_index() == 0:
        time.sleep(1)  # the end of this process ends the others: let them say their word
    if at_once or jax.distributed.is_initialized():
        os._exit(1)
    sys.exit(1)


def unraisable(raised: Any) -> None:
    """Python's hook for errors in destructors, without one that says nothing."""
    # 2026-11-29: a read or write that fails leaves tensorstore's others to a loop that orbax has closed.
    if "Event loop is closed" not in str(raised.exc_value):
        sys.__unraisablehook__(raised)
