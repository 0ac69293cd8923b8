"""Tables of results: rows as JSON, from what runs leave, and as Markdown."""

import importlib.metadata
import json
import os
import platform
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from lora_jax.checkpoints import finish_replacing, write_atomically
from lora_jax.core.extras import extra
from lora_jax.data.files import of_form
from lora_jax.data.json_files import read_json
from lora_jax.training import read_metrics

# A row is a dict. Of its entries the table shows those named here, in this order: the title, and the format of a number
# or of each part of {"score", "low", "high"}.
COLUMNS = {
    "table": ("table", "{}"),
    "config": ("config", "`{}`"),
    "size": ("rank or tokens", "{}"),
    "trained": ("trained parameters", "{:,}"),
    "rate": ("learning rate", "{:g}"),
    "printed": ("the paper's figure", "{}"),
    "verdict": ("", "{}"),
    "adapter_bytes": ("adapter, bytes", "{:,}"),
    "validation_loss": ("validation loss", "{:.4f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "f1": ("F1", "{:.3f}"),
    "matthews": ("Matthews", "{:.3f}"),
    "pearson": ("Pearson", "{:.3f}"),
    "spearman": ("Spearman", "{:.3f}"),
    "contexts": ("test contexts", "{:,}"),
    "bleu": ("BLEU", "{:.2f}"),
    "nist": ("NIST", "{:.2f}"),
    "meteor": ("METEOR", "{:.3f}"),
    "rouge_l": ("ROUGE-L", "{:.3f}"),
    "cider": ("CIDEr", "{:.2f}"),
    "ter": ("TER", "{:.3f}"),
    "tokens_per_second": ("tokens/s", "{:,}"),
    "relative_speed": ("relative to full fine-tuning", "{:.2f}"),
    "steps_compared": ("steps", "{}"),
    "loss_difference": ("losses differ by", "{:.1e}"),
    "factor_difference": ("factors differ by", "{:.1e}"),
    "ratio_total": ("our time over PEFT's", "{:.2f}"),
    "ratio_median": ("median of the steps", "{:.2f}"),
    "base_seconds": ("base, seconds", "{:.2f}"),
    "latency_lora_merged": ("LoRA merged", "{:.2f}"),
    "latency_lora": ("unmerged", "{:.2f}"),
    "latency_adapter_l": ("AdapterL", "{:.2f}"),
    "latency_adapter_h": ("AdapterH", "{:.2f}"),
    "latency_prefix": ("prefix of 14", "{:.2f}"),
    "times_ratio": ("the peer's time over ours", "{:.2f}"),
    "times_normalised": ("each over its matrix products", "{:.2f}"),
    "times_over_floor": ("our time over our matrix products", "{:.2f}"),
    "times_single": ("one adapter for all", "{:.2f}"),
    "times_tokens": ("its tokens over ours", "{:.2f}"),
    "times_token": ("a token, once compiled", "{:.2f}"),
    "times_load": ("loading", "{:.1f}"),
    "times_merge": ("merging", "{:.1f}"),
    "times_unmerge": ("taking out", "{:.1f}"),
    "times_switch": ("switching and a forward", "{:.1f}"),
    "times_cold": ("start, nothing kept", "{:.2f}"),
    "times_kept": ("start, compiled before", "{:.2f}"),
    "times_peak": ("its memory over ours", "{:.2f}"),
    "held_gb": ("training holds, GB", "{:,.0f}"),
    "saved_mb": ("a checkpoint in 16 bits, MB", "{:,.1f}"),
    "petaflops": ("10^15 FLOPs a step", "{:,.3g}"),
    "petaflops_kept": ("without remat", "{:,.3g}"),
    "sent_fsdp": ("sent along fsdp, GB", "{:,.1f}"),
    "sent_tensor": ("along tensor, GB", "{:,.1f}"),
    "times_tensor": ("so often", "{:,}"),
    "v5e": ("smallest v5e", "{}"),
    "v5p": ("v5p", "{}"),
    "v6e": ("v6e", "{}"),
    "texts": ("texts", "{}"),
    "peak_batch": ("at once, GB", "{:.2f}"),
    "fits_batch": ("fits", "{}"),
    "peak_text": ("one at a time, GB", "{:.2f}"),
    "fits_text": ("fits", "{}"),
    # of the studies of low-rank adaptation
    "phi_1": ("phi(1, 1)", "{:.2f}"),
    "phi_2": ("phi(2, 2)", "{:.2f}"),
    "phi_4": ("phi(4, 4)", "{:.2f}"),
    "phi_8": ("phi(8, 8)", "{:.2f}"),
    "phi_all": ("phi of all", "{:.2f}"),
    "floor_1": ("random, (1, 1)", "{:.3f}"),
    "floor_all": ("random, all", "{:.3f}"),
    "alignment": ("cosine of the updates", "{:.3f}"),
    "distance": ("relative distance", "{:.3f}"),
    "frobenius_projected": ("U^T W V of the update", "{:.3f}"),
    "frobenius_top": ("of W", "{:.2f}"),
    "frobenius_random": ("random", "{:.3f}"),
    "frobenius_update": ("the update", "{:.3f}"),
    "amplified": ("factor", "{:.2f}"),
    "amplified_layers": ("of all layers", "{:.2f}"),
    "best_rate": ("rate of the least loss", "{:.2g}"),
    "rate_ratio": ("over full fine-tuning's", "{:.1f}"),
    "rate_spread": ("largest over smallest best rate", "{:.1f}"),
    "at_shared_rate": ("loss at the shared rate", "{:.4f}"),
    "worst_rate": ("at its worst rate", "{:.4f}"),
    "text_loss": ("loss on text", "{:.4f}"),
    "intruders": ("intruders of the top 10", "{:.2f}"),
    "effective_rank": ("effective rank", "{:.1f}"),
    "rank_90": ("rank of 90% of the squares", "{:.0f}"),
    "rank_99": ("of 99%", "{:.0f}"),
    "rank_90_random": ("of 90%, random", "{:.0f}"),
    "largest": ("largest singular value", "{:.2f}"),
    "smallest": ("smallest over largest", "{:.1e}"),
    "chosen": ("matrices chosen", "{}"),
    "share": ("of full fine-tuning's gain", "{:.2f}"),
}
LEFT_ALIGNED = {"config", "verdict"}

Row = dict[str, Any]


def summarize(config: ConfigDict, workdir: Path, *, command: str | None = None, **numbers: Any) -> Row:
    """The run of a workdir in one row, which is written to its summary.json: the numbers given, the size of the
    adapter, and validation's figures of the best epoch where the config says what is best, else of the last."""
    entries = read_metrics(workdir)
    speeds = [entry["tokens_per_second"] for entry in entries if "tokens_per_second" in entry]
    best = config.get("best")
    validated = [entry for entry in entries if (best or "validation_loss") in entry]
    if not validated:
        problem = f"{workdir / 'metrics.jsonl'} has no {best or 'validation_loss'}, which summary.json is made of"
        raise ValueError(f"{problem}: put the file back")
    chosen = max(validated, key=lambda entry: entry[best]) if best else validated[-1]
    figures = {name: value for name, value in chosen.items() if name != "step"}
    adapter = workdir / "adapter" / "adapter.safetensors"
    row = {
        **({"command": command} if command else {}),
        "method": config.method,
        "base": config.base,
        "seed": config.seed,
        **numbers,
        "adapter_bytes": adapter.stat().st_size if adapter.is_file() else 0,
        **figures,
        "validation": list(figures),
        "tokens_per_second": round(statistics.median(speeds)) if speeds else None,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    write_json(workdir / "summary.json", row)
    return row


def rows_of(label: str, workdir: str | Path) -> list[Row]:
    """A run's summary.json with the scores of its evaluation on test, if there is one; after it a row for each part of
    the test set (seen, unseen) with scores of its own. A FileNotFoundError where the run is not done."""
    file = Path(workdir) / "summary.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: experiments.train writes it at its end")
    row = {"label": label} | read_json(file, strict=False)
    row.pop("tokens_per_second", None)  # runs share the machine with whatever else it does: experiments.speed compares
    kind = "test-base*" if row.get("method") == "none" else "test-[!b]*"
    folders = list(Path(workdir, "evaluation").glob(kind))
    for folder in folders:
        finish_replacing(folder)
    files = [folder / "evaluate.json" for folder in folders]
    results = {file: read_json(file, strict=False) for file in files if file.is_file()}
    if not results:
        return [row]
    with of_form(f"{', '.join(map(str, results))}: not all written by experiments.evaluate"):
        result = max(results.values(), key=lambda result: result["contexts"])  # others are of the first contexts only
        scores = result["scores"]
        row |= {name: result.get(name) for name in ("contexts", "skipped", "decoding", "missing")} | scores["all"]
        row["evaluation"] = result.get("command")
        return [row, *({"label": f"{label}, {part}"} | score for part, score in scores.items() if part != "all")]


def fill(text: str, folder: Path) -> str:
    """The text with each marked table made again: after `<!-- results: NAME -->`, up to `<!-- end -->`, the rows of
    folder/NAME.json; after `<!-- results: NAME START -->` those whose labels begin so, without "START: "."""

    def table_of(match: re.Match) -> str:
        file = folder / f"{match[1]}.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, but a table is marked {match[1]!r}")
        start = match[2] or ""
        rows = [row for row in read_rows(file) if row["label"].startswith(start)]
        rows = [row | {"label": row["label"].removeprefix(f"{start}: ")} for row in rows]
        return f"{match[0].splitlines()[0]}\n{table(rows)}<!-- end -->"

    return re.sub(r"<!-- results: (\w+)(?: (\w+))? -->\n.*?<!-- end -->", table_of, text, flags=re.S)


