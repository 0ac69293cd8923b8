"""Conversations from files, their labels, and packed rows."""

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from lora_jax.data import batches, chat, packing, templates
from lora_jax.data.digest import digest
from lora_jax.data.encoded import Conversations
from lora_jax.runs.tasks import load_split, task_named
from tests.helpers.chat_templates import TEMPLATES, TOKENS, chat_tokenizer


def format_of(name: str = "smollm2") -> chat.Format:
    return chat.Format(TEMPLATES[name], TOKENS, chat_tokenizer())


def written(file: Path, *rows: Any) -> Path:
    file.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file


def said(*turns: str) -> list[dict[str, str]]:
    """Turns of user and assistant in alternation."""
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), turns)]


@pytest.mark.parametrize(
    ("row", "context"),
    [
        ({"instruction": "Add.", "input": "1, 2", "output": "3", "id": 7}, said("Add.\n\n1, 2")),
        ({"instruction": "Greet.", "input": "", "output": "3"}, said("Greet.")),
        ({"instruction": "Greet.", "output": "3"}, said("Greet.")),
        ({"prompt": "Greet.", "response": "3"}, said("Greet.")),
        ({"prompt": "", "completion": "3"}, said("")),
        (
            {"messages": [{"role": "system", "content": "Be."}, *said("a", "3")]},
            [{"role": "system", "content": "Be."}, *said("a")],
        ),
        ({"messages": said("a", "b", "c", "3", "left out")}, said("a", "b", "c")),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "3"}]}, said("a")),
    ],
)
def test_every_kind_of_line(tmp_path: Path, row: dict, context: list) -> None:
    examples = chat.load(written(tmp_path / "a.jsonl", row, "", row), "train")
    assert examples["source"][:] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:3"]
    assert chat.loaded(examples["context"][0]) == context and examples["completion"][0] == "3"
    assert chat.loaded('[{"no": 1}]') == said('[{"no": 1}]')


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "message 0 .* has the role 'bot': one of system, developer, user",
        ),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "message 0 .* has the role 'bing': one of"),
        ({"messages": said("a")}, "there is no answer, no message of the assistant"),
        ({"messages": said("a", "b", "c", " \n")}, "message 3 .* is an empty answer"),
        ({"instruction": "a", "output": ""}, "message 1 .* is an empty answer"),
        ({"messages": said("a", "b")[1:]}, "begins with an answer"),
        (
            {"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]},
            "message 0 .* has None where its text",
        ),
        ({"prompt": said("a"), "completion": said("a", "b")[1:]}, "message 0 .* where its text belongs"),
        ({"instruction": "a", "input": 5, "output": "b"}, "message 0 .* has None where its text belongs"),
        ({"messages": "a"}, "messages is no list of objects with 'role' and 'content'"),
        ({"text": "a"}, "no conversation: it has the keys text, not those of one kind .instruction, output; prompt"),
        ([1], "no JSON object: write one conversation a line"),
        ('{"prompt": "a", "resp', "Unterminated string"),
        ({"prompt": "a", "response": "b"}, "a line of prompt and response, but those before it are of messages"),
    ],
)
def test_a_bad_line_is_an_error_that_names_it(tmp_path: Path, row: Any, message: str) -> None:
    first = {"messages": said("a", "b")} if "those before" in message else ""
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{message}"):
        chat.load(written(tmp_path / "a.jsonl", first, row), "train")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds none of train\.jsonl, .*docs/how_to/instruct\.md"):
        chat.load(tmp_path, "train")


def test_labels_stop_at_the_last_answer_and_the_long_are_left_out(tmp_path: Path, caplog: Any) -> None:
    rows = [{"messages": said("a", "b")}, {"messages": said("a " * 90, "b")}, {"messages": said("c", "d", "e", "f")}]
    examples, format = chat.load(written(tmp_path / "a.jsonl", *rows)), format_of("marked")
    with caplog.at_level(logging.WARNING):
        encoded = chat.encode(examples, format, length=60)
    assert (len(encoded), encoded.skipped) == (2, 1)
    assert "skipped 1 of 3 conversations longer than 60 tokens" in caplog.text
    whole = format.tokenizer.decode(encoded.tokens[encoded.offsets[1] :].tolist(), skip_special_tokens=False)
    assert whole == format.rendered(said("c", "d", "e", "f")).text.removesuffix("\n")
    targets = encoded.tokens[encoded.targets[encoded.first_targets[1] :]]
    assert format.tokenizer.decode(targets.tolist(), skip_special_tokens=False) == "d<|im_end|>f<|im_end|>"
    assert encoded.labels.tolist() == [2, 4] and encoded.offsets[-1] == encoded.targets[-1] + 1
    exact = int(encoded.lengths.max())
    assert chat.encode(examples, format, length=exact).skipped == 1
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the conversation has \d+ tokens, \d+ more .* as have 1 of 3"):
        chat.encode(examples, format, length=60, long="error")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .* as have 3 of 3"):
        chat.encode(examples, format, length=3)
    prefixed = chat.encode(examples, format, length=exact + 2, before=[300, 301])
    assert prefixed.tokens[prefixed.offsets[1] :][:2].tolist() == [300, 301]
    np.testing.assert_array_equal(prefixed.tokens[prefixed.targets], encoded.tokens[encoded.targets])
    with pytest.raises(ValueError, match=f"{exact + 1} tokens, 1 more than the context of {exact}"):
        chat.encode(examples.select([2]), format, length=exact, before=[300])


