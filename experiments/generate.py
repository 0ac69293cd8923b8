"""Completes contexts with a run's model, as its config decodes or the flags say.

    python -m experiments.generate --workdir=runs/e2e \\
      --context="name : Blue Spice | Type : coffee shop | area : city centre"
    python -m experiments.generate --workdir=runs/e2e --file=contexts.txt --out=texts.jsonl
    python -m experiments.generate --workdir=runs/e2e --interactive --adapter=other:runs/other

A file has one context a line; of a run on conversations it is what a user says (docs/how_to/instruct.md). Prints each
context with its text, or writes JSON lines to --out, where the same command resumes after it was stopped. --interactive
asks for contexts, or holds a conversation, and lets the adapter and its strength be changed between them; --adapter
names further ones.
"""

from pathlib import Path

from absl import flags

from experiments import cli, dialogue, reload
from lora_jax import checkpoints, runs
from lora_jax.data.files import read_text
from lora_jax.runs.evaluation import json_lines

flags.DEFINE_multi_string("context", [], "A context; may be given several times.")
flags.DEFINE_string("file", None, "A text file with one context a line (.gz too).")
flags.declare_key_flag("out")
flags.DEFINE_bool("interactive", False, "Asks for contexts.")
flags.DEFINE_multi_string("adapter", [], "NAME:PATH, a further adapter for --interactive: a workdir or a file.")
flags.adopt_module_key_flags(reload)
flags.declare_key_flag("workdir")
flags.mark_flag_as_required("workdir")


def main() -> None:
    values = flags.FLAGS
    if values.interactive == bool(values.context or values.file or values.out):
        raise ValueError("give --interactive, or else contexts: --context=TEXT or --file=FILE")
    if values.adapter and not values.interactive:
        raise ValueError("--adapter is for --interactive: otherwise --workdir names what is used")
    if values.interactive:
        return dialogue.hold(dict(_named(text) for text in values.adapter))
    contexts = list(values.context)
    if values.file:
        # not splitlines: a context may hold its rarer line ends
        contexts += [line.strip() for line in read_text(values.file).split("\n") if line.strip()]
    if not contexts:
        raise ValueError(f"nothing to complete: no contexts in {values.file}")
    loaded = reload.load()
    if not values.out:
        for context, text in zip(contexts, runs.complete(loaded, contexts, **reload.options()), strict=True):
            print(f"{context}\n    {text}")
        return
    kept = Path(f"{values.out}.part")
    texts = runs.complete(loaded, contexts, kept=kept, **reload.options())
    rows = [{"context": c, "prediction": t} for c, t in zip(contexts, texts, strict=True)]
    checkpoints.write_atomically(values.out, json_lines(rows))
    kept.unlink()
    print(f"written: {values.out}")


def _named(text: str) -> tuple[str, Path]:
    name, _, path = text.partition(":")
    if not name or not path:
        raise ValueError(f"--adapter={text!r}: write NAME:PATH")
    return name, Path(path)


if __name__ == "__main__":
    cli.run(main)
