"""Datasets of the Hugging Face Hub."""

import re
from collections.abc import Mapping
from pathlib import Path

from lora_jax.core.extras import extra

with extra("data"):
    import datasets


def is_name(path: str | Path) -> bool:
    """`owner/name`; not a path that exists, nor `folder/name` with a folder that exists, which is a misspelt path."""
    if Path(path).exists() or not re.fullmatch(r"\w[\w-]*/\w[\w-]*", str(path)):
        return False
    return not Path(str(path).partition("/")[0]).is_dir()


def load(
    name: str, split: str, splits: Mapping[str, str], source: str, *, config: str | None = None
) -> datasets.Dataset:
    """A split of a dataset.

    Args:
      splits: how the dataset calls each split.
      source: where else the data can be had, for the error.
      config: the dataset's configuration, where it has several.

    Raises:
      FileNotFoundError: it is not to be had (no such name, no network, a dataset that is a script).
      ValueError: another split.
    """
    if split not in splits:
        raise ValueError(f"split {split!r}: one of {', '.join(splits)}")
    try:
        return datasets.load_dataset(name, config, split=splits[split])
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"{name}: no such file or folder, and not to be had from the hub ({error}); {source}"
        ) from error
