"""The smallest slice on which a config's step fits, and how to lay it out there so that least is sent."""

import functools
import hashlib
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from experiments.plan import ask
from experiments.plan.ask import Choice
from lora_jax.checkpoints import write_atomically
from lora_jax.models import encoder
from lora_jax.planning import topologies
from lora_jax.planning.topologies import Topology

flags.DEFINE_float("minutes", 20, "How long to search.", lower_bound=0)
flags.DEFINE_string("cache", None, "A JSON file that keeps answers.")

TRIES = 8  # layouts of a slice, those with the least memory, before it counts as too small
MARGIN = 1.5  # an estimate may be wrong by so much

Answer = dict[str, Any]


def smallest(config: ConfigDict, names: list[str], seconds: float, cache: "Cache", say: Callable) -> Answer | None:
    """The answer for the first of these topologies on which some layout fits: of those that were asked in the time, the
    one whose devices send least for each text. Where none fits, or the time was up, that which wants least; None where
    none was asked."""
    until, nearest = time.monotonic() + seconds, None
    for name in names:
        topology = topologies.named(name)
        best = None
        for number, choice in enumerate(possible(config, topology)):
            if (best is None and number >= TRIES) or time.monotonic() > until:
                break
            answer = cache.ask(config, topology, choice)
            say(f"{name}, {choice}: {'fits' if answer['fits'] else 'does not fit'}{ask.room(answer)}")
            if answer["fits"] and (best is None or sent(answer) < sent(best)):
                best = answer
            if answer.get("wanted") and (nearest is None or answer["wanted"] < nearest["wanted"]):
                nearest = answer
        if best is not None:
            return best
        if time.monotonic() > until:
            say(f"the time was up at {name}: not all layouts of it and of what is larger were asked (--minutes)")
            break
    return nearest


def sent(answer: Answer) -> float:
    """Bytes that a device sends for each text."""
    return sum(each["bytes"] for each in answer["collectives"]) / answer["texts"]


def possible(config: ConfigDict, topology: Topology) -> list[Choice]:
    """Of all layouts, those with the least memory first, which may fit: by what they hold, which is exact, and by the
    estimate."""
    limit = math.inf if topology.limit is None else topology.limit
    found = ordered(config, topology)
    return [one.choice for one in found if one.held <= limit and one.estimate <= MARGIN * limit]


def chosen(config: ConfigDict, mesh: list[str], topology: Topology) -> Choice:
    """The layout that the flag and the config say, or the one that holds least.

    Raises:
      ValueError: no mesh of these devices.
    """
    devices = len(topology.devices)
    if not mesh:
        if not (found := ordered(config, topology)):
            raise ValueError(
                f"no layout of {devices} devices divides a batch of {config.data.batch_size} and the model"
            )
        return found[0].choice
    if len(mesh) != 3 or not all(part.isdecimal() for part in mesh):
        raise ValueError(f"--mesh={','.join(mesh)}: three numbers, data,fsdp,tensor")
    data, fsdp, tensor = map(int, mesh)
    if data * fsdp * tensor != devices:
        raise ValueError(f"--mesh={','.join(mesh)} has {data * fsdp * tensor} devices, {topology.name} has {devices}")
    return Choice(data, fsdp, tensor, config.model.remat, config.accumulate)


class Sized(NamedTuple):
    """A layout, and bytes on one device: in closed form, and of what is held from step to step."""

    estimate: float
    held: int
    choice: Choice


def ordered(config: ConfigDict, topology: Topology) -> list[Sized]:
    """All layouts that divide the model and the batch, those with the least memory first."""
    found = []
    for choice in choices(config, len(topology.devices)):
        try:
            found.append(sized(config, topology, choice))
        except ValueError:  # something does not divide
            continue
    return sorted(found)


def choices(config: ConfigDict, devices: int) -> Iterator[Choice]:
    """The layouts of so many devices: tensor divides the heads, and the batch divides into rows of equal number."""
    model = ask.count.of_base(config)
    heads = model.config.heads if isinstance(model, encoder.Encoder) else model.config.n_head
    for tensor in (n for n in range(1, devices + 1) if devices % n == 0 and heads % n == 0):
        shards = devices // tensor
        if (config.data.batch_size or shards) % shards:
            continue
        rows = (config.data.batch_size or shards) // shards
        for fsdp in (n for n in range(1, shards + 1) if shards % n == 0):
            for accumulate in sorted({rows, max(rows // 4, 1), 1} & {n for n in range(1, rows + 1) if rows % n == 0}):
                for remat in (True, False):
                    yield Choice(shards // fsdp, fsdp, tensor, remat, accumulate)


def sized(config: ConfigDict, topology: Topology, choice: Choice) -> Sized:
    """A layout's bytes. The estimate has what is held, gradients (twice where they are summed over micro-batches),
    what the backward pass needs of each layer, a layer's inside and its gathered weights, and a piece of the logits."""
    one = ask.step(config, choice, choice.mesh(topology))
    shape = one.model.config
    if isinstance(one.model, encoder.Encoder):
        width, layers, heads, inner, vocabulary = shape.hidden, shape.layers, shape.heads, shape.inner, 0
    else:
        width, layers, heads, inner, vocabulary = (
            shape.n_embd, shape.n_layer, shape.n_head, shape.inner, shape.vocab_size
        )  # fmt: skip
    length = ask.length_of(config, one.model)
    rows = ask.texts(config, choice) / (choice.accumulate * choice.data * choice.fsdp)
    size = 4 if shape.dtype == "float32" else 2
    block = getattr(shape, "query_block", None) or length
    between = rows * length * width * size / choice.tensor
    inside = rows * length * (8 * width + 2 * inner) * size / choice.tensor
    inside += rows * heads / choice.tensor * block * length * 6
    weights = (4 * width * width + 2 * width * inner) * size / choice.tensor * (2 if choice.fsdp > 1 else 0)
    kept = layers * between + inside if choice.remat else layers * (between + inside)
    logits = rows * length / 8 * vocabulary * 8 / choice.tensor
    gradients = ask.held(one.state.delta) * (2 if choice.accumulate > 1 else 1)
    held = ask.held((one.state, one.params))
    return Sized(held + gradients + kept + weights + logits, held, choice)


class Cache:
    """Answers that were given before, as JSON in one file; a compiler of another version is asked again."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.known: dict[str, Answer] = json.loads(file.read_text()) if file and file.is_file() else {}

    def ask(self, config: ConfigDict, topology: Topology, choice: Choice) -> Answer:
        versions = {name: _version(name) for name in ("jax", "libtpu", "lora_jax")}
        what = json.dumps([config.to_json(), topology.name, choice, versions, _sources()])
        key = hashlib.blake2b(what.encode(), digest_size=16).hexdigest()
        if key not in self.known:
            answer = ask.ask(config, topology, choice)
            if "limit" in answer and answer.get("wanted") is None:  # the compiler failed otherwise: ask again
                return answer
            self.known[key] = answer
            if self.file:
                write_atomically(self.file, (json.dumps(self.known, indent=1) + "\n").encode())
        return self.known[key]


@functools.cache
def _sources() -> str:
    """A digest of what makes a step, and of what reads its program."""
    root = Path(__file__).resolve().parents[2]
    files = sorted(file for part in ("lora_jax", "experiments/plan") for file in (root / part).rglob("*.py"))
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=16).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
