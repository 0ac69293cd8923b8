"""Globs of paths: `*` within one part, `**` any number of parts, `{a,b}` alternatives; a whole path matches.

Matching takes time linear in the glob's length times the path's, whatever the glob: alternatives are not multiplied out
and nothing is tried twice, so that the glob of a file needs no trust. The glob is an automaton, of which a set of
states is followed along the path. What a part of a path makes of a set is kept: the paths of a model have their parts
in common, and cost a look-up a part.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

LONGEST = 1000  # characters of a glob
_MOST_KEPT = 200_000  # numbers of states, and characters of parts, that one glob keeps

_TOKEN = re.compile(r"(?<=/)\*\*/|/\*\*(?=/|\Z)|\*\*|\*|.", re.DOTALL)
_UNFINISHED = ("", "*", "**", "/", "/*", "/**")  # another token, perhaps, with the character that follows
_END, _BEGIN = 0, 1  # states


class _Braces(NamedTuple):
    """Where `{`, the alternatives and `}` are in a glob."""

    begin: int
    starts: list[int]
    end: int


def matches(glob: str, path: str) -> bool:
    """Whether the glob matches the whole path.

    Raises:
      ValueError: the glob has more than 1,000 characters and a `*` or braces.
    """
    return _automaton(glob).matches(path) if "*" in glob or "{" in glob else glob == path


def matches_any(globs: Iterable[str], path: str) -> bool:
    """Whether one of the globs matches the whole path."""
    return any(matches(glob, path) for glob in globs)


def alternatives(glob: str) -> Iterator[tuple[str, str, Callable[[str], bool]]]:
    """Each alternative in braces, with the plainest path (`plainest`), and the matcher, of the glob by way of it."""
    groups = _braces(glob)
    for group in groups:
        for start, stop in zip(group.starts, [*group.starts[1:], group.end + 1], strict=True):
            outer = [other for other in groups if other.begin <= group.begin < other.end]
            jumps = _jumps(groups) | {o.begin: [max(at for at in o.starts if at <= start)] for o in outer}
            yield glob[start : stop - 1], _plainest(glob, jumps), _Automaton(glob, jumps).matches


def plainest(glob: str) -> str:
    """The glob with the first alternative of all braces and without wildcards: the path that is probably meant."""
    return _plainest(glob, _jumps(_braces(glob)))


def _plainest(glob: str, jumps: dict[int, list[int]]) -> str:
    at, text = 0, ""
    while at < len(glob):
        text += "" if at in jumps else glob[at]
        at = jumps[at][0] if at in jumps else at + 1
    return text.replace("**/", "").replace("*", "")


@functools.lru_cache(maxsize=2000)
def _automaton(glob: str) -> "_Automaton":
    if len(glob) > LONGEST:
        raise ValueError(f"the glob {glob[:40]!r}... has {len(glob)} characters, more than {LONGEST}: use several")
    return _Automaton(glob, _jumps(_braces(glob)))


def _braces(glob: str) -> list[_Braces]:
    """The braces that have both ends, inner ones first; others are characters like any other."""
    groups, unclosed = [], []
    for at, char in enumerate(glob):
        if char == "{":
            unclosed.append(_Braces(at, [at + 1], -1))
        elif char == "," and unclosed:
            unclosed[-1].starts.append(at + 1)
        elif char == "}" and unclosed:
            groups.append(unclosed.pop()._replace(end=at))
    return groups


def _jumps(groups: list[_Braces]) -> dict[int, list[int]]:
    """Where reading a glob goes on from braces and their commas: to each alternative, and behind the last one."""
    jumps: dict[int, list[int]] = {}
    for group in groups:
        stops = [*(start - 1 for start in group.starts[1:]), group.end]
        jumps |= {group.begin: group.starts, **{stop: [group.end + 1] for stop in stops}}
    return jumps


def _tokens(pending: str, char: str) -> tuple[list[str], str]:
    """The tokens that are complete with the next character of a glob ("" at its end), and what is pending then: the
    character before ("/" or "."), which tells `**/` at a part's begin, and what may be a token's first characters."""
    text, at, tokens = pending + char, 1, []
    while at < len(text) and not (char and text[at:] in _UNFINISHED):
        tokens.append(_TOKEN.match(text, at)[0])  # type: ignore[index]
        at += len(tokens[-1])
    return tokens, ("/" if text[at - 1] == "/" else ".") + text[at:]


class _Kept:
    """A set of states, and the sets that the next parts of a path make of it."""

    def __init__(self, states: frozenset[int]) -> None:
        self.states, self.after = states, dict[str, _Kept]()


class _Automaton:
    """A glob as states with moves to others: by a character, by any but "/" (""), or at once."""

    def __init__(self, glob: str, jumps: dict[int, list[int]]) -> None:
        self._at_once: list[list[int]] = [[], []]
        self._moves: list[list[tuple[str, int]]] = [[], []]
        numbers = {(0, "/"): self._new()}  # of the states between tokens: where in the glob, and what is pending
        self._moves[_BEGIN].append(("/", numbers[0, "/"]))  # as if the first part had a "/" before it too
        unread = list(numbers)
        while unread:
            at, pending = place = unread.pop()
            state = numbers[place]
            if at in jumps:
                following = [(target, pending) for target in jumps[at]]
            else:
                tokens, pending = _tokens(pending, glob[at : at + 1])
                for token in tokens:
                    state = self._add(token, state)
                following = [(at + 1, pending)] if at < len(glob) else []
            if at == len(glob):
                self._at_once[state].append(_END)
            unread += (new := [place for place in following if place not in numbers])
            numbers |= {place: self._new() for place in new}
            self._at_once[state] += [numbers[place] for place in following]
        self._forget()

    def matches(self, path: str) -> bool:
        here = self._begin
        for part in path.split("/"):
            here = here.after.get(part) or self._follow(here, part)
            if not here.states:
                return False
        return _END in here.states

    def _new(self) -> int:
        self._at_once.append([])
        self._moves.append([])
        return len(self._moves) - 1

    def _add(self, token: str, start: int) -> int:
        """The state behind a token, with the token's states and moves."""
        end = self._new()
        if token not in ("*", "**", "**/", "/**"):
            self._moves[start].append((token, end))
            return end
        self._at_once[start].append(end)
        if token == "*":  # [^/]*
            self._moves[end].append(("", end))
        else:
            inside = self._new()
            self._moves[inside].append(("", inside))
            if token == "**/":  # (?:[^/]+/)*
                self._moves[inside].append(("/", end))
                self._moves[end].append(("", inside))
            else:  # (?:/[^/]+)*, of "**" the first part without "/"
                slash = self._new()
                self._moves[slash].append(("", inside))
                self._moves[end if token == "/**" else inside].append(("/", slash))
                self._moves[start] += [("", inside)] if token == "**" else []
                self._at_once[inside].append(end)
        return end

    def _follow(self, here: _Kept, part: str) -> _Kept:
        """The set behind one more part, kept."""
        if self._kept > _MOST_KEPT:
            self._forget()
        states: Iterable[int] = here.states
        for char in f"/{part}":
            targets = {
                to for state in states for by, to in self._moves[state] if by == char or (not by and char != "/")
            }
            unread = list(targets)
            while unread:
                new = set(self._at_once[unread.pop()]) - targets
                targets |= new
                unread += new
            if not (states := targets):
                break
        reached = frozenset(states)
        self._kept += len(part) + (0 if reached in self._sets else len(reached))
        here.after[part] = self._sets.setdefault(reached, _Kept(reached))
        return here.after[part]

    def _forget(self) -> None:
        self._begin, self._kept = _Kept(frozenset([_BEGIN])), 0
        self._sets: dict[frozenset[int], _Kept] = {}
