"""Schedules of batches: fixed shapes, a seeded order, every position reachable by its index.

A batch is a dict of arrays, of b rows (examples, or packed rows), l tokens, n labelled positions::

    tokens (b, l) int32         0 where padded, on the right
    mask (b, l) bool            False: padding
    labelled (b, n) int32       the positions along l whose next token is scored
    labels (b, n) int32         those next tokens
    weights (b, n) float32      1, or 0 where there is no label

Packed rows (`packed`, `packing`) also have `segments` and `positions` (b, l) int32. Texts with one label each
(`classified`) have no `labelled`, n is 1, and::

    token_types (b, l) int32    1 for a BERT's second sentence
    labels (b,) int32, float32  the class, or the value of a regression
    weights (b,) float32        1, or 0 for an empty row

A row of zeros fills up a short batch. The shapes (l, n) are few, so a training step is compiled a few times only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lora_jax.core.extras import extra
from lora_jax.data.encoded import Conversations, Encoded, Texts

with extra("data"):
    from jaxtyping import Bool, Int, Int32, Shaped

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Schedule:
    """The batches of every epoch: `schedule(epoch)[i]` is one, `len(schedule)` their number.

    Each row comes once an epoch. The order depends on (seed, epoch) alone, so a run resumes at a position (epoch, i)
    without replaying anything. Rows left over in a bucket move to the next longer one: only one batch of an epoch can
    be short, and there are ceil(rows / batch_size).

    Attributes:
      buckets: the rows of each bucket, shortest first, with -1 for an empty row.
      shapes: (l, n) of each bucket.
      batch_size: b, the rows of a batch.
      seed: of the order.
      collate: makes a batch: (rows, l, n) -> Batch, with -1 for an empty row.
      held: which rows of a batch are made, by their numbers below b; None for all. The processes of one run each make
        those that their devices hold.
    """

    buckets: tuple[Int[np.ndarray, " _"], ...]
    shapes: tuple[tuple[int, int], ...]
    batch_size: int
    seed: int
    collate: Callable[[np.ndarray, int, int], Batch]
    held: Int[np.ndarray, " held"] | None = None

    def __repr__(self) -> str:
        return f"Schedule({len(self)} batches of {self.batch_size}, seed {self.seed})"

    def __len__(self) -> int:
        return -(-sum(map(len, self.buckets)) // self.batch_size)

    def __call__(self, epoch: int) -> "Epoch":
        random = np.random.default_rng([self.seed, epoch])
        parts, rest = [], np.zeros(0, np.int64)
        for number, bucket in enumerate(self.buckets, 1):
            rows = np.concatenate([rest, random.permutation(bucket)])
            if number == len(self.buckets):
                rows = np.append(rows, np.full(-len(rows) % self.batch_size, -1))
            full, rest = np.split(rows, [len(rows) // self.batch_size * self.batch_size])
            parts.append(full.reshape(-1, self.batch_size))
        bucket_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        order = random.permutation(len(self))
        return Epoch(self, np.concatenate(parts)[order], bucket_of[order])


@dataclass(frozen=True)
class Epoch(Sequence):
    """The batches of one epoch, each made when asked for: their `rows`, of all processes together (-1 for none), and
    the bucket of each. Of `Stacked` schedules the rows are (steps, members, batch_size)."""

    schedule: Schedule
    rows: Int[np.ndarray, "steps *members batch_size"]
    bucket_of: Int[np.ndarray, " steps"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        held = self.schedule.held
        rows = self.rows[i] if held is None else self.rows[i][..., held]
        return self.schedule.collate(rows, *self.schedule.shapes[self.bucket_of[i]])


@dataclass(frozen=True)
class Stacked:
    """The batches of several schedules that differ in the seed alone: each array is (members, b, ...), padded to the
    longest of the members' buckets."""

    members: tuple[Schedule, ...]

    def __len__(self) -> int:
        return len(self.members[0])

    def __call__(self, epoch: int) -> Epoch:
        epochs = [schedule(epoch) for schedule in self.members]
        rows = np.stack([of_member.rows for of_member in epochs], 1)
        longest = np.max([of_member.bucket_of for of_member in epochs], 0)  # the lengths ascend
        return Epoch(replace(self.members[0], collate=self._collate), rows, longest)

    def _collate(self, rows: Int[np.ndarray, "members b"], length: int, count: int) -> Batch:
        batches = [schedule.collate(row, length, count) for schedule, row in zip(self.members, rows, strict=True)]
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def bucketed(examples: Encoded | Conversations, batch_size: int, seed: int = 0, *, buckets: int = 8) -> Schedule:
    """Batches of examples of about equal length, padded on the right to their bucket's l and n.

    There are at most `buckets` of them, whose lengths are chosen so that padding is least.

    Raises:
      ValueError: a batch size or a number of buckets below 1.
    """
    check_sizes(batch_size=batch_size, buckets=buckets)
    lengths, labels = examples.lengths, examples.labels
    edges = bucket_lengths(lengths, buckets)
    bucket_of = np.searchsorted(edges, lengths)
    members = tuple(np.flatnonzero(bucket_of == number) for number in range(len(edges)))
    # a bucket also takes what shorter ones leave over: its n is theirs at least
    most = np.maximum.accumulate([labels[rows].max() for rows in members])
    shapes = tuple(zip(edges.tolist(), most.tolist(), strict=True))
    collate: Callable = _pairs_batch if isinstance(examples, Encoded) else _conversations_batch
    return Schedule(members, shapes, batch_size, seed, partial(collate, examples))


