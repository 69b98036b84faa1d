"""How the benchmarks measure: CPU seconds here, and of a process of its own with its memory."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

_WATCH = (
    "import resource, subprocess, sys\n"
    "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)\n"
    "use = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
    "print(use.ru_utime + use.ru_stime, use.ru_maxrss / 1024)\n"
    "sys.stderr.buffer.write(done.stderr[-2000:]); sys.exit(done.returncode)"
)


# All that a verb may come to load; the rooms load what is asked of them.
_IMPORTS = (
    "import peft\n"
    "from peft_svdinit import adapters, analysis, factors, masks, training\n"
    "for room in (adapters, analysis, factors, masks, training):\n"
    "    [getattr(room, name) for name in room.__all__]"
)


def options_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows `--quick`."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="end within a minute or so")
    return parser


def cpu_seconds(work: Callable[[], object], repetitions: int) -> float:
    """Median CPU time of `work` in this process."""
    spent = []
    for _ in range(repetitions):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return statistics.median(spent)


def run_child(command: list[str], *, check: bool = True) -> tuple[float, float]:
    """CPU seconds and peak resident MiB of a command on one thread (Unix only).

    Raises:
        RuntimeError: with `check`, if it fails; with what it said last.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _WATCH, *command], capture_output=True, text=True, env=environment
    )
    if done.returncode and check:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    seconds, peak = done.stdout.split()
    return float(seconds), float(peak)


def svdinit(*arguments: str) -> tuple[float, float]:
    """CPU seconds of a verb, the imports taken off, and its peak resident MiB."""
    imports, _ = run_child([sys.executable, "-c", _IMPORTS])
    command = [sys.executable, "-c", "from peft_svdinit.cli import main; main()", *arguments]
    seconds, peak = run_child(command)
    return seconds - imports, peak
