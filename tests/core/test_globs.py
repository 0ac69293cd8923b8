"""The glob matcher against a slow one written another way, and against the regular expressions that it once was."""

import itertools
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax.core import globs as module
from lora_jax.core.globs import alternatives, matches
from lora_jax.core.transforms import keys_of


def expand(glob: str) -> list[str]:
    """Braces out, the last innermost pair first."""
    opened = glob.rfind("{")
    if opened < 0:
        return [glob]
    closed = glob.index("}", opened)
    options = glob[opened + 1 : closed].split(",")
    return [g for o in options for g in expand(glob[:opened] + o + glob[closed + 1 :])]


def part_matches(pattern: str, part: str) -> bool:
    """`*` tried with every length."""
    if not pattern:
        return not part
    if pattern[0] == "*":
        return any(part_matches(pattern[1:], part[n:]) for n in range(len(part) + 1))
    return part[:1] == pattern[0] and part_matches(pattern[1:], part[1:])


def parts_match(patterns: list[str], parts: list[str]) -> bool:
    """`**` tried with every number of parts."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(parts_match(patterns[1:], parts[n:]) for n in range(len(parts) + 1))
    return bool(parts) and part_matches(patterns[0], parts[0]) and parts_match(patterns[1:], parts[1:])


def brute(glob: str, path: str) -> bool:
    return any(parts_match(plain.split("/"), path.split("/")) for plain in expand(glob))


def chosen(glob: str, paths: list[str]) -> set[str]:
    """What `select` picks among these paths; nothing where it raises."""
    tree = {path: np.ones((1, 1)) for path in paths}
    try:
        return set(lj.select(glob).leaves(tree))
    except ValueError:
        return set()


NAMES = ["a", "b", "ab", "h_1", "h_10", "kernel", "q.k", "w+", "[x]", "a-b"]
paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map("/".join)
glob_part = st.sampled_from(
    [*NAMES, "**", "**", "*", "a*", "*b", "h_*", "*_1*", "{a,b}", "{a,ab}*", "x{a,{b,}}", "k*l", "[a-z]", "."]
)
globs = st.lists(glob_part, min_size=1, max_size=5).map("/".join)


@settings(max_examples=400, deadline=None)
@given(globs, st.lists(paths, min_size=1, max_size=6, unique=True))
def test_globs_match_as_the_slow_matcher_says(glob, paths):
    assert chosen(glob, paths) == {path for path in paths if brute(glob, path)}


@settings(max_examples=100, deadline=None)
@given(paths)
def test_a_path_without_wildcards_matches_itself_alone(path):
    others = [name for name in itertools.islice(NAMES, 5) if name != path]
    assert chosen(path, [path, *others]) == {path}


def test_braces_may_span_parts():
    assert chosen("{a/b,c}/kernel", ["a/b/kernel", "c/kernel", "a/kernel"]) == {"a/b/kernel", "c/kernel"}
    assert chosen("{h_0/**,ln}/x", ["h_0/x", "h_0/a/b/x", "ln/x", "h_1/x"]) == {"h_0/x", "h_0/a/b/x", "ln/x"}


@pytest.mark.parametrize(
    "glob, path, expected",
    [
        ("**/kernel", "kernel", True),
        ("**/kernel", "a/b/kernel", True),
        ("**/kernel", "a/xkernel", False),
        ("*/kernel", "a/b/kernel", False),
        ("h_*/kernel", "h_/kernel", True),
        ("kernel", "a/kernel", False),
        ("a/**/b", "a/b", True),
        ("a/**", "a/b/c", True),
        ("**", "a/b/c", True),
        ("a/*", "a", False),
        ("a.b", "axb", False),
        ("**/attn/{query,value}/kernel", "h_3/attn/value/kernel", True),
        ("**/attn/{query,value}/kernel", "h_3/attn/key/kernel", False),
    ],
)
def test_globs_by_hand(glob, path, expected):
    assert brute(glob, path) is expected
    assert chosen(glob, [path, "unrelated/path"]) == ({path} if expected else set()) | (
        {"unrelated/path"} if brute(glob, "unrelated/path") else set()
    )


def test_no_part_of_a_glob_is_a_regular_expression():
    assert chosen("(a|b)", ["a", "b", "(a|b)"]) == {"(a|b)"}
    assert re.fullmatch("a.c", "abc") and chosen("a.c", ["abc", "a.c"]) == {"a.c"}


def former_braces(glob: str) -> list[str]:
    """`a/{b,c}` -> `[a/b, a/c]`, innermost braces first."""
    inner = re.search(r"\{([^{}]*)\}", glob)
    if not inner:
        return [glob]
    heads, tails = glob[: inner.start()], glob[inner.end() :]
    return [g for option in inner[1].split(",") for g in former_braces(heads + option + tails)]


FORMER_WILD = {"**/": r"(?:[^/]+/)*", "/**": r"(?:/[^/]+)*", "**": r"(?:[^/]+(?:/[^/]+)*)?", "*": r"[^/]*"}


def former_regex(glob: str) -> re.Pattern[str]:
    """The regular expression that a glob was until 2026-11-30."""

    def regex(plain: str) -> str:
        pieces = re.split(r"((?:^|(?<=/))\*\*/|/\*\*(?=/|$)|\*\*|\*)", plain)
        return "".join(FORMER_WILD.get(piece, re.escape(piece)) for piece in pieces)

    return re.compile("|".join(regex(plain) for plain in former_braces(glob)))


symbols = st.sampled_from([*"ab/,", "*", "**", "/**", "**/", "{", "}", "{a,", "{/**,", "}", "{,"])


@settings(max_examples=400, deadline=None)
@given(st.lists(symbols, max_size=9).map("".join), st.lists(st.text("ab/", max_size=8), min_size=1, max_size=8))
def test_any_text_is_the_glob_that_it_was(glob: str, paths: list[str]) -> None:
    """Braces that are not closed, wildcards that alternatives put together, empty parts."""
    former = former_regex(glob)
    for path in paths:
        assert matches(glob, path) is (former.fullmatch(path) is not None)


@settings(max_examples=200, deadline=None)
@given(st.lists(symbols, max_size=9).map("".join), st.lists(st.text("ab/", max_size=8), min_size=1, max_size=8))
def test_what_is_kept_and_forgotten_changes_nothing(glob: str, paths: list[str]) -> None:
    automaton = module._Automaton(glob, module._jumps(module._braces(glob)))
    once = [automaton.matches(path) for path in paths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MOST_KEPT", 2)
        assert [automaton.matches(path) for path in paths] == once


HARD = {
    "**" * 20 + "x": "a/" * 60 + "a",
    "**/" * 20 + "x": "a/" * 60 + "a",
    "{a,b}" * 18 + "!": "ab" * 9,
    "{a,aa}" * 100 + "!": "a" * 150,
    "{{{*,a},*},{a,*}}" * 30 + "!": "a" * 60,
    "*a" * 40 + "!": "a" * 200,
    "{**/,}" * 100 + "!": "a/" * 60 + "a",
}


@pytest.mark.parametrize("glob", HARD)
def test_time_is_linear_whatever_the_glob(glob: str) -> None:
    """By the former regular expressions each of these took from minutes to ages."""
    path, begin = HARD[glob], time.process_time()
    assert not matches(glob, path)
    assert time.process_time() - begin < 3


@pytest.mark.parametrize("glob", HARD)
def test_a_spec_of_a_file_ends_whatever_its_globs(glob: str) -> None:
    """As selection, exclusion, axes and rank; too many globs together are refused before they are matched."""
    tree = {HARD[glob].replace("/", ".")[:60]: np.ones((2, 2)), "a": {"a": np.ones((2, 2))}}
    spec = {"method": "lora", "select": ["**"], "axes": {glob: "io"}, "rank": {glob: 1, "**": 1}}
    begin = time.process_time()
    method = lj.from_spec(spec)
    assert len(keys_of(method, tree)) == 2
    with pytest.raises(ValueError, match="matches no parameter"):
        keys_of(lj.from_spec(spec | {"exclude": [glob]}), tree)
    assert time.process_time() - begin < 3
    many = {f"{glob}{n}": 1 for n in range(100_000 // len(glob) + 1)}
    for too_many in ({"method": "chain", "of": [spec, spec | {"rank": many}]}, spec | {"exclude": list(many)}):
        with pytest.raises(ValueError, match=r"the globs of the spec have 10.* characters together, more than 100,000"):
            lj.from_spec(too_many)


def test_a_glob_is_not_endless() -> None:
    long = "a/" * 600
    assert matches(long, long)  # a path is its own glob, however long
    with pytest.raises(ValueError, match=r"'a/a/a/.*\.\.\. has 1202 characters, more than 1000"):
        matches(f"{long}**", "a")


@settings(max_examples=300, deadline=None)
@given(globs, st.lists(paths, min_size=1, max_size=6, unique=True))
def test_each_alternative_takes_part_or_is_named(glob: str, paths: list[str]) -> None:
    """Whether an alternative takes part, by leaving it out: of the braces' readings those without it match less."""
    taking_part = {}
    for at, (begin, end) in enumerate(spans := brace_spans(glob)):
        options = split_options(glob[begin + 1 : end])
        for n, option in enumerate(options):
            alone = narrowed(glob, spans, at, n)
            taking_part[begin, n] = option, any(brute(alone, path) for path in paths)
    found = sorted((text, any(map(matcher, paths))) for text, _, matcher in alternatives(glob))
    assert found == sorted(taking_part.values())
    tree, silent = {path: np.ones((1, 1)) for path in paths}, [o for o, takes in taking_part.values() if not takes]
    if silent and chosen(glob, paths):
        with pytest.raises(ValueError, match=re.escape(f"{glob!r}: its alternative ")):
            lj.select(glob)(tree)
    elif chosen(glob, paths):
        assert set(lj.select(glob)(tree)) == chosen(glob, paths)


