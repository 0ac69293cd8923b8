"""Imports tensorboardX as where there is no torch: it would import it for nothing but a type."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
import tensorboardX  # noqa: E402, F401

del sys.modules["torch"]
