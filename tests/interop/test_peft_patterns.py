"""The steps that a pattern may take: no fewer than a matcher that tries all ways counts, and few enough for `re`.

Nothing here is timed against a clock: steps are counted, and what runs in `re` has minutes of processor time for what
takes seconds.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_jax.interop.peft import config as peft_config
from lora_jax.interop.peft import patterns
from lora_jax.interop.peft.kinds.lora import LORA
from lora_jax.interop.peft.patterns import steps, steps_with

ROLES = ("query", "key", "value")
LAYERS = [rf"roberta\.encoder\.layer\.{n}\.attention\.self\.{role}" for n in range(48) for role in ROLES]
ACCEPTED = [
    "c_attn",
    "all-linear",
    r".*\.(q|v)_proj",
    r".*attn\.(c_attn|c_proj)$",
    r"^transformer\.h\.(0|1|2)\..*",
    r".*\.h\.[12]\..*(c_attn|c_proj)",
    r"(transformer\.)?h\.0\.attn\.c_attn",
    r"(?!roberta).*query",
    r"(.*\.)?layer\.(\d+|x)\.(?P<part>output|intermediate)\.dense",
    r"^(?!.*(?:lm_head|output|emb|wte|shared)).*",
    r"^(?!.*(lm_head|emb|vision)).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$",
    r".*layers\.\d{1,2}\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    r".*(language|text).*(attn|mlp).*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    "|".join(LAYERS),
    f"(?:{'|'.join(LAYERS)})",
    "|".join(name.replace("\\", "") for name in LAYERS),
    r".*[.(*+?{|].*",
    "h\\{2\\}",
    "(?:attn|mlp)+",  # a name can take one alternative only
]
KEYS = [
    "c_attn",
    "^transformer.h.0.attn.c_attn",
    "attn.c_proj|mlp.c_fc",
    r".*attn.*",
    r"h\.[02]\.mlp.c_fc",
    r".*\.h\.[12]\..*(c_attn|c_proj)",
    r".*layers\.\d+\.self_attn\.(q|v)_proj",
    r"(.*\.)?layer\.(\d+|x)\.(?P<part>output|intermediate)\.dense",
    "|".join(LAYERS),
]
ENDLESS, SEVERAL, MANY = (
    "repeats without end follow",
    "matches in several ways is repeated",
    "more than 100,000,000 steps",
)
REFUSED = {
    ".*" * 8 + "!": ENDLESS,
    ".*?" * 8 + "!": ENDLESS,
    ".{3,}" * 4: ENDLESS,
    "a{,}" * 4: ENDLESS,
    "[^]*]*" * 4: ENDLESS,
    r"[\]]*" * 4: ENDLESS,
    "(?:.*|x)" * 4: ENDLESS,
    ".?" * 40 + "!": MANY,
    "(.|.)" * 30 + "!": MANY,
    "(?:.?)" * 40 + "!": MANY,
    ".{0,9}" * 12: MANY,
    "(?:a|ab|abc)" * 25: MANY,
    "(?:.{0,1}){0,1}" * 30: MANY,
    "(?:.??|.)" * 30: MANY,
    ".*.*.*" + r"\w" * 20: MANY,
    "(?=.?.?.?.?.?.?)" + ".?" * 40: MANY,
    ".?" * 4900: MANY,
    r"(\w|\w)*!": SEVERAL,
    "(a*)*": SEVERAL,
    "(a?){30}": SEVERAL,
    "((ab)+)+": SEVERAL,
    "(?:a|ab){2}": SEVERAL,
    "(?:){3000000}": "a repeat of at least 3000000 times",
    "(.*)(.*)(.*)" + "()" * 48: "51 groups",
    r"(.)\1": "a reference",
    "(?P<a>.)(?P=a)": "a reference",
    "(?i)c_attn": "a flag",
    "(a)?(?(1)b|c)": "a condition",
    "c_attn|" * 1500: "10500 characters",
}


def complete(**fields):
    return peft_config.complete({"peft_type": "LORA", **fields}, LORA, "config")


@pytest.mark.parametrize("pattern", ACCEPTED)
def test_patterns_as_people_write_them_are_accepted(pattern):
    re.compile(pattern)
    complete(target_modules=pattern, exclude_modules=pattern)


@pytest.mark.parametrize("pattern", KEYS)
def test_keys_of_patterns_as_people_write_them_are_accepted(pattern):
    """PEFT puts a repeat without end before these."""
    complete(rank_pattern={pattern: 4}, alpha_pattern={pattern: 4})


def test_our_own_patterns_are_accepted_for_the_largest_models():
    names = [f"transformer.h.{n}.{name}" for n in range(96) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")]
    complete(target_modules=["c_attn"], rank_pattern=dict.fromkeys(names, 4), alpha_pattern=dict.fromkeys(names, 8))


@pytest.mark.parametrize(("pattern", "why"), REFUSED.items(), ids=[pattern[:20] for pattern in REFUSED])
def test_patterns_that_could_run_for_ever_are_refused(pattern, why):
    for field in ("target_modules", "exclude_modules"):
        with pytest.raises(ValueError, match=rf"config: {field} has the pattern .*could run for ever \(.*{why}"):
            complete(**{field: pattern})
    with pytest.raises(ValueError, match=r"rank_pattern has .*could run for ever|flags not at the start"):
        complete(rank_pattern={pattern: 4})


MODULES = ("attn", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1")
GPT2 = [f"transformer.h.{n}.{module}" for n in range(48) for module in MODULES]
HARMLESS = {  # as people write them, with four and more endless repeats: how many of GPT-2's modules they mean
    ".*a.*b.*c.*d.*": 0,
    r".*transformer.*h.*attn.*c_attn.*": 48,
    r".*\.h\.\d+\..*(attn|mlp).*c_(attn|fc|proj).*": 192,
    r"^.*\.h\..*\.(attn|mlp)\..*(c_attn|c_fc).*$": 96,
    r".*t.*r.*a.*n.*s.*f.*o.*r.*m.*e.*r.*c_attn": 48,
    r"(?!.*lm_head.*).*h.*1.*(attn|mlp).*c_.*": 56,
    r"(\w+\.)*attn\.(c_attn|c_proj)": 96,
    r"(?:[^.]+\.)+(?:[^.]+\.)*c_fc": 48,
    r"(?:(?:transformer|base)\.|h\.\d+\.)*mlp\.c_fc": 48,
}


@pytest.mark.parametrize("pattern", HARMLESS)
def test_what_is_harmless_with_the_modules_names_is_accepted(pattern):
    """Whatever the number of its repeats; elsewhere, without the names, it is refused."""
    with pytest.raises(ValueError, match="which could run for ever"):
        complete(target_modules=pattern)
    fields = {"peft_type": "LORA", "target_modules": pattern}
    assert peft_config.complete(fields, LORA, "config", GPT2)["target_modules"] == pattern
    assert sum(re.fullmatch(pattern, name) is not None for name in GPT2) == HARMLESS[pattern]


SLOW = [".*" * 8 + "!", "(?:.*|x)" * 6 + "!", ".?" * 40 + "!", "(a*)*" * 9 + "!", "(.|.)*!", "((.*)*)*!", r"(\w|.)*!"]


@pytest.mark.parametrize("pattern", SLOW)
def test_what_is_slow_with_the_modules_names_is_refused(pattern):
    with pytest.raises(ValueError, match="more than 100,000,000 steps for the names of the modules"):
        peft_config.complete({"peft_type": "LORA", "target_modules": pattern}, LORA, "config", GPT2)


def test_many_patterns_that_are_slow_together_are_refused():
    slow = {f".*{n}.*": 4 for n in range(60)}  # each has three repeats, with PEFT's own
    complete(rank_pattern=dict(list(slow.items())[:20]))
    with pytest.raises(ValueError, match=r"patterns up to rank_pattern's '\.\*4\d\.\*' could run for ever, together"):
        complete(rank_pattern=slow)


class Node(NamedTuple):
    """A pattern's text, and the same as a matcher: `ends(name, start, count)` yields the end of every way."""

    text: str
    ends: Callable[[str, int, Callable[[], None]], Iterator[int]]


