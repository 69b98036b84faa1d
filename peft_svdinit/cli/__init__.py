"""`svdinit <verb>`: work on artefacts from the command line.

The verbs reach the rooms through their faces, which load what is asked for when it is: help and
wrong options are answered without torch, transformers or PEFT.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..files import one_line, printable
from ..training import REFUSALS, as_typed
from . import (
    analyze,
    compare,
    environment,
    export,
    extract,
    mask,
    merge,
    push,
    resize,
    synthesize,
)
from .arguments import parsed

VERBS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "synthesize": (synthesize.SynthesizeOptions, synthesize.run),
    "extract": (extract.ExtractOptions, extract.run),
    "resize": (resize.ResizeOptions, resize.run),
    "merge": (merge.MergeOptions, merge.run),
    "analyze": (analyze.AnalyzeOptions, analyze.run),
    "mask": (mask.MaskOptions, mask.run),
    "export": (export.ExportOptions, export.run),
    "compare": (compare.CompareOptions, compare.run),
    "push": (push.PushOptions, push.run),
    "env": (environment.EnvironmentOptions, environment.run),
}
_CLOSING = (
    "svdinit VERB --help lists the options of a verb.",
    "Equal inputs give equal files, bit by bit, on one machine with one number of threads",
    "(OMP_NUM_THREADS); with another number the last digits of factors and of figures may differ.",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command `svdinit`; exits with 2 after one line for a wrong input.

    Whatever else goes wrong is a fault of the program and leaves its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        raise SystemExit(0 if arguments else 2)
    verb, *rest = arguments
    if verb not in VERBS:
        raise SystemExit(_failure(f"unknown verb {verb!r}; the verbs: {', '.join(VERBS)}"))
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    options_class, run = VERBS[verb]
    options = parsed(options_class, rest, prog=f"svdinit {verb}")
    try:
        run(options)
    except REFUSALS as error:
        raise SystemExit(_failure(as_typed(str(error), [options]), verb)) from error


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _failure(message: str, verb: str = "") -> int:
    name = f"svdinit {verb}".strip()
    print(f"{name}: error: {one_line(message)}", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = ["usage: svdinit VERB [--option value …] [--config FILE]", ""]
    for verb, (options_class, _) in VERBS.items():
        lines.append(f"  {verb:<11} {(options_class.__doc__ or '').strip().splitlines()[0]}")
    return "\n".join([*lines, "", *_CLOSING])
