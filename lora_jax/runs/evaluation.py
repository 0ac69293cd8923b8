"""A run's texts and their scores, its labels and theirs."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from datasets import Dataset
from ml_collections import ConfigDict
from tqdm import tqdm

from lora_jax import Delta, ParamTransform, checkpoints, training
from lora_jax.data import glue
from lora_jax.data.batches import bucketed, in_order
from lora_jax.data.files import check_unicode, of_form
from lora_jax.data.json_files import parse_json
from lora_jax.data.pairs import contexts
from lora_jax.data.tasks import TextTask, references
from lora_jax.generation import completions
from lora_jax.methods.arguments import brief
from lora_jax.metrics import report
from lora_jax.metrics.scores import FILLED
from lora_jax.models.family import dimensions_of
from lora_jax.runs import bases, tasks
from lora_jax.runs.reload import Loaded, load, text_task
from lora_jax.runs.tables import write_json
from lora_jax.training import locks, stopping

TextMetric = Callable[[list[str], list[list[str]]], float]  # (predictions, references of each) -> a figure
Rows = list[dict[str, Any]]  # of predictions.jsonl
SAMPLING = ("temperature", "top_k", "top_p")


class Evaluation(NamedTuple):
    """What `evaluate` and `predict` return: the folder that they wrote, and the figures. An example is in `train`."""

    folder: Path
    result: dict[str, Any]


@brief
@stopping.noted()
def evaluate(
    run: Loaded | str | Path,
    *,
    split: str = "test",
    data: str | Path | None = None,
    limit: int | None = None,
    missing: str | None = None,
    decoding: Mapping[str, Any] = {},
    batch_size: int = 32,
    seed: int = 0,
    metrics: Mapping[str, TextMetric] = {},
    command: str | None = None,
) -> Evaluation:
    """Generates a text for each distinct context of a split, and scores them by the official scores of its data, with
    95% bootstrap intervals. `run` is a workdir, or what `load` returned. A stopped call is resumed.

    Writes evaluation/SPLIT-PARAMS/ into the workdir: predictions.jsonl (context, prediction, references) and
    evaluate.json, the result.

    Args:
      data: where they are, if not where the run's config says.
      limit: only so many contexts, the first ones.
      missing: WebNLG and DART: what stands for references that a context lacks, "first" or "empty" (`metrics.score`).
      decoding, batch_size, seed: as for `complete`.
      metrics: scores besides the official ones.
      command: the command line that makes the result again, kept in it.

    Raises:
      FileNotFoundError: the data are not there.
      ValueError: the run classifies, `missing` has no meaning here, or another process evaluates the same.
      InterruptedError: a signal stopped it (SIGINT, SIGTERM, SIGHUP); the same call resumes it.

    An example is in `train`.
    """
    loaded = run if isinstance(run, Loaded) else load(run)
    task = text_task(loaded.task, loaded.config, loaded.workdir)
    folder = loaded.workdir / "evaluation" / (f"{split}-{loaded.kind}" + (f"-first{limit}" if limit else ""))
    if missing and task.style not in FILLED:
        raise ValueError(f"--missing={missing}: references of {loaded.config.data.name} are not filled, leave it out")
    examples = tasks.load_split(loaded.task, loaded.config, split, data)
    groups = dict(list(contexts(examples).items())[:limit])
    if not groups:
        raise ValueError(f"no contexts to complete: split={split!r}, limit={limit}")
    examples = examples.select([i for i, context in enumerate(examples["context"]) if context in groups])
    check_unicode(examples["completion"], "completion")
    decoding = decoding_options(loaded.config, decoding)
    if task.conversations and loaded.config.data.long == "skip":
        groups = _fitting(loaded, groups, decoding["max_new_tokens"])
    made = {"command": command, "split": split, "decoding": decoding, "missing": missing}
    with locks.locked(folder):
        return _evaluate(loaded, folder, examples, groups, made, metrics, batch_size=batch_size, seed=seed)


def _fitting(loaded: Loaded, groups: Mapping[str, list[str]], max_new_tokens: int) -> dict[str, list[str]]:
    """The contexts, with their references, that leave the model room for an answer; the log says how many do not."""
    tokens, _ = loaded.task.prompts(list(groups), loaded.config, loaded, loaded.spec)
    room = dimensions_of(loaded.model).max_length - max_new_tokens
    fitting = {context: groups[context] for context, ids in zip(groups, tokens, strict=True) if len(ids) <= room}
    if not fitting:
        least = f"every context has more than {room} tokens" if room > 0 else f"the model takes {room + max_new_tokens}"
        raise ValueError(f"{least}: no room for max_new_tokens={max_new_tokens} new ones")
    if left_out := len(groups) - len(fitting):
        logging.warning("skipped %d of %d contexts longer than %d tokens", left_out, len(groups), room)
    return fitting


def _evaluate(
    loaded: Loaded,
    folder: Path,
    examples: Any,
    groups: Mapping[str, Sequence[str]],
    made: Mapping[str, Any],
    metrics: Mapping[str, TextMetric],
    **options: Any,
) -> Evaluation:
    """`evaluate`, of the contexts in `groups` with their references; `made` says how, for the result."""
    task = text_task(loaded.task, loaded.config, loaded.workdir)
    kept = folder / "predictions.jsonl.part"
    resumed, started = kept.exists(), time.perf_counter()
    texts = complete(loaded, list(groups), decoding=made["decoding"], kept=kept, **options)
    stopping.check(folder)
    seconds = None if resumed else time.perf_counter() - started
    rows = [{"context": c, "prediction": text, "references": groups[c]} for c, text in zip(groups, texts, strict=True)]
    if "seen" in examples.column_names:
        seen = dict(zip(examples["context"], examples["seen"], strict=True))
        rows = [row | {"seen": seen[row["context"]]} for row in rows]
    result = {**made, "params": loaded.kind, "step": loaded.step}
    result |= {"contexts": len(groups), "references": sum(map(len, groups.values())), **_validate(loaded, examples)}
    stopping.check(folder)
    result |= {"scores": scores(rows, task, made["missing"], metrics)}
    result |= {"seconds": seconds, "device": jax.devices()[0].device_kind}
    with checkpoints.replaced_together(folder, last="evaluate.json") as new:
        (new / "predictions.jsonl").write_bytes(json_lines(rows))
        write_json(new / "evaluate.json", result)
    kept.unlink()
    return Evaluation(folder, result)


@brief
def predict(
    run: Loaded | str | Path, *, split: str = "valid", data: str | Path | None = None, command: str | None = None
) -> Evaluation:
    """Predicts the labels of a split with a run, of `load` or in a workdir: scores them, or writes what GLUE's server
    takes.

    Writes predictions/SPLIT-PARAMS/ into the workdir: of a split with labels predictions.tsv (index, prediction,
    label) and predict.json, the result; of a test split the file for the server, the result's "file".

    Args:
      split: of MNLI also valid_mismatched and test_mismatched.
      data: where they are, if not where the run's config says.
      command: the command line that makes the result again, kept in it.

    Raises:
      FileNotFoundError: the data are not there.
      ValueError: the run writes texts, or the model's outputs are NaN.

    An example is in `classification`.
    """
    loaded = run if isinstance(run, Loaded) else load(run)
    task, name, workdir = loaded.task, loaded.config.data.name, loaded.workdir
    if task.text:
        raise ValueError(f"{workdir} is a run of {name}: give it to experiments.evaluate and experiments.generate")
    examples = tasks.load_split(task, loaded.config, split, data)
    epoch = task.batches(examples, loaded.config, loaded, loaded.spec)(0)
    objective = task.objective(loaded.config, loaded.model)
    forward = jax.jit(objective.forward)
    parts = [forward(loaded.params, batch) for batch in tqdm(epoch, unit="batch", desc="predict")]
    outputs = in_order(epoch, jax.device_get(parts))
    if (bad := np.flatnonzero(np.isnan(outputs).any(-1))).size:
        raise ValueError(f"the outputs are NaN for {bad.size} of {len(outputs)} examples: look at the parameters")
    predicted = outputs[:, 0] if task.head["head"] == "regression" else outputs.argmax(-1)
    folder = workdir / "predictions" / f"{split}-{loaded.kind}"
    if name in glue.TASKS and "label" not in examples.column_names:
        file, text = glue.submission(name, split, examples, predicted)
        checkpoints.write_atomically(folder / file, text.encode())
        return Evaluation(folder, {"file": str(folder / file), "examples": len(examples)})
    index = examples["index"] if "index" in examples.column_names else range(len(examples))
    rows = zip(index, predicted.tolist(), examples["label"], strict=True)
    text = "".join("\t".join(map(str, row)) + "\n" for row in [("index", "prediction", "label"), *rows])
    result = {"command": command, "task": name, "split": split, "params": loaded.kind, "step": loaded.step}
    figures = objective.metrics(outputs, np.asarray(examples["label"])) if objective.metrics else {}
    result |= {"examples": len(examples), **figures}
    with checkpoints.replaced_together(folder, last="predict.json") as new:
        (new / "predictions.tsv").write_bytes(text.encode())
        write_json(new / "predict.json", result)
    return Evaluation(folder, result)


def decoding_options(config: ConfigDict, given: Mapping[str, Any] = {}) -> dict[str, Any]:
    """How a run decodes: as its config's `decode` says (greedily where it says nothing), but for the options given;
    those of sampling stand instead of the config's beam search."""
    options = {"max_new_tokens": 64, **dict(config.get("decode", {}))}
    if set(given) & set(SAMPLING):
        options = {"max_new_tokens": options["max_new_tokens"]}
    return options | dict(given)