def character(text):
    fits = re.compile(text).fullmatch

    def ends(name, start, count):
        count()
        if start < len(name) and fits(name[start]):
            yield start + 1

    return Node(text, ends)


def place(text):
    fits = re.compile(text).match

    def ends(name, start, count):
        count()
        if fits(name, start):
            yield start

    return Node(text, ends)


def sequence(parts):
    def ends(name, start, count, n=0):
        if n == len(parts):
            yield start
            return
        for end in parts[n].ends(name, start, count):
            yield from ends(name, end, count, n + 1)

    return Node("".join(part.text for part in parts), ends)


def group(parts, opening):
    def ends(name, start, count):
        for part in parts:
            count()
            yield from part.ends(name, start, count)

    return Node(f"{opening}{'|'.join(part.text for part in parts)})", ends)


def look(part, opening):
    def ends(name, start, count):
        matches = next(part.ends(name, start, count), None) is not None
        if matches == (opening == "(?="):
            yield start

    return Node(f"{opening}{part.text})", ends)


def repeated(part, quantifier, low, high):
    def ends(name, start, count, done=0):
        count()
        if done < high:
            for end in part.ends(name, start, count):
                if end > start or done < low:
                    yield from ends(name, end, count, done + 1)
        if done >= low:
            yield start

    return Node(part.text + quantifier, ends)


QUANTIFIERS = [
    ("*", 0, math.inf),
    ("+", 1, math.inf),
    ("?", 0, 1),
    ("*?", 0, math.inf),
    ("??", 0, 1),
    ("{2}", 2, 2),
    ("{1,3}", 1, 3),
    ("{,2}", 0, 2),
    ("{2,}", 2, math.inf),
]
CHARACTERS = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\w", "[]a]", r"[\].]"]).map(character)

PLACES = st.sampled_from(["^", "$", r"\b", r"\B"]).map(place)


