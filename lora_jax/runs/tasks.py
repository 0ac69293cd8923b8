"""Tasks: what a run learns from which data; configs know them by a name.

A task of a user's package, passed to `train` or registered:

    register_task("reviews", classification(load_reviews, ("bad", "good")))
    config.data.name = "reviews"
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from ml_collections import ConfigDict

from lora_jax import training
from lora_jax.data import batches, glue, pairs, sentences, tasks
from lora_jax.data.batches import Schedule
from lora_jax.data.encoded import Conversations, Encoded
from lora_jax.data.tasks import TextTask
from lora_jax.generation import end_tokens
from lora_jax.metrics.glue import glue as glue_metrics
from lora_jax.metrics.glue import need_ids
from lora_jax.models.family import dimensions_of
from lora_jax.runs import methods

Metrics = Callable[[np.ndarray, np.ndarray], dict[str, float]]


def encode_pairs(examples: Dataset, config: ConfigDict, base: Any, spec: Mapping[str, Any]) -> pairs.Encoded:
    """Tokens of contexts and completions, as a config says, with the placeholders of a method of that spec."""
    model, length = base.model, min(config.data.length, dimensions_of(base.model).max_length)
    options = {"eos": model.config.eos_token_id, "length": length, "long": config.data.long}
    return pairs.encode(examples, base.tokenizer, **options | methods.placeholders(spec, model))


def pair_prompts(
    contexts: Sequence[str], config: ConfigDict, base: Any, spec: Mapping[str, Any]
) -> tuple[list[list[int]], list[int]]:
    """The tokens of contexts, with the placeholders of a method of that spec, and the tokens that end a completion."""
    eos = base.model.config.eos_token_id
    inserted = methods.placeholders(spec, base.model)
    return pairs.prompts(contexts, base.tokenizer, eos=eos, **inserted), end_tokens(base.tokenizer, eos)


class Task(NamedTuple):
    """What a run learns.

    Attributes:
      load: (path, split) -> examples, in whatever form `batches` takes; split is "train", "valid" or another.
      batches: (examples, config, base, spec) -> their schedule. The base has model and tokenizer, the spec is the
        method's, {} of none: `methods.placeholders` says which tokens it inserts.
      objective: (config, model) -> the objective, with its metrics.
      head: of the model, as `hf.load` takes it: {"head": "classification", "labels": 3}; {} for none.
      text: how completions are scored; None where the task writes no text.
      encode: of a task that writes text, (examples, config, base, spec) -> its examples as `batches.bucketed` takes
        them.
      prompts: of a task that writes text, (contexts, config, base, spec) -> the tokens that the model continues for
        each context, and the tokens that end a text.
      save_format: (config, base, folder) writes what a merged model needs besides, its chat template; None: nothing.

    An example is in `train`.
    """

    load: Callable[[str | Path, str], Any]
    batches: Callable[[Any, ConfigDict, Any, Mapping[str, Any]], Schedule]
    objective: Callable[[ConfigDict, Any], training.Objective]
    head: Mapping[str, Any] = {}
    text: TextTask | None = None
    encode: Callable[[Any, ConfigDict, Any, Mapping[str, Any]], Encoded | Conversations] = encode_pairs
    prompts: Callable[..., tuple[list[list[int]], list[int]]] = pair_prompts
    save_format: Callable[[ConfigDict, Any, Path], None] | None = None


_TASKS: dict[str, Task] = {}


def register_task(name: str, task: Task) -> None:
    """Makes a task known to configs by this name (`config.data.name`), in place of an earlier one of that name.

    An example is in `train`.
    """
    _TASKS[name] = task


def task_named(name: str) -> Task:
    """The task of that name: registered, of GLUE, of `data.tasks`, or "FILE.py:NAME", a Task in a Python file, which
    runs. Where there is none, a ValueError shows those there are.

    >>> from lora_jax import runs
    >>> runs.task_named("mnli").head
    {'head': 'classification', 'labels': 3}
    """
    return _task(name, methods.from_file)


def task_in(config: ConfigDict) -> Task:
    """The task that a config names, which may be a stored one: as `task_named`, but no file runs; a ValueError says how
    to run it."""
    return _task(config.data.name, partial(methods.already_run, what="data.name"))


def _task(name: str, from_file: Callable[[str], Any]) -> Task:
    if ".py:" in name:
        task = from_file(name)
        if not isinstance(task, Task):
            raise ValueError(f"data.name is {name!r}, but that is no Task")
        return task
    if name in _TASKS:
        return _TASKS[name]
    if name in glue.TASKS:
        return classification(partial(glue.load, name), glue.TASKS[name].labels, partial(_glue_metrics, name))
    if name in tasks.TASKS:
        return generation(tasks.TASKS[name])
    names = ", ".join([*tasks.TASKS, *glue.TASKS, *_TASKS])
    raise ValueError(f"no task {name!r} (data.name): one of {names}; or register_task, or task=")


def generation(text: TextTask) -> Task:
    """Completing contexts, by a model that predicts the next token. An example is in `train`."""

    def objective(config: ConfigDict, model: Any) -> training.Objective:
        return training.language_model(model, config.label_smoothing)

    def schedule(examples: Dataset, config: ConfigDict, base: Any, spec: Mapping[str, Any]) -> Schedule:
        encoded = encode_pairs(examples, config, base, spec)
        return batches.bucketed(encoded, config.data.batch_size, config.seed, buckets=config.data.buckets)

    return Task(text.load, schedule, objective, text=text)


def load_split(task: Task, config: ConfigDict, split: str, path: str | Path | None = None) -> Any:
    """The examples of a split: of `path` where it is given, else where the config says.

    That is `data.path`, with all splits, or the files `data.train` and `data.valid`. Without the latter one of twenty
    examples of the former, drawn at random, 1,000 at most, is held out for validation.

    Raises:
      FileNotFoundError, ValueError: as of `task.load`; or the config names no data, `data.train` is too small to be
        divided, or the split is neither of them.
    """
    train, valid = config.data.get("train"), config.data.get("valid")
    if path or not (train or valid):
        if not path and not config.data.path and "train" in config.data:
            raise ValueError("no data: --config.data.train=FILE, or --config.data.path=FOLDER")
        return task.load(path or config.data.path, split)
    if not train:
        raise ValueError(f"data.valid={valid} goes with data.train: a folder, data.path, has its own validation")
    if split not in ("train", "valid"):
        raise ValueError(f"data.train={train} has no split {split!r}: give --split=valid, or a file by --data")
    if valid:
        return task.load(valid if split == "valid" else train, split)
    examples = task.load(train, "train")
    if len(examples) < 2:
        raise ValueError(f"{train} has {len(examples)} examples, none to validate with: give data.valid")
    order = np.random.default_rng(0).permutation(len(examples))
    held_out = min(-(-len(examples) // 20), 1000)
    return examples.select(np.sort(order[:held_out] if split == "valid" else order[held_out:]))


def classification(
    load: Callable[[str | Path, str], Dataset], labels: Sequence[str], metrics: Metrics | None = None
) -> Task:
    """One label for each sentence or pair of sentences, by an encoder.

    Args:
      load: (path, split) -> a Dataset with columns `first`, of pairs `second`, and `label`, an id.
      labels: their names, in the order of their ids; none for a regression.
      metrics: (outputs (N, labels), labels (N,)) -> {name: value}; None: the accuracy, of a regression nothing.

    >>> import tempfile, jax, numpy as np
    >>> from datasets import Dataset
    >>> from lora_jax import runs
    >>> from lora_jax.interop import hf
    >>> from lora_jax.models import encoder
    >>> from tokenizers import Tokenizer, models, processors
    >>> def load(path, split):
    ...     return Dataset.from_dict({"first": ["good", "bad"] * 2, "label": [1, 0] * 2})
    >>> task = runs.classification(load, ("bad", "good"))
    >>> words = {"<s>": 0, "<pad>": 1, "</s>": 2, "bad": 3, "good": 4}
    >>> tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    >>> tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    >>> sizes = {"vocab_size": 5, "max_positions": 16, "hidden": 8, "layers": 1, "heads": 2, "inner": 16}
    >>> model = encoder.Encoder(encoder.EncoderConfig(**sizes))
    >>> params = jax.jit(model.init)(jax.random.key(0), np.ones((1, 4), "int32"))["params"]
    >>> config = runs.default_config("classification")
    >>> config.seeds, config.epochs, config.data.batch_size = (), 1, 2
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     config.base = f"{folder}/base"
    ...     hf.save(config.base, model, params, tokenizer)
    ...     result = runs.train(config, f"{folder}/run", task=task)
    ...     runs.predict(runs.load(f"{folder}/run", task=task)).result["examples"]
    step 2: validation loss 0.6931, accuracy 0.5000
    4
    """
    head = {"head": "classification", "labels": len(labels)} if labels else {"head": "regression", "labels": 1}
    metrics = metrics or (_accuracy if labels else None)

    def schedule(examples: Dataset, config: ConfigDict, base: Any, spec: Mapping[str, Any]) -> Schedule:
        length = min(config.data.length, dimensions_of(base.model).max_length)
        inserted = methods.placeholders(spec, base.model)
        if inserted["after"]:
            raise ValueError(f"infix={len(inserted['after'])}: a text to classify has a prefix alone")
        options = {"length": length, "labels": max(len(labels), 1), "before": inserted["before"]}
        encoded = sentences.encode(examples, base.tokenizer, **options)
        return batches.classified(encoded, config.data.batch_size, config.seed, buckets=config.data.buckets)

    return Task(load, schedule, lambda config, model: training.classifier(model, metrics), head)


def _accuracy(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    need_ids(labels, outputs.shape[-1], "label")
    return {"accuracy": float(np.mean(outputs.argmax(-1) == labels))}


def _glue_metrics(name: str, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return glue_metrics(name, outputs.argmax(-1) if glue.TASKS[name].labels else outputs[:, 0], labels)
