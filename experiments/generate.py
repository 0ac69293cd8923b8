"""Completes contexts with a run's model, greedily.

    python -m experiments.generate --workdir=runs/e2e \\
      --context="name : Blue Spice | Type : coffee shop | area : city centre"
    python -m experiments.generate --workdir=runs/e2e --file=contexts.txt --out=texts.jsonl

A file has one context a line. Prints each context with its text, or writes JSON lines to --out.
"""

from absl import flags

from experiments import cli, reload
from lora_jax import checkpoints
from lora_jax.data.files import read_text

flags.DEFINE_multi_string("context", [], "A context; may be given several times.")
flags.DEFINE_string("file", None, "A text file with one context a line (.gz too).")
flags.DEFINE_string("out", None, "Where to write JSON lines, instead of printing.")


def main() -> None:
    values = flags.FLAGS
    contexts = list(values.context)
    if values.file:
        contexts += [line.strip() for line in read_text(values.file).splitlines() if line.strip()]
    if not contexts:
        raise ValueError("nothing to complete: give --context=TEXT or --file=FILE")
    loaded = reload.load()
    texts = reload.complete_contexts(loaded, contexts)
    if not values.out:
        for context, text in zip(contexts, texts, strict=True):
            print(f"{context}\n    {text}")
        return
    rows = [{"context": c, "prediction": t} for c, t in zip(contexts, texts, strict=True)]
    checkpoints.write_atomically(values.out, reload.json_lines(rows))
    print(f"written: {values.out}")


if __name__ == "__main__":
    cli.run(main)
