"""A reader of safetensors of its own, for files that are sound."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from tests.helpers.fuzz.mutations import header_of

TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    header, data = header_of(file.read_bytes())
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], TYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries.items()
        if entry["dtype"] in TYPES
    }