def larger(part):
    parts = st.lists(part, min_size=1, max_size=3)
    grouped = st.builds(group, parts, st.sampled_from(["(", "(?:"]))
    repeats = st.builds(lambda part, how: repeated(part, *how), CHARACTERS | grouped, st.sampled_from(QUANTIFIERS))
    looks = st.builds(look, part, st.sampled_from(["(?=", "(?!"]))
    return st.one_of(grouped, repeats, repeats, st.builds(sequence, parts), looks)


PATTERNS = st.recursive(CHARACTERS | CHARACTERS | PLACES, larger, max_leaves=8)
NAMES = st.text("ab.", min_size=7, max_size=7) | st.just("a" * 7)


def counted(pattern, name):
    """Whether a pattern is a name, and the steps to try all its ways."""
    seen = [0]

    def count():
        seen[0] += 1

    matches = [end == len(name) for end in pattern.ends(name, 0, count)]
    return any(matches), seen[0] + len(matches)


@settings(max_examples=300)
@given(PATTERNS, st.lists(NAMES, min_size=1, max_size=4))
def test_no_way_with_a_name_is_left_out_of_the_count(pattern, names):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "_MOVE", 0)
        most = steps_with(pattern.text, names, 100_000)
    assume(most < math.inf)
    assert sum(counted(pattern, name)[1] for name in names) <= most


@settings(max_examples=300)
@given(PATTERNS, st.lists(NAMES, min_size=1, max_size=4))
def test_no_way_is_left_out_of_the_count(pattern, names):
    try:
        most = steps(pattern.text, 7)
    except ValueError:
        assume(False)
    assume(most < 100_000)
    for name in names:
        matches, spent = counted(pattern, name)
        assert matches == (re.fullmatch(pattern.text, name) is not None)
        assert spent <= most


WAYS = {
    "options": [repeated(character("."), "?", 0, 1)] * 6,
    "alternatives": [group([character("."), character("[ab]")], "(?:")] * 6,
    "the same letter": [group([character("a"), character("a")], "(?:")] * 6,
    "endless": [repeated(character("."), "*", 0, math.inf)] * 3,
    "bounded": [repeated(character("."), "{0,2}", 0, 2)] * 4,
    "a repeated group": [repeated(group([character("a")], "(?:"), "*", 0, math.inf)] * 3,
}


@pytest.mark.parametrize("parts", WAYS.values(), ids=WAYS)
def test_the_count_is_of_the_order_of_the_steps_where_all_ways_are_tried(parts, monkeypatch):
    """A step of the matcher is up to 54 of ours (a repeated group's), so the count is not much more than it must be."""
    pattern = sequence([*parts, character("!")])
    spent = counted(pattern, "a" * 7)[1]
    assert spent < steps(pattern.text, 7) < 60 * spent
    monkeypatch.setattr(patterns, "_MOVE", 0)
    assert spent < steps_with(pattern.text, ["a" * 7], 1e9) < 60 * spent


RUNS = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
patterns, names = json.loads(sys.stdin.read())
for pattern in patterns:
    for name in names:
        re.fullmatch(pattern, name)
"""
LONG_NAMES = ["a" * 200, "ab" * 100, "a." * 100, "0" * 199 + "."]
WORST = [
    ".*.*.*" + "a" * 30 + "!",
    ".*.*.*(a!|b!|c!|d!|e!|f!|g!)",
    ".*?.*?.*?[^a]",
    "(a)*(a)*(a)*!",
    ".*.*.*" + r"\w" * 5 + "!",
    ".?" * 21 + "!",
    "(.|.)" * 20 + "!",
    "(?:a|aa)" * 20 + "!",
    "(.)?" * 20 + "!",
]


def run(patterns, names=LONG_NAMES):
    """Matches the patterns with the names by `re`, in a process that may not take more than 300 s of a processor."""
    done = subprocess.run([sys.executable, "-c", RUNS], input=json.dumps([patterns, names]), text=True, timeout=1800)
    assert done.returncode == 0


def test_the_slowest_that_are_accepted_end():
    for pattern in WORST:
        complete(target_modules=pattern)
    run(WORST)


@settings(max_examples=8)
@given(st.lists(PATTERNS, min_size=5, max_size=5), st.sampled_from(["!", "[^a]", "(?!.)"]))
def test_whatever_is_accepted_ends(pieces, end):
    """Each piece as often as it is accepted: up to the limit, where ways multiply."""

    def accepted(pattern):
        try:
            return complete(target_modules=pattern) is not None
        except ValueError:
            return False

    longest = [piece.text * n + end for piece in pieces for n in range(1, 40) if accepted(piece.text * n + end)]
    assume(longest)
    run(longest)


@pytest.mark.slow
@settings(max_examples=20)
@given(st.lists(PATTERNS, min_size=5, max_size=5), st.sampled_from(["!", "[^a]", "(?!.)"]))
def test_whatever_is_accepted_with_names_ends(pieces, end):
    """As the one above, counted with the names themselves."""
    names = [name[:40] for name in LONG_NAMES]

    def accepted(pattern):
        try:
            return steps_with(pattern, names, 1e8) < 1e8
        except ValueError:
            return False

    longest = [piece.text * n + end for piece in pieces for n in range(1, 40) if accepted(piece.text * n + end)]
    assume(longest)
    run(longest, names)
