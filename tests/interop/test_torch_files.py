"""experiments.convert's reading of torch's files: every tensor arrives, nothing in them runs."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")

from lora_jax.interop import torch_files  # noqa: E402  (needs torch)


def test_every_tensor_arrives(tmp_path):
    """Tied, transposed, sliced, of other types; what is left out is named."""
    w = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    state = {
        "w": w, "tied": w, "turned": w.T, "row": w[1], "scalar": w[0, 0], "none": w[:0], "ids": torch.arange(3),
        "half": w.half(), "brain": w.bfloat16(), "grows": torch.nn.Parameter(w), "module.w": w,
    }  # fmt: skip
    masks = {"h.0.attn.bias": torch.ones(1, 1, 2, 2).bool(), "embeddings.position_ids": torch.arange(3)}
    torch.save({**state, **masks, "epoch": 3, "name": "x"}, tmp_path / "model.pt")
    written, left_out = torch_files.convert(tmp_path / "model.pt", tmp_path / "out" / "model.safetensors")
    assert set(left_out) == {*masks, "epoch", "name"}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert set(tensors) == set(written) == set(state)
    for name, tensor in state.items():
        assert str(tensor.dtype) == f"torch.{tensors[name].dtype}"
        np.testing.assert_array_equal(tensors[name].astype(np.float32), tensor.detach().float().numpy())


def test_the_prefix_of_ddp_is_taken_off(tmp_path):
    torch.save({"model_state_dict": {"module.a": torch.ones(2), "module.h.0.attn.bias": torch.ones(2)}}, tmp_path / "x")
    assert torch_files.convert(tmp_path / "x", tmp_path / "y") == (["a"], ["module.h.0.attn.bias"])
    assert set(load_file(tmp_path / "y")) == {"a"}


def test_a_failed_conversion_leaves_the_old_file(tmp_path):
    (tmp_path / "out.safetensors").write_bytes(b"old")
    for tensor in (torch.ones(3).to_sparse(), torch.ones(3, dtype=torch.complex128)):
        torch.save({"x": tensor}, tmp_path / "model.pt")
        with pytest.raises(ValueError, match="has a tensor that safetensors cannot hold"):
            torch_files.convert(tmp_path / "model.pt", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_does_not_run(tmp_path, kind):
    file, evil = tmp_path / "model.pt", Evil(tmp_path / "ran")
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"lora_A": evil}))
    else:
        torch.save({"lora_A": evil}, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"model.pt holds more than tensors .*could run any code.*lora_state_dict"):
        torch_files.convert(file, tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    if kind == "pickle":  # it would have worked
        pickle.loads(file.read_bytes())
        assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        (lambda: torch.nn.Linear(2, 2), r"holds more than tensors \(it asks for torch.nn.modules.linear.Linear\)"),
        (lambda: torch.ones(2), "holds a Tensor, not a dict"),
        (lambda: {}, "holds no weights; it holds nothing"),
        (lambda: {"epoch": 3, "model": {"x": torch.ones(2)}}, "holds no weights; it holds epoch, model"),
        (lambda: {3: torch.ones(2)}, "keys are no names: 3"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, saved, says):
    torch.save(saved(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=says):
        torch_files.convert(tmp_path / "model.pt", tmp_path / "x.safetensors")


def test_damaged_and_missing_files(tmp_path):
    file = tmp_path / "model.pt"
    for legacy in (False, True):
        torch.save({"x": torch.ones(1000)}, file, _use_new_zipfile_serialization=not legacy)
        content = file.read_bytes()
        for kept in (0, 1, 30, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:kept])
            with pytest.raises(ValueError, match=r"model.pt (is cut off or damaged|holds more than tensors)"):
                torch_files.convert(file, tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"nowhere.pt is missing"):
        torch_files.convert(tmp_path / "nowhere.pt", tmp_path / "x.safetensors")


def test_without_torch_or_with_an_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    with pytest.raises(ValueError, match=r"torch 2.5.1\+cu121 .*CVE-2025-32434.*pip install --upgrade torch"):
        torch_files.convert(tmp_path / "model.pt", tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="pip install torch"):
        torch_files.convert(tmp_path / "model.pt", tmp_path / "x.safetensors")
