"""The flags that say which model of a run is used, and how it decodes: what evaluate and generate share."""

from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli  # noqa: F401  defines --code
from lora_jax import runs

flags.declare_key_flag("code")
flags.DEFINE_enum(
    "params",
    "adapted",
    ["base", "adapted", "merged"],
    "The base alone, the base adapted by the run, or the same merged into plain weights.",
)
flags.DEFINE_string("base", None, "The base, where it is no longer where the run's config says.")
flags.DEFINE_integer("batch_size", 32, "Contexts that are completed together.", lower_bound=1)
flags.DEFINE_integer("max_new_tokens", None, "The most tokens of a text (the authors' 64).")
flags.DEFINE_integer("num_beams", None, "Beams; 1 is greedy.")
flags.DEFINE_float("length_penalty", None, "Finished beams score log p / length^length_penalty.")
flags.DEFINE_integer("no_repeat_ngram_size", None, "No n-gram of this size comes twice.")
flags.DEFINE_enum("beam_rule", None, ["hf", "lora_paper"], "The search of transformers, or of the LoRA authors.")
flags.DEFINE_float("temperature", None, "Samples: divides the logits.")
flags.DEFINE_integer("top_k", None, "Samples among the k likeliest tokens.")
flags.DEFINE_float("top_p", None, "Samples among the likeliest tokens that together reach this probability.")
flags.DEFINE_integer("seed", 0, "Of sampling.")

_DECODING = ("max_new_tokens", "num_beams", "length_penalty", "no_repeat_ngram_size", "beam_rule")
_SAMPLING = ("temperature", "top_k", "top_p")


def load() -> runs.Loaded:
    """The run of the flags' workdir."""
    values = flags.FLAGS
    return runs.load(Path(values.workdir), params=values.params, base=values.base)


def decoding() -> dict[str, Any]:
    """The options of decoding that the flags give."""
    given = {name: flags.FLAGS[name].value for name in (*_DECODING, *_SAMPLING)}
    return {name: value for name, value in given.items() if value is not None}


def options() -> dict[str, Any]:
    """The flags as `runs.complete` and `runs.evaluate` take them."""
    return {"decoding": decoding(), "batch_size": flags.FLAGS.batch_size, "seed": flags.FLAGS.seed}
