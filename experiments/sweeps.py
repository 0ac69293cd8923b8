"""A config's sweep: every combination of its values, trained in one program (lora_jax.training.sweep)."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import lora_jax as lj
from experiments import results, summaries
from lora_jax import checkpoints, training
from lora_jax.distributed import processes, sharding
from lora_jax.runs import bases, methods
from lora_jax.runs import tasks as setups
from lora_jax.training import sweep

KEYS = {"learning_rate": "optimizer.learning_rate", "weight_decay": "optimizer.weight_decay", "seed": "seed"}


def asked(config: ConfigDict) -> bool:
    """Whether a config says what to sweep."""
    return any(config.get("sweep", {}).values())


def train(config: ConfigDict, workdir: Path) -> None:
    """Trains all members to their end, or until the process is stopped."""
    if config.method == "none" or config.get("warm_start"):
        raise ValueError("a sweep trains new adapters: no method 'none', no warm_start")
    configs = members(config)
    first, *_ = configs.values()
    mesh = bases.mesh_of(config)
    setup = setups.load(first, mesh)
    base = setup.base
    params = {first.seed: base.params}
    found = []
    for name, own in configs.items():
        if own.seed not in params:  # draws its own head, where there is a new one
            params[own.seed] = bases.load(own, mesh=mesh).params if own.get("head") else base.params
        method = lj.from_spec(methods.spec(own, base.model, base.new))
        batches = dataclasses.replace(setup.batches["train"], seed=own.seed)
        found.append(sweep.Member(name, own, method, params[own.seed], batches))
    reports = [lj.check(member.method, base.params) for member in found]
    print(f"{reports[0]}\n{len(found)} members: {'; '.join(configs)}")
    ready = sweep.prepare(
        config,
        workdir,
        found,
        base=base.identity,
        objective=setup.objective,
        validation=setup.batches["valid"],
        mesh=mesh,
        rules=sharding.rules_for(base.model, mesh),
    )
    done = sweep.train(ready)
    if done is None:
        print(f"saved before step {ready.total}: the same command goes on")
        return
    if processes.first():
        write(workdir, found, reports, done)


def write(workdir: Path, found: list[sweep.Member], reports: list[lj.Report], done: list) -> None:
    """The members' summaries, and the table and the plot of all."""
    rows = []
    for member, report, result in zip(found, reports, done, strict=True):
        folder = workdir / member.name
        row: dict[str, Any] = {"label": member.name, "trained": report.trained}
        if result is not None:
            size = (folder / "adapter" / "adapter.safetensors").stat().st_size
            numbers = {"total": report.total, "adapter_bytes": size, "steps": result.step}
            row |= summaries.of(member.config, folder, trained=report.trained, **numbers)
            summaries.write(folder, row, show=False)
        rows.append(row)
    checkpoints.write_atomically(workdir / "sweep.json", (json.dumps({"rows": rows}, indent=2) + "\n").encode())
    plot(workdir, [member.name for member in found])
    print(results.table([row | {"command": None} for row in rows]))
    print(f"plot: {workdir / 'sweep.png'}")


def members(config: ConfigDict) -> dict[str, ConfigDict]:
    """The config of each member, as of a run of its own, by the name of its folder."""
    given = {name: tuple(values) for name, values in config.sweep.items() if values}
    if config.get("seeds"):
        given.setdefault("seed", tuple(config.seeds))
    plain = config.copy_and_resolve_references()
    for name in plain.sweep:
        plain.sweep[name] = None
    if "seeds" in plain:
        plain.seeds = ()
    found: dict[str, ConfigDict] = {}
    for values in itertools.product(*given.values()):
        named = dict(zip(given, values, strict=True))
        label = ",".join(f"{name}={value:g}" for name, value in named.items())
        if label in found:
            raise ValueError(f"sweep: {label} is there twice")
        found[label] = plain.copy_and_resolve_references()
        found[label].update_from_flattened_dict({_key(name, config): value for name, value in named.items()})
    return found


def _key(name: str, config: ConfigDict) -> str:
    """The key of the config that a name under `sweep` stands for."""
    if name in KEYS:
        return KEYS[name]
    for part in config.method.split("+"):
        if part in config and name in config[part]:
            return f"{part}.{name}"
    raise ValueError(f"sweep.{name}: the method {config.method!r} has no {name}")


def plot(workdir: Path, names: list[str]) -> None:
    """The curves of all members: loss in training and validation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, measured in zip(figure.subplots(1, 2), ("loss", "validation_loss"), strict=True):
        for name in names:
            entries = [entry for entry in training.read_metrics(workdir / name) if measured in entry]
            steps, values = [entry["step"] for entry in entries], [entry[measured] for entry in entries]
            axes.plot(steps, values, "o-" if measured == "validation_loss" else "-", label=name, markersize=4)
        axes.set(xlabel="step", ylabel=f"{measured.replace('_', ' ')} per label")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(workdir / "sweep.png", dpi=120)
