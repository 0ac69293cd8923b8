"""Conversations from JSON lines, and as tokens with the answers as labels.

A file is of one kind, a line one conversation::

    {"instruction": ..., "input": ..., "output": ...}                   Alpaca; "input" may be empty or absent
    {"prompt": ..., "response": ...}                                    or "completion" in place of "response"
    {"messages": [{"role": "user", "content": ...}, ...]}               of system, user, assistant, tool
    {"conversations": [{"from": "human", "value": ...}, ...]}           ShareGPT

Other keys do not count. What follows the last answer of a conversation is left out.
"""

import itertools
import json
import logging
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.extras import extra
from lora_jax.data import templates
from lora_jax.data.encoded import Conversations
from lora_jax.data.files import check_unicode, find, json_value, read_lines
from lora_jax.data.templates import Messages, Spans
from lora_jax.data.tokenizing import plain

with extra("data"):
    import datasets
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

SOURCE = "conversations are JSON lines of your own: docs/how_to/instruct.md"
FILES = {
    "train": ("train.jsonl",),
    "valid": ("valid.jsonl", "validation.jsonl", "val.jsonl", "dev.jsonl"),
    "test": ("test.jsonl",),
}
ROLES = ("system", "developer", "user", "assistant", "tool")
_SHARE_GPT = {"human": "user", "gpt": "assistant"}
# The keys that tell a kind, and how an error names it.
_KINDS = {
    ("instruction", "output"): "Alpaca",
    ("prompt", "response"): "prompt and response",
    ("prompt", "completion"): "prompt and completion",
    ("messages",): "messages",
    ("conversations",): "ShareGPT",
}
_PIECE = 1024  # conversations that are encoded together


def load(path: str | Path, split: str = "train") -> datasets.Dataset:
    """The conversations of a split in a folder of train, valid and test.jsonl (also .gz), or of one file.

    Returns:
      A Dataset with the columns `context`, the messages before the last answer, as `dumped`; `completion`, that answer;
      and `source`, the file and the line.

    Raises:
      FileNotFoundError: there is nothing there.
      ValueError: a line is no conversation of the file's kind, has an unknown role, no answer or an empty one; names
        file and line.
    """
    file = find(path, split, FILES, SOURCE)
    rows, kind = [], ""
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        try:
            messages, of_line = _messages(json_value(line))
            kind = kind or of_line
            if of_line != kind:
                raise ValueError(f"a line of {of_line}, but those before it are of {kind}: a file has one kind")
            check(messages)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}; {line[:80]!r}") from error
        last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
        context, answer = dumped(messages[:last]), messages[last]["content"]
        rows.append({"context": context, "completion": answer, "source": f"{file}:{number}"})
    return datasets.Dataset.from_list(rows)


def _messages(row: Any) -> tuple[list[dict[str, str]], str]:
    """The messages of a line, and its kind."""
    if not isinstance(row, dict):
        raise ValueError("no JSON object: write one conversation a line, {...}")
    kinds = [keys for keys in _KINDS if all(key in row for key in keys)]
    if not kinds:
        wanted = "; ".join(", ".join(keys) for keys in _KINDS)
        raise ValueError(f"no conversation: it has the keys {', '.join(row)}, not those of one kind ({wanted})")
    keys = kinds[0]
    if keys in (("messages",), ("conversations",)):
        turns, (role, content) = row[keys[0]], ("role", "content") if keys == ("messages",) else ("from", "value")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"{keys[0]} is no list of objects with {role!r} and {content!r}")
        messages = [{"role": turn.get(role), "content": turn.get(content)} for turn in turns]
        if keys == ("conversations",):
            messages = [turn | {"role": _SHARE_GPT.get(str(turn["role"]), turn["role"])} for turn in messages]
        return messages, _KINDS[keys]
    asked, answer = row[keys[0]], row[keys[1]]
    if row.get("input") and keys[0] == "instruction":
        asked = f"{asked}\n\n{row['input']}" if isinstance(asked, str) and isinstance(row["input"], str) else None
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], _KINDS[keys]


