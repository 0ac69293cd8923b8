"""How an entry point that cannot continue ends: with one message that a user can act on."""

import difflib
import itertools
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
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
    """absl's parsing of the flags; a flag, a config file or a key of it that there is not ends the program."""
    _need_config_file(argv)
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # of ml_collections: a key that is not there
        message = str(error.args[0])
        hint, key = re.search(r"Did you mean .*\?", message), re.findall(r"\w+", message)[0]
        end(f"the config has no key {key!r}. {hint[0] if hint else _here(key, argv)}")
    except flags.Error as error:
        message = str(error).strip().splitlines()[-1]
        if missing := re.search(r"Flag --(\w+) must have a value", message):
            example = _EXAMPLES.get(missing[1])
            message = f"--{missing[1]} is missing" + (f", for example {example}" if example else "")
        end(message.removeprefix("ValueError: "))


_EXAMPLES = {
    "config": "--config=configs/e2e.py:medium --workdir=runs/e2e",
    "workdir": "--workdir=runs/e2e",
    "topology": "--topology=v5e:4x8",
}


# Options of PEFT that are several things in a config.
_OF_PEFT = {
    "target_modules": "lora.select, globs as '**/attn/{query,value}/kernel'",
    "layers_to_transform": "lora.select, globs as '**/h_{10,11}/attn/query/kernel'",
    "modules_to_save": "method=lora+tune, with tune.select",
    "use_dora": "method=dora",
    "use_rslora": "lora.scale_rule='alpha/sqrt(r)'",
}


def _here(key: str, argv: Sequence[str]) -> str:
    """What to write for a key that the config does not have, as a sentence: of PEFT, of transformers, or of ours
    without its group."""
    from flax.traverse_util import flatten_dict  # slow to import

    from lora_jax.methods.arguments import FOREIGN
    from lora_jax.runs.config import default_config

    if key in _OF_PEFT:
        return f"It is {_OF_PEFT[key]} here."
    keys = {
        name
        for kind in ("generation", "classification", "chat")
        for name in flatten_dict(default_config(kind).to_dict(), sep=".")
    }
    written = [re.match(rf"--?config\.((?:\w+\.)*){key}(?:=|$)", argument) for argument in argv]
    group = next((match[1] for match in written if match), "")
    ours = FOREIGN.get(key, key)
    for wanted in (group + ours, f"lora.{ours}"):
        if wanted in keys:
            return f"It is {wanted} here."
    others = sorted(name for name in keys if name.endswith(f".{ours}") and not name.startswith("sweep."))
    return f"It is {' or '.join(others[:3])} here." if others else "lora_jax/runs/config.py lists the keys."


def _need_config_file(argv: Sequence[str]) -> None:
    """Ends the program where --config names a file that is not there, of which ml_collections tells only when the
    config is used."""
    for argument, following in itertools.pairwise([*argv, ""]):
        name, equals, value = argument.partition("=")
        if name not in ("--config", "-config"):
            continue
        file = Path((value if equals else following).partition(":")[0])
        if not file.is_file():
            near = difflib.get_close_matches(file.stem, [path.stem for path in file.parent.glob("*.py")], 1, 0.5)
            hint = f"did you mean {file.parent / near[0]}.py?" if near else f"for example {_EXAMPLES['config']}"
            end(f"--config: there is no file {str(file)!r}; {hint}")


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
