"""The type checker that jaxtyping's import hook puts around every function of the package.

It checks the annotations that state the shape of a tensor and leaves the others to pyright: a wrong
option then gets the package's own error in tests, as it does for users, and a lazy mapping is not
read to see what it holds. In use by `--jaxtyping-packages=peft_svdinit,shape_checks.checked`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, of the parameters and results that are annotated with `Float[...]`."""
    function.__annotations__ = {
        name: hint for name, hint in function.__annotations__.items() if "Float[" in str(hint)
    }
    return beartype(function)
