"""What a release needs: a tag that is the version, the files that say so, hooks and workflows that call what exists."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import lora_jax

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `.ci/tag` reads, of version 1.2.3."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "lora_jax").mkdir()
    (tmp_path / "lora_jax/__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [1.2.3] - 2026-12-01\n")
    return tmp_path


def tag(checkout: Path, *name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([checkout / ".ci/tag", *name], capture_output=True, text=True)


def test_a_tag_is_the_version(checkout: Path) -> None:
    assert tag(checkout, "v1.2.3").returncode == 0
    for wrong in (["v1.2.4"], ["1.2.3"], []):
        done = tag(checkout, *wrong)
        assert done.returncode == 1 and "lora_jax.__version__ is 1.2.3" in done.stderr
    (checkout / "CHANGELOG.md").write_text("## [Unreleased]\n")
    assert "no section [1.2.3]" in tag(checkout, "v1.2.3").stderr


def test_the_citation_is_of_this_version() -> None:
    version = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert version and version[1] == lora_jax.__version__


def test_the_workflow_calls_what_is_there() -> None:
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    called = re.findall(r"run: (\S+)", workflow)
    assert called == [".ci/tag", ".ci/run"]
    assert all((ROOT / name).is_file() for name in called)
