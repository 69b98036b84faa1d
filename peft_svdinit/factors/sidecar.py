"""`svdinit_config.json`, in which an adapter's folder keeps what it was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from ..files import Amount, read_json
from ..models import check_adapter_config

SIDECAR_NAME = "svdinit_config.json"
# What it says of a LoRI adapter in `config_class`.
LORI_CONFIG = "LoriConfig"
IN_MEMORY = "<factors in memory>"
"""`svd_factors` in it where there is no file to name."""
# Those of LoraConfig, of which an older sidecar may lack some.
_DEFAULTS = {"r": 8, "lora_alpha": 8}


class _Sidecar(msgspec.Struct):
    config_class: Annotated[str, msgspec.Meta(pattern=r"^(LoriConfig|SvdLoraConfig)\Z")] | None = (
        None
    )
    lori_density: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    lori_mask: str | None = None
    lori_scope: str | None = None
    lori_floor: Amount | None = None
    lori_seed: int | None = None
    lori_start: str | None = None
    svd_source: Annotated[str, msgspec.Meta(pattern=r"^(teacher|weight)\Z")] | None = None
    svd_part: Annotated[str, msgspec.Meta(pattern=r"^(principal|minor)\Z")] | None = None
    svd_factors: str | None = None
    svd_factors_revision: str | None = None
    svd_start: Annotated[str, msgspec.Meta(pattern=r"^(delta|subspace|reference)\Z")] | None = None
    svd_split: Annotated[str, msgspec.Meta(pattern=r"^(output|balanced)\Z")] | None = None
    svd_coverage: Annotated[str, msgspec.Meta(pattern=r"^(strict|partial)\Z")] | None = None
    svd_check_base: bool | None = None


def read_sidecar(path: Path, argument: str) -> dict[str, Any]:
    """The entries of an `svdinit_config.json`: the options of a LoraConfig, and ours.

    Args:
        path: the file.
        argument: by which the user gave the adapter; the messages of errors begin with it.

    Raises:
        ValueError: as `read_json` and `check_adapter_config`.
    """
    options = read_json(path, argument, _Sidecar)
    check_adapter_config({**_DEFAULTS, **options, "peft_type": "LORA"}, f"{argument}: {path}: ")
    return options
