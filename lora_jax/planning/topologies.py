"""Devices to compile for that are not at hand: slices of TPUs, by libtpu; GPUs of a size, by the CPU's compiler."""

import math
import os
import re
from typing import Any, NamedTuple

import jax

GIB = 2**30
# What a program may use on each device, as the compiler says where it does not fit (libtpu 0.0.42).
HBM = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75}
# The slices to try, smallest first.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
SLICES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT, "tpu7x": _CUBES}
NAMES = "v5e:16x16 (or v4, v5p, v6e, tpu7x), cpu:8, gpu:1x16GB"


class Topology(NamedTuple):
    """Devices that a program can be compiled for."""

    name: str
    devices: list[Any]
    chips: int
    limit: float | None  # bytes that a program may use on each device; None: unknown
    asks: bool  # whether the compiler itself refuses a program that does not fit


def prepare(names: list[str]) -> None:
    """Sets up JAX, before its first use, to compile for these topologies: CPU devices for the largest of them, and a
    libtpu that looks for no TPU."""
    if counts := [generic[0] for generic in map(_generic, names) if generic]:
        jax.config.update("jax_num_cpu_devices", max(counts))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", None)  # what is compiled for other devices cannot be read again
    one_host = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    # Several processes may ask the compiler at once, and none of them looks for a TPU.
    shared = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3"}
    for name, value in (shared | one_host).items():
        os.environ.setdefault(name, value)


def slices(name: str) -> list[str]:
    """The topologies that a name stands for: itself, or of a family ("v5e") all slices, smallest first."""
    return [f"{name}:{size}" for size in SLICES[name]] if name in SLICES else [name]


def named(name: str) -> Topology:
    """The devices of "v5e:4x8", "cpu:8" or "gpu:2x16GB" (GB of 10^9 bytes; their compiler is the CPU's); a ValueError
    where there is no such topology, or no libtpu for it."""
    if generic := _generic(name):
        count, limit = generic
        return Topology(name, jax.devices("cpu")[:count], count, limit, False)
    family, _, size = name.partition(":")
    if family not in SLICES or not re.fullmatch(r"\d+(x\d+){1,2}", size):
        raise ValueError(f"no topology {name!r}: name one such as {NAMES}, or a family alone to search its slices")
    from jax.experimental import topologies

    dims = [int(part) for part in size.split("x")]
    options: dict[str, Any] = {"chip_config_name": "megacore"} if family == "v4" else {}
    if any(side % 2 for side in dims[:2]):  # a host has 2 x 2 chips, unless there are fewer
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except RuntimeError as error:
        if "JAX TPU support not installed" in str(error):
            raise ValueError(f"{name} wants the TPU's compiler: pip install 'lora_jax[tpu]' brings it") from error
        raise ValueError(f"topology {name!r}: {str(error).splitlines()[0]}") from error
    return Topology(name, list(description.devices), math.prod(dims), HBM[family] * GIB, True)


def _generic(name: str) -> tuple[int, float | None] | None:
    """The number of devices, and the bytes of each, of CPUs or GPUs; None of TPUs."""
    if name.partition(":")[0] not in ("cpu", "gpu"):
        return None
    written = re.fullmatch(r"cpu:(\d+)|gpu:(\d+)x(\d+)GB", name)
    if not written:
        raise ValueError(f"no topology {name!r}: name one such as {NAMES}")
    count, gpus, size = written.groups()
    return (int(count), None) if count else (int(gpus), int(size) * 1e9)
