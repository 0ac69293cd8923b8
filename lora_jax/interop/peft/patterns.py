"""The most steps that a regular expression of a config can take, counted from its text before it runs.

Python's `re` tries the ways to match a pattern one after the other, and all of them where none fits. Their numbers
multiply along a pattern: `.?` has two, so forty of them have a thousand billion. Unbounded repeats divide the
characters of the name among them: k in a row match n characters in C(n + k, k) ways.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

# In steps, by measurement; a literal character costs one, some 1.5 ns on a processor of 2024.
_ANY, _CLASS, _GROUP, _LOOK = 2, 5, 2, 12
_TRY, _TRY_GROUP, _TRY_LITERAL = 12, 40, 2  # trying what follows a repeat, or the next alternative
_MOST_ENDLESS = 3
_MOST_GROUPS = 50  # `re` copies what they hold at every try

_TOKEN = re.compile(
    r"""
    (?P<look>\(\?<?[=!])
  | (?P<open>\((?:\?:|\?P<\w+>|(?!\?)))
  | (?P<close>\))
  | (?P<or>\|)
  | (?P<repeat>(?:[*+?]|\{(?!\})(?P<low>[0-9]*)(?P<comma>,?)(?P<high>[0-9]*)\})(?P<kind>[?+]?))
  | (?P<any>\.)
  | (?P<class>\[\^?\]?(?:\\.|[^]\\])*\]|\\[A-Za-z0])
  | (?P<literal>\\[^0-9]|[^()\\])
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)


class _Part(NamedTuple):
    """A part of a pattern; `ways` and `steps` are sums of number * C(n + k, k), as {k: number}."""

    ways: Counter[int]  # in how many it matches from one position
    steps: Counter[int]  # of trying them all
    first: str | None = ""  # the character that every match begins with; "" where there is none, None for an empty part
    one: bool = False  # whether it is a single character


_ONCE, _ENDLESS = Counter({0: 1}), Counter({1: 1})
_NOTHING = _Part(_ONCE, Counter(), None)


def steps(pattern: str, length: int = 200) -> int:
    """The most steps, each a nanosecond or two, that matching a (valid) pattern with a name of this length takes.

    Raises:
      ValueError: more than three unbounded repeats follow each other, a group that matches in several ways is repeated,
        there are too many groups, or something that is not counted here (flags, references, conditions).
    """
    if (groups := re.compile(pattern).groups) > _MOST_GROUPS:
        raise ValueError(f"{groups} groups, more than {_MOST_GROUPS}; (?:...) is none")
    counted = _alternatives(_TOKEN.finditer(pattern), length)
    ends = counted.steps + counted.ways  # each way ends with a check for the end of the name
    return sum(number * math.comb(length + k, k) for k, number in ends.items())


def _alternatives(tokens: Iterator[re.Match[str]], length: int) -> _Part:
    """The part up to the closing parenthesis, or to the end."""
    parts, before, last = [], _NOTHING, _NOTHING
    for token in tokens:
        if token.lastgroup == "close":
            break
        if token.lastgroup == "repeat":
            last = _repeated(last, token, length)
            continue
        before, last = _then(before, last), _NOTHING
        if token.lastgroup == "or":
            parts.append(before)
            before = _NOTHING
        elif token.lastgroup == "open":
            inner = _alternatives(tokens, length)
            last = _Part(inner.ways, inner.steps + Counter({0: _GROUP}), inner.first)
        elif token.lastgroup == "look":  # it matches in one way: `re` never tries another for it
            last = _Part(_ONCE, _alternatives(tokens, length).steps + Counter({0: _LOOK}))
        elif token.lastgroup == "other":
            raise ValueError(f"at {token.start()}, a flag, a reference, a condition or an atomic group")
        elif token.lastgroup == "literal":  # or an anchor between two
            last = _Part(_ONCE, Counter({0: 1}), "" if token[0] in "^$" else token[0][-1], one=True)
        else:
            last = _Part(_ONCE, Counter({0: _ANY if token.lastgroup == "any" else _CLASS}), one=True)
    return _any([*parts, _then(before, last)])


def _times(one: Counter[int], two: Counter[int]) -> Counter[int]:
    product: Counter[int] = Counter()
    for k, number in one.items():
        for more, other in two.items():
            product[k + more] += number * other
    if max(product, default=0) > _MOST_ENDLESS:
        raise ValueError(f"more than {_MOST_ENDLESS} repeats without end follow each other")
    return product


def _then(one: _Part, two: _Part) -> _Part:
    first = two.first if one.first is None else one.first
    return _Part(_times(one.ways, two.ways), one.steps + _times(one.ways, two.steps), first)


def _any(parts: list[_Part]) -> _Part:
    """Alternatives. Of those that begin with different characters only one can match, so a list of names is cheap."""
    if len(parts) == 1:
        return parts[0]
    by_first: dict[str, list[_Part]] = {}
    for part in parts:
        by_first.setdefault(part.first or "", []).append(part)
    free = by_first.pop("", [])
    most_ways: Counter[int] = Counter()
    most_steps: Counter[int] = Counter()
    for group in by_first.values():
        most_ways |= sum((part.ways for part in group), Counter())
        most_steps |= sum((part.steps for part in group), Counter()) + Counter({0: _TRY * len(group)})
    tries = Counter({0: _TRY * len(free) + _TRY_LITERAL * (len(parts) - len(free))})
    ways = sum((part.ways for part in free), most_ways)
    return _Part(ways, sum((part.steps for part in free), most_steps + tries))


def _repeated(part: _Part, quantifier: re.Match[str], length: int) -> _Part:
    """A part with a quantifier."""
    sign = quantifier[0][0]
    if sign == "{":
        low = int(quantifier["low"] or 0)
        high = int(quantifier["high"]) if quantifier["high"] else math.inf if quantifier["comma"] else low
    else:
        low, high = int(sign == "+"), 1 if sign == "?" else math.inf
    if high > 1 and part.ways != _ONCE:
        raise ValueError("a group that matches in several ways is repeated")
    if low > length:
        raise ValueError(f"a repeat of at least {low} times")
    lazy = quantifier["kind"] == "?"
    one_try = part.steps + Counter({0: (_TRY if part.one else _TRY_GROUP) + _TRY * lazy})
    if high > length:
        return _Part(_ENDLESS, _times(_ENDLESS, one_try))
    if high > 1:
        return _Part(Counter({0: high - low + 1}), _times(Counter({0: high}), one_try))
    return _Part(Counter({0: 1 - low}) + (part.ways if high else Counter()), one_try)
