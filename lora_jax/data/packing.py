"""Packed conversations: several in a row, which see nothing of each other."""

from functools import partial

import numpy as np

from lora_jax.core.extras import extra
from lora_jax.data.batches import Batch, Schedule, check_sizes
from lora_jax.data.encoded import Conversations

with extra("data"):
    from jaxtyping import Int


def packed_conversations(examples: Conversations, batch_size: int, length: int, seed: int = 0) -> Schedule:
    """Rows of exactly `length` tokens, each of one or more conversations: segments of their own, whose positions begin
    at 0. None is cut.

    Which conversations share a row is the same in every epoch; the order of the rows is drawn anew.

    Raises:
      ValueError: a conversation is longer than `length`, or a size is below 1.
    """
    check_sizes(batch_size=batch_size, length=length)
    if (longest := int(examples.lengths.max(initial=0))) > length:
        raise ValueError(f"a conversation has {longest} tokens: rows of {length} are too short")
    rows = fill(examples.lengths, length)
    members = np.concatenate([np.array(row, np.int64) for row in rows])
    bounds = np.cumsum([0, *map(len, rows)])
    most = int(np.add.reduceat(examples.labels[members], bounds[:-1]).max())
    collate = partial(_batch, examples, members, bounds)
    return Schedule((np.arange(len(rows)),), ((length, most),), batch_size, seed, collate)


def fill(sizes: Int[np.ndarray, " items"], capacity: int) -> list[list[int]]:
    """The items by their numbers in as few bins as best-fit decreasing finds: each, the largest first, goes where the
    least room is left that holds it. In time linear in the items, after sorting them.

    >>> fill(np.array([3, 7, 5, 5]), 10)
    [[1, 0], [2, 3]]
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r: a bin has room for r
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        if enough := rooms >> size:
            room = size + (enough & -enough).bit_length() - 1
            number = by_room[room].pop()
            rooms &= ~(not by_room[room] and 1 << room)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        by_room[room - size].append(number)
        rooms |= 1 << (room - size)
    return bins


def _batch(
    examples: Conversations,
    members: Int[np.ndarray, " N"],
    bounds: Int[np.ndarray, " edges"],
    rows: Int[np.ndarray, " b"],
    length: int,
    count: int,
) -> Batch:
    batch: Batch = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "segments", "positions")}
    batch |= {name: np.zeros((len(rows), count), np.int32) for name in ("labelled", "labels")}
    for i, row in enumerate(rows):
        start = label = 0
        for segment, member in enumerate(members[bounds[row] : bounds[row + 1]] if row >= 0 else (), 1):
            first, end = examples.offsets[member], examples.offsets[member + 1] - 1
            targets = examples.targets[examples.first_targets[member] : examples.first_targets[member + 1]]
            place = slice(start, start + end - first)
            batch["tokens"][i, place] = examples.tokens[first:end]
            batch["segments"][i, place] = segment
            batch["positions"][i, place] = np.arange(end - first)
            labels = slice(label, label + len(targets))
            batch["labelled"][i, labels] = targets - first + start - 1  # the token before a label predicts it
            batch["labels"][i, labels] = examples.tokens[targets]
            start, label = place.stop, labels.stop
    counts = np.add.reduceat(examples.labels[members], bounds[:-1])[rows] * (rows >= 0)
    weights = (np.arange(count) < counts[:, None]).astype(np.float32)
    return batch | {"mask": batch["segments"] > 0, "weights": weights}
