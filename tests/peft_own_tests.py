"""PEFT's own tests, with this package registered and without: no outcome may differ.

    python tests/peft_own_tests.py [--files test_config.py …] [--select EXPR] [--workers N]

Fetches the source distribution of the installed PEFT from the package index, which holds its
tests, and runs them offline, in parts; a part that is done is not run again, so that a run goes on
where it was stopped (delete FOLDER/registered after a change of this package). Tests that want a
model of the Hub fail alike in both. Ends with exit code 1 if an outcome differs. All of them take
hours on one core: `--files test_custom_models.py --select=-LoraConfig` is the larger part of what
concerns LoRA.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

TESTS = Path(__file__).resolve().parent
WAYS = ("plain", "registered")
PART = 500
"""Tests of one process; starting one takes some twenty seconds."""
NEEDED = ("parameterized", "diffusers", "importlib_metadata", "zipp")
"""What PEFT's tests import beyond our own dependencies."""
# Every test would ask the Hub for its model first, and wait for it.
OFFLINE = """

@contextmanager
def hub_online_once(model_id):
    yield
"""


@dataclass(frozen=True)
class Part:
    """Some tests in PEFT's order, run by one process in each way."""

    folder: Path
    ids: tuple[str, ...]

    @property
    def name(self) -> str:
        stem = Path(self.ids[0].partition("::")[0]).stem
        return f"{stem}-{sha256(chr(10).join(self.ids).encode()).hexdigest()[:12]}"

    def outcomes(self, way: str) -> dict[str, str]:
        """Outcome of each test; of those that a killed process never came to there is none."""
        path = self.folder / way / f"{self.name}.xml"
        return dict(_outcomes(path)) if path.is_file() else {}

    def run(self, way: str) -> None:
        target = self.folder / way / f"{self.name}.xml"
        if target.is_file():
            return
        target.parent.mkdir(exist_ok=True)
        listed = target.with_suffix(".txt")
        listed.write_text("\n".join(self.ids), encoding="utf-8")
        partial = target.with_suffix(".partial")
        registered = ["--registered"] if way == "registered" else []
        options = [f"@{listed}", f"--junitxml={partial}", "--tb=line", *registered]
        _pytest(self.folder, *options, log=target.with_suffix(".log"))
        if partial.is_file():
            partial.replace(target)


def _pytest(folder: Path, *options: str, log: Path | None = None) -> str:
    """What pytest says, in the unpacked source distribution."""
    paths = [str(TESTS.parent), str(TESTS), str(folder / "needed"), os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["-p", "support.peft_own_plugin", "-q", "-W", "ignore", *options]
    done = subprocess.run(
        command, cwd=_unpacked(folder), env=environment, capture_output=True, text=True
    )
    if log is not None:
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
    return done.stdout


def _unpacked(folder: Path) -> Path:
    return folder / f"peft-{importlib.metadata.version('peft')}"


def fetch(folder: Path) -> None:
    """Unpack the source distribution of the installed PEFT, unless it is there."""
    target = _unpacked(folder)
    if target.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "-q"]
    source = f"peft=={importlib.metadata.version('peft')}"
    download = ["download", source, "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    subprocess.run([*pip, *download], check=True)
    needed = ["install", "--no-deps", "--target", str(folder / "needed"), *NEEDED]
    subprocess.run([*pip, *needed], check=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        with tarfile.open(target.with_name(f"{target.name}.tar.gz")) as archive:
            archive.extractall(scratch, filter="data")
        tests = Path(scratch, target.name, "tests")
        (tests / "__init__.py").touch()  # The archive lacks it, and they import each other.
        with (tests / "testing_utils.py").open("a", encoding="utf-8") as file:
            file.write(OFFLINE)
        Path(scratch, target.name).rename(target)


def parts(folder: Path, files: Iterable[str], select: str | None) -> list[Part]:
    """All tests that can be collected, file by file in PEFT's order; says which files cannot."""
    options = [f"tests/{name}" for name in files] or ["tests"]
    options += [f"-k={select}"] if select else []
    said = _pytest(folder, "--collect-only", "--continue-on-collection-errors", *options)
    for line in said.splitlines():
        if line.startswith("ERROR "):
            print(f"left out: {line.removeprefix('ERROR ')}")
    ids = [line for line in said.splitlines() if line.startswith("tests/") and "::" in line]
    return [Part(folder, tuple(ids[at : at + PART])) for at in range(0, len(ids), PART)]


def _outcomes(path: Path) -> Iterator[tuple[str, str]]:
    """Each test's name with "passed", "skipped", or how it failed and the kind of its error."""
    for case in ET.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        ends = [end for end in case if end.tag in ("failure", "error", "skipped")]
        if not ends:
            yield name, "passed"
        elif ends[0].tag == "skipped":
            yield name, "skipped"
        else:
            kind = (ends[0].get("message") or "").partition(":")[0]
            yield name, f"{ends[0].tag}: {kind[:60]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--files", nargs="*", default=[], help="of PEFT's tests; all by default")
    parser.add_argument("--select", help="as pytest's -k: --select=-LoraConfig")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    scratch = Path(tempfile.gettempdir(), "peft_own_tests")
    parser.add_argument("--folder", type=Path, default=scratch, help="of all parts, done or not")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS, help="run only these now")
    options = parser.parse_args()
    folder = options.folder.resolve()
    fetch(folder)
    found = parts(folder, options.files, options.select)
    print(f"{sum(len(part.ids) for part in found)} tests in {len(found)} parts, in {folder}")
    with ThreadPoolExecutor(options.workers) as pool:
        for part in found:
            for way in options.ways:
                pool.submit(part.run, way)
    return report(found)


def report(found: list[Part]) -> int:
    """Print what differs, and the counts; 1 if anything does, or was not run in both ways."""
    counts: Counter[str] = Counter()
    different = lost = 0
    for part in found:
        plain, registered = (part.outcomes(way) for way in WAYS)
        if not plain or not registered:
            lost += len(part.ids)
            print(f"not run in both ways: {part.name}, see {part.folder}/*/{part.name}.log")
            continue
        for name in sorted(plain.keys() | registered.keys()):
            before, after = plain.get(name, "none"), registered.get(name, "none")
            counts[before.partition(":")[0]] += 1
            if before != after:
                different += 1
                print(f"{name}\n    plain:      {before}\n    registered: {after}")
    print("RESULT " + json.dumps({**counts, "different": different, "not_compared": lost}))
    return int(different + lost > 0)


if __name__ == "__main__":
    sys.exit(main())