def classified(examples: Texts, batch_size: int, seed: int = 0, *, buckets: int = 12) -> Schedule:
    """Batches of texts of about equal length, each with one label, padded on the right to their bucket's l.

    A bucket is a number of full batches, so that no row moves to a longer one; empty rows, fewer than a batch has, are
    among the shortest. (With `bucketed` the one short batch, the longest, would be a tenth of a small evaluation set.)
    With 12 buckets of batches of 16 or 32 texts, cut at 128 tokens, at least 90% of the tokens are not padding in every
    set of CoLA, SST-2, MRPC, STS-B and RTE.

    Raises:
      ValueError: a batch size or a number of buckets below 1.
    """
    check_sizes(batch_size=batch_size, buckets=buckets)
    lengths, members = _full_batches(examples.lengths, batch_size, buckets)
    shapes = tuple((length, 1) for length in lengths)
    return Schedule(members, shapes, batch_size, seed, partial(_texts_batch, examples))


def in_order(epoch: Epoch, outputs: Sequence[Shaped[np.ndarray, "b ..."]]) -> Shaped[np.ndarray, "N ..."]:
    """What was computed for each row, `outputs` of every batch of the epoch, in the order of the rows; without what
    was computed for empty rows.

    Raises:
      ValueError: the outputs are not those of every batch.
    """
    rows = epoch.rows.reshape(-1)
    flat = np.concatenate(outputs)
    if len(flat) != len(rows):
        raise ValueError(f"outputs of {len(flat)} rows for an epoch of {len(rows)}")
    return flat[np.argsort(rows)[np.count_nonzero(rows < 0) :]]


