"""Model cards: the README.md beside what a run is exported as, in the form that the Hugging Face Hub reads.

What is not known is left out: a license that the base's files do not name, data without a name on the Hub, scores that
nobody computed for this step.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

import lora_jax as lj
from lora_jax import checkpoints
from lora_jax.core.arrays import is_frozen
from lora_jax.core.extras import extra
from lora_jax.data.files import is_hub_name
from lora_jax.data.json_files import read_json
from lora_jax.distributed import processes
from lora_jax.interop import hf
from lora_jax.runs.tables import COLUMNS
from lora_jax.runs.tasks import Task, task_in

_SIGNED = re.compile(r"\n<!-- written by lora_jax, ([0-9a-f]{16}) -->\n\Z")
_LIBRARIES = {"peft": "peft", "merged": "transformers", "native": "lora_jax"}
_PLAIN = {"method", "of", "axes", "sites", "peft", "vocabulary", "dtype"}  # options of a method that say nothing here


class Exported(NamedTuple):
    """What a card is about."""

    workdir: Path
    config: ConfigDict
    form: str  # of `export_run`
    source: str  # of the base
    method: lj.ParamTransform
    delta: lj.Delta
    step: int

    @property
    def task(self) -> Task | None:
        """None where it is in a Python file that has not run."""
        try:
            return task_in(self.config)
        except ValueError:
            return None


def write(folder: str | Path, exported: Exported) -> None:
    """Writes README.md into the folder of an export. One that is there stays, with a warning, unless this function
    wrote it and nobody changed it since. Of several processes the first one writes."""
    if not processes.is_primary():
        return None
    file = Path(folder) / "README.md"
    if file.exists() and not _is_ours(file):
        return logging.warning("%s was there and stays: delete or move it to get a model card", file)
    text = _card(exported, Path(folder))
    return checkpoints.write_atomically(file, f"{text}\n<!-- written by lora_jax, {_digest(text)} -->\n".encode())


def _is_ours(file: Path) -> bool:
    text = file.read_text(encoding="utf-8", errors="replace")
    signed = _SIGNED.search(text)
    return signed is not None and signed[1] == _digest(text[: signed.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _card(exported: Exported, folder: Path) -> str:
    origin = hf.origin_of(exported.source)
    base = origin.name or exported.source
    names = [part["method"] for part in _parts(exported.method.spec)]
    title = f"# {base.rstrip('/').rpartition('/')[2]}, adapted by {' and '.join(names)}"
    sections = {
        "Base": _base(exported, origin),
        "Method": [*_method(exported, folder), f"Trained parameters: {_trained(exported.delta):,}."],
        "Data and training": _training(exported),
        "Scores": _scores(exported),
        "Use": _use(exported, base, folder),
        "Versions": [f"lora_jax {lj.__version__}, jax {jax.__version__}."],
    }
    body = "\n\n".join(f"## {name}\n\n" + "\n".join(lines) for name, lines in sections.items() if lines)
    return f"---\n{_front_matter(exported, origin, names)}\n---\n\n{title}\n\n{body}\n"


def _front_matter(exported: Exported, origin: hf.Origin, names: list[str]) -> str:
    with extra("hf"):
        from huggingface_hub import ModelCardData  # slow to import, and seldom needed
    library, data = _LIBRARIES[exported.form], exported.config.data.get("path", "")
    adapts = [f"base_model:adapter:{origin.name}"] if origin.name and library == "peft" else []
    fields = {
        "base_model": origin.name,
        "library_name": library,
        "license": origin.license,
        "pipeline_tag": _pipeline(exported.task),
        "tags": [*adapts, *dict.fromkeys(names), "lora_jax"],
        "datasets": [str(data)] if exported.step and data and is_hub_name(data) else [],
    }
    return ModelCardData(**{name: value for name, value in fields.items() if value}).to_yaml()


def _pipeline(task: Task | None) -> str:
    if task is None:
        return ""
    return "text-generation" if task.text else "text-classification" if task.head else ""


def _parts(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The spec of a method, or those of a chain's methods."""
    return [part for inner in spec["of"] for part in _parts(inner)] if spec["method"] == "chain" else [spec]


def _trained(delta: lj.Delta) -> int:
    factors = (item for of_leaf in delta.values() for item in of_leaf.items())
    return sum(factor.size for name, factor in factors if not is_frozen(name))


def _base(exported: Exported, origin: hf.Origin) -> list[str]:
    if not origin.name:
        return [f"`{exported.source}`, whose name on the Hub, if it has one, is not known."]
    lines = [f"[{origin.name}](https://huggingface.co/{origin.name})"]
    if origin.said_by:
        lines[0] += f", as {origin.said_by} says. The weights used are those of `{exported.source}`, a GGUF file"
        lines[0] += ": rounded, where it is quantized"
    return [f"{lines[0]}."]


