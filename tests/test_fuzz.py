"""20,000 spoiled files in four parts, each read within 10 s and 1 GB: the right weights, or an error that names it."""

import importlib.util
from collections.abc import Callable

import pytest

from tests.helpers.fuzz import hugging_face, native, others, runner

# name: (the files, how many mutations of the slow run's 5,000 for each of the four kinds)
PARTS: dict[str, tuple[Callable[[], runner.Part], int]] = {
    "native adapters": (native.adapters, 4000),
    "native workdirs": (native.workdirs, 1000),
    "Hugging Face, in shards": (hugging_face.sharded, 2500),
    "Hugging Face, untied": (hugging_face.untied, 1000),
    "Hugging Face, RoBERTa": (hugging_face.roberta, 1500),
    "tokenizers": (others.tokenizers, 2000),
    "data": (others.data, 1500),
    "results": (others.results, 1500),
}
if importlib.util.find_spec("peft"):
    from tests.helpers.fuzz import peft

    PARTS["PEFT"] = (peft.folders, 5000)


def accept(report: runner.Report) -> None:
    assert not report.faults, f"{len(report.faults)} faults:\n" + "\n".join(report.faults[:40])
    assert report.refused


@pytest.mark.parametrize("name", PARTS)
def test_a_few(name: str) -> None:
    part = PARTS[name][0]()
    unspoiled = part._replace(spoil=lambda _, files: files)
    assert runner.outcome(unspoiled, 0) == "right"
    report = runner.fuzz(part, range(15))
    accept(report._replace(refused=report.refused or len(part.files) > 20))  # one of many files may matter little


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_thousands(name: str) -> None:
    make, count = PARTS[name]
    report = runner.fuzz_apart(make, range(count))
    accept(report)
    assert report.right
