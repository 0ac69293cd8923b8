"""What the entry points share: flags, and errors that a user can act on as one message."""

import os
import re
import shlex
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags, logging

flags.DEFINE_string("workdir", None, "Folder of the run: made, or gone on with if it holds one.")
flags.DEFINE_string("out", None, "What to write: see above.")
flags.DEFINE_string("data", None, "The data, where they are not where the run's config says.")
flags.DEFINE_string("split", None, "Of the data: by default test of a task of generation, valid of one of GLUE.")


def run(main: Callable[[], None]) -> None:
    """absl's `app.run`, but a bad flag or a ValueError, TypeError or OSError of main ends the
    program with its message alone and exit code 1; -v=1 shows where it came from."""

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax and others tell each step they take
        if len(argv) > 1:
            _end(f"{argv[1]!r} is not expected: write --flag=value")
        keep_compiled()
        try:
            main()
        except (ValueError, TypeError, OSError) as error:
            if flags.FLAGS.verbosity > 0:
                traceback.print_exc()
            _end(str(error))

    app.run(guarded, flags_parser=_parse)


def keep_compiled() -> None:
    """Keeps what is compiled for the next process, in lora_jax of the user's cache folder, unless JAX has been told of
    another one (JAX_COMPILATION_CACHE_DIR)."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lora_jax"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if jax.config.values["jax_compilation_cache_max_size"] < 0:
            jax.config.update("jax_compilation_cache_max_size", 4 * 2**30)


def command(name: str) -> str:
    """The command line of this process, of the entry point of that name, for what is made again with it."""
    return shlex.join(["python", "-m", f"experiments.{name}", *sys.argv[1:]])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range, as `experiments.results` shows them."""
    return {"score": statistics.median(values), "low": min(values), "high": max(values)}


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # of ml_collections: a key that is not there
        message = str(error.args[0])
        hint = re.search(r"Did you mean .*\?", message)
        said = hint[0] if hint else "The config file lists the keys."
        _end(f"the config has no key {re.findall(r'[a-zA-Z_]+', message)[0]!r}. {said}")
    except flags.Error as error:
        _end(str(error).strip().splitlines()[-1])


def _end(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
