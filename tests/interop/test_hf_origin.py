"""Which model of the Hub a base is, from what its own files and its place say."""

from pathlib import Path

import numpy as np
import pytest

from lora_jax.interop import hf, packages

URL = "https://huggingface.co/owner/model-1.5"
SAYS = {
    "its source": ({"general.source.repo_url": URL}, "owner/model-1.5"),
    "its source, and its parent": (
        {
            "general.source.url": f"{URL}/",
            "general.base_model.count": 1,
            "general.base_model.0.repo_url": f"{URL}-base",
        },
        "owner/model-1.5",
    ),
    "as older files say it": ({"general.source.huggingface.repository": "owner/model-1.5"}, "owner/model-1.5"),
    "a quantized copy of another": (
        {
            "general.quantized_by": "somebody",
            "general.base_model.count": 1,
            "general.base_model.0.repo_url": URL,
        },
        "owner/model-1.5",
    ),
    "a parent alone": ({"general.base_model.count": 1, "general.base_model.0.repo_url": URL}, ""),
    "two parents": (
        {"general.quantized_by": "somebody", "general.base_model.count": 2, "general.base_model.0.repo_url": URL},
        "",
    ),
    "another site": ({"general.source.repo_url": "https://example.com/owner/model"}, ""),
    "nothing": ({"general.name": "Model", "general.organization": "owner"}, ""),
}


def gguf_file(path: Path, metadata: dict) -> Path:
    pytest.importorskip("gguf")
    from tests.helpers import gguf_files

    values = np.zeros((32, 1), np.float32)
    keys = {"general.architecture": "llama", "general.license": "mit", **metadata}
    return gguf_files.write(path, keys, {"token_embd.weight": (values, "F32")})


@pytest.mark.parametrize("metadata, name", SAYS.values(), ids=SAYS)
def test_a_gguf_file_is_what_its_metadata_name(metadata: dict, name: str, tmp_path: Path) -> None:
    origin = hf.origin_of(gguf_file(tmp_path / "model.gguf", metadata))
    assert (origin.name, origin.license) == (name, "mit")
    assert bool(origin.said_by) == bool(name) and (not name or "general." in origin.said_by)


def test_folders_and_names(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--model-1.5" / "snapshots" / "0a1b"
    folder.mkdir(parents=True)
    assert hf.origin_of(folder) == hf.Origin("owner/model-1.5")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    assert hf.origin_of(folder).license == "apache-2.0"
    for text in ("no front matter", "---\n- a list\n---\n", "---\nlicense: [a]\n---\n", "---\na: {\n---\n"):
        (folder / "README.md").write_text(text)
        assert hf.origin_of(folder).license == ""
    assert hf.origin_of("owner/model") == hf.Origin("owner/model")
    for unknown in (tmp_path, tmp_path / "owner" / "model", "tests/model", "no/model.gguf", "package:not_installed"):
        assert hf.origin_of(unknown) == hf.Origin()


def test_a_package_s_model_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packages.REPOSITORIES, "carries_weights", "owner/model")
    assert hf.origin_of("package:carries_weights").name == "owner/model"
    (tmp_path / "carries_weights").mkdir()
    (tmp_path / "carries_weights" / "__init__.py").touch()
    gguf_file(tmp_path / "carries_weights" / "model.gguf", {"general.source.repo_url": URL})
    monkeypatch.syspath_prepend(tmp_path)
    origin = hf.origin_of("package:carries_weights")
    assert (origin.name, origin.license) == ("owner/model", "mit") and "package" in origin.said_by
