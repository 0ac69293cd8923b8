"""The notebooks run from top to bottom, and what is stored of each is of this version: the pages show it."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
# Of each notebook what it prints, the number of its plots, and the packages that it needs besides.
EXPECTED = {
    "transforms": (
        ["dense: 7,000 numbers; as a product: 340", "same as the base: True", "trained: 340 of 7,780 parameters"],
        1,
        [],
    ),
    "your_model": (["trained: 3,284 of 151,306 parameters", "'conv2/kernel' matches no parameter"], 1, ["sklearn"]),
    "from_peft": (["adapter_config.json unchanged: True"], 0, ["torch", "peft"]),
}


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs if output.get("name") != "stderr")


def without_numbers(text: str) -> list[str]:
    """The lines of a text; of numbers, which depend on the machine, their places alone."""
    return [re.sub(r"[\d.e+-]*\d[\d.e+-]*", "#", line) for line in text.splitlines()]


def test_every_notebook_is_expected_to_say_something() -> None:
    assert {file.stem for file in NOTEBOOKS.glob("*.ipynb")} == set(EXPECTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_a_notebook_runs(name: str) -> None:
    texts, plots, packages = EXPECTED[name]
    for package in packages:
        pytest.importorskip(package)
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    stored = printed(notebook)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": "."}})
    client.execute()
    text = printed(notebook)
    for expected in texts:
        assert expected in text
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == plots
    assert without_numbers(stored) == without_numbers(text)