def table(rows: list[Row]) -> str:
    """Rows as Markdown, with the commands that made them below."""
    shown = {name: form for name, form in COLUMNS.items() if any(name in row for row in rows)}
    lines = [
        ["", *(title for title, _ in shown.values())],
        ["---", *("---" if name in LEFT_ALIGNED else "---:" for name in shown)],
    ]
    for row in rows:
        cells = (_cell(row.get(name), form) for name, (_, form) in shown.items())
        lines.append([row["label"], *cells])
    parts = ["| " + " | ".join(line) + " |" for line in lines]
    commands = dict.fromkeys(str(row[kind]) for row in rows for kind in ("command", "evaluation") if row.get(kind))
    if commands:
        seeds = sorted({int(seed) for row in rows for seed in re.findall(r"\d+", str(row.get("seed")))})
        named = f"Seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; " if seeds else ""
        parts += ["", f"{named}{rows[0].get('device', 'a device unknown')}:", "", "```sh", *commands, "```"]
    return "\n".join(parts) + "\n"


def _cell(value: Any, form: str) -> str:
    """A figure, with its interval or range where it has one."""
    if value is None:
        return "-"
    try:
        if isinstance(value, dict) and value["low"] == value["high"]:
            value = value["score"]  # of one seed
        if isinstance(value, dict):
            return f"{form} [{form}, {form}]".format(value["score"], value["low"], value["high"])
        return form.format(value)
    except (KeyError, TypeError, ValueError):  # what somebody wrote into the file
        return str(value)