def test_what_a_template_refuses_names_the_line(tmp_path: Path) -> None:
    rows = [{"messages": said("a", "b")}, {"messages": [*said("a"), *said("a", "b")]}]
    examples = chat.load(written(tmp_path / "a.jsonl", *rows))
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the chat template fails: .*roles must alternate"):
        chat.encode(examples, format_of("llama-2"), length=99)
    nothing = chat.Format("{% generation %}{% endgeneration %}a b c", TOKENS, chat_tokenizer())
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no token of an answer"):
        chat.encode(examples, nothing, length=99)
    never = chat.Format("{% if 0 %}{% generation %}{% endgeneration %}{% endif %}a", TOKENS, chat_tokenizer())
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the chat template marks no answer"):
        chat.encode(examples, never, length=99)


def test_a_prompt_continues_as_the_training_did(tmp_path: Path) -> None:
    for name in ("smollm2", "llama-2", "llama-3", "mistral", "qwen", "gemma", "marked"):
        format = format_of(name)
        row = {"context": chat.dumped(said("a", "b", "c")), "completion": "d e", "source": ""}
        examples = datasets.Dataset.from_list([row])
        encoded = chat.encode(examples, format, length=999)
        last = encoded.targets[-1] - len(format.tokenizer.encode("d e", add_special_tokens=False).ids)
        (prompt,) = chat.prompts(examples["context"][:], format)
        np.testing.assert_array_equal(encoded.tokens[: len(prompt)], prompt, err_msg=name)
        assert last - len(prompt) <= 2, name  # Llama 2 and Mistral have a blank between
        assert chat.prompts(["c"], format) == chat.prompts([chat.dumped(said("c"))], format)


turns = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=3)
conversations = st.lists(turns, min_size=1, max_size=25)


def made(shapes: list[list[tuple[int, int]]]) -> Conversations:
    """Conversations of turns of (tokens before, labels); every token of its own."""
    tokens, offsets, targets, first = 0, [0], [], [0]
    for turns in shapes:
        for before, labels in turns:
            targets += range(tokens + before, tokens + before + labels)
            tokens += before + labels
        offsets.append(tokens)
        first.append(len(targets))
    places = [np.array(numbers) for numbers in (offsets, targets, first)]
    return Conversations(np.arange(1, tokens + 1, dtype=np.int32), *places)


