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
    """One instruction of the program."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, along which devices exchange; () where each is alone
    bytes: int  # of its result on one device (of a reduce-scatter: of its operand)
    sent: float  # bytes that one device sends each time, on a ring
    times: int  # how often a run of the program gets there
    shapes: tuple[tuple[int, ...], ...]  # of its result
    name: str  # of its computation


def of_program(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of a compiled program (`compiled.as_text()`) on a mesh of those axes, in the devices' order.

    The CPU's compiler says how often a loop runs; of others' loops the number is taken from their condition. A TPU's
    program may hold the same gather in several fusions (start, update, end), which have one channel: it counts once.
    """
    computations, entry = _computations(text)
    times = _times(computations, entry)
    distinct: dict[Any, Collective] = {}
    for name, lines in computations.items():
        for line in lines:
            if times[name] and (collective := _collective(line, name, times[name], mesh)):
                channel = re.search(r"channel_id=(\d+)", line)
                key = (collective.kind, channel[1]) if channel else len(distinct)
                # of a loop's prologue and its body, the body
                if key not in distinct or distinct[key].times < collective.times:
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
            trips = _trips(line, computations) if called and " while(" in line else 1
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
    kind = instruction[3].removesuffix("-start") if instruction else ""
    if not instruction or kind not in KINDS:
        return None
    arrays = _SHAPE.findall(instruction[2])
    shapes = [(_numbers(dims), _BYTES[dtype]) for dtype, dims in arrays if dtype in _BYTES]
    if instruction[3].endswith("-start") and len(shapes) > 1:  # operands stand beside the results
        if kind == "collective-permute":
            shapes = shapes[1:2]
        elif kind != "all-reduce":
            shapes = shapes[len(shapes) // 2 :]
    axes, size = _along(line, mesh)
    result = sum(math.prod(shape) * width for shape, width in shapes)
    share = (size - 1) / size
    gathered = result * size if kind == "reduce-scatter" else result
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # a fusion, in which a slice follows
        kind = "reduce-scatter"
    sent = {"all-reduce": 2 * share * gathered, "collective-permute": float(gathered)}.get(kind, share * gathered)
    return Collective(kind, axes, gathered, sent, times, tuple(shape for shape, _ in shapes), name)


def _along(line: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The axes along which the devices of a group differ, and how many they are."""
    sizes = tuple(mesh.values())
    groups = _groups(line, math.prod(sizes))
    positions = [np.unravel_index(group, sizes) for group in groups]
    varying = [any(len(set(at[axis].tolist())) > 1 for at in positions) for axis in range(len(mesh))]
    return tuple(itertools.compress(mesh, varying)), max(map(len, groups), default=1)


def _groups(line: str, devices: int) -> list[list[int]]:
    """The groups of devices, in any of the ways they are written."""
    if listed := re.search(r"(?:source_target_pairs|replica_groups)=\{(\{[\d,{}]*\})\}", line):
        return [list(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()
    named = re.search(
        r"replica_groups=\{?mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", line
    )
    if named:
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        ids = _iota(named[2] or ",".join(axes.values()), named[3]).reshape([int(size) for size in axes.values()])
        along = [list(axes).index(name) for name in re.findall(r"'(\w+)'", named[4])]
        rest = [axis for axis in range(len(axes)) if axis not in along]
        size = math.prod(ids.shape[axis] for axis in along)
        return ids.transpose(*rest, *along).reshape(-1, size).tolist()
    return [list(range(devices))]


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Ids from 0 of those dimensions, then transposed."""
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> tuple[int, ...]:
    """Those of "4,2"; none of ""."""
    return tuple(int(number) for number in text.split(",") if number)
