"""The collectives of a compiled program, read from its HLO text."""

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    """One instruction of the program.

    Attributes:
      axes: of the mesh, along which devices exchange; () where each is alone.
      bytes: of its result on one device (of a reduce-scatter: of its operand).
      sent: bytes that one device sends each time, on a ring.
      times: how often a run of the program gets there.
      shapes: of its result.
      name: of its computation.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    sent: float
    times: int
    shapes: tuple[tuple[int, ...], ...]
    name: str


def of_program(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of a compiled program (`compiled.as_text()`).

    Args:
      mesh: the size of each axis, in the order of the mesh's devices.

    The CPU's compiler says how often a loop runs; of others' loops the number is taken from their condition. A TPU's
    program may hold the same gather in several fusions (start, update, end), which have one channel: it counts once.
    """
    computations, entry = _computations(text)
    times = _times(computations, entry)
    distinct: dict[Any, Collective] = {}
    for name, lines in computations.items():
        for line in lines:
            if not times[name] or not (collective := _collective(line, name, times[name], mesh)):
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            key = (collective.kind, channel[1]) if channel else len(distinct)
            if (
                key not in distinct or distinct[key].times < collective.times
            ):  # of a loop's prologue and its body, the body
                distinct[key] = collective
    return list(distinct.values())


def summary(collectives: Iterable[Collective]) -> list[dict]:
    """By kind and axes: the number in a run of the program, and the bytes that a device sends."""
    counts: Counter = Counter()
    sent: defaultdict[tuple, float] = defaultdict(float)
    for collective in collectives:
        if collective.axes:
            counts[collective.kind, collective.axes] += collective.times
            sent[collective.kind, collective.axes] += collective.times * collective.sent
    return [
        {"kind": kind, "axes": list(axes), "times": counts[kind, axes], "bytes": int(sent[kind, axes])}
        for kind, axes in sorted(counts)
    ]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the entry computation."""
    lines_of: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            name = begins[2]
            entry = name if begins[1] else entry
            lines_of[name] = []
        elif name and " = " in line:
            lines_of[name].append(line)
    return lines_of, entry


def _times(computations: Mapping[str, Sequence[str]], entry: str) -> Counter:
    """How often each computation is reached in a run."""
    times: Counter = Counter()

    def reach(name: str, count: int) -> None:
        times[name] += count
        for line in computations.get(name, ()):
            called = _CALLED.findall(line)
            if branches := _BRANCHES.search(line):
                called += re.findall(r"%?([\w.\-]+)", branches[1])
            if not called:
                continue
            trips = _trips(line, computations) if " while(" in line else 1
            for callee in called:
                reach(callee, count * trips)

    reach(entry, 1)
    return times


def _trips(line: str, computations: Mapping[str, Sequence[str]]) -> int:
    """How often a loop runs."""
    if trip_count := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line):
        return int(trip_count[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    pending, numbers = [condition[1]] if condition else [], []
    while pending:
        for instruction in computations.get(pending.pop(), ()):
            numbers += [int(n) for n in re.findall(r"s32\[\][^=]* constant\((\d+)\)", instruction)]
            pending += _CALLED.findall(instruction)
    return max(numbers, default=1)


def _collective(line: str, name: str, times: int, mesh: Mapping[str, int]) -> Collective | None:
    instruction = _INSTRUCTION.match(line)
    if not instruction:
        return None
    kind = instruction[3].removesuffix("-start")
    if kind not in KINDS:
        return None
    shapes = [
        (tuple(int(n) for n in dims.split(",") if n), _BYTES[dtype])
        for dtype, dims in _SHAPE.findall(instruction[2])
        if dtype in _BYTES
    ]
    if instruction[3].endswith("-start") and len(shapes) > 1:  # operands stand beside the results
        if kind == "collective-permute":
            shapes = shapes[1:2]
        elif kind != "all-reduce":
            shapes = shapes[len(shapes) // 2 :]
    axes, size = _along(line, mesh)
    scattered = kind == "all-reduce" and name.startswith("all-reduce-scatter")  # a fusion, in which a slice follows
    result = sum(math.prod(shape) * width for shape, width in shapes)
    share = (size - 1) / size
    gathered = result * size if kind == "reduce-scatter" else result
    kind = "reduce-scatter" if scattered else kind
    sent = {"all-reduce": 2 * share * gathered, "collective-permute": float(gathered)}.get(kind, share * gathered)
    return Collective(kind, axes, gathered, sent, times, tuple(shape for shape, _ in shapes), name)


def _along(line: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The axes along which the devices of a group differ, and how many they are."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        groups = [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)", pairs[0] + "}")]
    else:
        groups = _groups(line, math.prod(mesh.values()))
    places = [np.unravel_index(group, tuple(mesh.values())) for group in groups]
    varying = [any(len(set(at[axis].tolist())) > 1 for at in places) for axis in range(len(mesh))]
    return tuple(itertools.compress(mesh, varying)), max(map(len, groups), default=1)


def _groups(line: str, devices: int) -> list[list[int]]:
    """The groups of devices, in any of the three ways they are written."""
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        return _iota(dims or [], order).reshape(shape or []).tolist()
    named = re.search(
        r"replica_groups=\{?mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", line
    )
    if named:
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        dims = [int(n) for n in named[2].split(",")] if named[2] else list(axes.values())
        order = [int(n) for n in named[3].split(",")] if named[3] else None
        ids = _iota(dims, order).reshape(tuple(axes.values()))
        along = [list(axes).index(name) for name in re.findall(r"'(\w+)'", named[4])]
        rest = [axis for axis in range(len(axes)) if axis not in along]
        size = math.prod(ids.shape[axis] for axis in along)
        return ids.transpose(*rest, *along).reshape(-1, size).tolist()
    return [list(range(devices))]


def _iota(dims: Sequence[int], order: Sequence[int] | None) -> np.ndarray:
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(order) if order else ids
