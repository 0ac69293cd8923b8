"""The glob matcher against a slow one written another way."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lj


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
        return set(lj.select(glob)(tree))
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
