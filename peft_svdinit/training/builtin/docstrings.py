"""`builtin:stdlib-docstrings`: from a signature of the standard library to its docstring."""

from __future__ import annotations

from .stdlib import Definition, rows_of, signature

# Characters, about 80 tokens; longer signatures are mostly tables of defaults.
_LONGEST_PROMPT = 240


def stdlib_docstrings() -> list[dict[str, str]]:
    """Pairs of a signature and the first sentence of its docstring, about 4,000 of them.

    Returns:
        One dict per public function, method or class, in the order of the modules' paths and of
        the source, without a repeated prompt. `prompt` is source text up to the docstring's
        opening quotes, with the enclosing class above a method; `completion` is the docstring's
        first sentence on one line; `module` is the top-level module's name.

    Raises:
        RuntimeError: if this Python comes without the sources of its standard library.

    Cost: a few seconds on the first call of a process, for parsing about 8 MB of source.
    """
    return [dict(row) for row in rows_of(_pair)]


def _pair(definition: Definition) -> tuple[str, str] | None:
    nodes = [*definition.classes, definition.node]
    lines = [f"{'    ' * depth}{signature(node)}\n" for depth, node in enumerate(nodes)]
    prompt = f'{"".join(lines)}{"    " * len(nodes)}"""'
    return (prompt, definition.sentence) if len(prompt) <= _LONGEST_PROMPT else None
