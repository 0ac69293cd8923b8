"""What the entry points share: flags, several processes as one run, errors that a user can act on as one message."""

import contextlib
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging

from experiments.ending import end, parse, unraisable, with_homes, with_new_names
from lora_jax.distributed import processes
from lora_jax.metrics.statistics import spread  # noqa: F401  used as cli.spread

flags.DEFINE_string("workdir", None, "Folder of the run: made, or resumed if it holds one.")
flags.DEFINE_string("out", None, "What to write: see above.")
flags.DEFINE_string("data", None, "The data, where they are not where the run's config says.")
flags.DEFINE_string("split", None, "Of the data: by default test of a task of generation, valid of one of GLUE.")
flags.DEFINE_multi_string(
    "code",
    [],
    "FILE.py, which registers methods and tasks of your own: it runs. A run's files never run by themselves.",
)
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, of a run of several processes (docs/how_to/devices).")
flags.DEFINE_integer("processes", None, "How many processes the run has.", lower_bound=1)
flags.DEFINE_integer("process", None, "Which of them this one is, from 0.", lower_bound=0)
flags.DEFINE_enum("distributed", None, ["auto"], "auto: the three above are found (Slurm, Open MPI, TPU pods).")
flags.DEFINE_integer("heartbeat", 10, "Seconds of silence after which a process counts as dead.", lower_bound=1)


def run(main: Callable[[], None]) -> None:
    """absl's `app.run`, but a bad flag or a ValueError, TypeError or OSError of main ends the
    program with its message alone and exit code 1; -v=1 shows where it came from. An InterruptedError, what a run that
    a signal stopped ends in, ends it with 128 + the number of the signal.

    With the flags of several processes it makes them one run first; the first one prints. One that fails ends at once,
    without waiting for the others, which then end as well."""

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
            # orbax tells each step it takes, and every error with its traceback before it raises it
            logging.get_absl_logger().setLevel("CRITICAL")
            sys.unraisablehook = unraisable
        if flags.FLAGS.verbosity > 0:
            jax.config.update("jax_traceback_filtering", "off")  # the library's own errors keep theirs too
        if len(argv) > 1:
            end(f"{argv[1]!r} is not expected: write --flag=value")
        keep_compiled()
        values = flags.FLAGS
        try:
            several = values.coordinator, values.processes, values.process
            processes.connect(*several, auto=values.distributed == "auto", heartbeat=values.heartbeat)
            with contextlib.ExitStack() as stack:
                if jax.distributed.is_initialized() and jax.process_index() > 0:
                    stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                if values.code:
                    from lora_jax.runs.methods import run_file  # slow to import

                    for file in values.code:
                        run_file(file)
                main()
        except InterruptedError as error:
            from lora_jax.training import stopping  # slow to import

            if processes.is_primary():
                print(error, flush=True)
            sys.exit(128 + (stopping.requested() or signal.SIGINT))
        except (ValueError, TypeError, OSError) as error:
            if flags.FLAGS.verbosity > 0:
                traceback.print_exc()
            end(str(error), at_once=isinstance(error, OSError))
        except (Exception, KeyboardInterrupt) as error:
            if not jax.distributed.is_initialized():
                raise
            if flags.FLAGS.verbosity > 0 or not isinstance(error, jax.errors.JaxRuntimeError):
                traceback.print_exc()
            reason = (str(error).splitlines() or [""])[0]
            end(f"{type(error).__name__} {reason} (has another process of the run ended?)")

    sys.argv[1:] = with_homes(with_new_names(sys.argv[1:]))  # ml_collections reads sys.argv
    app.run(guarded, flags_parser=parse)


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