def packed(tokens: Int32[np.ndarray, " total"], batch_size: int, length: int, seed: int = 0, *, eos: int) -> Schedule:
    """Rows of exactly `length` tokens (l, and n) out of documents laid end to end, for pretraining.

    Every document begins with the token `eos`, as `text.encode` makes them, and so every token of the stream but its
    first is a label: a document's last token predicts the next one's eos. A row is cut where it is full; what follows
    in the next row is another segment. Positions restart in each segment. The last row of all may be short.

    Raises:
      ValueError: fewer than two tokens, or a size below 1.
    """
    check_sizes(batch_size=batch_size, length=length)
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens of text: nothing to predict")
    rows = np.arange(-(-(len(tokens) - 1) // length))
    return Schedule((rows,), ((length, length),), batch_size, seed, partial(_packed_batch, tokens, eos))


def bucket_lengths(lengths: Int[np.ndarray, " rows"], count: int) -> Int[np.ndarray, " buckets"]:
    """At most `count` lengths to pad to, ascending, with the least padding in all.

    >>> bucket_lengths(np.array([3, 3, 4, 9, 10, 10]), 2)
    array([ 4, 10])
    """
    values, counts = np.unique(lengths, return_counts=True)
    return values[_cuts(values, np.cumsum(counts), count)]


def _full_batches(
    lengths: Int[np.ndarray, " rows"], batch_size: int, count: int
) -> tuple[list[int], tuple[Int[np.ndarray, " _"], ...]]:
    """The lengths of at most `count` buckets of full batches, and their rows, with the least padding in all.

    >>> _full_batches(np.array([9, 3, 4, 3, 5]), 2, 2)
    ([4, 9], (array([-1,  1,  3,  2]), array([4, 0])))
    """
    order = np.concatenate([np.full(-len(lengths) % batch_size, -1), np.argsort(lengths, kind="stable")])
    along = np.where(order < 0, 0, lengths[order])
    # of the rows of one length, the best end of a bucket is the last one that ends a batch
    ends = np.unique((np.flatnonzero(np.diff(along, append=-1)) + 1) // batch_size) * batch_size
    ends = ends[ends > 0]
    ends = ends[_cuts(along[ends - 1], ends, count)]
    return along[ends - 1].tolist(), tuple(np.split(order, ends[:-1]))


def _cuts(values: Int[np.ndarray, " ends"], below: Int[np.ndarray, " ends"], count: int) -> Int[np.ndarray, " buckets"]:
    """Which of the possible ends to choose for at most `count` buckets, the last one among them, so that padding is
    least. At end i a bucket is padded to `values[i]`, and `below[i]` rows lie before it; both ascend."""
    below = np.concatenate([[0], below])
    # cost[i, j]: the tokens of one bucket of what lies between the ends i - 1 and j - 1
    cost = np.triu(np.concatenate([[0], values]) * (below[None, :] - below[:, None]), 1)
    cost = np.where(cost > 0, cost, np.inf)
    best, choices = cost[0], []
    for _ in range(min(count, len(values)) - 1):
        total = best[:, None] + cost
        choices.append(total.argmin(0))
        best = total.min(0)
    edges = [len(values)]
    for choice in reversed(choices):
        edges.insert(0, int(choice[edges[0]]))
    return np.array(edges) - 1


def check_sizes(**sizes: int) -> None:
    """A ValueError that names all sizes where one is below 1."""
    if min(sizes.values()) < 1:
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"{given}: both must be at least 1")


def _positions(
    examples: Encoded | Conversations | Texts, rows: Int[np.ndarray, " b"], length: int
) -> tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
    """Where each row's tokens lie, and which of those positions belong to the row."""
    along = np.arange(length)
    mask = (rows >= 0)[:, None] & (along < examples.lengths[rows][:, None])
    return examples.offsets[rows][:, None] + along, mask


def _texts_batch(examples: Texts, rows: Int[np.ndarray, " b"], length: int, count: int) -> Batch:
    at, mask = _positions(examples, rows, length)
    return {
        "tokens": _take(examples.tokens, at, mask),
        "mask": mask,
        "token_types": _take(examples.token_types, at, mask),
        "labels": np.where(rows >= 0, examples.labels[rows], 0),
        "weights": (rows >= 0).astype(np.float32),
    }


def _pairs_batch(examples: Encoded, rows: Int[np.ndarray, " b"], length: int, count: int) -> Batch:
    at, mask = _positions(examples, rows, length)
    start, ahead = examples.starts[rows][:, None], np.arange(count)
    scored = (rows >= 0)[:, None] & (ahead < examples.labels[rows][:, None])
    return {
        "tokens": _take(examples.tokens, at, mask),
        "mask": mask,
        # the token before a label predicts it
        "labelled": np.where(scored, start - 1 + ahead, 0).astype(np.int32),
        "labels": _take(examples.tokens, at[:, :1] + start + ahead, scored),
        "weights": scored.astype(np.float32),
    }


def _conversations_batch(examples: Conversations, rows: Int[np.ndarray, " b"], length: int, count: int) -> Batch:
    at, mask = _positions(examples, rows, length)
    ahead = np.arange(count)
    scored = (rows >= 0)[:, None] & (ahead < examples.labels[rows][:, None])
    targets = examples.targets.take(examples.first_targets[rows][:, None] + ahead, mode="clip")
    return {
        "tokens": _take(examples.tokens, at, mask),
        "mask": mask,
        "labelled": np.where(scored, targets - at[:, :1] - 1, 0).astype(np.int32),
        "labels": _take(examples.tokens, targets, scored),
        "weights": scored.astype(np.float32),
    }


def _packed_batch(
    tokens: Int32[np.ndarray, " total"], eos: int, rows: Int[np.ndarray, " b"], length: int, count: int
) -> Batch:
    along = np.arange(length)
    at = rows[:, None] * length + along
    mask = (rows >= 0)[:, None] & (at < len(tokens) - 1)
    inputs = _take(tokens, at, mask)
    begins = mask & (inputs == eos)
    begins[:, 0] = True
    return {
        "tokens": inputs,
        "mask": mask,
        "segments": np.cumsum(begins, 1, dtype=np.int32),
        "positions": (along - np.maximum.accumulate(begins * along, 1)).astype(np.int32),
        "labelled": np.where(mask, along, 0).astype(np.int32),
        "labels": _take(tokens, at + 1, mask),
        "weights": mask.astype(np.float32),
    }


def _take(
    tokens: Int[np.ndarray, " total"], at: Int[np.ndarray, "b l"], where: Bool[np.ndarray, "b l"]
) -> Int32[np.ndarray, "b l"]:
    """The tokens at those positions, 0 where `where` is False (the position may lie outside)."""
    return np.where(where, tokens.take(at, mode="clip"), 0).astype(np.int32)
