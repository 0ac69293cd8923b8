"""Chat templates: from the messages of a conversation to the text that a model reads.

A template is Jinja, written by whoever made the tokenizer. It runs in Jinja's sandbox, as transformers runs it, with
the same functions and filters, and gives the same text.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from lora_jax.core.extras import extra

with extra("data"):
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = Sequence[Mapping[str, str]]  # {"role": ..., "content": ...} each
Spans = list[tuple[int, int]]  # [start, end) of characters

# Of a base without a template: what is asked is a line, or several, and the answer follows with the end of text.
PLAIN = """{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}\
{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"""

# Noncharacters of Unicode, which no text has: they stand around special tokens that a message spells out, and around
# what a template's {% generation %} blocks write.
_LITERAL, _LITERAL_END, _ANSWER, _ANSWER_END = "\ufdd0\ufdd1\ufdd2\ufdd3"
_MARKS = re.compile(f"[{_LITERAL}-{_ANSWER_END}]")

# What strftime_now says in a run, so that its data are the same every day: the date in Llama 3's template.
DATE_IN_DATA = datetime(2024, 7, 26)


class Rendered(NamedTuple):
    """A conversation as text: where the answers stand in it, and special tokens that are only spelt out there."""

    text: str
    answers: Spans
    literals: Spans


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what a model writes, as transformers has it."""

    tags = {"generation"}  # noqa: RUF012  as Jinja asks for it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_ANSWER}{caller()}{_ANSWER_END}"


class _Namespace(jinja2.utils.Namespace):
    """A namespace whose attributes are a template's own: none begins with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace with an attribute {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(x: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, **options)


@functools.lru_cache(maxsize=16)
def compiled(template: str) -> jinja2.Template:
    """The template, ready to render.

    Raises:
      ValueError: it is no Jinja.
    """
    extensions = [_Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    functions = {"raise_exception": _raise_exception, "namespace": _Namespace}
    environment.globals.update(functions, dict=lambda *pairs, **entries: dict(*pairs, **entries))
    try:
        return environment.from_string(template)
    except jinja2.exceptions.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise ValueError(f"the chat template is no Jinja{f' (line {line})' if line else ''}: {error}") from error


def render(
    template: str,
    messages: Messages,
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = False,
    now: datetime | None = None,
) -> str:
    """The text of a conversation, as transformers' `apply_chat_template(messages, tokenize=False)` writes it.

    Args:
      template: Jinja.
      messages: the turns.
      special_tokens: {"bos_token": ..., "eos_token": ...}, as the tokenizer names them.
      add_generation_prompt: the text ends where the model's next answer begins.
      now: the date of `strftime_now`; by default today's.

    Raises:
      ValueError: the template fails, or refuses the messages; the error has its message.
    """
    return _MARKS.sub("", _written(template, messages, special_tokens, add_generation_prompt, now))


def rendered(template: str, messages: Messages, special_tokens: Mapping[str, str], tokens: re.Pattern) -> Rendered:
    """The text of a conversation, and its answers: what the template's `{% generation %}` blocks write or, without
    such, what an assistant's turn adds to the turns before it and the prompt for an answer. White space behind the
    special token that ends a turn is no part of the answer. The date is `DATE_IN_DATA`.

    Args:
      tokens: matches the tokenizer's special tokens.

    Raises:
      ValueError: the template fails; or the text of some turns depends on later ones, so that the answers are not
        known.
    """
    marked = [{**message, "content": _literal(message["content"], tokens)} for message in messages]
    write = functools.partial(_written, template, special_tokens=special_tokens, now=DATE_IN_DATA)
    conversation = _unmarked(write(marked, answer_next=False))
    if conversation.answers or re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template):
        return conversation
    answers = []
    for n in (n for n, message in enumerate(messages) if message["role"] == "assistant"):
        before = _unmarked(write(marked[:n], answer_next=True)).text
        after = conversation if n + 1 == len(messages) else _unmarked(write(marked[: n + 1], answer_next=False))
        if not (after.text.startswith(before) and conversation.text.startswith(after.text)):
            raise ValueError(
                f"where answer {n} (counted from 0, of all messages) stands is not known: the chat template writes "
                "turns otherwise where more of them follow. Give one that marks the answers with {% generation %} ... "
                "{% endgeneration %} (data.template), or give each answer a conversation of its own"
            )
        answer = after.text[len(before) :]
        stripped = answer.rstrip()
        ended = any(match.end() == len(stripped) for match in tokens.finditer(stripped))
        answers.append((len(before), len(before) + len(stripped if ended else answer)))
    return conversation._replace(answers=answers)


def prompt(template: str, messages: Messages, special_tokens: Mapping[str, str], tokens: re.Pattern) -> Rendered:
    """The text up to where the answer to these messages begins. Arguments and errors as `render`'s and `rendered`'s."""
    marked = [{**message, "content": _literal(message["content"], tokens)} for message in messages]
    return _unmarked(_written(template, marked, special_tokens, True, DATE_IN_DATA))


def _written(
    template: str, messages: Messages, special_tokens: Mapping[str, str], answer_next: bool, now: datetime | None
) -> str:
    """What the template writes, with marks."""
    variables: dict[str, Any] = {**special_tokens, "messages": messages, "tools": None, "documents": None}
    variables["strftime_now"] = (now or datetime.now()).strftime
    try:
        return compiled(template).render(variables, add_generation_prompt=answer_next)
    except (ArithmeticError, AttributeError, LookupError, TypeError, jinja2.exceptions.TemplateError) as error:
        raise ValueError(f"the chat template fails: {error}") from error


def _literal(text: str, tokens: re.Pattern) -> str:
    """The text with marks around the special tokens that it spells out."""
    if mark := _MARKS.search(text):
        raise ValueError(f"a message holds {mark[0]!r}, which is no character: remove it")
    return tokens.sub(f"{_LITERAL}\\g<0>{_LITERAL_END}", text)


def _unmarked(text: str) -> Rendered:
    """The text without marks, and the spans between them."""
    parts: list[str] = []
    spans: dict[str, Spans] = {_ANSWER_END: [], _LITERAL_END: []}
    opened: dict[str, int] = {}  # by the mark that closes the span
    length = end = 0
    for mark in _MARKS.finditer(text):
        parts.append(text[end : mark.start()])
        length, end = length + len(parts[-1]), mark.end()
        if mark[0] in (_ANSWER, _LITERAL):
            opened[_ANSWER_END if mark[0] == _ANSWER else _LITERAL_END] = length
        elif mark[0] in opened:  # else the template took the text apart
            spans[mark[0]].append((opened.pop(mark[0]), length))
    return Rendered("".join([*parts, text[end:]]), spans[_ANSWER_END], spans[_LITERAL_END])