def _method(exported: Exported, folder: Path) -> Iterator[str]:
    for part in _parts(exported.method.spec):
        options = {name: value for name, value in part.items() if name not in _PLAIN and value not in (None, [], {}, 0)}
        yield f"- {part['method']}: " + ", ".join(f"{name} `{_json(value)}`" for name, value in options.items())
    config = read_json(folder / "adapter_config.json", strict=False) if exported.form == "peft" else {}
    shown = {name: config[name] for name in ("r", "lora_alpha", "alpha", "target_modules") if config.get(name)}
    if shown:
        yield f"- PEFT's {config['peft_type']}: " + ", ".join(f"{name} `{_json(x)}`" for name, x in shown.items())
    yield ""


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _training(exported: Exported) -> list[str]:
    """What the run's config says; nothing of an adapter that was taken in and not trained here."""
    config, data = exported.config, exported.config.data
    if not exported.step:
        return []
    places = [data.get(name) for name in ("path", "train") if data.get(name)]
    optimizer, best = config.get("optimizer", {}), config.get("best")
    shown = {
        "task": data.name,
        "data": ", ".join(map(str, places)),
        "steps": f"{exported.step}, of the best {best}" if best else exported.step,
        "batch": data.get("batch_size"),
        "accumulated batches": config.get("accumulate", 1) if config.get("accumulate", 1) > 1 else None,
        "learning rate": optimizer.get("learning_rate"),
        "schedule": optimizer.get("schedule"),
        "warm-up steps": optimizer.get("warmup_steps"),
        "weight decay": optimizer.get("weight_decay"),
        "label smoothing": config.get("label_smoothing"),
        "seed": config.get("seed"),
        "bits of the frozen base": config.get("model", {}).get("base_bits"),
        "computed in": config.get("model", {}).get("dtype"),
    }
    return [f"- {name}: {value}" for name, value in shown.items() if value not in (None, "")]


def _scores(exported: Exported) -> list[str]:
    """The figures of validation and of evaluations, of the step that is exported."""
    workdir, rows = exported.workdir, []
    if (workdir / "summary.json").is_file():
        summary = read_json(workdir / "summary.json", strict=False)
        if exported.config.get("best") or summary.get("steps") == exported.step:
            rows += [("validation", name, summary[name], "") for name in summary.get("validation", ())]
    for file in sorted([*workdir.glob("evaluation/*/evaluate.json"), *workdir.glob("predictions/*/predict.json")]):
        result = read_json(file, strict=False)
        if result.get("step") == exported.step and result.get("params") != "base":
            rows += list(_of_evaluation(result))
    table = [
        f"| {data} | {_title(name)} | {_number(name, value)} | {interval} |" for data, name, value, interval in rows
    ]
    return ["| on | score | value | 95% interval |", "|---|---|---|---|", *table] if rows else []


def _of_evaluation(result: Mapping[str, Any]) -> Iterator[tuple[str, str, float, str]]:
    count = result.get("contexts", result.get("examples"))
    data = f"{result['split']} ({count:,} {'contexts' if 'contexts' in result else 'examples'})"
    scores = result.get("scores", {}).get("all", {})
    for name, score in scores.items():
        interval = f"{_number(name, score['low'])} to {_number(name, score['high'])}"
        yield data, name, score["score"], interval if score["low"] < score["high"] else ""
    skipped = {"step", "examples", "contexts", "references", "skipped", "seconds"}
    for name, value in result.items():
        if isinstance(value, float | int) and not isinstance(value, bool) and name not in skipped:
            yield data, name, value, ""


def _title(name: str) -> str:
    return COLUMNS.get(name, (name.replace("_", " "), ""))[0]


def _number(name: str, value: float) -> str:
    return COLUMNS.get(name, ("", "{:.4g}"))[1].format(value)


def _use(exported: Exported, base: str, folder: Path) -> list[str]:
    """Lines that load it, with the libraries that can; its own folder is called by its name."""
    head = exported.task.head if exported.task else {}
    labels = head.get("labels")
    auto = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
    wanted = f', head="{head["head"]}", labels={labels}' if labels else ""
    where, here = _transformers_arguments(base), folder.name
    theirs = {
        "peft": [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            f"model = PeftModel.from_pretrained({auto}.from_pretrained({where}"
            f'{f", num_labels={labels}" if labels else ""}), "{here}")',
        ],
        "merged": [
            f"from transformers import {auto}, AutoTokenizer",
            f'model = {auto}.from_pretrained("{here}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{here}")',
        ],
        "native": [],
    }[exported.form]
    load = f'model, params, tokenizer = hf.load("{exported.source}"{wanted})'
    ours = {
        "peft": ["from lora_jax.interop import hf, peft", load, f'method, delta = peft.load("{here}", params)'],
        "merged": ["from lora_jax.interop import hf", f'model, params, tokenizer = hf.load("{here}"{wanted})'],
        "native": [
            "from lora_jax import checkpoints; from lora_jax.interop import hf",
            load,
            f'method, delta, info = checkpoints.load_adapter("{here}")',
        ],
    }[exported.form]
    blocks = [["```python", *lines, "```"] for lines in (theirs, ours) if lines]
    after = ["", "`method.apply(params, delta)` are the adapted parameters, for `lora_jax.lift(model.apply)`."]
    return ["\n\n".join("\n".join(block) for block in blocks), *(after if exported.form != "merged" else [])]


def _transformers_arguments(base: str) -> str:
    """How transformers' `from_pretrained` is given a base."""
    path = Path(base)
    return f'"{path.parent}", gguf_file="{path.name}"' if path.suffix.lower() == ".gguf" else f'"{base}"'
