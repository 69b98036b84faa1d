"""The dtypes that adapters are stored in, by name."""

from __future__ import annotations

from typing import Literal, get_args

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