def read_and_scored(batch: batches.Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tokens read, labels) of each conversation in a batch, checked on the way."""
    segments = batch.get("segments", batch["mask"].astype(np.int32))
    result = []
    for i, row in enumerate(segments):
        scored = batch["weights"][i] > 0
        at, labels = batch["labelled"][i][scored], batch["labels"][i][scored]
        np.testing.assert_array_equal(batch["tokens"][i][at] + 1, labels)  # tokens count up
        assert batch["mask"][i].tolist() == (row > 0).tolist() and not batch["tokens"][i][row == 0].any()
        assert not batch["labelled"][i][~scored].any() and not batch["labels"][i][~scored].any()
        for segment in sorted(set(row[row > 0].tolist())):
            here = np.flatnonzero(row == segment)
            assert (np.diff(here) == 1).all()
            if "positions" in batch:
                np.testing.assert_array_equal(batch["positions"][i][here], np.arange(len(here)))
            result.append((tuple(batch["tokens"][i][here].tolist()), tuple(labels[np.isin(at, here)].tolist())))
    return result


@given(shapes=conversations, size=st.integers(1, 5), room=st.integers(0, 40))
def test_packed_and_bucketed_have_every_conversation_once(shapes: list, size: int, room: int) -> None:
    examples = made(shapes)
    expected = []
    for n in range(len(examples)):
        labels = examples.targets[examples.first_targets[n] : examples.first_targets[n + 1]]
        own = examples.tokens[examples.offsets[n] : examples.offsets[n + 1] - 1]
        expected.append((tuple(own.tolist()), tuple(examples.tokens[labels].tolist())))
    length = int(examples.lengths.max()) + room
    packed = packing.packed_conversations(examples, size, length, 1)
    for schedule in (packed, batches.bucketed(examples, size, 1, buckets=3)):
        for epoch in range(2):
            rows = [row for batch in schedule(epoch) for row in read_and_scored(batch)]
            assert sorted(rows) == sorted(expected)
    if length - room > 1:
        with pytest.raises(ValueError, match=r"a conversation has \d+ tokens: rows of"):
            packing.packed_conversations(examples, size, length - room - 1)


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=40), extra=st.integers(0, 10))
def test_bins_are_filled_as_best_fit_decreasing_does(sizes: list[int], extra: int) -> None:
    capacity = max(sizes) + extra
    bins = packing.fill(np.array(sizes), capacity)
    assert sorted(item for row in bins for item in row) == list(range(len(sizes)))
    slow: list[int] = []  # what is in each, looked for one by one
    for size in sorted(sizes, reverse=True):
        fitting = [n for n, filled in enumerate(slow) if filled + size <= capacity]
        if fitting:
            slow[max(fitting, key=lambda n: slow[n])] += size
        else:
            slow.append(size)
    assert sorted(sum(sizes[item] for item in row) for row in bins) == sorted(slow)


def test_many_bins_are_filled_in_linear_time() -> None:
    sizes = np.random.default_rng(0).integers(20, 900, 50_000)
    bins = packing.fill(sizes, 1024)
    assert len(bins) * 1024 < 1.02 * sizes.sum()


def test_the_digest_is_of_the_template_too(tmp_path: Path) -> None:
    examples = chat.load(written(tmp_path / "a.jsonl", {"messages": said("a", "b")}, {"messages": said("c", "d")}))
    schedules = [
        packing.packed_conversations(chat.encode(examples, format, length=99), 2, 99, seed)
        for format, seed in ((format_of(), 0), (format_of(), 1), (format_of("marked"), 0))
    ]
    digests = [digest(schedule) for schedule in schedules]
    assert digests[0] == digests[1] != digests[2]


def test_splits_of_one_file(tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "response": "x"} for n in range(41)]
    file, other = written(tmp_path / "a.jsonl", *rows), written(tmp_path / "b.jsonl", *rows[:3])
    task, data = task_named("chat"), {"train": str(file), "valid": "", "path": ""}
    parts = {split: load_split(task, ConfigDict({"data": data}), split)["source"][:] for split in ("train", "valid")}
    assert (len(parts["train"]), len(parts["valid"])) == (38, 3) and not {*parts["train"]} & {*parts["valid"]}
    with pytest.raises(ValueError, match="has no split 'test': give --split=valid"):
        load_split(task, ConfigDict({"data": data}), "test")
    config = ConfigDict({"data": data | {"valid": str(other)}})
    assert [len(load_split(task, config, split)) for split in ("train", "valid")] == [41, 3]
    assert len(load_split(task, config, "test", other)) == 3
    with pytest.raises(ValueError, match=r"no data: --config\.data\.train=FILE"):
        load_split(task, ConfigDict({"data": {"train": "", "valid": "", "path": ""}}), "train")
    with pytest.raises(ValueError, match=r"data\.valid=b\.jsonl goes with data\.train"):
        load_split(task, ConfigDict({"data": {"train": "", "valid": "b.jsonl", "path": "."}}), "train")
    with pytest.raises(ValueError, match="has 1 examples, none to validate with"):
        load_split(task, ConfigDict({"data": data | {"train": str(written(tmp_path / "c.jsonl", rows[0]))}}), "valid")


def test_the_example_of_the_docs() -> None:
    """docs/how_to/instruct.md shows what is in the loss."""
    rendered = format_of("smollm2").rendered(said("Is it open?", "Yes, until ten.", "And tomorrow?", "Closed."))
    underlined, start = "", 0
    for line in rendered.text.splitlines(keepends=True):
        inside = [any(first <= start + n < end for first, end in rendered.answers) for n in range(len(line) - 1)]
        underlined += line + ("~" * sum(inside) + "\n" if any(inside) else "")
        assert all(inside) or not any(inside)
        start += len(line)
    assert f"```\n{underlined}```" in (Path(__file__).parents[2] / "docs/how_to/instruct.md").read_text()


def test_the_plain_template_needs_no_special_tokens_of_a_chat() -> None:
    format = chat.Format(templates.PLAIN, TOKENS, chat_tokenizer())
    assert format.ends() == [format.tokenizer.token_to_id("</s>")]
