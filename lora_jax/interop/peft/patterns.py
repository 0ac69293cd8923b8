"""The most steps that a regular expression of a config can take, counted before it runs.

Python's `re` tries the ways to match a pattern one after the other, and all of them where none fits. Their numbers
multiply along a pattern: `.?` has two, so forty of them have a thousand billion. Unbounded repeats divide the
characters of the name among them: k in a row match n characters in C(n + k, k) ways.

`steps` bounds them for every name of a length, from the pattern's text. Most patterns pass. Of the others many are
harmless with the names that there are: the words between the repeats leave them few ways. `steps_with` counts for
these, exactly but for what `re` skips: how often each place of the pattern is tried at each character of each name.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

# In steps, by measurement; a literal character costs one, some 1.5 ns on a processor of 2024.
_ANY, _CLASS, _GROUP, _LOOK = 2, 5, 2, 12
_TRY, _TRY_GROUP, _TRY_LITERAL = 12, 40, 2  # trying what follows a repeat, or the next alternative
_MOST_ENDLESS = 3
_MOST_GROUPS = 50  # `re` copies what they hold at every try
_ANCHORS = ("^", "$", r"\A", r"\Z", r"\b", r"\B")
_MOVE = 20_000  # of `steps_with`, for some hundred names

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
    _check_groups(pattern)
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
    low, high = _bounds(quantifier)
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


def _bounds(quantifier: re.Match[str]) -> tuple[int, float]:
    """The least and the largest number of times."""
    sign = quantifier[0][0]
    if sign != "{":
        return int(sign == "+"), 1 if sign == "?" else math.inf
    low = int(quantifier["low"] or 0)
    return low, int(quantifier["high"]) if quantifier["high"] else math.inf if quantifier["comma"] else low


def _check_groups(pattern: str) -> None:
    if (groups := re.compile(pattern).groups) > _MOST_GROUPS:
        raise ValueError(f"{groups} groups, more than {_MOST_GROUPS}; (?:...) is none")


def steps_with(pattern: str, names: Collection[str], most: float) -> float:
    """The most steps that matching a (valid) pattern with each of these names takes, those of counting them included;
    infinitely many where they are more than `most`.

    Raises:
      ValueError: there are too many groups, or something that is not counted here (flags, references, conditions).
    """
    _check_groups(pattern)
    count = _Count(names, most)
    arrivals = np.zeros_like(count.chars, float)
    arrivals[:, 0] = 1
    try:
        ends = count.run(_tree(_TOKEN.finditer(pattern)), arrivals)
    except _TooManyError:
        return math.inf
    return count.steps + float(ends.sum())  # each way ends with a check for the end of the name


def _tree(tokens: Iterator[re.Match[str]]) -> list[list[Any]]:
    """The alternatives up to the closing parenthesis, or to the end: each a list of parts (token, alternatives inside
    or None) and of repeats of the part before."""
    alternatives: list[list[Any]] = [[]]
    for token in tokens:
        if token.lastgroup == "close":
            break
        if token.lastgroup == "or":
            alternatives.append([])
        elif token.lastgroup == "repeat":
            alternatives[-1].append((token, alternatives[-1].pop()))
        elif token.lastgroup == "other":
            raise ValueError(f"at {token.start()}, a flag, a reference, a condition or an atomic group")
        else:
            inner = _tree(tokens) if token.lastgroup in ("open", "look") else None
            alternatives[-1].append((token, inner))
    return alternatives


class _TooManyError(Exception):
    """More steps than are allowed."""


class _Count:
    """Steps with some names. Arrivals are how often the matcher comes to each position of each name, (names, the
    longest's length + 1)."""

    def __init__(self, names: Collection[str], most: float) -> None:
        self.most, self.steps, self.longest = most, 0.0, max(map(len, names))
        self.chars = np.array([[*map(ord, name), *[-1] * (self.longest + 1 - len(name))] for name in names])

    def run(self, alternatives: list[list[Any]], arrivals: np.ndarray) -> np.ndarray:
        """The arrivals behind the alternatives."""
        ends = np.zeros_like(arrivals)
        for parts in alternatives:
            self._spend(arrivals, _TRY * (len(alternatives) > 1))
            here = arrivals
            for token, inner in parts:
                here = self._part(token, inner, here)
            ends = ends + here
        return ends

    def _part(self, token: re.Match[str], inner: Any, arrivals: np.ndarray) -> np.ndarray:
        match token.lastgroup:
            case "repeat":
                return self._repeated(token, inner, arrivals)
            case "look":  # it matches in one way at most
                self._spend(arrivals, _LOOK)
                self.run(inner, arrivals)
                return arrivals
            case "open":
                self._spend(arrivals, _GROUP)
                return self.run(inner, arrivals)
        self._spend(arrivals, {"any": _ANY, "class": _CLASS}.get(token.lastgroup or "", 1))
        if token[0] in _ANCHORS:
            return arrivals
        ends = np.zeros_like(arrivals)
        ends[:, 1:] = (arrivals * self._fitting(token[0]))[:, :-1]
        return ends

    def _repeated(self, quantifier: re.Match[str], part: Any, arrivals: np.ndarray) -> np.ndarray:
        low, high = _bounds(quantifier)
        if low > self.longest:
            raise ValueError(f"a repeat of at least {low} times")
        token, inner = part
        a_try = (_TRY_GROUP if inner else _TRY) + _TRY * (quantifier["kind"] == "?")
        ends, done = np.zeros_like(arrivals), 0
        while arrivals.any():
            self._spend(arrivals, a_try)
            ends = ends + arrivals * (done >= low)
            if done >= min(high, low + self.longest):  # `re` repeats nothing that is empty
                break
            arrivals, done = self._part(token, inner, arrivals), done + 1
        return ends

    def _fitting(self, token: str) -> np.ndarray:
        """Which characters of the names a token takes."""
        if token[0] == "\\" and token[1] in "xuUN0":
            raise ValueError(f"the escape {token}")
        chars = np.unique(self.chars[self.chars >= 0])
        fits = re.compile(token).fullmatch
        return np.isin(self.chars, [char for char in chars if fits(chr(char))])

    def _spend(self, arrivals: np.ndarray, each: int) -> None:
        self.steps += each * float(arrivals.sum()) + _MOVE
        if self.steps > self.most:
            raise _TooManyError