def brace_spans(glob: str) -> list[tuple[int, int]]:
    """Where braces begin and end."""
    spans, begins = [], []
    for at, char in enumerate(glob):
        if char == "{":
            begins.append(at)
        elif char == "}":
            spans.append((begins.pop(), at))
    return spans


def split_options(text: str) -> list[str]:
    """The options between a pair of braces, at its own commas."""
    options, depth = [""], 0
    for char in text:
        depth += (char == "{") - (char == "}")
        if char == "," and not depth:
            options.append("")
        else:
            options[-1] += char
    return options


def narrowed(glob: str, spans: list[tuple[int, int]], at: int, n: int) -> str:
    """The glob with only option n of the braces `at`, and of those around them the option that they are in."""
    begin, end = spans[at]
    for outer_begin, outer_end in sorted(spans):
        if outer_begin < begin and end < outer_end:  # the outermost: its option has the same braces, deeper
            options, start = split_options(glob[outer_begin + 1 : outer_end]), outer_begin + 1
            for option in options:
                if start <= begin < start + len(option):
                    rest = glob[:outer_begin] + option + glob[outer_end + 1 :]
                    inner = brace_spans(rest)
                    which = inner.index((begin - start + outer_begin, end - start + outer_begin))
                    return narrowed(rest, inner, which, n)
                start += len(option) + 1
    return glob[:begin] + split_options(glob[begin + 1 : end])[n] + glob[end + 1 :]
