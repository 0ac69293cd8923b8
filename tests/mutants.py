"""Single wrong lines, each of which some test must notice: applies them one at a time to a copy, and reports survivors.

    python tests/mutants.py                      # all of tests/mutants.json, two at a time; about half an hour
    python tests/mutants.py --area=training --jobs=1
    python tests/mutants.py --out=FILE           # keeps results: a stopped run resumes, changed entries are run anew

An entry of tests/mutants.json names an area, a file, the text `old` (which stands once in the file), the wrong text
`new`, and the `tests` (pytest's names) that are to notice it. A mutant is noticed where these tests fail; it survives
where they pass. Tests that fail without any change are an error, which is found first. At most 5% may survive.
Results: docs/results/mutants.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".json")
SURVIVORS = 0.05
SECONDS = 600  # a mutant may loop for ever: that is noticed too


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--area", help="only the mutants of this area")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (%(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file that keeps the results")
    options = parser.parse_args()
    mutants = [mutant for mutant in read() if options.area in (None, mutant["area"])]
    done = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    waiting = [mutant for mutant in mutants if key(mutant) not in done]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(options.jobs) as pool:
        copies = [copied(Path(folder) / str(number)) for number in range(options.jobs)]
        every_test = sorted({test for mutant in waiting for test in mutant["tests"]})
        if every_test and not passes(copies[0], every_test):
            print("these tests fail without any change", file=sys.stderr)
            return 2

        def tried(mutant: dict[str, Any]) -> tuple[str, bool]:
            copy = copies.pop()
            try:
                return key(mutant), survives(copy, mutant)
            finally:
                copies.append(copy)

        for name, survived in tqdm(pool.map(tried, waiting), total=len(waiting), unit="mutant"):
            done[name] = survived
            if options.out:
                options.out.write_text(json.dumps(done, indent=1) + "\n")
    return report(mutants, done)


def read() -> list[dict[str, Any]]:
    """The entries of tests/mutants.json."""
    return json.loads(LIST.read_text())


def key(mutant: dict[str, Any]) -> str:
    """What identifies an entry in a file of results."""
    return json.dumps([mutant[name] for name in ("file", "old", "new", "tests")])


def copied(folder: Path) -> Path:
    """A copy of the repository's files, beside a link to what its tests read."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in names.stdout.decode().splitlines():
        if (ROOT / name).is_file():
            target = folder / "copy" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    shared = Path(os.environ.get("LORA_JAX_SHARED", ROOT.parent / "shared"))
    if shared.is_dir():
        (folder / "shared").symlink_to(shared)
    return folder / "copy"


def passes(copy: Path, tests: list[str]) -> bool:
    """Whether these tests pass in a copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"CI": "true", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def survives(copy: Path, mutant: dict[str, Any]) -> bool:
    """Whether a mutant's tests pass with its wrong line."""
    file = copy / mutant["file"]
    right = file.read_text()
    file.write_text(applied(right, mutant))
    try:
        return passes(copy, mutant["tests"])
    finally:
        file.write_text(right)


def applied(text: str, mutant: dict[str, Any]) -> str:
    """The text of a mutant's file with the wrong line."""
    if text.count(mutant["old"]) != 1:
        raise ValueError(
            f"{mutant['file']}: {mutant['old']!r} stands there {text.count(mutant['old'])} times, not once"
        )
    return text.replace(mutant["old"], mutant["new"])


def report(mutants: list[dict[str, Any]], done: dict[str, bool]) -> int:
    """Prints the counts by area and the survivors; 1 where more than 5% survive."""
    survivors = [mutant for mutant in mutants if done[key(mutant)]]
    tried, survived = (Counter(mutant["area"] for mutant in some) for some in (mutants, survivors))
    for area in sorted(tried):
        print(f"{area:14}{tried[area] - survived[area]:4} of {tried[area]} noticed")
    for mutant in survivors:
        print(f"survives: {mutant['file']}: {mutant['old']!r} -> {mutant['new']!r} ({mutant['why']})")
    print(f"{'all':14}{len(mutants) - len(survivors):4} of {len(mutants)} noticed")
    return int(len(survivors) > SURVIVORS * len(mutants))


if __name__ == "__main__":
    sys.exit(main())
