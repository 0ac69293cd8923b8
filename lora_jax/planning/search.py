"""The smallest slice that a training step fits, and the layout that sends the fewest bytes on it."""

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_jax.checkpoints import write_atomically
from lora_jax.data.json_files import read_json
from lora_jax.models.family import dimensions_of, family_of
from lora_jax.planning import asking, topologies
from lora_jax.planning.asking import Answer, Layout, Workload
from lora_jax.planning.topologies import Topology

TRIES = 8  # layouts of a slice, those with the least memory first, before the slice counts as too small
MARGIN = 1.5  # the estimate may be too high by this factor


def smallest(
    workload: Workload, names: Sequence[str], seconds: float, cache: "Cache", log: Callable[[str], None]
) -> Answer | None:
    """The answer for the first of these topologies, smallest first, on which some layout fits.

    Of the layouts of that topology that were compiled in the time, it is the one whose devices send the fewest bytes an
    example. Where no layout fits, or the time is over before, it is the answer that wants the least memory, or None if
    nothing was compiled. No compilation begins after those seconds; `log` gets a line for each answer.
    """
    until, nearest = time.monotonic() + seconds, None
    for name in names:
        topology = topologies.named(name)
        best = None
        for number, layout in enumerate(_possible(workload, topology)):
            if (best is None and number >= TRIES) or time.monotonic() > until:
                break
            answer = cache.ask(workload, topology, layout)
            log(f"{name}, {layout}: {'fits' if answer['fits'] else 'does not fit'}{asking.needed(answer)}")
            if answer["fits"] and (best is None or _sent(answer) < _sent(best)):
                best = answer
            if answer.get("wanted") and (nearest is None or answer["wanted"] < nearest["wanted"]):
                nearest = answer
        if best is not None:
            return best
        if time.monotonic() > until:
            log(f"the time was up at {name}: not all layouts of it and of what is larger were asked (--minutes)")
            break
    return nearest


def _sent(answer: Answer) -> float:
    """Bytes that a device sends for each example."""
    return sum(collective["bytes"] for collective in answer["collectives"]) / answer["texts"]


def _possible(workload: Workload, topology: Topology) -> list[Layout]:
    """The layouts that may fit, those with the least memory first: neither what a device holds from step to step, which
    is exact, nor the estimate with its margin is above the limit."""
    limit = math.inf if topology.limit is None else topology.limit
    sizes = ordered(workload, topology)
    return [size.layout for size in sizes if size.held <= limit and size.estimate <= MARGIN * limit]


def least(workload: Workload, topology: Topology) -> Layout:
    """The layout with the smallest estimate; a ValueError where none divides the batch and the model."""
    if sizes := ordered(workload, topology):
        return sizes[0].layout
    devices = len(topology.devices)
    raise ValueError(f"no layout of {devices} devices divides a batch of {workload.batch_size} and the model")


class Size(NamedTuple):
    """Bytes on one device in closed form, those of them that stay from step to step, and the layout."""

    estimate: float
    held: int
    layout: Layout


def ordered(workload: Workload, topology: Topology) -> list[Size]:
    """All layouts that divide the model and the batch, those with the least memory first."""
    sizes = []
    for layout in _layouts(workload, len(topology.devices)):
        with contextlib.suppress(ValueError):  # an axis does not divide
            sizes.append(size_of(workload, topology, layout))
    return sorted(sizes)


def _layouts(workload: Workload, devices: int) -> Iterator[Layout]:
    """The layouts of a number of devices whose tensor axis divides the heads, and whose data and fsdp axes and
    micro-batches divide the batch."""
    heads = dimensions_of(workload.model).heads
    for tensor in _divisors(devices):
        shards = devices // tensor
        rows, rest = divmod(workload.batch_size or shards, shards)
        if heads % tensor or rest:
            continue
        micro_batches = sorted({rows, max(rows // 4, 1), 1} & set(_divisors(rows)))
        for fsdp, accumulate, remat in itertools.product(_divisors(shards), micro_batches, (True, False)):
            yield Layout(shards // fsdp, fsdp, tensor, remat, accumulate)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def size_of(workload: Workload, topology: Topology, layout: Layout) -> Size:
    """A layout's bytes. The estimate is the sum of what stays from step to step, the gradients (twice where they are
    summed over micro-batches), the activations that the backward pass needs of each layer, those inside one layer, its
    gathered weights, and a chunk of the logits."""
    step = asking.step(workload, layout, layout.mesh(topology))
    config, family, length = workload.model.config, family_of(workload.model), workload.length
    layers, width, heads, inner, _, query_block = family.dimensions(config)
    vocabulary = config.vocab_size if family.output_head else 0
    rows = layout.examples(workload) / (layout.accumulate * layout.data * layout.fsdp)
    itemsize = 4 if config.dtype == "float32" else 2
    between_layers = rows * length * width * itemsize / layout.tensor
    inside_layer = rows * length * (8 * width + 2 * inner) * itemsize / layout.tensor
    inside_layer += rows * heads / layout.tensor * (query_block or length) * length * 6
    gathered = (4 * width * width + 2 * width * inner) * itemsize / layout.tensor * (2 if layout.fsdp > 1 else 0)
    activations = layers * between_layers + inside_layer * (1 if layout.remat else layers)
    logits = rows * length / 8 * vocabulary * 8 / layout.tensor
    gradients = asking.bytes_per_device(step.state.delta) * (2 if layout.accumulate > 1 else 1)
    held = asking.bytes_per_device((step.state, step.params))
    return Size(held + gradients + activations + gathered + logits, held, layout)


class Cache:
    """Answers in one JSON file. Those of another version of jax, libtpu or this package are not used."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.answers: dict[str, Answer] = read_json(file, strict=False) if file and file.is_file() else {}

    def ask(self, workload: Workload, topology: Topology, layout: Layout) -> Answer:
        """`asking.ask`, or its answer of before."""
        arguments = [str(part) for part in workload if part is not workload.method]
        question = [workload.method.spec, arguments, topology.name, layout]
        versions = [_version(name) for name in ("jax", "libtpu", "lora_jax")]
        text = json.dumps([question, versions, _digest_of_package()])
        key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        if key in self.answers:
            return self.answers[key]
        answer = asking.ask(workload, topology, layout)
        if "limit" not in answer or answer.get("wanted") is not None:  # else the compiler failed otherwise: not kept
            self.answers[key] = answer
            if self.file:
                write_atomically(self.file, (json.dumps(self.answers, indent=1) + "\n").encode())
        return answer


@functools.cache
def _digest_of_package() -> str:
    """A digest of the sources that make a step and read its program."""
    files = sorted(Path(__file__).resolve().parents[1].rglob("*.py"))
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=16).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