def sampling_key(options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """{"key": that of the seed} where the options of decoding ask for sampling, else nothing."""
    return {"key": jax.random.key(seed)} if set(options) & set(SAMPLING) else {}


def complete(
    loaded: Loaded,
    texts: Sequence[str],
    *,
    decoding: Mapping[str, Any] = {},
    batch_size: int = 32,
    seed: int = 0,
    kept: Path | None = None,
) -> list[str]:
    """The model's completion of each context, the texts.

    Args:
      decoding: options of `generation.generate` instead of those of the run's config.
      batch_size: contexts that are completed together.
      seed: of sampling.
      kept: a file that keeps completions as they come; a killed call resumes from it.

    Raises:
      ValueError: the file holds completions of other contexts or settings; a context is no Unicode text.
      InterruptedError: a signal came, and there is such a file; what it holds is resumed.

    An example is in `train`.
    """
    check_unicode(texts, "context")
    options = decoding_options(loaded.config, decoding)
    settings = options | {"params": loaded.kind, "seed": seed, "batch_size": batch_size, "contexts": list(texts)}
    settings |= {"workdir": str(loaded.workdir.resolve()), "step": loaded.step, "base": loaded.base}
    done = completed(kept, settings) if kept else {}
    tokens, ends = loaded.task.prompts(texts, loaded.config, loaded, loaded.spec)
    options |= _written(loaded.task)
    options |= {"eos": ends, "batch_size": batch_size, "done": done.copy(), **sampling_key(options, seed)}
    batches = completions(loaded.model, loaded.params, loaded.tokenizer, tokens, **options)
    with contextlib.ExitStack() as stack:
        if kept:
            stack.enter_context(stopping.noted())
        bar = stack.enter_context(tqdm(total=len(texts), initial=len(done), unit="text", desc="generate"))
        for batch in batches:
            if kept:
                with checkpoints.naming(kept), kept.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps([row, text], ensure_ascii=False) + "\n" for row, text in batch.items())
            bar.update(len(batch.keys() - done.keys()))
            done |= batch
            if kept and len(done) < len(texts):
                stopping.check(kept)
    return [done[row] for row in range(len(texts))]