def check(messages: Sequence[Mapping[str, Any]], *, answered: bool = True) -> None:
    """A ValueError unless these are a conversation that can be learnt from or, not `answered`, be continued."""
    for n, message in enumerate(messages):
        where = f"message {n} (counted from 0)"
        if message["role"] not in ROLES:
            raise ValueError(f"{where} has the role {message['role']!r}: one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise ValueError(f"{where} has {message['content']!r} where its text belongs")
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"{where} is an empty answer: leave it out, or write what is to be learnt")
    roles = [message["role"] for message in messages]
    if not answered:
        return
    if "assistant" not in roles:
        raise ValueError("there is no answer, no message of the assistant: nothing to learn from")
    if not {"user", "tool"} & set(roles[: roles.index("assistant")]):
        raise ValueError("the conversation begins with an answer: put before it what it answers")


def dumped(messages: Messages) -> str:
    """Messages as JSON, one string for equal ones."""
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    return json.dumps(turns, ensure_ascii=False)


def loaded(context: str) -> list[dict[str, str]]:
    """The messages of a context: of `dumped`, or one of the user for any other text."""
    if context.startswith('[{"role": "'):
        messages = json_value(context)
        check(messages, answered=False)
        return messages
    return [{"role": "user", "content": context}]


class Format:
    """How conversations become tokens: by a chat template, and by a tokenizer that knows the special tokens which the
    template writes. What a message spells out is text, whatever it says.

    Args:
      template: Jinja.
      special_tokens: {"bos_token": ..., "eos_token": ...} for the template.
      tokenizer: stays as it is.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str], tokenizer: Tokenizer):
        self.template, self.special_tokens = template, dict(special_tokens)
        fields = json.loads(tokenizer.to_str()) | {"post_processor": None, "truncation": None, "padding": None}
        self.tokenizer = Tokenizer.from_str(json.dumps(fields))  # without post-processor: it would shift the offsets
        self.text_tokenizer = plain(self.tokenizer)
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {token.content: id for id, token in added.items() if token.special}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def rendered(self, messages: Messages) -> templates.Rendered:
        """The text of a conversation with its answers. Errors are those of `templates.rendered`."""
        return templates.rendered(self.template, messages, self.special_tokens, self.pattern)

    def prompt(self, messages: Messages) -> list[int]:
        """The tokens up to where the answer to these messages begins."""
        text = templates.prompt(self.template, messages, self.special_tokens, self.pattern)
        ((ids, _),) = self.tokens([text])
        return ids

    def tokens(self, texts: Sequence[templates.Rendered]) -> Iterator[tuple[list[int], Spans]]:
        """The ids of each text, and which characters each of them stands for."""
        encodings = iter(
            self.tokenizer.encode_batch([x.text for x in texts if not x.literals], add_special_tokens=False)
        )
        for x in texts:
            if x.literals:
                yield self._in_pieces(x)
            else:
                encoding = next(encodings)
                yield encoding.ids, encoding.offsets

    def _in_pieces(self, x: templates.Rendered) -> tuple[list[int], Spans]:
        """The tokens where special tokens are spelt out: these and the text between them, one after the other. A piece
        is encoded behind a line feed, lest a tokenizer puts a blank where it takes a text to begin."""
        edges = [0, *(edge for span in x.literals for edge in span), len(x.text)]
        line_feed = self.tokenizer.encode("\n", add_special_tokens=False).ids
        ids: list[int] = []
        offsets: Spans = []
        for number, (start, end) in enumerate(itertools.pairwise(edges)):
            tokenizer = self.text_tokenizer if number % 2 else self.tokenizer
            encoding = tokenizer.encode("\n" * bool(number) + x.text[start:end], add_special_tokens=False)
            skipped, shift = 0, start
            if number and encoding.ids[: len(line_feed)] == line_feed:
                skipped, shift = len(line_feed), start - 1
            elif number:
                encoding = tokenizer.encode(x.text[start:end], add_special_tokens=False)
            ids += encoding.ids[skipped:]
            offsets += [(first + shift, last + shift) for first, last in encoding.offsets[skipped:]]
        return ids, offsets

    def ends(self) -> list[int]:
        """The special tokens that end an answer, as the template writes them; [] for none."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = self.rendered(turns)
        start, end = text.answers[-1] if text.answers else (0, 0)
        last = [match for match in self.pattern.finditer(text.text, start, end) if match.end() == end]
        return [self.special[match[0]] for match in last]


