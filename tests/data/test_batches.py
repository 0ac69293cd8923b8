"""Schedules of batches: nothing lost, nothing twice, the labels where they belong."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lora_jax.data import batches, e2e, pairs
from lora_jax.data.pairs import Encoded

sizes = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=60)


def examples(sizes: list[tuple[int, int]]) -> Encoded:
    """Examples of (context and separator, labels) tokens; every token of its own."""
    total = np.array([head + tail for head, tail in sizes])
    offsets = np.concatenate([[0], np.cumsum(total)])
    starts = np.array([head for head, _ in sizes])
    return Encoded(np.arange(1, offsets[-1] + 1, dtype=np.int32), offsets, starts)


def rows(batch: batches.Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tokens read, tokens scored) of each row that holds something, checked on the way."""
    assert {name: array.dtype for name, array in batch.items()} == {
        "tokens": np.int32,
        "mask": bool,
        "labelled": np.int32,
        "labels": np.int32,
        "weights": np.float32,
    }
    read_and_scored = []
    for i in range(len(batch["tokens"])):
        mask, scored = batch["mask"][i], batch["weights"][i] > 0
        assert mask.any() == scored.any()
        assert not batch["tokens"][i][~mask].any() and not batch["labels"][i][~scored].any()
        assert not batch["labelled"][i][~scored].any()
        if mask.any():
            real = batch["tokens"][i][mask]
            labels = batch["labels"][i][scored]
            # tokens count up, so the label must be the one after the token that predicts it
            np.testing.assert_array_equal(batch["tokens"][i][batch["labelled"][i][scored]] + 1, labels)
            assert mask[: len(real)].all()
            read_and_scored.append((tuple(real), tuple(labels)))
    return read_and_scored


@given(sizes=sizes, size=st.integers(1, 9), buckets=st.integers(1, 6), seed=st.integers(0, 5))
def test_every_example_once_an_epoch(sizes: list[tuple[int, int]], size: int, buckets: int, seed: int) -> None:
    data = examples(sizes)
    schedule = batches.bucketed(data, size, seed, buckets=buckets)
    expected = [
        (tuple(tokens[:-1]), tuple(tokens[start:]))
        for tokens, start in zip(np.split(data.tokens, data.offsets[1:-1]), data.starts, strict=True)
    ]
    assert len(schedule) == -(-len(sizes) // size)
    assert len(schedule.shapes) <= buckets
    for epoch in range(2):
        epoch_batches = list(schedule(epoch))
        assert len(epoch_batches) == len(schedule)
        assert sorted(row for batch in epoch_batches for row in rows(batch)) == sorted(expected)
        assert sum(not batch["mask"].any(1).all() for batch in epoch_batches) <= 1
        for batch in epoch_batches:
            shape = (batch["tokens"].shape[1], batch["labels"].shape[1])
            assert shape in schedule.shapes
            assert batch["tokens"].shape[0] == batch["labels"].shape[0] == size


def test_a_row_left_over_keeps_its_labels_and_a_short_batch_ends_in_zeros() -> None:
    """One short example with many labels, four long ones with a single label each: three batches, one row empty."""
    data = examples([(1, 9), (20, 1), (20, 1), (20, 1), (20, 1)])
    schedule = batches.bucketed(data, 2, buckets=2)
    assert schedule.shapes == ((9, 9), (20, 9)) and len(schedule) == 3
    epoch = list(schedule(0))
    read = [row for batch in epoch for row in rows(batch)]
    assert sorted(len(labels) for _, labels in read) == [1, 1, 1, 1, 9] and len(set(read)) == 5
    assert sum(not mask.any() for batch in epoch for mask in batch["mask"]) == 1


def test_order_is_of_seed_and_epoch_and_any_position_can_be_had() -> None:
    data = examples([(1 + i % 7, 1 + i % 5) for i in range(50)])

    def order(seed: int, epoch: int) -> list:
        return [rows(batch) for batch in batches.bucketed(data, 4, seed)(epoch)]

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4) != order(1, 4)
    epoch = batches.bucketed(data, 4, 0)(3)
    assert rows(batches.bucketed(data, 4, 0)(3)[7]) == rows(epoch[7]) == order(0, 3)[7]
    assert [rows(batch) for batch in epoch[9:]] == order(0, 3)[9:]
    assert rows(epoch[-1]) == order(0, 3)[-1]
    with pytest.raises(IndexError):
        epoch[len(epoch)]