def answer(
    base: bases.Base,
    method: ParamTransform,
    delta: Delta,
    strength: float,
    context: str,
    decoding: Mapping[str, Any],
    *,
    task: tasks.Task | None = None,
    config: ConfigDict | None = None,
) -> str:
    """The completion of one context by the base with an adapter of any strength, which is an array in the program:
    only an adapter of other shapes, or a context of another multiple of 16 tokens, is compiled anew. Decoding is of
    `decoding_options`, with a `key` where it samples. `task` and `config`: of the run; by default contexts are those of
    pairs."""
    check_unicode([context], "context")
    params = method.apply(base.params, delta, strength=np.float32(strength))
    tokens, ends = (task.prompts if task else tasks.pair_prompts)([context], config, base, method.spec)
    options = {**(_written(task) if task else {}), **decoding}
    (texts,) = completions(base.model, params, base.tokenizer, tokens, eos=ends, **options)
    return texts[0]


def _written(task: tasks.Task) -> dict[str, Any]:
    """Options of `completions` by which a task's texts come out."""
    return {"paragraphs": True} if task.text and task.text.conversations else {}


def completed(kept: Path, settings: Mapping[str, Any]) -> dict[int, str]:
    """The completions that a killed call left, by the number of their context; makes the file where there is none."""
    head = _head(settings)
    if not kept.is_file():
        checkpoints.write_atomically(kept, head.encode())
        return {}
    raw = kept.read_bytes()
    lines = raw[: raw.rfind(b"\n") + 1]  # the last line may have been cut off
    # those of before 2026-11-30 do not name config and tokenizer of the base
    base = {part: x for part, x in settings.get("base", {}).items() if part in ("source", "shapes", "content")}
    if not lines.startswith((head.encode(), _head({**settings, "base": base}).encode())):
        raise ValueError(f"{kept} was begun with other contexts or settings: delete it, or finish it as it was begun")
    checkpoints.write_atomically(kept, lines)
    done = {}
    for number, line in enumerate(lines.split(b"\n")[1:-1], 2):
        with of_form(f"{kept}:{number}: not [number, text]: delete the line"):
            row, text = parse_json(line, strict=False)
            done[int(row)] = str(text)
    return done


