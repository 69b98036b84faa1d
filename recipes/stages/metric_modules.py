"""The metrics of `recipes/metrics`, through `evaluate`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parents[1] / "metrics"


@cache
def metric(name: str) -> Any:
    """`evaluate.load` of one of them, without a network.

    Raises:
        ValueError: if there is none of the name.
        ModuleNotFoundError: without the package `evaluate`.
    """
    known = sorted(script.stem for script in _FOLDER.glob("*/*.py"))
    if name not in known:
        raise ValueError(f"metric must be one of {', '.join(known)}, got {name!r}")
    try:
        import evaluate
    except ImportError:
        raise ModuleNotFoundError(
            'metrics need the package evaluate; run: pip install "peft-svdinit[evaluation]"'
        ) from None
    return evaluate.load(str(_FOLDER / name), keep_in_memory=True)