def encode(
    examples: datasets.Dataset, format: Format, *, length: int, long: str = "skip", before: Sequence[int] = ()
) -> Conversations:
    """Tokens of every conversation up to its last answer, and which of them are labels: those of each answer, with the
    token that ends the turn, as far as the template writes one.

    Args:
      length: the most tokens that a model may read, its context.
      long: conversations longer than that are left out and counted ("skip") or a ValueError ("error"); none is cut.
      before: ids of a method's prefix; they count for the length.

    Raises:
      ValueError: a conversation that the template refuses, or whose answers it hides, with file and line; one is too
        long (`long="error"`), or every one is.
    """
    if long not in ("skip", "error"):
        raise ValueError(f'long={long!r}: either "skip" or "error"')
    tokens, offsets, targets, first_targets = array("i"), array("q", [0]), array("q"), array("q", [0])
    too_long: list[tuple[str, int]] = []
    for source, ids, scored in _scored(examples, format):
        size = len(before) + int(scored[-1])  # the last label is not read
        if size > length:
            too_long.append((source, size))
            continue
        targets.extend((scored + len(tokens) + len(before)).tolist())
        tokens.fromlist([*before, *ids[: scored[-1] + 1]])
        offsets.append(len(tokens))
        first_targets.append(len(targets))
    if too_long and (long == "error" or len(too_long) == len(examples)):
        source, size = too_long[0]
        raise ValueError(
            f"{source}: the conversation has {size} tokens, {size - length} more than the context of {length}, as have "
            f"{len(too_long)} of {len(examples)}: raise data.length if the model reads more, or leave them out"
        )
    if too_long:
        log.warning("skipped %d of %d conversations longer than %d tokens", len(too_long), len(examples), length)
    places = [np.array(numbers, np.int64) for numbers in (offsets, targets, first_targets)]
    return Conversations(np.array(tokens, np.int32), places[0], places[1], places[2], skipped=len(too_long))


def _scored(examples: datasets.Dataset, format: Format) -> Iterator[tuple[str, list[int], np.ndarray]]:
    """Of each conversation where it stands, its tokens, and the places of its labels among them."""
    for rows in examples.iter(_PIECE):
        texts = []
        for context, answer, source in zip(rows["context"], rows["completion"], rows["source"], strict=True):
            try:
                texts.append(format.rendered([*loaded(context), {"role": "assistant", "content": answer}]))
                if not texts[-1].answers:
                    raise ValueError("the chat template marks no answer: its {% generation %} blocks leave all out")
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error
        for source, text, (ids, spans) in zip(rows["source"], texts, format.tokens(texts), strict=True):
            scored = inside(spans, text.answers)
            scored = scored[scored > 0]  # nothing predicts the first token
            if not len(scored):
                raise ValueError(f"{source}: no token of an answer")
            yield source, ids, scored


def inside(spans: Spans, answers: Spans) -> np.ndarray:
    """The numbers of the spans that have a character in one of the answers, which are in order.

    >>> inside([(0, 2), (2, 3), (3, 6), (6, 7)], [(4, 6)])
    array([2])
    """
    starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
    first, last = np.array(answers, np.int64).reshape(-1, 2).T
    of_answer = np.minimum(np.searchsorted(last, starts, side="right"), len(last) - 1)
    return np.flatnonzero((ends > first[of_answer]) & (starts < last[of_answer]))


def prompts(contexts: Sequence[str], format: Format, *, before: Sequence[int] = ()) -> list[list[int]]:
    """What a model continues to answer each context (`loaded`): its tokens, a method's prefix `before` them."""
    check_unicode(contexts, "context")
    return [[*before, *format.prompt(loaded(context))] for context in contexts]