def _head(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, ensure_ascii=False, sort_keys=True) + "\n"


def json_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read_predictions(folder: Path) -> Rows:
    """The rows (context, prediction, references) of an evaluation's folder."""
    checkpoints.finish_replacing(folder)
    file = folder / "predictions.jsonl"
    if not file.is_file():
        others = ", ".join(sorted(path.parent.name for path in folder.parent.glob("*/predictions.jsonl")))
        hint = f"; there {'are' if ',' in others else 'is'} {others}" if others else ""
        raise FileNotFoundError(f"{file} does not exist: experiments.evaluate writes it{hint}")
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        with of_form(f"{file}:{number}: no row of experiments.evaluate"):
            row = parse_json(line or b"{}", strict=False)
            rows += [row | {name: row[name] for name in ("context", "prediction", "references")}] if line else []
    return rows


def scores(
    rows: Rows, task: TextTask, missing: str | None = None, metrics: Mapping[str, TextMetric] = {}
) -> dict[str, dict]:
    """The scores of all rows, and of those of seen and unseen categories where the data tell them apart: of the task's
    style with their intervals, and of further metrics without."""
    parts = {"all": rows}
    if "seen" in rows[0]:
        parts |= {"seen": [row for row in rows if row["seen"]], "unseen": [row for row in rows if not row["seen"]]}
    result = {}
    for name, part in parts.items():
        if part:
            texts = prepared(part, task)
            further = {metric: float(score(*texts)) for metric, score in metrics.items()}
            result[name] = report(*texts, style=task.style, missing=missing)
            result[name] |= {
                metric: dict.fromkeys(("score", "low", "high"), value) for metric, value in further.items()
            }
    return result


def prepared(rows: Rows, task: TextTask) -> tuple[list[str], list[list[str]]]:
    """Predictions and references as the task's scorer gets them."""
    write = task.normalize or str
    return [write(row["prediction"]) for row in rows], [references(task, row["references"]) for row in rows]


def _validate(loaded: Loaded, examples: Dataset) -> dict[str, float]:
    """Nats per label of the examples, as in training, and how many were too long to count."""
    data, objective = loaded.config.data, training.language_model(loaded.model)
    encoded = loaded.task.encode(examples, loaded.config, loaded, loaded.spec)
    batches = bucketed(encoded, data.batch_size, buckets=data.buckets)
    loss = training.validate(objective, loaded.params, batches)["validation_loss"]
    return {"skipped": encoded.skipped, "loss": loss, "perplexity": math.exp(loss)}
