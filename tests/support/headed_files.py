"""Files with a JSON header, edited in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def rewrite_headed(
    key: str,
    path: Path,
    tensors: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
    header: Callable[[dict[str, Any]], Any] = lambda header: None,
) -> None:
    """Edit the tensors and the fields of the header's entry `key`."""
    content = load_file(path)
    with safe_open(path, framework="pt") as opened:
        fields = json.loads(opened.metadata()[key])
    tensors(content)
    header(fields)
    save_file(content, path, {key: json.dumps(fields)})
