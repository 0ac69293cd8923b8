"""The notebook runs from top to bottom, and says what its texts say."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "transforms.ipynb"


def printed(notebook) -> str:
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "".join(o.get("text", "") for o in outputs)


def test_the_notebook_runs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = printed(notebook)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": "."}})
    client.execute()
    text = printed(notebook)
    assert "dense: 7,000 numbers; as a product: 340" in text
    assert "same as the base: True" in text
    assert "trained: 340 of 7,780 parameters" in text
    images = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(images) == 1
    assert len(stored.splitlines()) == len(text.splitlines())  # what is stored is of this version
