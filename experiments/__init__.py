"""Entry points: `python -m experiments.NAME`."""

import os
import sys

# XLA's CPU client asks anew for the memory of each step, hundreds of MB, and the kernel hands it out in pages of 4 kB.
# In pages of 2 MB a training step takes 6 to 30% less time (docs/performance.md). glibc reads it at the start.
if (
    sys.platform == "linux"
    and "GLIBC_TUNABLES" not in os.environ
    and sys.argv[0] == "-m"  # while Python looks for the module that is to run
    and any(name.startswith("experiments.") for name in sys.orig_argv)
):
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