@given(st.lists(st.integers(1, 15), min_size=1, max_size=12), st.integers(1, 4))
def test_bucket_lengths_waste_least(lengths: list[int], count: int) -> None:
    ends = batches.bucket_lengths(np.array(lengths), count)
    assert len(ends) <= count and list(ends) == sorted(set(ends)) and ends[-1] == max(lengths)

    def padded(edges: tuple[int, ...]) -> int:
        return sum(min(edge for edge in edges if edge >= n) for n in lengths)

    values = sorted(set(lengths))
    choices = [(*edges, values[-1]) for k in range(min(count, len(values))) for edges in combinations(values[:-1], k)]
    assert padded(tuple(ends)) == min(map(padded, choices))


@pytest.mark.parametrize(
    ("tokenizer", "eos"),
    [
        ("base/tokenizer.json", 0),
        pytest.param("data/gpt2_tokenizer/tokenizer.json", 50256, marks=pytest.mark.slow),
    ],
)
def test_e2e_computes_few_padded_tokens(shared: Path, tokenizer: str, eos: int) -> None:
    data = e2e.load(shared / "data/e2e", "train")
    encoded = pairs.encode(data, Tokenizer.from_file(str(shared / tokenizer)), eos=eos, length=512)
    assert (len(encoded), encoded.skipped) == (42_061, 0)
    schedule = batches.bucketed(encoded, 8, 110)
    assert len(schedule) == 5_258  # the paper's: 5 epochs are 26,290 steps
    assert len(schedule.shapes) <= 12
    real = computed = 0
    for batch in schedule(0):
        real, computed = real + batch["mask"].sum(), computed + batch["mask"].size
    assert real == encoded.lengths.sum()
    assert real / computed > 0.90


@given(
    documents=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    length=st.integers(1, 9),
    size=st.integers(1, 4),
)
def test_packed(documents: list[int], length: int, size: int) -> None:
    # eos 0 begins a document; the other tokens count up, over documents too
    parts = np.split(np.arange(1, sum(documents) + 1), np.cumsum(documents)[:-1])
    stream = np.concatenate([np.concatenate([[0], part]) for part in parts]).astype(np.int32)
    if len(stream) < 2:
        return
    schedule = batches.packed(stream, size, length, eos=0)
    packed_rows = []
    for batch in schedule(0):
        assert batch["tokens"].shape == batch["labels"].shape == (size, length)
        for i in range(size):
            row = {name: array[i] for name, array in batch.items()}
            real = row["mask"]
            np.testing.assert_array_equal(real, row["weights"] > 0)
            if not real.any():
                assert not row["tokens"].any() and not row["labels"].any()
                continue
            tokens, positions = row["tokens"][real], row["positions"][real]
            np.testing.assert_array_equal(row["labelled"][real], np.arange(len(tokens)))
            begins = (tokens == 0) | (np.arange(len(tokens)) == 0)
            np.testing.assert_array_equal(np.cumsum(begins), row["segments"][real])
            np.testing.assert_array_equal(positions == 0, begins)
            assert (np.diff(positions)[~begins[1:]] == 1).all()
            packed_rows.append((tuple(tokens), tuple(row["labels"][real])))
    last = len(stream) - 1
    expected = [
        (tuple(stream[at : min(at + length, last)]), tuple(stream[at + 1 : at + 1 + length]))
        for at in range(0, last, length)
    ]
    assert sorted(packed_rows) == sorted(expected)


def test_bad_sizes() -> None:
    data = examples([(2, 3)])
    with pytest.raises(ValueError, match="batch_size=0"):
        batches.bucketed(data, 0)
    with pytest.raises(ValueError, match="buckets=0"):
        batches.bucketed(data, 8, buckets=0)
    with pytest.raises(ValueError, match="length=0"):
        batches.packed(data.tokens, 8, 0, eos=0)
    with pytest.raises(ValueError, match="1 tokens of text"):
        batches.packed(data.tokens[:1], 8, 4, eos=0)