def write_json(file: str | Path, value: Any) -> None:
    """Writes a value as JSON, all of it or nothing."""
    write_atomically(file, (json.dumps(value, indent=2) + "\n").encode())


def read_rows(file: Path) -> list[Row]:
    """The rows of a file of results; none where there is no file."""
    if not file.is_file():
        return []
    rows = read_json(file, strict=False).get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "label" in row for row in rows):
        raise ValueError(f"{file} has no list of rows with labels: it is no file of results")
    return rows


def write_rows(file: Path, rows: list[Row]) -> None:
    """Writes a file of results."""
    write_json(file, {"rows": rows})


def add_rows(file: Path, rows: list[Row]) -> None:
    """Writes rows into a file of results, in place of those with the same labels."""
    labels = {row["label"] for row in rows}
    write_rows(file, [row for row in read_rows(file) if row["label"] not in labels] + rows)


def plot_losses(file: Path, workdirs: Mapping[str, Path], frozen: float | None = None) -> None:
    """Draws the losses of runs by their names, of training and of validation, there beside that of a frozen base."""
    with extra("train"):
        from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(12, 5), layout="constrained")
    titles = {"loss": "training", "validation_loss": "validation"}
    for axes, measured, style in zip(figure.subplots(1, 2), titles, ("-", "o-"), strict=True):
        for name, workdir in workdirs.items():
            entries = [entry for entry in read_metrics(workdir) if measured in entry]
            steps, losses = ([entry[key] for entry in entries] for key in ("step", measured))
            axes.plot(steps, losses, style, label=name, markersize=4)
        axes.set(xlabel="step", ylabel=f"{titles[measured]} loss per label")
        axes.grid(alpha=0.3)
    if frozen is not None:
        axes.axhline(frozen, color="gray", linestyle="--", label="frozen base")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)


def machine(*packages: str) -> Row:
    """The device and the packages' versions, for a row of results."""
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}"
    return {"device": device, "versions": versions}
