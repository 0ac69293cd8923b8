"""What two processes agree on, each played by this one in turn."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from lora_jax.data.batches import Schedule
from lora_jax.distributed import processes
from lora_jax.distributed.sharding import make_mesh


class Two:
    """Two processes: `first` runs and what it sends is kept for `second`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch, self._sent = patch, []
        patch.setattr(jax, "process_count", lambda: 2)

    def first(self, function: Callable) -> Any:
        self._patch.setattr(jax, "process_index", lambda: 0)
        self._patch.setattr(multihost_utils, "broadcast_one_to_all", self._send)
        return function()

    def second(self, function: Callable) -> Any:
        self._patch.setattr(jax, "process_index", lambda: 1)
        self._patch.setattr(multihost_utils, "broadcast_one_to_all", lambda x: self._sent.pop(0))
        return function()

    def _send(self, x: Any) -> Any:
        self._sent.append(np.array(x))
        return self._sent[-1]


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Two:
    return Two(monkeypatch)


def never() -> Any:
    raise AssertionError("the second process does not call it")


@pytest.mark.parametrize("value", [None, 3, "text", {"a": [1.5, None]}, "x" * 900, "x" * 1500])
def test_both_have_what_the_first_finds(two: Two, value: Any) -> None:
    assert two.first(lambda: processes.on_primary(lambda: value)) == value
    assert two.second(lambda: processes.on_primary(never)) == value


@pytest.mark.parametrize("kind", [FileNotFoundError, PermissionError, ValueError, TypeError])
def test_both_raise_what_the_first_meets(two: Two, kind: type[Exception]) -> None:
    def fail() -> Any:
        raise kind("no such thing")

    raised = OSError if kind is PermissionError else kind
    for process, function in ((two.first, fail), (two.second, never)):
        with pytest.raises(raised, match="no such thing") as caught:
            process(lambda function=function: processes.on_primary(function))
        assert type(caught.value) is raised


def test_a_flag_of_one_process_is_heard(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    other = [True, False, False, False]

    def gathered(x: np.ndarray) -> np.ndarray:
        theirs = np.zeros_like(x)
        theirs[:4] = other
        return np.stack([x, theirs])

    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    assert processes.anywhere([False, True, False, True]) == [True, True, False, True]
    assert not processes.everywhere(True) and not processes.everywhere(False)  # the other's first flag: not so there
    other[0] = False
    assert processes.everywhere(True) and not processes.everywhere(False)


class Held:
    """A sharding of which this process holds these parts."""

    def __init__(self, *parts: tuple) -> None:
        self._parts = dict(enumerate(parts))

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict:
        return self._parts


def test_the_rows_that_a_process_holds(two: Two) -> None:
    held = processes.own_rows(Held((slice(4, 6),), (slice(0, 2),)), (8,))
    assert held is not None and held.tolist() == [0, 1, 4, 5]
    micro = processes.own_rows(Held((slice(None), slice(1, 2))), (2, 3))
    assert micro is not None and micro.tolist() == [1, 4]

    def collate(rows: np.ndarray, length: int, count: int) -> dict:
        return {"rows": rows}

    batches = Schedule((np.arange(8),), ((1, 1),), 8, 0, collate)
    all_rows = batches(0)[0]["rows"]
    held_rows = Schedule((np.arange(8),), ((1, 1),), 8, 0, collate, held)(0)[0]["rows"]
    assert held_rows.tolist() == all_rows[[0, 1, 4, 5]].tolist()


def test_a_mesh_without_a_process_is_refused(two: Two) -> None:
    with pytest.raises(ValueError, match="leaves out the devices of process 1"):
        processes.check_mesh(make_mesh({"data": 2}))
